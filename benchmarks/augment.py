"""Images per CPU second of AutoAugment, against a plain numpy version and torchvision, both sides in one
process on one thread.

    python benchmarks/augment.py              # all tables, about two minutes
    python benchmarks/augment.py --seconds 5  # longer slices, steadier numbers
    python benchmarks/augment.py --sides 224  # the tables of these images only

The sides take turns in short slices and the medians of their slices are compared, so that a busy machine
disturbs both alike.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lit_gen.augment import AutoAugment, Policy, RandAugment
from lit_gen.data.images import TensorImages
from lit_gen.data.keyed import KeyedDataset
from lit_gen.data.transforms import Flip

BOXES = np.array(
    [[0.1, 0.1, 0.4, 0.4], [0.3, 0.5, 0.8, 0.9], [0.6, 0.05, 0.95, 0.3], [0.2, 0.2, 0.7, 0.6]], np.float32
)


# --- The plain numpy version: detection policy v1 as one would write it down, (H, W, 3) uint8, official
# arithmetic ---


def np_blend(a, b, f):
    t = a.astype(np.float32)
    t = t + np.float32(f) * (b.astype(np.float32) - t)
    return np.clip(t, 0, 255).astype(np.uint8)


def np_equalize(image):
    out = np.empty_like(image)
    for c in range(3):
        histogram = np.bincount(image[..., c].ravel(), minlength=256)
        used = histogram[histogram > 0]
        step = (used.sum() - used[-1]) // 255
        if step == 0:
            out[..., c] = image[..., c]
            continue
        table = np.concatenate([[0], (np.cumsum(histogram)[:-1] + step // 2) // step])
        out[..., c] = np.clip(table, 0, 255).astype(np.uint8)[image[..., c]]
    return out


def np_color(image, f):
    scaled = image.astype(np.float32) * np.float32(1 / 255)
    grey = (
        scaled[..., 0] * np.float32(0.2989)
        + scaled[..., 1] * np.float32(0.587)
        + scaled[..., 2] * np.float32(0.114)
    )
    grey = (grey * np.float32(255.5)).astype(np.uint8)
    return np_blend(np.repeat(grey[..., None], 3, 2), image, f)


def np_sharpness(image, f):
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / np.float32(13)
    h, w = image.shape[:2]
    x, total = image.astype(np.float32), np.zeros((h - 2, w - 2, 3), np.float32)
    for i in range(3):
        for j in range(3):
            total += x[i : h - 2 + i, j : w - 2 + j] * kernel[i, j]
    smooth = image.copy()
    smooth[1:-1, 1:-1] = np.clip(total, 0, 255).astype(np.uint8)
    return np_blend(smooth, image, f)


def np_solarize_add(image, m):
    return np.where(image < 128, np.clip(image.astype(np.int64) + m, 0, 255), image).astype(np.uint8)


def np_cutout(image, m, at):
    h, w = image.shape[:2]
    cy, cx, out = int(at[0] * h), int(at[1] * w), image.copy()
    out[max(0, cy - m) : max(0, cy + m), max(0, cx - m) : max(0, cx + m)] = 128
    return out


def np_warp(image, t):
    h, w = image.shape[:2]
    y, x = np.mgrid[:h, :w].astype(np.float32)
    in_x, in_y = t[0] * x + t[1] * y + t[2], t[3] * x + t[4] * y + t[5]
    in_x = (np.sign(in_x) * np.floor(np.abs(in_x) + np.float32(0.5))).astype(np.int64)
    in_y = (np.sign(in_y) * np.floor(np.abs(in_y) + np.float32(0.5))).astype(np.int64)
    inside = (in_x >= 0) & (in_x < w) & (in_y >= 0) & (in_y < h)
    out = np.full_like(image, 128)
    out[inside] = image[in_y[inside], in_x[inside]]
    return out


def np_matrix(name, m, h, w):
    m, one, zero = np.float32(m), np.float32(1), np.float32(0)
    if name == "TranslateX":
        return one, zero, m, zero, one, zero
    if name == "TranslateY":
        return one, zero, zero, zero, one, m
    if name == "ShearX":
        return one, m, zero, zero, one, zero
    if name == "ShearY":
        return one, zero, zero, m, one, zero
    a = m * np.float32(np.pi / 180)
    c, s, x, y = np.cos(a), np.sin(a), np.float32(w - 1), np.float32(h - 1)
    return c, -s, (x - (c * x - s * y)) / 2, s, c, (y - (s * x + c * y)) / 2


def np_pixels(name, image, m, at):
    if name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        return np_warp(image, np_matrix(name, m, *image.shape[:2]))
    if name == "Cutout":
        return np_cutout(image, m, at)
    ops = {"Color": np_color, "Sharpness": np_sharpness, "SolarizeAdd": np_solarize_add}
    if name in ops:
        return ops[name](image, m)
    if name == "Brightness":
        return np_blend(np.zeros_like(image), image, m)
    return np_equalize(image) if name == "Equalize" else image[:, ::-1]


def np_boxes(name, boxes, m, h, w):
    out = []
    for y0, x0, y1, x1 in boxes:
        if name == "Rotate":
            ys = -np.trunc(h * (np.array([y0, y0, y1, y1]) - np.float32(0.5)))
            xs = np.trunc(w * (np.array([x0, x1, x0, x1]) - np.float32(0.5)))
            a = np.float32(m) * np.float32(np.pi / 180)
            c, s = np.cos(a), np.sin(a)
            ys, xs = np.trunc(c * ys + s * xs), np.trunc(-s * ys + c * xs)
            box = -(ys.max() / h - 0.5), xs.min() / w + 0.5, -(ys.min() / h - 0.5), xs.max() / w + 0.5
        else:
            ys, xs = np.trunc(h * np.array([y0, y0, y1, y1])), np.trunc(w * np.array([x0, x1, x0, x1]))
            if name == "ShearX":
                xs = np.trunc(-np.float32(m) * ys + xs)
            elif name == "ShearY":
                ys = np.trunc(ys - np.float32(m) * xs)
            elif name == "TranslateX":
                xs = np.clip(xs - int(m), 0, w)
            else:
                ys = np.clip(ys - int(m), 0, h)
            box = ys.min() / h, xs.min() / w, ys.max() / h, xs.max() / w
        y0, x0, y1, x1 = np.clip(np.array(box, np.float32), 0, 1)
        if y1 == y0:
            y0, y1 = min(y0, np.float32(0.95)), max(y1, np.float32(0.05))
        if x1 == x0:
            x0, x1 = min(x0, np.float32(0.95)), max(x1, np.float32(0.05))
        out.append((y0, x0, y1, x1))
    return np.array(out, np.float32)


def np_apply(image, boxes, draws):
    h, w = image.shape[:2]
    for r in draws["ops"]:
        name, m = r["op"], r.get("magnitude")
        if name.endswith("_Only_BBoxes"):
            image = image.copy()
            for k, i in enumerate(r["boxes"]):
                y0, x0, y1, x1 = (np.array([h, w, h, w], np.float32) * boxes[i]).astype(int)
                crop = image[y0 : min(y1, h - 1) + 1, x0 : min(x1, w - 1) + 1]
                crop[...] = np_pixels(name.split("_")[0], crop, m, r["at"][k] if "at" in r else None).copy()
        else:
            kind = name.removesuffix("_BBox")
            image = np_pixels(kind, image, m, r.get("at"))
            if name.endswith("_BBox"):
                boxes = np_boxes(kind, boxes, m, h, w)
    return image, boxes


# --- Measuring ---


def picture(side: int, seed: int = 0) -> torch.Tensor:
    """A smooth random picture with a little noise, uint8 (3, side, side)."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, side // 8 + 2, side // 8 + 2, generator=g)
    x = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return ((x + 0.03 * torch.randn(x.shape, generator=g)).clamp(0, 1) * 255).to(torch.uint8)[0]


def compare(title: str, sides: dict[str, Callable[[], int]], seconds: float) -> None:
    """Prints images per CPU second; every side returns how many images a call was."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(9):
        for name, side in sides.items():
            start, count = time.process_time(), 0
            while (spent := time.process_time() - start) < seconds / 9:
                count += side()
            rates[name].append(count / spent)
    medians = {name: statistics.median(r) for name, r in rates.items()}
    ours = next(iter(medians.values()))
    print(f"\n{title}")
    for name, rate in medians.items():
        print(f"  {name:44s} {rate:9.0f} images / CPU s    ours x {ours / rate:5.2f}", flush=True)


def detection(side: int, seconds: float) -> None:
    image, g = picture(side), torch.Generator().manual_seed(1)
    array, boxes = image.permute(1, 2, 0).numpy().copy(), torch.from_numpy(BOXES)
    repaired = Policy.load("detection_v1", box_format="yxyx_normalized")
    official = Policy.load("detection_v1", box_format="yxyx_normalized", official=True)
    for _ in range(40):  # the same pictures, before any clock runs
        draws = official.sample(4, g)
        a, b = official.apply(image, boxes, draws), np_apply(array, BOXES, draws)
        assert np.array_equal(a[0].permute(1, 2, 0), b[0]), draws
    turns = {name: torch.Generator().manual_seed(2) for name in ("repaired", "official", "numpy")}

    def ours(policy: Policy, name: str) -> int:
        policy.apply(image, boxes, policy.sample(4, turns[name]))
        return 1

    def theirs() -> int:
        np_apply(array, BOXES, official.sample(4, turns["numpy"]))
        return 1

    sides = {
        "lit_gen": lambda: ours(repaired, "repaired"),
        "lit_gen, official": lambda: ours(official, "official"),
        "plain numpy": theirs,
    }
    compare(f"Detection v1, 4 boxes, {side} x {side}", sides, seconds)


def classification(side: int, batch: int, seconds: float, name: str) -> None:
    images = torch.stack([picture(side, i) for i in range(batch)])
    pils = [F.to_pil_image(image) for image in images]
    if name == "RandAugment":
        ours, theirs = AutoAugment(RandAugment(2, 9)), v2.RandAugment(2, 9)
    else:
        ours = AutoAugment(f"classification_{name}")
        theirs = v2.AutoAugment(v2.AutoAugmentPolicy[name.upper()])

    def whole() -> int:
        ours(images)
        return batch

    def single(transform, items) -> int:
        for x in items:
            transform(x)
        return len(items)

    few = min(batch, 16)
    sides = {
        f"lit_gen, batch of {batch}, draws per image": whole,
        "lit_gen, one by one": lambda: single(ours, images[:few]),
        "torchvision, tensors one by one": lambda: single(theirs, images[:few]),
        "torchvision, PIL one by one": lambda: single(theirs, pils[:few]),
    }
    compare(f"Classification {name}, {side} x {side}", sides, seconds)


def in_the_data_module(side: int, batch: int, seconds: float) -> None:
    """A batch by keys, draws keyed image by image: CIFAR-10's policy at once and image by image, a flip, and
    torchvision on PIL images that are made into tensors afterwards."""
    images = torch.stack([picture(side, i) for i in range(batch)])
    pils = [F.to_pil_image(image) for image in images]
    policy = AutoAugment("classification_cifar10")
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    epoch = itertools.count()

    def module(transform: Callable) -> Callable[[], int]:
        data = KeyedDataset(TensorImages(images), transform)

        def read() -> int:
            e = next(epoch)
            data.__getitems__([(e, i) for i in range(batch)])
            return batch

        return read

    def torchvision() -> int:
        torch.stack([F.pil_to_tensor(theirs(x)) for x in pils])
        return batch

    def apply_batch() -> int:
        policy.policy.apply_batch(images, None, policy.policy.sample_batch(batch, generator))
        return batch

    generator = torch.Generator().manual_seed(0)
    sides = {
        f"in the data module, batch of {batch}": module(policy),
        "the same image by image": module(lambda image, g: policy(image, g)),
        "apply_batch alone, one generator": apply_batch,
        "torchvision, PIL to stacked tensors": torchvision,
        "flip in the data module": module(Flip()),
    }
    compare(f"Data module, cifar10 policy, {side} x {side}", sides, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds a side and table")
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 224, 512], help="of images, in pixels")
    args = parser.parse_args()
    seconds = args.seconds
    torch.set_num_threads(1)
    batches = [(side, batch) for side, batch in ((32, 128), (224, 16)) if side in args.sides]
    for side, batch in batches:
        in_the_data_module(side, batch, seconds)
    for side in sorted({224, 512} & set(args.sides)):
        detection(side, seconds)
    for side, batch in batches:
        for name in ("cifar10", "imagenet", "RandAugment"):
            classification(side, batch, seconds, name)


if __name__ == "__main__":
    main()
