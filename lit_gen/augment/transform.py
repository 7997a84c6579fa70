"""AutoAugment as a torchvision.transforms.v2 transform.

    train = v2.Compose([AutoAugment("detection_v1"), v2.ToDtype(torch.float32, scale=True)])

Images are tv_tensors.Image, uint8 tensors (C, H, W) or PIL; BoundingBoxes (of any format, rotated ones too),
Masks, and KeyPoints move along. A batch (B, C, H, W) of images gets draws per image. `BatchAugment` augments
lists of samples, as Mosaic and the like take them.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.utils._pytree import tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms import v2

from lit_gen import rng
from lit_gen.augment.layers import box_weights
from lit_gen.augment.policy import Augmentation, Policy
from lit_gen.augment.samples import Parts, holder, wrapped
from lit_gen.errors import ConfigError

__all__ = ["AutoAugment", "BatchAugment", "LabelRows", "Views"]


class AutoAugment(v2.Transform):
    """Applies a policy, drawn anew for each image, to an image or to a sample of any structure that holds
    one.

    `policy` is a shipped name, a policy file, or an `Augmentation`; `options` (fill, min_visibility, tight,
    official) go to `Policy.load`. With `drop`, boxes that left the image are removed, and with them the rows
    of the entries `per_box` of the same dict. An entry `weights` is multiplied by `layers.box_weights`, the
    share that mixup leaves of each box's image.

    Rotated boxes of an angle become the smallest rectangle around themselves where they are sheared, and
    `keep` looks at the upright box around them. Keypoints whose pixels are no longer in the image lie outside
    it, at (-1, -1) if they would not otherwise; with `tight` they are taken for polygons, (N, P, 2), one a
    box, and go where the image's map puts them.

    Randomness comes from torch's global generator, which DataLoader seeds differently in each worker, and
    from the process's rank, so that ranks seeded alike draw different numbers. For data that do not depend on
    how the work is divided, pass a keyed generator: `transform.augment(sample, keyed_generator(seed,
    "augment", epoch, index))`.
    """

    def __init__(
        self,
        policy: str | Path | Augmentation,
        *,
        drop: bool = True,
        per_box: Sequence[str] = ("labels", "masks", "area", "iscrowd", "keypoints", "weights"),
        **options: Any,
    ):
        super().__init__()
        if isinstance(policy, Augmentation) and options:
            raise ConfigError(f"Give {', '.join(options)} to the policy object itself, not to the transform.")
        self.policy = policy if isinstance(policy, Augmentation) else Policy.load(policy, **options)
        self.drop, self.per_box = drop, tuple(per_box)

    def forward(self, *inputs: Any) -> Any:
        """The inputs, augmented; a torch.Generator as the last of them is what is drawn from."""
        generator = inputs[-1] if isinstance(inputs[-1], torch.Generator) else None
        sample = inputs[:-1] if generator else inputs
        return self.augment(sample[0] if len(sample) == 1 else sample, generator)

    @property
    def needs_partner(self) -> bool:
        """Whether `augment` wants other images: the policy has SamplePairing, Mosaic, or the like."""
        return self.policy.needs_partner

    def augment(
        self,
        sample: Any,
        generator: torch.Generator | None = None,
        partner: Tensor | Sequence[Any] | None = None,
    ) -> Any:
        """The sample, augmented; with a generator the result depends on nothing else. `partner`, an image
        uint8 (C, H, W) of the same size, is what SamplePairing mixes in; Mosaic and the like take a list of
        `policy.partners` samples of the same structure, whose boxes, masks, keypoints, and entries `per_box`
        come behind the sample's own.
        """
        generator = generator or _generator()
        own = Parts(sample)
        if own.image.ndim == 4:
            return tree_unflatten(self._batch(own, generator), own.spec)
        given = _given(partner) if self.needs_partner else None
        others = [] if given is None or isinstance(given, Tensor) else [Parts(x) for x in given]
        if others:
            own.check_partners(others)
            given = [x.as_partner() for x in others]
        counts = [x.count for x in (own, *others)]
        draws = self.policy.sample(sum(counts), generator)
        shapes = own.masks, own.upright_format, given, own.points
        image, boxes, keep, *rest = self.policy.apply(own.image, own.boxes, draws, *shapes)
        masks = rest.pop(0) if own.masks is not None else None
        points = rest.pop(0) if own.points is not None else None
        out = own.put_back(others, self.policy.tight, image, boxes, masks, points)
        if own.boxes is None or not (others or (self.drop and not keep.all())):
            return out
        more = [holder(x) or {} for x in partner or ()] if others else []
        keep = keep if self.drop else torch.ones_like(keep)
        return self._selected(out, keep, more, box_weights(draws, counts) if others else None)

    def batch(
        self, images: Tensor, generators: Sequence[torch.Generator], partners: Tensor | None = None
    ) -> Tensor:
        """uint8 (B, C, H, W): `augment` of each image with its own generator, in fewer calls; `partners`, of
        the images' shape, are what SamplePairing mixes in."""
        draws = [self.policy.sample(0, g) for g in generators]
        mixed_in = _given(partners) if self.needs_partner else None
        return self.policy.apply_batch(images, None, draws, partners=mixed_in)[0]

    def _batch(self, own: Parts, generator: torch.Generator) -> list[Any]:
        if own.boxes_at or own.masks_at or own.points_at:
            raise ConfigError(
                "A batch with boxes, masks, or keypoints goes through policy.apply_batch, which takes a list "
                "of them, or as a list of samples through BatchAugment."
            )
        draws = self.policy.sample_batch(len(own.image), generator)
        own.flat[own.at] = wrapped(self.policy.apply_batch(own.image, None, draws)[0], own.flat[own.at])
        return own.flat

    def _selected(
        self, sample: Any, keep: Tensor, more: list[Mapping[str, Any]], weights: Tensor | None
    ) -> Any:
        """The sample with the rows that are kept, in the dict that holds the boxes; behind its own those of
        its partners' dicts, `more`."""
        same_type: Callable[..., Any] = type(sample)
        if isinstance(sample, Mapping) and holder(sample) is sample:
            return same_type((k, self._rows(k, x, keep, more, weights)) for k, x in sample.items())
        if isinstance(sample, Mapping):
            return same_type((k, self._selected(x, keep, more, weights)) for k, x in sample.items())
        if isinstance(sample, tv_tensors.BoundingBoxes):
            raise ConfigError(
                "A box left the image, and its label cannot be found: put BoundingBoxes and labels into one "
                "dict, or use AutoAugment(drop=False) and v2.SanitizeBoundingBoxes."
            )
        if isinstance(sample, (list, tuple)):
            return same_type(self._selected(x, keep, more, weights) for x in sample)
        return sample

    def _rows(
        self, name: str, x: Any, keep: Tensor, more: list[Mapping[str, Any]], weights: Tensor | None
    ) -> Any:
        if isinstance(x, tv_tensors.BoundingBoxes):
            return wrapped(x.as_subclass(Tensor)[keep.to(x.device)], x)
        if name not in self.per_box or not isinstance(x, (Tensor, list)):
            return x
        if missing := [other for other in more if name not in other]:
            raise ConfigError(f"{len(missing)} of the partners have no {name!r}, which the sample has.")
        if isinstance(x, list):
            x = [*x, *(v for other in more for v in other[name])]
            return [v for v, good in zip(x, keep.tolist(), strict=True) if good]
        if isinstance(x, tv_tensors.KeyPoints) and len(x) != len(keep):
            return x  # none of a box's own
        rows = x.as_subclass(Tensor)
        if not isinstance(x, tv_tensors.TVTensor):
            rows = torch.cat([rows, *(other[name].to(rows) for other in more)])
        if name == "weights" and weights is not None:
            rows = rows * weights.to(rows)
        return wrapped(rows[keep.to(x.device)], x)

    def extra_repr(self) -> str:
        return f"{type(self.policy).__name__} {getattr(self.policy, 'name', '')}".strip()


class BatchAugment(v2.Transform):
    """An `AutoAugment` of lists of samples, each of which has random samples of the list as its partners.

    `augment(samples)` gives a list, of (image, target) samples the list of images and the list of targets, so
    that it is a DataLoader's `collate_fn`; `augment(images, targets)` takes these lists apart. A
    torch.Generator as the last input is what is drawn from.
    """

    def __init__(self, policy: str | Path | Augmentation | AutoAugment, **options: Any):
        super().__init__()
        self.augment = policy if isinstance(policy, AutoAugment) else AutoAugment(policy, **options)

    def forward(self, *inputs: Any) -> Any:
        """The samples, augmented."""
        columns = [x for x in inputs if not isinstance(x, torch.Generator)]
        generator = next((x for x in inputs if isinstance(x, torch.Generator)), None) or _generator()
        samples: list[Any] = list(zip(*columns, strict=True)) if len(columns) > 1 else list(columns[0])
        places = (len(samples), self.augment.policy.partners)
        chosen = torch.randint(len(samples), places, generator=generator).tolist()
        out = []
        for sample, row in zip(samples, chosen, strict=True):
            partners = [samples[j] for j in row] if row else None
            out.append(self.augment.augment(sample, generator, partners))
        return [list(x) for x in zip(*out, strict=True)] if isinstance(samples[0], tuple) else out


class LabelRows:
    """A policy for loaders of (image, labels) as Ultralytics' are: image uint8 (H, W, C) of numpy or a tensor
    (C, H, W), labels float (N, 5) of the same kind: class, and the box's cx, cy, w, h in shares of the image.

    `partners` are `policy.partners` other pairs of the data set, for Mosaic and the like.
    """

    def __init__(self, policy: str | Path | Augmentation, **options: Any):
        self.augment = AutoAugment(policy, **options)

    def __call__(
        self,
        image: ndarray | Tensor,
        labels: ndarray | Tensor,
        partners: Sequence[tuple[Any, Any]] = (),
        generator: torch.Generator | None = None,
    ) -> tuple[Any, Any]:
        """The pair, augmented; rows of lost boxes are gone and those of partners come last."""
        others = [self._sample(*pair) for pair in partners]
        out = self.augment.augment(self._sample(image, labels), generator, others or None)
        h, w = out["image"].shape[-2:]
        boxes = out["boxes"].as_subclass(Tensor) / torch.tensor([w, h, w, h])
        rows = torch.cat([out["labels"][:, None], boxes], 1)
        rows = rows.to(torch.as_tensor(labels).dtype)
        if isinstance(image, ndarray):
            return np.ascontiguousarray(out["image"].permute(1, 2, 0).numpy()), rows.numpy()
        return out["image"], rows

    def _sample(self, image: ndarray | Tensor, labels: ndarray | Tensor) -> dict[str, Tensor]:
        pixels = torch.from_numpy(image).permute(2, 0, 1) if isinstance(image, ndarray) else image
        (h, w), rows = pixels.shape[-2:], torch.as_tensor(labels, dtype=torch.float32).reshape(-1, 5)
        kind: Any = tv_tensors.BoundingBoxes
        boxes = kind(rows[:, 1:] * torch.tensor([w, h, w, h]), format="CXCYWH", canvas_size=(h, w))
        return {"image": pixels, "boxes": boxes, "labels": rows[:, 0]}


class Views(torch.nn.Module):
    """(1 + copies, C, H, W): the image and `copies` independent augmentations of it, as AugMix's loss takes
    them."""

    def __init__(self, transform: v2.Transform, copies: int = 2):
        super().__init__()
        self.transform, self.copies = transform, copies

    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The views; a generator is handed to the transform, which must then take one (as AutoAugment)."""
        given = () if generator is None else (generator,)
        return torch.stack([image, *(self.transform(image, *given) for _ in range(self.copies))])


def _generator() -> torch.Generator:
    draw = int(torch.randint(2**63 - 1, ()))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return rng.keyed_generator(draw, torch.distributed.get_rank())
    return rng.keyed_generator(draw, *(os.environ.get(k, "0") for k in ("RANK", "NODE_RANK", "LOCAL_RANK")))


def _given(partner: Tensor | Sequence[Any] | None) -> Tensor | Sequence[Any]:
    if partner is None:
        raise ConfigError(
            "SamplePairing mixes in a second image, and Mosaic and the like take others: augment batches "
            "(B, C, H, W), or lists of samples (BatchAugment), or augment(sample, generator, partner), or "
            "leave these ops out."
        )
    return partner
