"""Translating with a generator: codes of few images, translations, ways between two classes."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.images import to_float, to_uint8
from lit_gen.rng import keyed_generator


class Generator(Protocol):
    """What translates: FUNIT's generator, or a score model (`lit_gen.score.translation`)."""

    @property
    def channels(self) -> int: ...

    def class_code(self, images: Tensor, /) -> Tensor: ...

    def content_code(self, content: Tensor, /) -> Tensor: ...

    def decode(self, content: Tensor, code: Tensor, /) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@torch.no_grad()
def class_code(generator: Generator, images: Tensor) -> Tensor:
    """Class images (K, C, H, W), float in [-1, 1] -> their mean code (code_size,); (N, K, C, H, W) -> (N,
    code_size)."""
    images = images.to(_device(generator))
    code = generator.class_code(images if images.ndim == 5 else images[None])
    return code if images.ndim == 5 else code[0]


@torch.enable_grad()
def adapted_code(
    generator: Generator,
    images: Tensor,
    steps: int,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    rate: float = 0.02,
) -> Tensor:
    """`class_code` of K images (K, C, H, W), float in [-1, 1], then `steps` steps of Adam on the code alone,
    for the mean absolute difference between the images and their own reconstructions: (code_size,).

    Test-time adaptation, which FUNIT does not have. The content of a reconstruction is that of the image, or
    of `augment(image, generator)`, uint8 (C, H, W) in and out, drawn anew in every step: with the
    augmentation of the training, the code has to add what it removes. A step is `rate` times the root mean
    square of the code. Raises ConfigError for steps below 0.
    """
    if steps < 0:
        raise ConfigError(f"adapt={steps}: a number of steps, 0 for none.")
    images, random = images.to(_device(generator)), keyed_generator("adapt")
    start = class_code(generator, images)
    scale, change = start.square().mean().sqrt(), torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=rate)
    for _ in range(steps):
        shown = images
        if augment is not None:
            shown = torch.stack([augment(image, random) for image in to_uint8(images).cpu()])
            shown = to_float(shown).to(images)
        with torch.no_grad():
            content = generator.content_code(shown)
        code = (start + scale * change).expand(len(images), -1)
        loss = (generator.decode(content, code) - images).abs().mean()
        (change.grad,) = torch.autograd.grad(loss, change)
        optimizer.step()
    return (start + scale * change).detach()


@torch.no_grad()
def translate(generator: Generator, content: Tensor, classes: Tensor) -> Tensor:
    """Content images (N, C, H, W), float in [-1, 1], into classes -> uint8 (N, C, H, W).

    `classes` are class codes, (code_size,) for all or (N, code_size), or K class images for all (K, C, H, W)
    or for each (N, K, C, H, W). Images of another size than in training work as far as the networks take
    them; else ConfigError.
    """
    code = class_code(generator, classes) if classes.ndim >= 4 else classes.to(_device(generator))
    code = code.expand(len(content), -1)
    return to_uint8(generator.decode(generator.content_code(content.to(_device(generator))), code))


@torch.no_grad()
def interpolate(
    generator: Generator, content: Tensor, first: Tensor, second: Tensor, steps: int = 8
) -> Tensor:
    """Content images (N, C, H, W) on the way from one class code (code_size,) to another: uint8 (N, steps, C,
    H, W)."""
    if steps < 2:
        raise ConfigError(f"interpolate={steps}: a way has at least 2 steps, its ends.")
    codes = [torch.lerp(first, second, i / (steps - 1)) for i in range(steps)]
    return torch.stack([translate(generator, content, code) for code in codes], 1)


def _device(generator: Generator) -> torch.device:
    return next(generator.parameters()).device
