"""Policies: sub-policies of (op, probability, level), drawn apart from being applied.

    policy = Policy.load("detection_v1")  # or a YAML/JSON file of your own
    draws = policy.sample(num_boxes=len(boxes), generator=g)  # plain data: log it, keep it as JSON, replay it
    image, boxes, keep = policy.apply(image, boxes, draws)
    boxes, labels = boxes[keep], labels[keep]

Contract of `apply`: image uint8 (C, H, W), C = 1 or 3; boxes (N, 4) in `box_format`; `keep` is bool (N,).
Boxes come back in their order and number, so that labels are selected by `keep`; behind them those of its
partners, if it was given any as mappings (`lit_gen.augment.mixing`):

    others = [{"image": image_2, "boxes": boxes_2}, ...]  # policy.partners of them
    draws = policy.sample(len(boxes) + sum(len(x["boxes"]) for x in others), g)
    image, boxes, keep = policy.apply(image, boxes, draws, partner=others)
    boxes, labels = boxes[keep], torch.cat([labels, *labels_of_others])[keep]
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy import ndarray
from torch import Tensor

from lit_gen.augment import boxes as box_maps
from lit_gen.augment import layers
from lit_gen.augment.ops import Batch, Op, PairOp, Record, rows_of
from lit_gen.augment.tables import DETECTION_OFFICIAL, TABLES, checked
from lit_gen.errors import ConfigError

__all__ = ["Augmentation", "Draws", "Policy", "shipped_policies"]

Draws = dict[str, Any]  # {"sub_policy": int, "ops": [record, ...]}, see ops.py
Others = Sequence[
    Mapping[str, Any]
]  # an image's partners: {"image": uint8 (C, h, w)[, "boxes", "masks", "points"]}
SHIPPED = Path(__file__).parent / "policies"
FILE_KEYS = {"ops", "sub_policies", "name", "fill", "min_visibility"}
CHUNK_BYTES = 1 << 18  # of images processed at once on a CPU: what stays in its cache


class Augmentation(ABC):
    """What samples draws and applies them; `sample` is the subclass's, the rest is here.

    `fill` is the value of uncovered pixels. A box of which less than `min_visibility` of the area is left in
    the image loses its `keep`. `official` reproduces the official detection code bit for bit, quirks
    included: boxes are then never dropped, and their native format is "yxyx_normalized" (other formats are
    converted, which rounds). `tight`: a box that moved is that of its moved mask, or of its moved polygon
    (`points` (N, P, 2)), where there is one a box, instead of the one around its own moved corners.
    """

    partners = 0  # how many other images the ops of one draw take at most (SamplePairing, `mixing`)

    def __init__(
        self,
        table: dict[str, Op],
        *,
        official: bool = False,
        fill: int = 128,
        min_visibility: float = 0.1,
        box_format: str = "xyxy",
        tight: bool = False,
    ):
        if not (isinstance(fill, int) and 0 <= fill <= 255):
            raise ConfigError(f"fill = {fill!r}: give an integer in 0..255.")
        if not 0 <= min_visibility <= 1:
            raise ConfigError(f"min_visibility = {min_visibility}: give a share in [0, 1].")
        box_format = box_maps.box_format(box_format)
        self.table, self.official, self.fill = table, official, fill
        self.min_visibility, self.box_format, self.tight = min_visibility, box_format, tight
        self._native, self._dtype = ("yxyx_normalized", np.float32) if official else ("xyxy", np.float64)

    @property
    def needs_partner(self) -> bool:
        """Whether an image can only be augmented beside others."""
        return self.partners > 0

    @abstractmethod
    def sample(self, num_boxes: int = 0, generator: torch.Generator | None = None) -> Draws:
        """The draws for one image with this many boxes."""

    def sample_batch(
        self, num_boxes: int | Sequence[int], generator: torch.Generator | None = None
    ) -> list[Draws]:
        """Draws for a batch, image by image: the number of images (without boxes), or the number of boxes of
        each.
        """
        counts = [0] * num_boxes if isinstance(num_boxes, int) else num_boxes
        return [self.sample(n, generator) for n in counts]

    def apply(
        self,
        image: Tensor,
        boxes: Tensor | None,
        draws: Draws,
        masks: Tensor | None = None,
        box_format: str | None = None,
        partner: Tensor | Others | None = None,
        points: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """(image, boxes, keep) of one image; without boxes those two are None. With masks (K, H, W): also
        the moved masks; with points: also those. `partner`, an image of the same shape, is what SamplePairing
        mixes in; ops of `mixing` take a list of mappings.
        """
        boxes_of, masks_of, points_of = ([x] if x is not None else None for x in (boxes, masks, points))
        others = partner[None] if isinstance(partner, Tensor) else None if partner is None else [partner]
        out = self.apply_batch(image[None], boxes_of, [draws], masks_of, box_format, others, points_of)
        return tuple(x if x is None else x[0] for x in out)

    def apply_batch(
        self,
        images: Tensor,
        boxes: Sequence[Tensor] | None,
        draws: Sequence[Draws],
        masks: Sequence[Tensor] | None = None,
        box_format: str | None = None,
        partners: Tensor | Sequence[Others] | None = None,
        points: Sequence[Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """uint8 (B, C, H, W), B boxes (N_i, 4) and B draws -> (images, boxes, keeps), and the masks and the
        points if there were any.

        Images are grouped by op, so that every op runs on all its images at once, each with its own
        magnitude. SamplePairing mixes in `partners`, of the images' shape, or other images of the batch. The
        ops of `mixing` take `partners[i]`, mappings, one after another; without them the images of the batch
        that `layers.in_batch(draws)` says. Points (..., 2) are x, y in indices of pixels, and come out as
        (M, 3): x, y, and whether (1 or 0) the pixel there is still in the image.
        """
        _check(images, boxes, draws, partners)
        if partners is not None and not isinstance(partners, Tensor):
            parts = {"boxes": boxes, "masks": masks, "points": points}
            layers.check_partners(images, {name for name, x in parts.items() if x is not None}, partners)
        if partners is None and self.partners and any("partners" in r for d in draws for r in d["ops"]):
            parts = {"image": images, "boxes": boxes, "masks": masks, "points": points}
            batch = [{k: x[i] for k, x in parts.items() if x is not None} for i in range(len(images))]
            partners = [[batch[j] for j in chosen] for chosen in layers.in_batch(draws)]
        box_format = box_format or self.box_format
        box_format = box_maps.box_format(box_format)
        batch, inner = self._inside(images, boxes, masks, points, partners, box_format)
        for part in range(max((len(d["ops"]) for d in draws), default=0)):
            step = {i: d["ops"][part] for i, d in enumerate(draws) if part < len(d["ops"])}
            self._run_step(batch, step, partners if isinstance(partners, Tensor) else None)
        out_boxes, keeps = None, None
        if boxes is not None and batch.boxes is not None:
            h, w = images.shape[-2:]
            if partners is not None and not isinstance(partners, Tensor):
                boxes = [
                    torch.cat([b, *(x["boxes"].to(b) for x in some)])
                    for b, some in zip(boxes, partners, strict=True)
                ]
            if self.tight:
                self._tighten(batch, inner)
            pairs = zip(batch.boxes, inner, boxes, strict=True)
            out_boxes = [self._outward(new, old, given, box_format, h, w) for new, old, given in pairs]
            shares = batch.visible or [None] * len(boxes)
            keeps = [self._keep(b, v, g.device) for b, v, g in zip(batch.boxes, shares, boxes, strict=True)]
        moved = () if masks is None else (batch.masks,)
        if batch.points is not None and points is not None:
            rows = zip(batch.points, points, strict=True)
            moved = *moved, [torch.from_numpy(p).to(given.device) for p, given in rows]
        return batch.images, out_boxes, keeps, *moved

    def _inside(
        self,
        images: Tensor,
        boxes: Sequence[Tensor] | None,
        masks: Sequence[Tensor] | None,
        points: Sequence[Tensor] | None,
        partners: Tensor | Sequence[Others] | None,
        box_format: str,
    ) -> tuple[Batch, list[ndarray]]:
        """The batch that ops work on, and its boxes as they were."""
        # A single image is replaced by each op, never written to; a batch is written to row by row, so it is
        # copied.
        own = images if len(images) == 1 else images.clone(memory_format=torch.contiguous_format)
        batch = Batch(own, masks=None if masks is None else list(masks))
        batch.points = None if points is None else [layers.points_of(p) for p in points]
        inward, (h, w) = partial(self._inward, box_format), images.shape[-2:]
        inner = None if boxes is None else [inward(b, h, w) for b in boxes]
        if partners is not None and not isinstance(partners, Tensor):
            inner, batch.masks, batch.points, batch.queues = layers.with_partners(
                inner, batch.masks, batch.points, partners, inward
            )
        if inner is None:
            return batch, []
        batch.boxes = list(inner)  # ops replace entries; `inner` stays for comparison
        if not self.official:
            batch.visible = [box_maps.usable(b, h, w).astype(np.float64) for b in inner]
        return batch, inner

    def _tighten(self, batch: Batch, inner: list[ndarray]) -> None:
        assert batch.boxes is not None and batch.visible is not None
        for i, old in enumerate(inner):
            masks = None if batch.masks is None else batch.masks[i]
            points = None if batch.points is None else batch.points[i]
            now = batch.boxes[i], old, batch.visible[i]
            batch.boxes[i], batch.visible[i] = layers.tightened(*now, masks, points)

    def draw_op(
        self, name: str, probability: float, level: float | None, num_boxes: int, u: Iterator[float]
    ) -> Record | None:
        """The record of one op, or None where it does not happen, from uniform numbers in [0, 1)."""
        op = self.table[name]
        magnitude = None if op.magnitude is None or level is None else op.magnitude(level)
        return op.draw(magnitude, probability, num_boxes, u)

    def pixel_boxes(self, boxes: Tensor, h: int, w: int) -> Tensor:
        """Boxes (N, 4) of this policy's format as float64 [x0, y0, x1, y1] in pixels."""
        return torch.from_numpy(box_maps.convert(boxes.cpu().numpy(), self.box_format, "xyxy", h, w))

    def _run_step(self, batch: Batch, step: dict[int, Record], partners: Tensor | None) -> None:
        """One op for every image that has one left."""
        if len(batch.images) == 1 and not isinstance(op := self._op(step[0]["op"]), PairOp):
            return batch.put([0], op.run(batch, [step[0]], self.fill))
        groups: dict[str, list[int]] = {}
        for i, record in step.items():
            groups.setdefault(record["op"], []).append(i)
        ops = {name: self._op(name) for name in groups}
        pairing = any(isinstance(op, PairOp) for op in ops.values())
        others = batch.images.clone() if partners is None and pairing else partners
        for name, rows in groups.items():
            for chunk in _chunks(rows, batch.images):
                records = [step[i] for i in chunk]
                part = batch.take(chunk)
                if isinstance(ops[name], PairOp) and batch.queues is not None:
                    part.partners = _next_images(batch, chunk, self.fill)
                elif isinstance(ops[name], PairOp) and others is not None:
                    places = _partners(chunk, records, len(others)) if partners is None else chunk
                    part.partners = rows_of(others, places)
                batch.put(chunk, ops[name].run(part, records, self.fill))

    def _op(self, name: str) -> Op:
        try:
            return self.table[name]
        except KeyError:
            raise ConfigError(
                f"The draws name the op {name!r}; this policy knows {', '.join(self.table)}."
            ) from None

    def _inward(self, box_format: str, boxes: Tensor, h: int, w: int) -> ndarray:
        rows = boxes.detach().cpu().numpy()
        return box_maps.convert(rows, box_format, self._native, h, w).astype(self._dtype)

    def _outward(
        self, boxes: ndarray, before: ndarray, given: Tensor, box_format: str, h: int, w: int
    ) -> Tensor:
        dtype = given.dtype if given.is_floating_point() else torch.float32
        if boxes is before:  # nothing moved: no rounding either
            return given.to(dtype)
        rows = box_maps.convert(boxes, self._native, box_format, h, w)
        return torch.from_numpy(rows).to(given.device, dtype)

    def _keep(self, boxes: ndarray, visible: ndarray | None, device: torch.device) -> Tensor:
        if visible is None:
            return torch.ones(len(boxes), dtype=torch.bool, device=device)
        return torch.from_numpy((visible > 0) & (visible >= self.min_visibility)).to(device)


def _next_images(batch: Batch, rows: list[int], fill: int) -> Tensor:
    found = [next(batch.partners_of(i), None) for i in rows]
    if None in found:
        raise ConfigError("SamplePairing takes another image: give each image `policy.partners` of them.")
    size = batch.layer(0).size
    return torch.stack([layers.fitted(x.layer, size, fill).image for x in found if x is not None])


def _check(images: Tensor, boxes: Sequence[Tensor] | None, draws: Sequence[Draws], partners: Any) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ConfigError(
            f"Augmentation takes uint8 images (C, H, W) with 1 or 3 channels, got {images.dtype} "
            f"{tuple(images.shape[1:])}; put it before the conversion to floats."
        )
    if len(draws) != len(images) or (boxes is not None and len(boxes) != len(images)):
        raise ConfigError(f"{len(images)} images need as many draws and boxes, got {len(draws)} draws.")
    if isinstance(partners, Tensor) and partners.shape != images.shape:
        raise ConfigError(
            f"SamplePairing mixes images of one size, got {tuple(images.shape[1:])} and "
            f"{tuple(partners.shape[1:])}: set data.image_size, or leave this op out."
        )
    for b in boxes or ():
        if b.ndim != 2 or b.shape[1] != 4:
            raise ConfigError(f"Boxes are (N, 4), got {tuple(b.shape)}; no boxes are (0, 4).")


def _chunks(rows: list[int], images: Tensor) -> list[list[int]]:
    if len(rows) == 1 or images.device.type != "cpu":
        return [rows]
    size = max(1, CHUNK_BYTES // math.prod(images.shape[1:]))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _partners(chunk: list[int], records: list[Record], n: int) -> list[int]:
    if n < 2:
        raise ConfigError(
            "SamplePairing needs a batch of two images at least: augment batches, or leave this op out."
        )
    return [(i + 1 + int(r["partner"] * (n - 1))) % n for i, r in zip(chunk, records, strict=True)]


class Policy(Augmentation):
    """Sub-policies of (op, probability, level); one of them, uniformly drawn, is applied to an image, its
    ops in order.

    `ops` is the table: "detection" (25 ops, levels 0..10, https://arxiv.org/abs/1906.11172) or
    "classification" (levels 0..9, https://arxiv.org/abs/1805.09501). Sub-policies may differ in length.
    Raises ConfigError, naming file, sub-policy and op.
    """

    def __init__(
        self,
        sub_policies: Sequence[Sequence[Sequence[Any]]],
        ops: str = "detection",
        *,
        name: str = "policy",
        official: bool = False,
        **options: Any,
    ):
        if official and ops != "detection":
            raise ConfigError("official=True is about the detection code; classification has no such mode.")
        self.sub_policies = checked(sub_policies, ops, name)
        self.ops, self.name = ops, name
        super().__init__(DETECTION_OFFICIAL if official else TABLES[ops], official=official, **options)
        if missing := self.names_used - self.table.keys():
            raise ConfigError(f"{name}: official=True has no {', '.join(sorted(missing))}; leave it out.")
        self.partners = max(sum(self.table[op].partners for op, _, _ in sub) for sub in self.sub_policies)

    @property
    def names_used(self) -> set[str]:
        return {name for sub in self.sub_policies for name, _, _ in sub}

    @classmethod
    def load(cls, source: str | Path, **options: Any) -> "Policy":
        """A shipped policy by name (`shipped_policies()`), or a YAML or JSON file `{ops, sub_policies: [[[op,
        p, level], ...], ...], fill, min_visibility}`, the last two optional; `options` go before the file's.
        """
        path = SHIPPED / f"{source}.yaml"
        if not path.is_file():
            path = Path(source)
        if not path.is_file():
            raise ConfigError(
                f"No policy {str(source)!r}: give a file, or one of {', '.join(shipped_policies())}."
            )
        parse = json.loads if path.suffix == ".json" else yaml.safe_load
        try:
            data = parse(path.read_text())
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not readable as {path.suffix or 'YAML'}: {error}") from None
        if not isinstance(data, dict) or not {"ops", "sub_policies"} <= data.keys() <= FILE_KEYS:
            raise ConfigError(
                f"{path}: a policy has the keys ops and sub_policies, and perhaps name, fill and "
                "min_visibility; see docs/augment.md."
            )
        options = {key: data[key] for key in ("fill", "min_visibility") if key in data} | options
        name = str(path if path.parent != SHIPPED else path.stem)
        return cls(data["sub_policies"], data["ops"], name=name, **options)

    def to_yaml(self, comment: str = "") -> str:
        """The text of a policy file, one sub-policy a line; `comment` comes first."""
        lines = [f"# {line}".rstrip() for line in comment.splitlines()]
        rows = [json.dumps([list(op) for op in sub]) for sub in self.sub_policies]
        settings = [f"fill: {self.fill}", f"min_visibility: {self.min_visibility}"]
        body = [f"ops: {self.ops}", *settings, "sub_policies:", *(f"  - {row}" for row in rows)]
        return "\n".join([*lines, *body, ""])

    def sample(self, num_boxes: int = 0, generator: torch.Generator | None = None) -> Draws:
        k = int(next(uniform(1, generator)) * len(self.sub_policies))
        return self.sample_sub_policy(k, num_boxes, generator)

    def sample_sub_policy(
        self, k: int, num_boxes: int = 0, generator: torch.Generator | None = None
    ) -> Draws:
        """The draws of sub-policy k."""
        ops = self.sub_policies[k]
        count = sum(self.table[name].numbers(num_boxes) for name, _, _ in ops)
        return {"sub_policy": k, "ops": self.draw_ops(ops, num_boxes, uniform(count, generator))}

    def draw_ops(self, ops: Sequence[tuple], num_boxes: int, u: Iterator[float]) -> list[Record]:
        """Records of the ops that happen, from uniform numbers in [0, 1)."""
        drawn = [self.draw_op(name, p, level, num_boxes, u) for name, p, level in ops]
        return [record for record in drawn if record is not None]


def uniform(count: int, generator: torch.Generator | None = None) -> Iterator[float]:
    """`count` uniform numbers in [0, 1)."""
    device = "cpu" if generator is None else generator.device
    return iter(torch.rand(count, generator=generator, device=device).tolist())


def shipped_policies() -> list[str]:
    """The names `Policy.load` knows."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))
