"""Letters shown in other shapes than their own, so that a content code cannot tell their typeface."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gen.errors import ConfigError


class StrokeAugment:
    """Stretches, slants and thickens or thins dark strokes on light paper, as `transform(image, generator)`.

    What is done is what tells a typeface from its relatives; which letter it is stays readable. uint8
    (C, H, W) in and out.

    Arguments
        width, height: factors from 1 / width to width, evenly in their logarithms; no letter is stretched
            beyond the image.
        slant: shift per unit of height, up to this much to either side.
        weight: strokes grow by up to this many pixels on every side; they shrink by half of that at most,
            for a stroke of a pixel must not vanish.
    """

    def __init__(
        self,
        width: float = 1.5,
        height: float = 1.2,
        slant: float = 0.35,
        weight: float = 1.0,
    ):
        if width < 1 or height < 1:
            raise ConfigError(f"width={width}, height={height}: largest factors, so at least 1.")
        if slant < 0 or not 0 <= weight <= 1:
            raise ConfigError(
                f"slant={slant}, weight={weight}: give a slant of at least 0 and 0 to 1 pixels of weight."
            )
        self.width, self.height, self.slant, self.weight = width, height, slant, weight

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = (2 * torch.rand(4, generator=generator) - 1).tolist()
        return self.apply(
            image,
            width=self.width ** u[0],
            height=self.height ** u[1],
            slant=self.slant * u[2],
            weight=self.weight * (u[3] if u[3] > 0 else u[3] / 2),
        )

    def apply(self, image: Tensor, width: float, height: float, slant: float, weight: float) -> Tensor:
        """The image with these factors, this slant and this weight in pixels; the center stays."""
        ink = 255 - image.float()
        rows, columns = ((ink > 64).any(0).any(axis).nonzero() for axis in (1, 0))
        if not len(rows):
            return image
        (h, w), margin = image.shape[-2:], 0.95
        tall, broad = (int(some[-1] - some[0]) + 1 for some in (rows, columns))
        height = min(height, max(margin * h / tall, 1.0))
        width = min(width, max((margin * w - abs(slant) * tall * height) / broad, 1 / self.width))
        # Where each output pixel comes from, in the units of affine_grid: the inverse of stretch, then slant.
        inverse = ink.new_tensor([[1 / width, slant * h / (w * width), 0.0], [0.0, 1 / height, 0.0]])
        grid = F.affine_grid(inverse[None], [1, len(ink), h, w], align_corners=False)
        ink = F.grid_sample(ink[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        sign = 1 if weight > 0 else -1  # the largest ink around a pixel, or the smallest
        ink = ink.lerp(sign * F.max_pool2d(sign * ink, 3, stride=1, padding=1), abs(weight))
        return 255 - ink[0].round().clamp(0, 255).to(torch.uint8)
