"""Ops that put other images with their boxes, masks, and points into an image: mosaic, copy-paste, mixup,
CutMix; and the random resized crop.

Boxes, masks, and points come out as those of the image and then those of its partners, in the order in which
the partners were given, whether an op took them or not: their labels are joined alike, and `keep` says which
are in the picture. Sampling is bilinear. Records hold fractions, so that they know no image size:
"partners", one for each image that the op takes, choose among a batch where nobody gave partners.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

import torch
from scipy.special import betaincinv

from lit_gen.augment.layers import Layer, fitted, hidden, joined, shown
from lit_gen.augment.ops import Batch, Op, Record, regions
from lit_gen.errors import ConfigError


@dataclass(frozen=True)
class MixOp(Op):
    """An op that takes `partners` other images, one image at a time."""

    fractions: ClassVar[int] = 0  # that `_details` draws besides

    def numbers(self, num_boxes: int) -> int:
        return 1 + self.partners + self.fractions

    def _details(self, record: Record, num_boxes: int, u: Iterator[float]) -> Record:
        chosen = [next(u) for _ in range(self.partners)]
        record |= {"partners": chosen} if chosen else {}
        return record | self.place([next(u) for _ in range(self.fractions)], record["magnitude"])

    @abstractmethod
    def place(self, u: list[float], m: float) -> Record:
        """What a record of magnitude m says besides, from `fractions` uniform numbers."""

    @abstractmethod
    def mix(self, layers: list[Layer], record: Record, fill: int) -> list[Layer]:
        """The image's layer and its partners', as they are seen in the picture, which is the first's."""

    def run(self, batch: Batch, records: Sequence[Record], fill: int) -> Batch:
        out = []
        for i, record in enumerate(records):
            partners = list(islice(batch.partners_of(i), self.partners))
            if len(partners) < self.partners:
                raise ConfigError(
                    f"{self.name} takes {self.partners} other images: give each image `policy.partners` of "
                    "them, with their boxes."
                )
            own, *others = self.mix([batch.layer(i), *(p.layer for p in partners)], record, fill)
            out.append(joined(own, partners, others))
        return batch.of_layers(out)


@dataclass(frozen=True)
class Mosaic(MixOp):
    """Four images around a random point (YOLOv4, https://arxiv.org/abs/2004.10934), which lies in the middle
    half of each side.

    All are scaled by one number between the magnitude and 1, or by as much as it takes to fill their tiles,
    and each tile shows a random window of its image.
    """

    partners: ClassVar[int] = 3
    fractions: ClassVar[int] = 11

    def place(self, u: list[float], m: float) -> Record:
        windows = [u[i : i + 2] for i in range(3, 11, 2)]
        return {"at": [0.25 + v / 2 for v in u[:2]], "scale": 1 - u[2] * (1 - m), "windows": windows}

    def mix(self, layers: list[Layer], record: Record, fill: int) -> list[Layer]:
        (h, w), canvas = layers[0].size, torch.empty_like(layers[0].image)
        x, y = (min(max(round(v * side), 1), side) for v, side in zip(record["at"], (w, h), strict=True))
        tiles = [(0, 0, x, y), (x, 0, w, y), (0, y, x, h), (x, y, w, h)]
        out = []
        for layer, tile, (u, v) in zip(layers, tiles, record["windows"], strict=True):
            (tall, wide), (x0, y0, x1, y1) = layer.size, tile
            scale = max(record["scale"] * min(w / wide, h / tall), (x1 - x0) / wide, (y1 - y0) / tall)
            width, height = (x1 - x0) / scale, (y1 - y0) / scale
            view = u * (wide - width), v * (tall - height), width, height
            out.append(shown(layer, view, tile, canvas))
        return out


@dataclass(frozen=True)
class MixUp(MixOp):
    """(1 - w) image + w partner, rounded, w from Beta(m, m) for the magnitude m, and the boxes of both
    (https://arxiv.org/abs/1710.09412, with boxes https://arxiv.org/abs/1902.04103); `box_weights` are 1 - w
    and w."""

    partners: ClassVar[int] = 1
    fractions: ClassVar[int] = 1

    def place(self, u: list[float], m: float) -> Record:
        return {"weight": _beta(m, u[0])}

    def mix(self, layers: list[Layer], record: Record, fill: int) -> list[Layer]:
        own, other = layers[0], fitted(layers[1], layers[0].size, fill)
        mixed = torch.lerp(own.image.float(), other.image.float(), record["weight"])
        return [replace(own, image=mixed.round_().to(torch.uint8)), other]


@dataclass(frozen=True)
class PasteOp(MixOp):
    """Where the `region` of the partner is, the partner is seen, elsewhere the image."""

    partners: ClassVar[int] = 1

    @abstractmethod
    def region(self, partner: Layer, record: Record) -> torch.Tensor:
        """bool (H, W)"""

    def mix(self, layers: list[Layer], record: Record, fill: int) -> list[Layer]:
        own, other = layers[0], fitted(layers[1], layers[0].size, fill)
        region = self.region(other, record)
        image = torch.where(region, other.image, own.image)
        return [hidden(replace(own, image=image), region), hidden(other, ~region)]


@dataclass(frozen=True)
class CutMix(PasteOp):
    """A rectangle of the partner (https://arxiv.org/abs/1905.04899): centered at a random pixel, of the
    image's shape, its share of the area from Beta(m, m) for the magnitude m, cut at the border."""

    fractions: ClassVar[int] = 3

    def place(self, u: list[float], m: float) -> Record:
        return {"share": _beta(m, u[0]), "at": u[1:]}

    def region(self, partner: Layer, record: Record) -> torch.Tensor:
        h, w = partner.size
        (x, y), side = record["at"], math.sqrt(record["share"]) / 2
        region = torch.zeros(h, w, dtype=torch.bool, device=partner.image.device)
        top, bottom = (min(max(round((y + d) * h), 0), h) for d in (-side, side))
        left, right = (min(max(round((x + d) * w), 0), w) for d in (-side, side))
        region[top:bottom, left:right] = True
        return region


@dataclass(frozen=True)
class CopyPaste(PasteOp):
    """Objects of the partner over the image, at their places (https://arxiv.org/abs/2012.07177): a random
    number of them up to the share `magnitude` of all, one at least, by their masks where there is one a box,
    else as the rectangles of their boxes."""

    fractions: ClassVar[int] = 2

    def place(self, u: list[float], m: float) -> Record:
        return {"count": u[0] * m, "order": int(u[1] * 2**24)}

    def region(self, partner: Layer, record: Record) -> torch.Tensor:
        h, w = partner.size
        region = torch.zeros(h, w, dtype=torch.bool, device=partner.image.device)
        there = [(j, r) for j, r in enumerate(regions(partner.boxes, h, w)) if r]
        if not there:
            return region
        order = torch.randperm(len(there), generator=torch.Generator().manual_seed(record["order"]))
        for k in order[: math.ceil(record["count"] * len(there)) or 1].tolist():
            j, (top, bottom, left, right) = there[k]
            if partner.masks is not None and partner.one_mask_a_box:
                region |= partner.masks[j] > 0
            else:
                region[top:bottom, left:right] = True
        return region


@dataclass(frozen=True)
class ResizedCrop(MixOp):
    """A random part of the image, as large as the image: from the share m of its area for the magnitude m, up
    to all, its sides' ratio that of the image times 3/4 to 4/3 (https://arxiv.org/abs/1409.4842)."""

    fractions: ClassVar[int] = 4

    def place(self, u: list[float], m: float) -> Record:
        area, ratio = m + u[0] * (1 - m), (4 / 3) ** (2 * u[1] - 1)
        width, height = (min(math.sqrt(area * r), 1) for r in (ratio, 1 / ratio))
        return {"crop": [u[2] * (1 - width), u[3] * (1 - height), width, height]}

    def mix(self, layers: list[Layer], record: Record, fill: int) -> list[Layer]:
        (layer,), (h, w) = layers, layers[0].size
        x, y, width, height = record["crop"]
        view, canvas = (x * w, y * h, width * w, height * h), torch.empty_like(layer.image)
        return [shown(layer, view, (0, 0, w, h), canvas)]


def _beta(a: float, u: float) -> float:
    """The quantile u of Beta(a, a); 0 for a = 0."""
    return float(betaincinv(a, a, u)) if a > 0 else 0.0
