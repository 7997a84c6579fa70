"""Flips, crops and resizes of uint8 tensors, as `transform(image, generator) -> image`.

`generator` is keyed by (seed, epoch, index) outside (see `lit_gen.data.keyed`); what needs no random numbers
ignores it. Images are uint8 (C, H, W) in and out. The functions are exact and draw nothing; the classes draw
and call them. A transform may also have `batch(images, generators) -> images`, (B, C, H, W) in and out, which
gives each image what the transform alone would, in fewer calls; `transform_all` uses it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gen.errors import ConfigError

__all__ = [
    "CentreCrop",
    "Compose",
    "Flip",
    "RandomCrop",
    "Resize",
    "ResizeShorter",
    "TransformsBatches",
    "crop",
    "flip",
    "flip_boxes",
    "resize",
    "transform_all",
]

Transform = Callable[[Tensor, torch.Generator | None], Tensor]


@runtime_checkable
class TransformsBatches(Protocol):
    """A transform that also takes (B, C, H, W) and a generator for each image."""

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor: ...

    def batch(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor: ...


def flip(image: Tensor) -> Tensor:
    """Left and right exchanged."""
    return image.flip(-1)


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Boxes (N, 4) xyxy in pixels, in an image `width` wide that was flipped."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """The window at (top, left); it must lie inside."""
    assert 0 <= top <= image.shape[-2] - height and 0 <= left <= image.shape[-1] - width
    return image[..., top : top + height, left : left + width]


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear and antialiased, as `torchvision.transforms.v2` does it (within 1 of Pillow)."""
    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]


def transform_all(
    transform: Transform, images: Tensor | Sequence[Tensor], generators: Sequence[torch.Generator]
) -> Tensor:
    """Each image through the transform with its own generator, stacked to (B, C, H, W); at once where the
    transform has a `batch` and the images are of one size, with the same result."""
    if isinstance(transform, TransformsBatches) and len({image.shape for image in images}) == 1:
        return transform.batch(_stacked(images), generators)
    return torch.stack([transform(image, g) for image, g in zip(images, generators, strict=True)])


def _stacked(images: Tensor | Sequence[Tensor]) -> Tensor:
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
        return flip(image) if torch.rand((), generator=generator) < self.p else image

    def batch(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """`__call__` of each image, in one copy."""
        rows = [i for i, g in enumerate(generators) if torch.rand((), generator=g) < self.p]
        out = images.clone()
        # numpy writes rows where torch's indexed write goes through bytes one by one.
        out.numpy()[rows] = flip(images.index_select(0, torch.tensor(rows, dtype=torch.int64))).numpy()
        return out


class RandomCrop:
    """A window of size x size anywhere in the image, after `padding` pixels of its mirror image were added on
    every side."""

    def __init__(self, size: int, padding: int = 0):
        if size < 1 or padding < 0:
            raise ConfigError(
                f"size={size}, padding={padding}: size must be at least 1 and padding at least 0."
            )
        self.size, self.padding = size, padding

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.batch(image[None], [generator])[0]

    def batch(self, images: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
        """`__call__` of each image; they are padded together."""
        if self.padding:
            if self.padding >= min(images.shape[-2:]):
                raise ConfigError(
                    f"padding={self.padding}: a mirror image needs less than the image's {_size(images)}."
                )
            images = F.pad(images, [self.padding] * 4, mode="reflect")
        room = [side - self.size + 1 for side in _room(images, self.size)]
        tops_lefts = [(_draw_below(room[0], g), _draw_below(room[1], g)) for g in generators]
        windows = zip(images, tops_lefts, strict=True)
        return torch.stack([crop(x, top, left, self.size, self.size) for x, (top, left) in windows])


class CentreCrop:
    """The middle window of size x size, at the pixel that torchvision's CenterCrop takes."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        top, left = (round((side - self.size) / 2) for side in _room(image, self.size))
        return crop(image, top, left, self.size, self.size)


class Resize:
    """To size x size; the aspect ratio is lost."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return resize(image, self.size, self.size)


class ResizeShorter:
    """The short side to `size`, the aspect ratio kept."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        height, width = image.shape[-2:]
        short = min(height, width)
        return resize(image, self.size * height // short, self.size * width // short)


def _room(image: Tensor, size: int) -> tuple[int, int]:
    if min(image.shape[-2:]) < size:
        raise ConfigError(
            f"No window of {size}x{size} fits into an image of {_size(image)}; make the images larger first."
        )
    return image.shape[-2], image.shape[-1]


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"


def _draw_below(n: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(n, (), generator=generator))
