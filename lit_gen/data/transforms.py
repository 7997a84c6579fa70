"""Flips and crops of uint8 tensors, as `transform(image, generator) -> image`.

`generator` is keyed by (seed, epoch, index) outside (see `lit_gen.data.keyed`); what needs no random numbers
ignores it. Images are uint8 (C, H, W) in and out. A transform may also have `batch(images, generators) ->
images`, (B, C, H, W) in and out, which gives each image what the transform alone would, in fewer calls;
`transform_all` uses it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms.v2 import functional as official

from lit_gen.errors import ConfigError
from lit_gen.images import height_and_width

Transform = Callable[[Tensor, torch.Generator | None], Tensor]


@runtime_checkable
class TransformsBatches(Protocol):
    """A transform that also takes (B, C, H, W) and a generator for each image."""

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor: ...

    def batch(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor: ...


def transform_all(
    transform: Callable[..., Any], images: Tensor | Sequence[Tensor], generators: Sequence[torch.Generator]
) -> Any:
    """Each image through the transform with its own generator, stacked to (B, C, H, W); at once where the
    transform has a `batch` and the images are of one size, with the same result. Of a transform that gives
    (image, condition), the images and the conditions."""
    if isinstance(transform, TransformsBatches) and len({image.shape for image in images}) == 1:
        return transform.batch(stacked(images), generators)
    return default_collate([transform(image, g) for image, g in zip(images, generators, strict=True)])


def stacked(images: Tensor | Sequence[Tensor]) -> Tensor:
    """(B, C, H, W), also of single images of one size."""
    return images if isinstance(images, Tensor) else torch.stack(list(images))


class Compose:
    """One transform after another, all drawing from the same generator."""

    def __init__(self, transforms: Sequence[Transform]):
        self.transforms = list(transforms)

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        for transform in self.transforms:
            image = transform(image, generator)
        return image

    def batch(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """`__call__` of each image, one transform after another for all of them."""
        for transform in self.transforms:
            images = transform_all(transform, images, generators)
        return images


class Flip:
    """Exchanges left and right with probability `p`."""

    def __init__(self, p: float = 0.5):
        if not 0 <= p <= 1:
            raise ConfigError(f"p={p}: a probability lies between 0 and 1.")
        self.p = p

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return image.flip(-1) if torch.rand((), generator=generator) < self.p else image

    def batch(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """`__call__` of each image, in one copy."""
        rows = [i for i, g in enumerate(generators) if torch.rand((), generator=g) < self.p]
        out = images.clone()
        # numpy writes rows where torch's indexed write goes through bytes one by one.
        out.numpy()[rows] = images.index_select(0, torch.tensor(rows, dtype=torch.int64)).flip(-1).numpy()
        return out


class RandomCrop:
    """A window of size x size, or of (height, width), anywhere in the image."""

    def __init__(self, size: int | Sequence[int]):
        self.size = height_and_width(size, "size")

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check_fits(image, self.size)
        room = [side - size + 1 for side, size in zip(image.shape[-2:], self.size, strict=True)]
        top, left = (int(torch.randint(n, (), generator=generator)) for n in room)
        return image[:, top : top + self.size[0], left : left + self.size[1]]


class CenterCrop:
    """The middle window of size x size, or of (height, width), torchvision's."""

    def __init__(self, size: int | Sequence[int]):
        self.size = height_and_width(size, "size")

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check_fits(image, self.size)  # torchvision would pad
        return official.center_crop(image, list(self.size))


def _check_fits(image: Tensor, size: tuple[int, int]) -> None:
    height, width = image.shape[-2:]
    if height < size[0] or width < size[1]:
        raise ConfigError(
            f"No window of {size[1]}x{size[0]} fits into an image of {width}x{height} (width x height); make "
            "the images larger first."
        )
