"""Samples of torchvision with other images: rows of labels and masks stay with their boxes, keypoints and
rotated boxes move with the pixels, lists of samples and rows of labels as loaders have them."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lit_gen import rng
from lit_gen.augment import AutoAugment, BatchAugment, LabelRows, Policy
from lit_gen.errors import ConfigError

H, W = 60, 80
MIXING = ("Mosaic", "CopyPaste", "CutMix")
ROTATED = ("XYWHR", "CXCYWHR", "XYXYXYXY")


def color(label: int) -> torch.Tensor:
    """The first two add up to 255, so that none is another mixed with black."""
    return torch.tensor([20 * label + 20, 235 - 20 * label, 90]).to(torch.uint8)


def colored(key: int) -> tuple[torch.Tensor, dict]:
    """Two rectangles of a color that no other object has, with labels, masks, and centers."""
    g = rng.keyed_generator("samples", key)
    image, boxes, masks, points = torch.zeros(3, H, W, dtype=torch.uint8), [], [], []
    for k in range(2):
        x, y = 40 * k + int(torch.randint(2, 12, (), generator=g)), int(torch.randint(2, 30, (), generator=g))
        w, h = (int(torch.randint(12, 24, (), generator=g)) for _ in range(2))
        boxes.append([x, y, x + w, y + h])
        image[:, y : y + h, x : x + w] = color(2 * key + k)[:, None, None]
        masks.append(torch.zeros(H, W, dtype=torch.bool))
        masks[-1][y : y + h, x : x + w] = True
        points.append([[x + w // 2, y + h // 2]])
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(H, W), dtype=torch.float32),
        "labels": torch.tensor([2 * key, 2 * key + 1]),
        "masks": tv_tensors.Mask(torch.stack(masks)),
        "keypoints": tv_tensors.KeyPoints(points, canvas_size=(H, W)),
        "names": [f"{key}a", f"{key}b"],
        "weights": torch.ones(2),
        "id": key,
    }
    return tv_tensors.Image(image), target


@pytest.mark.parametrize("name", MIXING)
def test_rows_of_partners_come_with_their_boxes(name):
    """The pixels of a box's label are those of its box and of its mask; its keypoint is on them."""
    transform = AutoAugment(
        Policy([[[name, 1, 6]]], fill=0), per_box=("labels", "masks", "keypoints", "names")
    )
    found = set()
    for seed in range(6):
        samples = [colored(i) for i in range(1 + transform.policy.partners)]
        image, target = transform.augment(samples[0], rng.keyed_generator(seed), samples[1:])
        assert target["id"] == 0 and target["boxes"].canvas_size == (H, W)
        assert (
            len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) == len(target["keypoints"])
        )
        assert [f"{k // 2}{'ab'[k % 2]}" for k in target["labels"].tolist()] == target["names"]
        rows = zip(*(target[k] for k in ("labels", "boxes", "masks", "keypoints")), strict=True)
        for label, box, mask, point in rows:
            pixels = (image == color(label)[:, None, None]).all(0)
            y, x = pixels.nonzero().unbind(1)
            extent = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
            assert (extent - box.as_subclass(torch.Tensor)).abs().max() <= (2 if name == "Mosaic" else 0)
            assert not (pixels & ~mask).any()
            px, py = point.as_subclass(torch.Tensor)[0].round().int().tolist()
            assert (px, py) == (-1, -1) or not (0 <= px < W and 0 <= py < H) or pixels[py, px]
            found.add((seed, int(label)))
    assert len(found) > 8 and any(label > 1 for _, label in found)


def test_mixup_multiplies_the_weights():
    transform = AutoAugment(Policy([[["MixUp", 1, 10]]]))
    samples = [colored(0), colored(1)]
    samples[1][1]["weights"] = torch.tensor([1, 0.5])
    out = transform.augment(samples[0], rng.keyed_generator(0), samples[1:])[1]
    share = float(out["weights"][2])
    assert 0 < share < 1
    torch.testing.assert_close(out["weights"], torch.tensor([1 - share, 1 - share, share, share / 2]))
    del samples[1][1]["weights"]
    with pytest.raises(ConfigError, match="'weights'"):
        transform.augment(samples[0], None, samples[1:])


class Colored(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return colored(i)


def test_lists_of_samples_and_collation():
    """The same draws for a list of samples and for lists of images and targets; each sample as by itself."""
    mosaic = BatchAugment(Policy([[["Mosaic", 1, 10]]]))
    samples = [colored(i) for i in range(4)]
    images, targets = mosaic(samples, rng.keyed_generator(3))
    again, targets_2 = mosaic(*map(list, zip(*samples, strict=True)), rng.keyed_generator(3))
    g = rng.keyed_generator(3)
    rows = torch.randint(4, (4, 3), generator=g).tolist()
    for i in range(4):
        image, target = mosaic.augment.augment(samples[i], g, [samples[j] for j in rows[i]])
        assert torch.equal(images[i], image) and torch.equal(again[i], image)
        for name in ("boxes", "labels", "masks"):
            assert torch.equal(targets[i][name], target[name]) and torch.equal(
                targets_2[i][name], target[name]
            )
    loader = DataLoader(Colored(), batch_size=3, collate_fn=BatchAugment("detection_v1"))
    assert [len(images) for images, _ in loader] == [3, 3]
    dicts = mosaic([{"image": image} | target for image, target in samples])
    assert len(dicts) == 4 and all(len(x["labels"]) == len(x["boxes"]) for x in dicts)


@pytest.mark.parametrize("box_format", ROTATED)
@pytest.mark.parametrize("flip", ["X", "Y"])
def test_rotated_boxes_flip_as_torchvisions(box_format, flip):
    corners = torch.tensor([[30.0, 10, 50, 20, 40, 40, 20, 30], [10, 10, 40, 10, 40, 20, 10, 20]]).double()
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXYXYXY", canvas_size=(H, W))
    boxes = F.convert_bounding_box_format(boxes, new_format=box_format)
    image = torch.zeros(3, H, W, dtype=torch.uint8)
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    out = AutoAugment(Policy([[[f"Flip{flip}_BBox", 1, None]]]))(image, target)[1]["boxes"]
    expected = (F.horizontal_flip if flip == "X" else F.vertical_flip)(boxes)
    assert out.format == boxes.format
    a, b = (
        F.convert_bounding_box_format(x, new_format="XYXYXYXY").reshape(-1, 4, 2) for x in (out, expected)
    )
    for p, q in zip(a.tolist(), b.tolist(), strict=True):  # which corner is the first is a matter of taste
        np.testing.assert_allclose(sorted(p), sorted(q), atol=1e-4)
    sides = a.as_subclass(torch.Tensor).diff(dim=1)  # clockwise on the screen, as they were
    assert (sides[:, 0, 0] * sides[:, 1, 1] > sides[:, 0, 1] * sides[:, 1, 0]).all()


def test_rotated_boxes_follow_the_image():
    """The painted parallelogram reaches as far as the moved corners; the format of an angle has the smallest
    rectangle around them."""
    corners = torch.tensor([[[35.0, 20], [55, 30], [50, 40], [30, 30]]])
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    inside = torch.ones(H, W, dtype=torch.bool)
    for k in range(4):
        (ax, ay), (bx, by) = corners[0, k], corners[0, (k + 1) % 4]
        inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0
    image = tv_tensors.Image(inside.to(torch.uint8).mul(255).expand(3, H, W))
    for name in ("Rotate_BBox", "ShearX_BBox", "TranslateX_BBox", "FlipX_BBox"):
        transform = AutoAugment(Policy([[[name, 1, 8 if "Flip" not in name else None]]], fill=0))
        boxes = tv_tensors.BoundingBoxes(corners.flatten(1), format="XYXYXYXY", canvas_size=(H, W))
        moved, target = transform.augment((image, {"boxes": boxes}), rng.keyed_generator(1))
        at = moved[0].nonzero().double().flip(1) + 0.5
        ends = target["boxes"].as_subclass(torch.Tensor).reshape(4, 2).double()
        for angle in torch.arange(0, torch.pi, 0.2):  # how far it reaches in any direction
            d = torch.stack([angle.cos(), angle.sin()]).double()
            assert (
                abs((at @ d).max() - (ends @ d).max()) < 1.5 and abs((at @ d).min() - (ends @ d).min()) < 1.5
            )
        boxes = F.convert_bounding_box_format(boxes, new_format="CXCYWHR")
        out = transform.augment((image, {"boxes": boxes}), rng.keyed_generator(1))[1]["boxes"]
        areas = []
        for angle in torch.linspace(0, torch.pi, 1801).double():
            d = torch.stack(
                [torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])]
            )
            areas.append(float(((ends @ d.T).amax(0) - (ends @ d.T).amin(0)).prod()))
        assert abs(float(out[0, 2] * out[0, 3]) - min(areas)) < 0.05 * min(areas) ** 0.5, name


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_rows_of_labels(kind):
    """(image, labels) of a loader: class, and the box in shares of the image, as the transform gives them."""
    pairs = []
    for i in range(4):
        image, target = colored(i)
        boxes = F.convert_bounding_box_format(target["boxes"], new_format="CXCYWH") / torch.tensor(
            [W, H, W, H]
        )
        rows = torch.cat([target["labels"][:, None].float(), boxes.as_subclass(torch.Tensor)], 1)
        image = image.as_subclass(torch.Tensor)
        pairs.append((image.permute(1, 2, 0).numpy(), rows.numpy()) if kind == "numpy" else (image, rows))
    augment = LabelRows(Policy([[["Mosaic", 1, 10]]]))
    image, rows = augment(*pairs[0], pairs[1:], rng.keyed_generator(2))
    samples = [colored(i) for i in range(4)]
    expected, target = augment.augment.augment(samples[0], rng.keyed_generator(2), samples[1:])
    assert (
        type(image) is type(pairs[0][0])
        and type(rows) is type(pairs[0][1])
        and image.shape == pairs[0][0].shape
    )
    image, rows = (torch.as_tensor(x) for x in (image, rows))
    assert torch.equal(
        image.permute(2, 0, 1) if kind == "numpy" else image, expected.as_subclass(torch.Tensor)
    )
    assert rows[:, 0].tolist() == target["labels"].tolist()
    corners = v2.functional.convert_bounding_box_format(
        rows[:, 1:] * torch.tensor([W, H, W, H]),
        tv_tensors.BoundingBoxFormat.CXCYWH,
        tv_tensors.BoundingBoxFormat.XYXY,
    )
    torch.testing.assert_close(corners, target["boxes"].as_subclass(torch.Tensor), atol=1e-3, rtol=0)


def test_polygons_and_masks_give_tighter_boxes():
    """A disk about the center under a rotation keeps its box, to the pixel, by its mask or its polygon; the
    corners of its box do not."""
    angle = torch.arange(0, 2 * torch.pi, 0.1)
    polygon = torch.stack([40 + 15 * angle.cos(), 30 + 15 * angle.sin()], 1)[None] - 0.5
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    disk = (x - 40) ** 2 + (y - 30) ** 2 <= 15**2
    boxes = tv_tensors.BoundingBoxes([[25.0, 15, 55, 45]], format="XYXY", canvas_size=(H, W))
    rotate, image = [[["Rotate_BBox", 1, 10]]], torch.zeros(3, H, W, dtype=torch.uint8)
    shapes = {
        "masks": tv_tensors.Mask(disk[None]),
        "keypoints": tv_tensors.KeyPoints(polygon, canvas_size=(H, W)),
    }
    for name, shape in shapes.items():
        out = AutoAugment(Policy(rotate, tight=True))(image, {"boxes": boxes, name: shape})[1]["boxes"]
        torch.testing.assert_close(
            out.as_subclass(torch.Tensor), boxes.as_subclass(torch.Tensor), atol=1.0, rtol=0
        )
    loose = AutoAugment(Policy(rotate))(image, {"boxes": boxes})[1]["boxes"][0]
    assert loose[2] - loose[0] > 40


def test_samples_that_cannot_be_joined_are_named():
    transform, (image, target) = AutoAugment(Policy([[["CutMix", 1, 5]]])), colored(0)
    with pytest.raises(ConfigError, match="boxes of its format"):
        transform.augment(
            (image, target), None, [(image, {k: v for k, v in target.items() if k != "keypoints"})]
        )
    target["masks"] = tv_tensors.Mask(target["masks"].any(0))
    with pytest.raises(ConfigError, match="one a box"):
        transform.augment((image, target), None, [(image, target)])
