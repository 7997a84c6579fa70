"""What a torchvision sample holds: its image, boxes, masks, and keypoints, taken out and put back."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy import ndarray
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from lit_gen.augment.boxes import BOX_FORMATS
from lit_gen.errors import ConfigError

ROTATED = ("xywhr", "cxcywhr", "xyxyxyxy")


class Parts:
    """The parts of a sample of any structure. `image` is (C, H, W) or (B, C, H, W); `boxes` (N, 4) of
    `box_format` are upright, around the corners of rotated ones; `masks` are (K, H, W); `points` (M, 2) are
    the keypoints and then the corners of rotated boxes, in indices of pixels; each None where there is none.
    """

    def __init__(self, sample: Any):
        self.flat, self.spec = tree_flatten(sample)
        self.at = _image_index(self.flat)
        self.image = _to_tensor(self.flat[self.at])
        self.boxes_at, self.masks_at, self.points_at = (
            [i for i, x in enumerate(self.flat) if isinstance(x, kind)]
            for kind in (tv_tensors.BoundingBoxes, tv_tensors.Mask, tv_tensors.KeyPoints)
        )
        for name, found in (("BoundingBoxes", self.boxes_at), ("KeyPoints", self.points_at)):
            if len(found) > 1:
                raise ConfigError(f"A sample has one {name}, got {len(found)}; concatenate them.")
        self.boxes, self.box_format, corners = None, "xyxy", None
        if self.boxes_at:
            given = self.flat[self.boxes_at[0]]
            self.boxes, self.box_format = given.as_subclass(Tensor), given.format.value.lower()
            if self.box_format in ROTATED:
                corners = _corners(self.boxes, self.box_format)
                self.boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
            elif self.box_format not in BOX_FORMATS:
                raise ConfigError(f"Boxes of format {given.format} are unknown; convert them to XYXY.")
        planes = [self.flat[i].as_subclass(Tensor) for i in self.masks_at]
        self.planes = [x.reshape(-1, *x.shape[-2:]) for x in planes]
        self.masks = torch.cat(self.planes) if planes else None
        points = [self.flat[i].as_subclass(Tensor).reshape(-1, 2) for i in self.points_at]
        self.keypoints = sum(map(len, points))
        points += [] if corners is None else [corners.reshape(-1, 2) - 0.5]
        self.points = torch.cat([x.double().cpu() for x in points]) if points else None

    @property
    def count(self) -> int:
        """How many boxes there are."""
        return 0 if self.boxes is None else len(self.boxes)

    @property
    def upright_format(self) -> str:
        return "xyxy" if self.box_format in ROTATED else self.box_format

    def as_partner(self) -> dict[str, Tensor]:
        """What `Augmentation.apply` takes as one of an image's partners."""
        parts = {"image": self.image, "boxes": self.boxes, "masks": self.masks, "points": self.points}
        return {name: x for name, x in parts.items() if x is not None}

    def put_back(self, partners: Sequence["Parts"], polygons: bool, image: Tensor, *moved: Any) -> Any:
        """The sample with what `Augmentation.apply` made of it and its partners: boxes, masks, and points.
        Keypoints whose pixels are gone lie outside the image, unless they are `polygons`."""
        boxes, masks, points = moved
        flat = list(self.flat)
        flat[self.at] = _like(image, flat[self.at])
        together = [self, *partners]
        corners = None
        if points is not None:
            parts = points.split([len(x.points) for x in together if x.points is not None])
            keypoints = torch.cat([p[: x.keypoints] for p, x in zip(parts, together, strict=True)])
            corners = torch.cat([p[x.keypoints :, :2] for p, x in zip(parts, together, strict=True)])
            if self.points_at:
                given = flat[self.points_at[0]]
                at = keypoints[:, :2]
                if not polygons:
                    h, w = image.shape[-2:]
                    inside = ((at >= -0.5) & (at < at.new_tensor([w, h]) - 0.5)).all(1)
                    at[inside & (keypoints[:, 2] == 0)] = -1
                dtype = given.dtype if given.is_floating_point() else torch.float32
                at = at.to(given.device, dtype).reshape(-1, *given.shape[1:])
                flat[self.points_at[0]] = wrapped(at, given)
        if self.boxes_at:
            given = flat[self.boxes_at[0]]
            if corners is not None and self.box_format in ROTATED:
                rows = corners.numpy().reshape(-1, 4, 2) + 0.5
                boxes = _rotated(rows, self.box_format).to(given.device, boxes.dtype)
            flat[self.boxes_at[0]] = wrapped(boxes.as_subclass(Tensor), given)
        if masks is not None:
            sizes = [len(some) for some in self.planes] if not partners else [len(masks)]
            for i, part in zip(self.masks_at, masks.split(sizes), strict=True):
                flat[i] = wrapped(part if partners else part.reshape(flat[i].shape), flat[i])
        return tree_unflatten(flat, self.spec)

    def check_partners(self, partners: Sequence["Parts"]) -> None:
        """Raises ConfigError for samples that cannot be joined."""
        for part in (self, *partners):
            if (
                part.boxes is not None
                and part.masks is not None
                and [len(part.boxes)] != [*map(len, part.planes)]
            ):
                raise ConfigError(
                    "Mosaic and the like take masks (N, H, W), one a box; or leave the masks out."
                )
            kinds = [
                (bool(x.boxes_at), x.box_format, bool(x.masks_at), bool(x.points_at)) for x in (self, part)
            ]
            if kinds[0] != kinds[1]:
                raise ConfigError(
                    "An image's partners have boxes of its format, masks, and keypoints if it has."
                )


def _corners(boxes: Tensor, box_format: str) -> Tensor:
    """(N, 4, 2): the corners, in pixels, of rotated boxes."""
    if box_format != "xyxyxyxy":
        kind = tv_tensors.BoundingBoxFormat
        boxes = F.convert_bounding_box_format(boxes.double(), kind[box_format.upper()], kind.XYXYXYXY)
    return boxes.double().reshape(-1, 4, 2)


def _rotated(corners: ndarray, box_format: str) -> Tensor:
    """Rotated boxes of moved corners (N, 4, 2), which stay in their order around the box. A parallelogram has
    itself as XYXYXYXY; in the formats of an angle the smallest rectangle around it, which has one of its
    sides."""
    (ax, ay), (bx, by) = ((corners[:, k] - corners[:, k - 1]).T for k in (1, 2))
    mirrored = ax * by - ay * bx < 0
    corners[mirrored] = corners[mirrored][:, [1, 0, 3, 2]]
    if box_format != "xyxyxyxy":
        corners = np.array([_rectangle(c) for c in corners]).reshape(-1, 4, 2)
    out = torch.from_numpy(corners.reshape(-1, 8))
    kind = tv_tensors.BoundingBoxFormat
    return F.convert_bounding_box_format(out, kind.XYXYXYXY, kind[box_format.upper()])


def _rectangle(corners: ndarray) -> ndarray:
    """The smaller of the rectangles along the first and the second side of a parallelogram (4, 2)."""
    found = []
    for k in (0, 1):
        side = corners[k + 1] - corners[k]
        x, y = side / max(float(np.hypot(*side)), 1e-12)
        axes = np.array([[x, y], [-y, x]] if k == 0 else [[y, -x], [x, y]])
        low, high = (corners @ axes.T).min(0), (corners @ axes.T).max(0)
        turned = np.array([low, [high[0], low[1]], high, [low[0], high[1]]])
        found.append(((high - low).prod(), turned @ axes))
    return found[0][1] if found[0][0] <= found[1][0] * (1 + 1e-9) else found[1][1]


def holder(sample: Any) -> Mapping[str, Any] | None:
    """The mapping in a sample that holds the boxes, if one does."""
    if isinstance(sample, Mapping):
        if any(isinstance(x, tv_tensors.BoundingBoxes) for x in sample.values()):
            return sample
        sample = list(sample.values())
    found = [holder(x) for x in sample] if isinstance(sample, (list, tuple)) else []
    return next((x for x in found if x is not None), None)


def _image_index(flat: list[Any]) -> int:
    if len(flat) == 1 and type(flat[0]) is Tensor and flat[0].ndim >= 3:
        return 0  # nothing else could be meant
    if any(isinstance(x, tv_tensors.Video) for x in flat):
        raise ConfigError("AutoAugment moves Image, BoundingBoxes, Mask, and KeyPoints; Video it does not.")
    found = [i for i, x in enumerate(flat) if isinstance(x, (tv_tensors.Image, PIL.Image.Image))]
    if not found:  # as in torchvision: a plain tensor is the image if nothing else is
        found = [
            i
            for i, x in enumerate(flat)
            if isinstance(x, Tensor) and not isinstance(x, tv_tensors.TVTensor) and x.ndim >= 3
        ]
    if len(found) != 1:
        raise ConfigError(
            f"A sample holds one image (tv_tensors.Image, PIL or a tensor (C, H, W)), found {len(found)}."
        )
    return found[0]


def _to_tensor(image: Any) -> Tensor:
    if isinstance(image, PIL.Image.Image):
        return F.pil_to_tensor(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    return image.as_subclass(Tensor)


def _like(image: Tensor, given: Any) -> Any:
    if isinstance(given, PIL.Image.Image):
        return F.to_pil_image(image)
    return wrapped(image, given)


def wrapped(x: Tensor, given: Any) -> Tensor:
    """`x` as the kind of tensor that `given` is. Of any shape."""
    if not isinstance(given, tv_tensors.TVTensor):
        return x
    return tv_tensors.wrap(x, like=given)  # pyright: ignore[reportCallIssue] (its decorator hides its arguments)
