"""Differentiable augmentation for GANs: the same kind of distortion on what is real and what is generated.

DiffAugment (Zhao et al. 2020, https://arxiv.org/abs/2006.10738): the discriminator sees T(x) and T(G(z))
only, and the generator's gradient flows through T, so that T does not leak into what is generated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gen import rng
from lit_gen.errors import ConfigError


@dataclass(frozen=True)
class DifferentiableAugment:
    """Color, translation and cut-out of float images (B, C, H, W), any value range; uncovered pixels are 0.

    `color`: brightness + U(-.5, .5), saturation x U(0, 2), contrast x U(.5, 1.5); `translation`, `cutout`:
    the share of the side by which an image moves at most, and which is blanked. 0 turns one off. Defaults are
    the paper's.
    """

    color: bool = True
    translation: float = 0.125
    cutout: float = 0.5

    def __post_init__(self):
        if not (0 <= self.translation <= 1 and 0 <= self.cutout <= 1):
            raise ConfigError(
                f"translation = {self.translation} and cutout = {self.cutout} are shares in [0, 1]."
            )

    def __call__(self, images: Tensor, generator: rng.Generator = None) -> Tensor:
        return self.apply(images, self.draw(len(images), generator, images.device))

    def draw(self, n: int, generator: rng.Generator = None, device: torch.device | str = "cpu") -> Tensor:
        """(n, 7) uniform numbers in [0, 1): brightness, saturation, contrast, shift y, x, cut-out y, x."""
        return rng.rand((n, 7), generator, device=device)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """The images under `draws`, differentiable in the images."""
        if self.color:
            brightness, saturation, contrast = draws[:, :3, None, None, None].to(images).unbind(1)
            images = images + (brightness - 0.5)
            gray = images.mean(1, keepdim=True)
            images = (images - gray) * (2 * saturation) + gray
            level = images.mean((1, 2, 3), keepdim=True)
            images = (images - level) * (contrast + 0.5) + level
        if self.translation:
            images = self._shift(images, draws[:, 3:5])
        if self.cutout:
            images = images * self._window(images, draws[:, 5:7])
        return images

    def _shift(self, images: Tensor, u: Tensor) -> Tensor:
        shown, inside = [], []  # of each side: the place that is shown at a place, and whether there is one
        for size, v in zip(images.shape[-2:], u.unbind(1), strict=True):
            limit = int(size * self.translation + 0.5)
            steps = (v * (2 * limit + 1)).floor().long() - limit
            place = torch.arange(size, device=u.device) - steps[:, None]
            shown.append(place.clamp(0, size - 1))
            inside.append(_between(place, size))
        n = torch.arange(len(images), device=u.device)[:, None, None]
        moved = images[n, :, shown[0][:, :, None], shown[1][:, None, :]].permute(0, 3, 1, 2)
        return moved * (inside[0][:, None, :, None] & inside[1][:, None, None, :])

    def _window(self, images: Tensor, u: Tensor) -> Tensor:
        """(B, 1, H, W) zero in a rectangle that may lie half outside, one elsewhere."""
        keep = []
        for size, v in zip(images.shape[-2:], u.unbind(1), strict=True):
            side = int(size * self.cutout + 0.5)
            start = (v * (size + 1 - side % 2)).floor().long()[:, None] - side // 2
            keep.append(_between(torch.arange(size, device=u.device) - start, side))
        return (~(keep[0][:, None, :, None] & keep[1][:, None, None, :])).to(images.dtype)


def _between(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)
