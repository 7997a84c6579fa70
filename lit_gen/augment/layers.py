"""What moves along with an image, and the partners that ops lay beside or over it.

Boxes are float64 [x0, y0, x1, y1] in pixels as in `boxes`, points (M, 3): x, y as indices of pixels, whose
centers are whole numbers as in `tv_tensors.KeyPoints`, and 1 while the pixel there is in the image, else 0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from lit_gen.augment import boxes as box_maps
from lit_gen.errors import ConfigError

NO_BOX = -1.0  # sides of the row of a box that is not in the image yet: no op touches it
View = tuple[float, float, float, float]  # left, top, width, height of what is seen of an image, in pixels
Tile = tuple[int, int, int, int]  # left, top, right, bottom of where it is put, whole pixels


@dataclass
class Layer:
    """An image (C, H, W) with its boxes (N, 4), the share `visible` (N,) that is left of each, masks (K, H,
    W), and points (M, 3)."""

    image: Tensor
    boxes: ndarray
    visible: ndarray
    masks: Tensor | None
    points: ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.image.shape[-2], self.image.shape[-1]

    @property
    def one_mask_a_box(self) -> bool:
        return self.masks is not None and len(self.masks) == len(self.boxes)


@dataclass
class Partner:
    """Another image's layer, and where its rows lie among those of the image that it is a partner of."""

    layer: Layer
    boxes: slice
    masks: slice
    points: slice


def points_of(points: Tensor | None) -> ndarray:
    """float64 (M, 3) of points (..., 2)."""
    rows = np.zeros((0, 2)) if points is None else points.detach().cpu().numpy().reshape(-1, 2)
    return np.column_stack([rows, np.ones(len(rows))]).astype(np.float64)


def check_partners(images: Tensor, needed: set[str], partners: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Raises ConfigError for partners without what the images have, or with other kinds of images."""
    if len(partners) != len(images):
        raise ConfigError(f"{len(images)} images need as many lists of partners, got {len(partners)}.")
    for other in (x for some in partners for x in some):
        if missing := {name for name in needed | {"image"} if other.get(name) is None}:
            raise ConfigError(f"A partner has no {', '.join(sorted(missing))}, which the images have.")
        image = other["image"]
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != images.shape[1]:
            raise ConfigError(
                f"A partner's image is {image.dtype} {tuple(image.shape)}, not uint8 with the "
                f"{images.shape[1]} channels of the images."
            )


def with_partners(
    boxes: list[ndarray] | None,
    masks: list[Tensor] | None,
    points: list[ndarray] | None,
    partners: Sequence[Sequence[Mapping[str, Any]]],
    inward: Callable[[Tensor, int, int], ndarray],
) -> tuple[list[ndarray] | None, list[Tensor] | None, list[ndarray] | None, list[Iterator[Partner]]]:
    """The boxes, masks, and points of images with room for their partners' behind them, and the partners,
    which ops take one after another. A partner is {"image": uint8 (C, h, w)[, "boxes", "masks", "points"]};
    `inward(boxes, h, w)` makes pixel boxes of its own."""
    queues = []
    for i, others in enumerate(partners):
        rows, queue = [0 if x is None else len(x[i]) for x in (boxes, masks, points)], []
        for other in others:
            layer = _layer(other if boxes is not None else {**other, "boxes": None}, inward)
            own = len(layer.boxes), 0 if layer.masks is None else len(layer.masks), len(layer.points)
            queue.append(Partner(layer, *(slice(r, r + n) for r, n in zip(rows, own, strict=True))))
            rows = [r + n for r, n in zip(rows, own, strict=True)]
        if boxes is not None:
            boxes[i] = np.concatenate([boxes[i], np.full((rows[0] - len(boxes[i]), 4), NO_BOX)])
        if masks is not None:
            masks[i] = torch.cat([masks[i], masks[i].new_zeros(rows[1] - len(masks[i]), *masks[i].shape[1:])])
        if points is not None:
            points[i] = np.concatenate(
                [points[i], np.full((rows[2] - len(points[i]), 3), (NO_BOX, NO_BOX, 0))]
            )
        queues.append(iter(queue))
    return boxes, masks, points, queues


def _layer(partner: Mapping[str, Any], inward: Callable[[Tensor, int, int], ndarray]) -> Layer:
    image, boxes = partner["image"], partner.get("boxes")
    h, w = image.shape[-2:]
    rows = np.zeros((0, 4)) if boxes is None else inward(boxes, h, w)
    shares = box_maps.usable(rows, h, w).astype(np.float64)
    return Layer(image, rows, shares, partner.get("masks"), points_of(partner.get("points")))


def joined(own: Layer, partners: Sequence[Partner], moved: Sequence[Layer]) -> Layer:
    """The image's layer with the rows of its partners, which have been `moved` into it."""
    out = replace(own, boxes=own.boxes.copy(), visible=own.visible.copy(), points=own.points.copy())
    if out.masks is not None:
        out.masks = out.masks.clone()
    for partner, layer in zip(partners, moved, strict=True):
        out.boxes[partner.boxes], out.visible[partner.boxes] = layer.boxes, layer.visible
        if len(out.points):
            out.points[partner.points] = layer.points
        if out.masks is not None and layer.masks is not None:
            out.masks[partner.masks] = layer.masks
    return out


def shown(layer: Layer, view: View, tile: Tile, canvas: Tensor) -> Layer:
    """The layer of `canvas`, (C, H, W), into whose `tile` is written what is seen of the layer in `view`:
    bilinear, masks nearest; boxes are cut at the tile's sides."""
    left, top, width, height = view
    x0, y0, x1, y1 = tile
    canvas[:, y0:y1, x0:x1] = resampled(layer.image, view, y1 - y0, x1 - x0)
    masks = layer.masks
    if masks is not None:
        seen = _nearest(masks, view, y1 - y0, x1 - x0)
        masks = masks.new_zeros(len(masks), *canvas.shape[1:])
        masks[:, y0:y1, x0:x1] = seen
    scale, start = np.array([(x1 - x0) / width, (y1 - y0) / height]), np.array([left, top])
    boxes, visible = layer.boxes.copy(), np.zeros(len(layer.boxes))
    ok = box_maps.usable(boxes, *layer.size)
    wide = ((boxes[ok].reshape(-1, 2, 2) - start) * scale + (x0, y0)).reshape(-1, 4)
    cut = wide.clip((x0, y0) * 2, (x1, y1) * 2)
    areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (cut, wide)]
    boxes[ok], visible[ok] = cut, layer.visible[ok] * areas[0] / np.maximum(areas[1], 1e-12)
    points = layer.points.copy()
    points[:, :2] = (points[:, :2] + 0.5 - start) * scale + (x0, y0) - 0.5
    low, high = np.array([x0, y0]) - 0.5, np.array([x1, y1]) - 0.5
    points[:, 2] *= ((points[:, :2] >= low) & (points[:, :2] < high)).all(1)
    return Layer(canvas, boxes, visible, masks, points)


def fitted(layer: Layer, size: tuple[int, int], fill: int) -> Layer:
    """The whole layer as large as it goes into an image of `size` (H, W), at its upper left."""
    if layer.size == size:
        return layer
    (h, w), k = layer.size, min(a / b for a, b in zip(size, layer.size, strict=True))
    tile = 0, 0, min(max(round(w * k), 1), size[1]), min(max(round(h * k), 1), size[0])
    return shown(layer, (0, 0, w, h), tile, layer.image.new_full((len(layer.image), *size), fill))


def resampled(image: Tensor, view: View, h: int, w: int) -> Tensor:
    """uint8 (C, h, w): the view of (C, H, W), bilinear at pixel centers and, beyond the border, its pixels.
    Weights are 256ths, so that float32 is exact and every device gives the same bytes."""
    left, top, width, height = view
    rows, row_weights = _between(image.shape[-2], top, height, h)
    columns, column_weights = _between(image.shape[-1], left, width, w)
    first, last = int(columns[0].min()), int(columns[1].max()) + 1
    out = image[..., first:last]
    out = _mixed(out, -2, rows, row_weights[:, None])
    out = _mixed(out, -1, columns - first, column_weights)
    return out.add_(32768).mul_(1 / 65536).floor_().to(torch.uint8)


def _between(side: int, start: float, length: float, n: int) -> tuple[ndarray, ndarray]:
    """int64 (2, n): the two pixels of an axis between which n centers in [start, start + length] lie, and the
    second one's weights in 256ths."""
    at = (start + (np.arange(n) + 0.5) * (length / n) - 0.5).clip(0, side - 1)
    low = np.floor(at).astype(np.int64)
    weights = np.rint((at - low) * 256).astype(np.float32)
    return np.stack([low, np.minimum(low + 1, side - 1)]), weights


def _mixed(image: Tensor, dim: int, between: ndarray, weights: ndarray) -> Tensor:
    second = torch.from_numpy(weights).to(image.device)
    low, high = (_at(image, dim, index).float() for index in between)
    return low.mul_(256 - second).add_(high.mul_(second))


def _at(image: Tensor, dim: int, index: ndarray) -> Tensor:
    """Rows or columns; of numpy, which takes columns five times as fast as torch."""
    if image.device.type == "cpu":
        return torch.from_numpy(np.take(image.numpy(), index, axis=dim))
    return image.index_select(dim, torch.from_numpy(index).to(image.device))


def _nearest(masks: Tensor, view: View, h: int, w: int) -> Tensor:
    left, top, width, height = view
    for dim, start, length, n in ((-2, top, height, h), (-1, left, width, w)):
        at = np.floor(start + (np.arange(n) + 0.5) * (length / n)).clip(0, masks.shape[dim] - 1)
        masks = _at(masks, dim, at.astype(np.int64))
    return masks


def hidden(layer: Layer, covered: Tensor) -> Layer:
    """The layer where `covered`, bool (H, W), hides it: boxes shrink to what is left of their pixels, those
    of their masks where there is one a box; its image stays."""
    h, w = layer.size
    cover = covered.cpu().numpy()
    boxes, visible, masks = layer.boxes.copy(), layer.visible.copy(), layer.masks
    shapes = masks.cpu().numpy() if masks is not None and layer.one_mask_a_box else None
    for j in np.flatnonzero(box_maps.usable(boxes, h, w)):
        (x0, y0), (x1, y1) = np.floor(boxes[j, :2]).astype(int).clip(0), np.ceil(boxes[j, 2:]).astype(int)
        there = np.ones_like(cover[y0:y1, x0:x1])
        if shapes is not None and shapes[j].any():
            there = shapes[j, y0:y1, x0:x1] > 0
        left = there & ~cover[y0:y1, x0:x1]
        share = left.sum() / max(there.sum(), 1)
        visible[j] *= share
        if 0 < share < 1:
            rows, columns = np.flatnonzero(left.any(1)), np.flatnonzero(left.any(0))
            seen = x0 + columns[0], y0 + rows[0], x0 + columns[-1] + 1, y0 + rows[-1] + 1
            boxes[j] = *np.maximum(boxes[j, :2], seen[:2]), *np.minimum(boxes[j, 2:], seen[2:])
    if masks is not None:
        masks = masks * ~covered
    points = layer.points.copy()
    at = np.floor(points[:, :2] + 0.5).astype(int)
    inside = ((at >= 0) & (at < (w, h))).all(1)
    points[inside, 2] *= ~cover[at[inside, 1], at[inside, 0]]
    return Layer(layer.image, boxes, visible, masks, points)


def tightened(
    boxes: ndarray, before: ndarray, visible: ndarray, masks: Tensor | None, points: ndarray | None
) -> tuple[ndarray, ndarray]:
    """Boxes and visible shares: boxes that moved become those of their masks, gone where the mask is, or
    reach no further than the corners of their polygons, which lie one after another in `points`."""
    rows = np.flatnonzero((boxes != before).any(1) & (visible > 0))
    boxes, visible = boxes.copy(), visible.copy()
    if masks is not None and len(masks) == len(boxes):
        for j in rows.tolist():
            found = masks[j].nonzero().cpu().numpy()
            if len(found):
                boxes[j, [1, 0]], boxes[j, [3, 2]] = found.min(0), found.max(0) + 1
            else:
                visible[j] = 0
    elif points is not None and len(boxes) and len(points) and len(points) % len(boxes) == 0:
        corners = points[:, :2].reshape(len(boxes), -1, 2)[rows] + 0.5
        boxes[rows, :2] = np.maximum(boxes[rows, :2], corners.min(1))
        boxes[rows, 2:] = np.maximum(np.minimum(boxes[rows, 2:], corners.max(1)), boxes[rows, :2])
    elif len(boxes):
        raise ConfigError("tight=True takes boxes from masks or polygons (points): give one a box.")
    return boxes, visible


def in_batch(draws: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Which other images of the batch the draws of each take: where nobody gave it partners."""
    n, out = len(draws), []
    for i, d in enumerate(draws):
        chosen = [u for record in d["ops"] for u in _taken(record)]
        if chosen and n < 2:
            raise ConfigError(
                "Mosaic, copy-paste, mixup, and CutMix need other images: give partners, or a batch of two."
            )
        out.append([(i + 1 + int(u * (n - 1))) % n for u in chosen])
    return out


def box_weights(draws: Mapping[str, Any], counts: Sequence[int]) -> Tensor:
    """float32 (N,): how much of each box's image is in the picture under these draws, 1 but for mixup; of the
    image's own boxes and then its partners', `counts` of each (https://arxiv.org/abs/1902.04103 weights the
    boxes' losses by it)."""
    weights, partners = [1.0] + [0.0] * (len(counts) - 1), iter(range(1, len(counts)))
    for record in draws["ops"]:
        taken = [next(partners) for _ in _taken(record)]
        weights = [w * (1 - record.get("weight", 0.0)) for w in weights]
        for k in taken if "partners" in record else ():  # SamplePairing adds no boxes
            weights[k] = record.get("weight", 1.0)
    return torch.tensor(weights).repeat_interleave(torch.tensor(counts))


def _taken(record: Mapping[str, Any]) -> list[float]:
    """A number for each partner that the op of a record takes."""
    return record.get("partners") or ([record["partner"]] if "partner" in record else [])
