"""Augmentation of images with boxes: lit_gen beside albumentations, kornia and torchvision (`pip install
'lit-gen[bench]'`), each in its own layout and way, in one process on one thread.

    python benchmarks/augment_peers.py ops --side 224        # op by op, CPU us an image
    python benchmarks/augment_peers.py policies --side 512   # detection v0-v3 and RandAugment
    python benchmarks/augment_peers.py module --side 224     # batches by keys, as a data module reads them

The libraries take turns in short slices, and the medians of their slices are printed, so that a busy machine
disturbs all alike. kornia gets its images as floats, without the time of the conversion, and draws one
sub-policy for a whole batch; all others draw for each image. Of the detection policies the ops that no other
library has (`_Only_BBoxes`, BBox_Cutout, SolarizeAdd) are left out on all sides.

Each `*_op` function gives one library's op of a name, at the magnitude of RandAugment's level 9 of 30
(enhancing ops and warps: anything up to it, either sign), nearest-neighbor and filled with 128, so that all
sides do the same work. Lengths are for images of `side` pixels.
"""

import argparse
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from augment import BOXES, picture
from kornia import augmentation as K
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image

from lit_gen.augment import AutoAugment, Policy, RandAugment
from lit_gen.data.detection_module import KeyedBoxes, PolicyAugment

cv2.setNumThreads(1)
NAMES = (
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
    "Posterize", "Solarize", "AutoContrast", "Equalize", "Cutout",
)  # fmt: skip
WITHOUT_LEVEL = ("AutoContrast", "Equalize")
SHARE = 0.3  # of the highest magnitude
SHEAR, DEGREES, ENHANCE, BITS, THRESHOLD = 0.3 * SHARE, 30 * SHARE, 0.9 * SHARE, 7, 180
HALF = 0.09 * SHARE  # of the side: half a cut-out's


def albumentations_op(name: str, side: int, p: float = 1.0) -> Any:
    degrees, pixels, hole = (
        float(np.rad2deg(np.arctan(SHEAR))),
        int(150 / 331 * SHARE * side),
        int(2 * HALF * side),
    )
    around, one = (1 - ENHANCE, 1 + ENHANCE), {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1)}
    warp = {"interpolation": cv2.INTER_NEAREST, "border_mode": cv2.BORDER_CONSTANT, "fill": 128, "p": p}
    return {
        "ShearX": lambda: A.Affine(shear={"x": (-degrees, degrees), "y": (0, 0)}, **warp),
        "ShearY": lambda: A.Affine(shear={"x": (0, 0), "y": (-degrees, degrees)}, **warp),
        "TranslateX": lambda: A.Affine(translate_px={"x": (-pixels, pixels), "y": (0, 0)}, **warp),
        "TranslateY": lambda: A.Affine(translate_px={"x": (0, 0), "y": (-pixels, pixels)}, **warp),
        "Rotate": lambda: A.Rotate((-DEGREES, DEGREES), **warp),
        "Brightness": lambda: A.RandomBrightnessContrast((0, 0), (-ENHANCE, ENHANCE), p=p),  # v m
        "Color": lambda: A.ColorJitter(**(one | {"saturation": around}), hue=(0, 0), p=p),
        "Contrast": lambda: A.ColorJitter(**(one | {"contrast": around}), hue=(0, 0), p=p),
        "Sharpness": lambda: A.Sharpen(p=p),
        "Posterize": lambda: A.Posterize(BITS, p=p),
        "Solarize": lambda: A.Solarize((THRESHOLD / 255, THRESHOLD / 255), p=p),
        "AutoContrast": lambda: A.AutoContrast(p=p),
        "Equalize": lambda: A.Equalize(p=p),
        "Cutout": lambda: A.CoarseDropout((1, 1), (hole, hole), (hole, hole), fill=128, p=p),
    }[name]()


def kornia_op(name: str, side: int, p: float = 1.0) -> Any:
    degrees, share = float(np.rad2deg(np.arctan(SHEAR))), 150 / 331 * SHARE
    around, hole = (1 - ENHANCE, 1 + ENHANCE), (2 * HALF) ** 2
    return {
        "ShearX": lambda: K.RandomShear((-degrees, degrees, 0.0, 0.0), resample="nearest", p=p),
        "ShearY": lambda: K.RandomShear((0.0, 0.0, -degrees, degrees), resample="nearest", p=p),
        "TranslateX": lambda: K.RandomTranslate((-share, share), (0.0, 0.0), resample="nearest", p=p),
        "TranslateY": lambda: K.RandomTranslate((0.0, 0.0), (-share, share), resample="nearest", p=p),
        "Rotate": lambda: K.RandomRotation(DEGREES, resample="nearest", p=p),
        "Brightness": lambda: K.RandomBrightness(around, p=p),
        "Color": lambda: K.RandomSaturation(around, p=p),
        "Contrast": lambda: K.RandomContrast(around, p=p),
        "Sharpness": lambda: K.RandomSharpness(ENHANCE, p=p),
        "Posterize": lambda: K.RandomPosterize(float(BITS), p=p),
        "Solarize": lambda: K.RandomSolarize((THRESHOLD / 255, THRESHOLD / 255), p=p),
        "AutoContrast": lambda: K.RandomAutoContrast(p=p),
        "Equalize": lambda: K.RandomEqualize(p=p),
        "Cutout": lambda: K.RandomErasing((hole, hole), (1.0, 1.0), p=p),
    }[name]()


def torchvision_op(name: str, side: int, p: float = 1.0) -> Any:
    degrees, share = float(np.rad2deg(np.arctan(SHEAR))), 150 / 331 * SHARE
    around, hole = (1 - ENHANCE, 1 + ENHANCE), (2 * HALF) ** 2
    op = {
        "ShearX": lambda: v2.RandomAffine(0, shear=(-degrees, degrees, 0, 0), fill=128),
        "ShearY": lambda: v2.RandomAffine(0, shear=(0, 0, -degrees, degrees), fill=128),
        "TranslateX": lambda: v2.RandomAffine(0, translate=(share, 0), fill=128),
        "TranslateY": lambda: v2.RandomAffine(0, translate=(0, share), fill=128),
        "Rotate": lambda: v2.RandomRotation(DEGREES, fill=128),
        "Brightness": lambda: v2.ColorJitter(brightness=around),
        "Color": lambda: v2.ColorJitter(saturation=around),
        "Contrast": lambda: v2.ColorJitter(contrast=around),
        "Sharpness": lambda: v2.RandomAdjustSharpness(1 + ENHANCE, p=1),
        "Posterize": lambda: v2.RandomPosterize(BITS, p=1),
        "Solarize": lambda: v2.RandomSolarize(THRESHOLD, p=1),
        "AutoContrast": lambda: v2.RandomAutocontrast(p=1),
        "Equalize": lambda: v2.RandomEqualize(p=1),
        "Cutout": lambda: v2.RandomErasing(1, (hole, hole), (1, 1), value=128),
    }[name]()
    return op if p == 1 else v2.RandomApply([op], p)


OPS = {"albumentations": albumentations_op, "kornia": kornia_op, "torchvision": torchvision_op}


def one_of(library: str, choices: list[list[tuple[str, float]]], side: int, times: int = 1) -> Any:
    """`times` times a list of (op, probability), drawn from `choices`, with boxes, as the library says it."""
    made = [[OPS[library](name, side, p) for name, p in ops] for ops in choices]
    if library == "albumentations":
        each = [A.Sequential(ops, p=1) for ops in made]
        boxes = A.BboxParams("pascal_voc", label_fields=["labels"], min_visibility=0.1)
        return A.Compose([A.OneOf(each, p=1)] * times, bbox_params=boxes)
    if library == "kornia":
        each = [K.ImageSequential(*ops) for ops in made]
        one = [K.ImageSequential(*each, random_apply=1) for _ in range(times)]
        return K.AugmentationSequential(*one, data_keys=["input", "bbox_xyxy"])
    return v2.Compose([v2.RandomChoice([v2.Compose(ops) for ops in made]) for _ in range(times)])


def runs(
    library: str, transform: Any, images: torch.Tensor, boxes: torch.Tensor
) -> dict[str, Callable[[], int]]:
    """How a library is run on uint8 images (B, C, H, W), each with the boxes (N, 4), in its own layout;
    every side returns how many images a call was."""
    n, labels = len(images), torch.arange(len(boxes))
    if library == "albumentations":
        arrays = [np.ascontiguousarray(x.permute(1, 2, 0).numpy()) for x in images]
        return {
            library: _each(arrays, lambda x: transform(image=x, bboxes=boxes.numpy(), labels=labels.numpy()))
        }
    if library == "kornia":
        floats, many = images / 255, boxes.expand(n, -1, -1)
        return {
            library: _each(floats.split(1), lambda x: transform(x, many[:1])),
            "kornia, batch": _each([floats], lambda x: transform(x, many)),
        }
    wrapped = BoundingBoxes(boxes, format="XYXY", canvas_size=images.shape[-2:])  # pyright: ignore
    kinds = {library: [Image(x) for x in images]}
    if library == "torchvision":
        kinds["torchvision, PIL"] = [v2.functional.to_pil_image(x) for x in images]
    one = lambda x: transform({"image": x, "boxes": wrapped, "labels": labels})  # noqa: E731
    sides = {name: _each(items, one) for name, items in kinds.items()}
    if library == "lit_gen":
        policy = transform.policy
        draw = lambda x: policy.apply_batch(x, [boxes] * n, policy.sample_batch([len(boxes)] * n))  # noqa: E731
        sides["lit_gen, batch"] = _each([images], draw)
    return sides


def _each(items: Any, call: Callable[[Any], Any]) -> Callable[[], int]:
    def side() -> int:
        for x in items:
            call(x)
        return sum(len(x) if isinstance(x, torch.Tensor) and x.ndim == 4 else 1 for x in items)

    return side


def microseconds(sides: dict[str, Callable[[], int]], seconds: float) -> dict[str, float]:
    """CPU us an image of every side, medians of seven slices by turns."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(7):
        for name, side in sides.items():
            start, count = time.process_time(), 0
            while (t := time.process_time() - start) < seconds / 7:
                count += side()
            spent[name].append(t / count * 1e6)
    return {name: statistics.median(v) for name, v in spent.items()}


def row(title: str, of: dict[str, float]) -> None:
    """One line of the table: CPU us an image, the fastest other library and the ratio to it, one by one and
    in batches."""
    others = {name: v for name, v in of.items() if not name.startswith("lit_gen")}
    best = min(others, key=others.__getitem__)
    cells = "  ".join(f"{name} {v:.0f}" for name, v in of.items())
    ratios = " ".join(f"{others[best] / v:.2f}" for name, v in of.items() if name.startswith("lit_gen"))
    print(f"{title:14s} {cells}  | {best} / lit_gen {ratios}", flush=True)


def scene(side: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and the boxes that each of them has."""
    boxes = torch.from_numpy(BOXES[:, [1, 0, 3, 2]] * side)
    return torch.stack([picture(side, i) for i in range(batch)]), boxes


def ops(side: int, batch: int, seconds: float, names: list[str], libraries: list[str]) -> None:
    images, boxes = scene(side, batch)
    for name in names or NAMES:
        level = None if name in WITHOUT_LEVEL else 9 * SHARE
        ours = AutoAugment(Policy([[[name, 1.0, level]]], "classification"))
        sides = runs("lit_gen", ours, images, boxes)
        for library in libraries:
            sides |= runs(library, one_of(library, [[(name, 1.0)]], side), images, boxes)
        if name == "Cutout":
            sides.pop("torchvision, PIL", None)  # RandomErasing leaves PIL images as they are
        row(name, microseconds(sides, seconds))


def common(policy: str) -> list[list[tuple[str, float, float]]]:
    """A shipped policy's sub-policies as far as all libraries have their ops, never empty."""
    kept = [
        [
            (name.removesuffix("_BBox"), p, level)
            for name, p, level in sub
            if name.removesuffix("_BBox") in NAMES
        ]
        for sub in Policy.load(policy).sub_policies
    ]
    return [sub for sub in kept if sub]


def contestants(name: str, side: int) -> dict[str, Any]:
    """The transform of each library for a policy, or for RandAugment(2, 9): two of 14 ops, Identity left
    out."""
    if name == "RandAugment":
        choices, times, ours = [[(op, 1.0)] for op in NAMES if op != "Cutout"], 2, RandAugment(2, 9)
    else:
        subs = common(name)
        choices, times = [[(op, p) for op, p, _ in sub] for sub in subs], 1
        moved = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}
        ours = Policy([[(f"{op}_BBox" if op in moved else op, p, v) for op, p, v in sub] for sub in subs])
    return {"lit_gen": AutoAugment(ours)} | {x: one_of(x, choices, side, times) for x in OPS}


POLICIES = ("detection_v0", "detection_v1", "detection_v2", "detection_v3", "RandAugment")


def policies(side: int, batch: int, seconds: float, names: list[str], libraries: list[str]) -> None:
    images, boxes = scene(side, batch)
    for name in names or POLICIES:
        sides: dict[str, Callable[[], int]] = {}
        made = contestants(name, side)
        for library in ("lit_gen", *libraries):
            sides |= runs(library, made[library], images, boxes)
        row(name, microseconds(sides, seconds))


class Scenes:
    """A detection set in memory, as `KeyedBoxes` reads it."""

    def __init__(self, images: torch.Tensor, boxes: torch.Tensor):
        self.images, self.boxes, self.image_size = images, boxes, images.shape[-1]
        self.labels = torch.arange(len(boxes))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[i], "boxes": self.boxes.clone(), "labels": self.labels.clone()}


def module(side: int, batch: int, seconds: float, names: list[str], libraries: list[str]) -> None:
    """Batches as tensors: lit_gen's by (epoch, index) keys, the others' stacked from their images."""
    images, boxes = scene(side, batch)
    labels, epoch = torch.arange(len(boxes)), itertools.count()
    arrays = [np.ascontiguousarray(x.permute(1, 2, 0).numpy()) for x in images]
    pils = [v2.functional.to_pil_image(x) for x in images]
    wrapped = BoundingBoxes(boxes, format="XYXY", canvas_size=(side, side))  # pyright: ignore
    for name in names or POLICIES:
        made = contestants(name, side)
        data = KeyedBoxes(Scenes(images, boxes), PolicyAugment(made["lit_gen"].policy))

        def ours(data: KeyedBoxes = data) -> int:
            e = next(epoch)
            data.__getitems__([(e, i) for i in range(batch)])
            return batch

        def albumentations(transform: Any = made["albumentations"]) -> int:
            out = [transform(image=x, bboxes=boxes.numpy(), labels=labels.numpy())["image"] for x in arrays]
            torch.stack([torch.from_numpy(x).permute(2, 0, 1) for x in out]).contiguous()
            return batch

        def torchvision(transform: Any = made["torchvision"]) -> int:
            out = [transform({"image": x, "boxes": wrapped, "labels": labels})["image"] for x in pils]
            torch.stack([v2.functional.pil_to_tensor(x) for x in out])
            return batch

        others = {"albumentations": albumentations, "torchvision, PIL": torchvision}
        sides = {"lit_gen": ours} | {k: f for k, f in others.items() if k.split(",")[0] in libraries}
        row(name, microseconds(sides, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = {"ops": ops, "policies": policies, "module": module}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--side", type=int, default=224, help="of images, in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU seconds a library and row")
    parser.add_argument("--libraries", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--names", nargs="+", help="rows of the table; all of them if none is given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tables[args.table](args.side, args.batch, args.seconds, args.names, args.libraries)


if __name__ == "__main__":
    main()
