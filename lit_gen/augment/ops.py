"""The operations of AutoAugment: what a level means, what is drawn, what happens to images and boxes.

An op is drawn and run apart. `draw` turns uniform numbers into a record, a plain dict: `{"op": name,
"magnitude": m, ...}` with a signed magnitude, `"at": [u, v]` for where a cut-out lies (fractions, so that
records know no image size), `"box"` for which box (a fraction too) and `"boxes"` for the boxes an
`_Only_BBoxes` op visits, in order. `run` replays records on a batch.

Paper: https://arxiv.org/abs/1906.11172; arithmetic: tensorflow/tpu,
models/official/detection/utils/autoaugment_utils.py.
"""

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from lit_gen.augment import boxes as box_maps
from lit_gen.augment import warps
from lit_gen.augment.layers import Layer, Partner

Record = dict[str, Any]
ONLY_BOXES_DIVISOR = (
    3.0  # of the probability of `_Only_BBoxes` ops, per box (a constant of the official code)
)


@dataclass
class Batch:
    """Images of one size with what moves along: `boxes[i]` (N_i, 4), `visible[i]` (N_i,) the share left,
    `masks[i]` (K_i, H, W), `points[i]` (M_i, 3) of `layers`; `partners`, of the images' shape, are what a
    `PairOp` mixes in, `queues[i]` the images that the ops of `mixing` take next.
    """

    images: Tensor
    boxes: list[ndarray] | None = None
    visible: list[ndarray] | None = None
    masks: list[Tensor] | None = None
    partners: Tensor | None = None
    points: list[ndarray] | None = None
    queues: list[Iterator[Partner]] | None = None

    def with_images(self, images: Tensor) -> "Batch":
        """The same boxes and masks with other images."""
        return replace(self, images=images, partners=None)

    def take(self, rows: list[int]) -> "Batch":
        """The sub-batch of these rows. Ops never write to the images they are given."""
        if len(rows) == len(self.images):
            return self
        images = self.images[rows[0] : rows[0] + 1] if len(rows) == 1 else rows_of(self.images, rows)
        lists: list[Any] = [self.boxes, self.visible, self.masks, self.points, self.queues]
        boxes, visible, masks, *rest = (None if x is None else [x[i] for i in rows] for x in lists)
        return Batch(images, boxes, visible, masks, None, *rest)

    def put(self, rows: list[int], part: "Batch") -> None:
        """Puts a sub-batch back."""
        if len(rows) == len(self.images):
            self.images, self.boxes = part.images, part.boxes
            self.visible, self.masks, self.points = part.visible, part.masks, part.points
            return
        if len(rows) == 1:  # a copy, not an indexed write
            self.images[rows[0]] = part.images[0]
        elif self.images.device.type == "cpu":
            self.images.numpy()[rows] = part.images.numpy()
        else:
            self.images[rows] = part.images
        _replace(self.boxes, rows, part.boxes)
        _replace(self.visible, rows, part.visible)
        _replace(self.masks, rows, part.masks)
        _replace(self.points, rows, part.points)

    def layer(self, i: int) -> Layer:
        """Image i with all that moves along."""
        boxes = np.zeros((0, 4)) if self.boxes is None else self.boxes[i]
        visible = np.zeros(0) if self.visible is None else self.visible[i]
        masks, points = None if self.masks is None else self.masks[i], self.points
        return Layer(self.images[i], boxes, visible, masks, np.zeros((0, 3)) if points is None else points[i])

    def partners_of(self, i: int) -> Iterator[Partner]:
        """The partners of image i that no op has taken yet."""
        return iter(()) if self.queues is None else self.queues[i]

    def of_layers(self, layers: list[Layer]) -> "Batch":
        """The batch with all of these in the place of its own."""
        out = self.with_images(torch.stack([layer.image for layer in layers]))
        if self.boxes is not None:
            out.boxes, out.visible = [x.boxes for x in layers], [x.visible for x in layers]
        if self.masks is not None:
            out.masks = [x.masks for x in layers if x.masks is not None]
        if self.points is not None:
            out.points = [x.points for x in layers]
        return out


def _replace(values: list[Any] | None, rows: list[int], new: list[Any] | None) -> None:
    if values is not None and new is not None:
        for row, value in zip(rows, new, strict=True):
            values[row] = value


def rows_of(images: Tensor, rows: list[int]) -> Tensor:
    """images[rows]; numpy copies rows where torch's index goes through bytes one by one, 10 times slower.
    `images` is (N, ...)."""
    return torch.from_numpy(images.numpy()[rows]) if images.device.type == "cpu" else images[rows]


def happens(u: float, probability: float) -> bool:
    """floor(float32(u) + float32(p)) >= 1, the official coin."""
    return _float32(_float32(u) + _float32(probability)) >= 1


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


@dataclass(frozen=True)
class Op(ABC):
    """`magnitude(level)` in the op's own unit (None: the op has none); `signed`: negated with probability
    1/2.
    """

    name: str
    magnitude: Callable[[float], float] | None = None
    signed: bool = False
    partners: ClassVar[int] = 0  # how many other images it takes

    def numbers(self, num_boxes: int) -> int:
        """How many uniform numbers `draw` takes at most."""
        return 2

    def draw(
        self, magnitude: float | None, probability: float, num_boxes: int, u: Iterator[float]
    ) -> Record | None:
        """The record of one application, or None where the coin says no; `u` yields numbers in [0, 1)."""
        if not happens(next(u), probability):
            return None
        return self._details(self._signed(magnitude, u), num_boxes, u)

    def _signed(self, magnitude: float | None, u: Iterator[float]) -> Record:
        if self.signed and not happens(next(u), 0.5):
            assert magnitude is not None, f"{self.name} is signed but has no magnitude"
            magnitude = -magnitude
        return {"op": self.name} if magnitude is None else {"op": self.name, "magnitude": magnitude}

    def _details(self, record: Record, num_boxes: int, u: Iterator[float]) -> Record:
        return record

    @abstractmethod
    def run(self, batch: Batch, records: Sequence[Record], fill: int) -> Batch:
        """The batch after the op, row i by records[i]; the input stays as it is."""


@dataclass(frozen=True)
class CropOp(Op):
    """An op that also works on a part of an image."""

    @abstractmethod
    def pixels(self, images: Tensor, records: Sequence[Record], fill: int, size: tuple[int, int]) -> Tensor:
        """The images alone; lengths are relative to `size`, the (H, W) of the whole image where `images` are
        crops.
        """

    def run(self, batch: Batch, records: Sequence[Record], fill: int) -> Batch:
        h, w = batch.images.shape[-2:]
        return batch.with_images(self.pixels(batch.images, records, fill, (h, w)))


def _magnitudes(records: Sequence[Record]) -> list[float]:
    return [r.get("magnitude", 0.0) for r in records]


@dataclass(frozen=True)
class PixelOp(CropOp):
    """`apply(images, magnitudes)` of `pixels`; boxes and masks unchanged."""

    apply: Callable[[Tensor, Sequence[float]], Tensor] = field(kw_only=True)

    def pixels(self, images: Tensor, records: Sequence[Record], fill: int, size: tuple[int, int]) -> Tensor:
        return self.apply(images, _magnitudes(records))


Length = Callable[[float, int, int], float]  # (magnitude, side of the image, its longer side) -> pixels


@dataclass(frozen=True)
class WarpOp(CropOp):
    """`maps(magnitudes, H, W)` of `warps`. With `length` the magnitude is one along `axis`. `official` is
    the box arithmetic of the official code; without it boxes follow the image's map exactly."""

    maps: Callable[[Sequence[float], int, int], ndarray] = field(kw_only=True)
    length: Length | None = None
    axis: int = -1
    official: Callable[[ndarray, float, int, int], ndarray] | None = None

    def _arguments(self, records: Sequence[Record], size: tuple[int, int]) -> list[float]:
        m = _magnitudes(records)
        return m if self.length is None else [self.length(v, size[self.axis], max(size)) for v in m]

    def pixels(self, images: Tensor, records: Sequence[Record], fill: int, size: tuple[int, int]) -> Tensor:
        return warps.warp(images, self._maps(self._arguments(records, size), *images.shape[-2:]), fill)

    def _maps(self, m: Sequence[float], h: int, w: int) -> ndarray:
        """(n, 6)."""
        return _map(self.maps, m[0], h, w) if len(m) == 1 else self.maps(m, h, w)

    def run(self, batch: Batch, records: Sequence[Record], fill: int) -> Batch:
        h, w = batch.images.shape[-2:]
        m = self._arguments(records, (h, w))
        t = self._maps(m, h, w)
        out = batch.with_images(warps.warp(batch.images, t, fill))
        if batch.boxes is not None and self.official is not None:
            out.boxes = [self.official(b, v, h, w) for b, v in zip(batch.boxes, m, strict=True)]
        elif batch.boxes is not None:
            assert batch.visible is not None  # as in `Augmentation.apply_batch`
            moved = [self._move(b, row, h, w) for b, row in zip(batch.boxes, t.tolist(), strict=True)]
            out.boxes = [b for b, _ in moved]
            out.visible = [old * left for old, (_, left) in zip(batch.visible, moved, strict=True)]
        if batch.masks is not None:
            out.masks = [warps.warp(m_[None], t[i : i + 1], 0)[0] for i, m_ in enumerate(batch.masks)]
        if batch.points is not None:
            out.points = [
                box_maps.transform_points(p, row, h, w)
                for p, row in zip(batch.points, t.tolist(), strict=True)
            ]
        return out

    @staticmethod
    def _move(boxes: ndarray, t: list[float], h: int, w: int) -> tuple[ndarray, ndarray]:
        ok = box_maps.usable(boxes, h, w)  # padding rows and degenerate boxes pass through
        if ok.all():
            return box_maps.transform_boxes(boxes, t, h, w)
        moved, left = boxes.copy(), np.zeros(len(boxes))
        moved[ok], left[ok] = box_maps.transform_boxes(boxes[ok], t, h, w)
        return moved, left


@lru_cache(maxsize=256)
def _map(maps: Callable[[Sequence[float], int, int], ndarray], m: float, h: int, w: int) -> ndarray:
    """`maps([m], h, w)`: a policy has few of them."""
    return maps([m], h, w)


def _fill(image: Tensor, cy: int, cx: int, half_h: int, half_w: int, fill: int) -> None:
    """In place; (C, H, W). Rows cy - half .. cy + half - 1 as far as they are in the image, columns alike."""
    image[:, max(0, cy - half_h) : max(0, cy + half_h), max(0, cx - half_w) : max(0, cx + half_w)] = fill


@dataclass(frozen=True)
class CutoutOp(CropOp):
    """A square of side twice the magnitude around a random pixel."""

    length: Length = field(kw_only=True)

    def numbers(self, num_boxes: int) -> int:
        return 4

    def _details(self, record: Record, num_boxes: int, u: Iterator[float]) -> Record:
        return record | {"at": [next(u), next(u)]}

    def pixels(self, images: Tensor, records: Sequence[Record], fill: int, size: tuple[int, int]) -> Tensor:
        out = images.clone()
        h, w = images.shape[-2:]
        for image, r in zip(out, records, strict=True):
            half = int(self.length(r["magnitude"], max(size), max(size)))
            _fill(image, int(r["at"][0] * h), int(r["at"][1] * w), half, half, fill)
        return out


Region = tuple[int, int, int, int]  # top, bottom, left, right; bottom and right excluded


@dataclass(frozen=True)
class BoxCutoutOp(Op):
    """A rectangle of `magnitude` times one box's size, centered in the box. `regions(boxes, H, W)` gives a
    Region or None a box.
    """

    regions: Callable[[ndarray, int, int], list[Region | None]] = field(kw_only=True)
    all_rows: bool = False  # official: the box is chosen among all rows

    def numbers(self, num_boxes: int) -> int:
        return 5

    def draw(
        self, magnitude: float | None, probability: float, num_boxes: int, u: Iterator[float]
    ) -> Record | None:
        if num_boxes:
            return super().draw(magnitude, probability, num_boxes, u)
        next(u)  # the coin is tossed all the same: what later ops draw does not depend on the boxes
        return None

    def _details(self, record: Record, num_boxes: int, u: Iterator[float]) -> Record:
        return record | {"box": next(u), "at": [next(u), next(u)]}

    def run(self, batch: Batch, records: Sequence[Record], fill: int) -> Batch:
        if batch.boxes is None:
            return batch
        out = batch.images.clone()
        for image, boxes, r in zip(out, batch.boxes, records, strict=True):
            regions = self.regions(boxes, *image.shape[-2:])
            if not self.all_rows:
                regions = [region for region in regions if region]
            region = regions[int(r["box"] * len(regions))] if regions else None
            if region:
                (top, bottom, left, right), (u, v), m = region, r["at"], r["magnitude"]
                halves = int(m * ((bottom - top) / 2)), int(m * ((right - left) / 2))
                _fill(image, top + int(u * (bottom - top)), left + int(v * (right - left)), *halves, fill)
        return batch.with_images(out)


@dataclass(frozen=True)
class OnlyBoxesOp(Op):
    """An op on the content of each box by itself, with a third of the probability a box; the boxes stay."""

    inner: CropOp = field(kw_only=True)
    regions: Callable[[ndarray, int, int], list[Region | None]] = field(kw_only=True)

    def numbers(self, num_boxes: int) -> int:
        return 1 + num_boxes * (2 + self.inner.numbers(0))

    def draw(
        self, magnitude: float | None, probability: float, num_boxes: int, u: Iterator[float]
    ) -> Record | None:
        record = self._signed(magnitude, u)
        keys = [next(u) for _ in range(num_boxes)]
        order = sorted(range(num_boxes), key=keys.__getitem__)
        hit = [i for i in order if happens(next(u), probability / ONLY_BOXES_DIVISOR)]
        if not hit:
            return None
        details = [self.inner._details({}, 0, u) for _ in hit]
        return record | {"boxes": hit} | {key: [d[key] for d in details] for key in details[0]}

    def run(self, batch: Batch, records: Sequence[Record], fill: int) -> Batch:
        if batch.boxes is None:
            return batch
        out = batch.images.clone()
        h, w = out.shape[-2:]
        for image, boxes, r in zip(out, batch.boxes, records, strict=True):
            regions = self.regions(boxes, h, w)
            for k, i in enumerate(r["boxes"]):
                if region := regions[i]:
                    top, bottom, left, right = region
                    crop = image[None, :, top:bottom, left:right]
                    step = r | ({"at": r["at"][k]} if "at" in r else {})
                    image[:, top:bottom, left:right] = self.inner.pixels(crop, [step], fill, (h, w))[0]
        return batch.with_images(out)


@dataclass(frozen=True)
class PairOp(Op):
    """Mixes in a random other image of the batch with weight `magnitude` (SamplePairing,
    https://arxiv.org/abs/1801.02929).
    """

    partners: ClassVar[int] = 1

    def numbers(self, num_boxes: int) -> int:
        return 3

    def _details(self, record: Record, num_boxes: int, u: Iterator[float]) -> Record:
        return record | {"partner": next(u)}

    def run(self, batch: Batch, records: Sequence[Record], fill: int) -> Batch:
        """(1 - m) image + m partner, rounded; the labels stay, as in the paper."""
        assert batch.partners is not None  # as in `Augmentation._run_step`
        m = torch.tensor(_magnitudes(records), device=batch.images.device).view(-1, 1, 1, 1)
        mixed = torch.lerp(batch.images.float(), batch.partners.float(), m)
        return batch.with_images(mixed.round_().to(torch.uint8))


def regions(boxes: ndarray, h: int, w: int) -> list[Region | None]:
    """The pixels that pixel boxes touch; None for a box that is not `usable`."""
    ok = box_maps.usable(boxes, h, w).tolist()
    return [_region(row, h, w) if good else None for row, good in zip(boxes.tolist(), ok, strict=True)]


def _region(row: list[float], h: int, w: int) -> Region:
    x0, y0, x1, y1 = row
    return max(0, math.floor(y0)), min(h, math.ceil(y1)), max(0, math.floor(x0)), min(w, math.ceil(x1))


def regions_official(boxes: ndarray, h: int, w: int, clip: bool = True) -> list[Region | None]:
    """trunc(H y0) .. trunc(H y1) inclusive of official boxes, with `clip` clipped to the image; None where
    the official code stops with an error. BBox_Cutout does not clip: its center may lie one pixel below or
    right of the image.
    """
    size = np.array([h, w, h, w], np.float32)
    rows = np.trunc(np.where(np.isfinite(boxes), boxes * size, -1)).astype(np.int64).tolist()
    out: list[Region | None] = []
    for top, left, bottom, right in rows:
        if clip:
            bottom, right = min(bottom, h - 1), min(right, w - 1)
        out.append((top, bottom + 1, left, right + 1) if 0 <= top <= bottom and 0 <= left <= right else None)
    return out
