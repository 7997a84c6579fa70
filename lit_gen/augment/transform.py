"""AutoAugment as a torchvision.transforms.v2 transform.

    train = v2.Compose([AutoAugment("detection_v1"), v2.ToDtype(torch.float32, scale=True)])

Images are tv_tensors.Image, uint8 tensors (C, H, W) or PIL; BoundingBoxes (any upright format) and Masks move
along. A batch (B, C, H, W) of images gets draws per image.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lit_gen import rng
from lit_gen.augment.boxes import BOX_FORMATS
from lit_gen.augment.policy import Augmentation, Policy
from lit_gen.errors import ConfigError

__all__ = ["AutoAugment", "Views"]


class AutoAugment(v2.Transform):
    """Applies a policy, drawn anew for each image, to an image or to a sample of any structure that holds
    one.

    `policy` is a shipped name, a policy file, or an `Augmentation`; `options` (fill, min_visibility,
    official) go to `Policy.load`. With `drop`, boxes that left the image are removed, and with them the rows
    of the entries `per_box` of the same dict.

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
        per_box: Sequence[str] = ("labels", "masks", "area", "iscrowd"),
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
        """Whether `augment` wants a second image: the policy has SamplePairing."""
        return self.policy.needs_partner

    def augment(
        self, sample: Any, generator: torch.Generator | None = None, partner: Tensor | None = None
    ) -> Any:
        """The sample, augmented; with a generator the result depends on nothing else. `partner`, an image
        uint8 (C, H, W) of the same size, is what SamplePairing mixes in.
        """
        generator = generator or _generator()
        flat, spec = tree_flatten(sample)
        at = _image_index(flat)
        image = _to_tensor(flat[at])
        if image.ndim == 4:
            return tree_unflatten(self._batch(flat, at, image, generator), spec)
        boxes_at = [i for i, x in enumerate(flat) if isinstance(x, tv_tensors.BoundingBoxes)]
        masks_at = [i for i, x in enumerate(flat) if isinstance(x, tv_tensors.Mask)]
        if len(boxes_at) > 1:
            raise ConfigError(f"A sample has one BoundingBoxes, got {len(boxes_at)}; concatenate them.")
        boxes, box_format = _boxes(flat[boxes_at[0]]) if boxes_at else (None, None)
        planes = [flat[i].as_subclass(Tensor).reshape(-1, *flat[i].shape[-2:]) for i in masks_at]
        masks = torch.cat(planes) if planes else None
        draws = self.policy.sample(0 if boxes is None else len(boxes), generator)
        mixed_in = _given(partner) if self.needs_partner else None
        out = self.policy.apply(image, boxes, draws, masks, box_format, mixed_in)
        image, moved, keep, *masks_out = out
        flat[at] = _like(image, flat[at])
        if boxes_at:
            flat[boxes_at[0]] = _wrapped(moved.as_subclass(Tensor), flat[boxes_at[0]])
        if masks_at:
            for i, part in zip(masks_at, masks_out[0].split([len(some) for some in planes]), strict=True):
                flat[i] = _wrapped(part.reshape(flat[i].shape), flat[i])
        out = tree_unflatten(flat, spec)
        return self._dropped(out, keep) if boxes_at and self.drop and not keep.all() else out

    def batch(
        self, images: Tensor, generators: Sequence[torch.Generator], partners: Tensor | None = None
    ) -> Tensor:
        """uint8 (B, C, H, W): `augment` of each image with its own generator, in fewer calls; `partners`, of
        the images' shape, are what SamplePairing mixes in."""
        draws = [self.policy.sample(0, g) for g in generators]
        mixed_in = _given(partners) if self.needs_partner else None
        return self.policy.apply_batch(images, None, draws, partners=mixed_in)[0]

    def _batch(self, flat: list[Any], at: int, images: Tensor, generator: torch.Generator) -> list[Any]:
        if any(isinstance(x, (tv_tensors.BoundingBoxes, tv_tensors.Mask)) for x in flat):
            raise ConfigError(
                "A batch with boxes or masks goes through policy.apply_batch, which takes a list of them."
            )
        draws = self.policy.sample_batch(len(images), generator)
        flat[at] = _like(self.policy.apply_batch(images, None, draws)[0], flat[at])
        return flat

    def _dropped(self, sample: Any, keep: Tensor) -> Any:
        """The sample without the rows that are not kept, in the dict that holds the boxes."""
        same_type: Callable[..., Any] = type(sample)
        if isinstance(sample, Mapping) and any(
            isinstance(x, tv_tensors.BoundingBoxes) for x in sample.values()
        ):
            return same_type((k, self._rows(k, x, keep)) for k, x in sample.items())
        if isinstance(sample, Mapping):
            return same_type((k, self._dropped(x, keep)) for k, x in sample.items())
        if isinstance(sample, tv_tensors.BoundingBoxes):
            raise ConfigError(
                "A box left the image, and its label cannot be found: put BoundingBoxes and labels into one "
                "dict, or use AutoAugment(drop=False) and v2.SanitizeBoundingBoxes."
            )
        if isinstance(sample, (list, tuple)):
            return same_type(self._dropped(x, keep) for x in sample)
        return sample

    def _rows(self, name: str, x: Any, keep: Tensor) -> Any:
        if isinstance(x, tv_tensors.BoundingBoxes) or (name in self.per_box and isinstance(x, Tensor)):
            rows = x.as_subclass(Tensor)[keep.to(x.device)]
            return _wrapped(rows, x)
        if name in self.per_box and isinstance(x, list):
            return [v for v, good in zip(x, keep.tolist(), strict=True) if good]
        return x

    def extra_repr(self) -> str:
        return f"{type(self.policy).__name__} {getattr(self.policy, 'name', '')}".strip()


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


def _given(partner: Tensor | None) -> Tensor:
    if partner is None:
        raise ConfigError(
            "SamplePairing mixes in a second image: augment batches (B, C, H, W), or augment(sample, "
            "generator, partner), or leave this op out of the policy."
        )
    return partner


def _image_index(flat: list[Any]) -> int:
    if len(flat) == 1 and type(flat[0]) is Tensor and flat[0].ndim >= 3:
        return 0  # nothing else could be meant
    if any(isinstance(x, (tv_tensors.Video, tv_tensors.KeyPoints)) for x in flat):
        raise ConfigError("AutoAugment moves Image, BoundingBoxes and Mask; Video and KeyPoints it does not.")
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
    return _wrapped(image, given)


def _wrapped(x: Tensor, given: Any) -> Tensor:
    """`x` as the kind of tensor that `given` is."""
    if not isinstance(given, tv_tensors.TVTensor):
        return x
    return tv_tensors.wrap(x, like=given)  # pyright: ignore[reportCallIssue] (its decorator hides its arguments)


def _boxes(boxes: tv_tensors.BoundingBoxes) -> tuple[Tensor, str]:
    box_format = boxes.format.value.lower()
    if box_format not in BOX_FORMATS:
        raise ConfigError(f"Boxes of format {boxes.format} are not upright; convert them to XYXY.")
    return boxes.as_subclass(Tensor).reshape(-1, 4), box_format
