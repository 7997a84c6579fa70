"""What the transformers share: an image as a row of tokens, one a patch, and what acts on them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.images import height_and_width
from lit_gen.score.networks import layers


def sinusoids(noise_label: Tensor, channels: int) -> Tensor:
    """cos(c f_i), sin(c f_i) of frequencies from 1 in geometric steps to just before 1/10000, (B,) -> (B,
    channels), a zero at the end of an odd number.

    Computed in float32 at least, and in float64 for float64.
    """
    half = channels // 2
    c = noise_label.to(torch.promote_types(noise_label.dtype, torch.float32))
    steps = torch.arange(half, dtype=c.dtype, device=c.device)
    phase = c[:, None] * (steps * (-math.log(10000) / half)).exp()
    return F.pad(torch.cat([phase.cos(), phase.sin()], 1), (0, channels % 2))


def grid_of(image_size: layers.ImageSize, patch_size: int) -> tuple[int, int]:
    """How many patches are above and beside one another; ConfigError where a remainder is left."""
    height, width = height_and_width(image_size)
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ConfigError(
            f"image_size={image_size} cannot be cut into patches of patch_size={patch_size}: take heights "
            "and widths that are multiples of it."
        )
    return height // patch_size, width // patch_size


def check_sizes(**sizes: float) -> None:
    """Raises ConfigError for options, by name, that are not above 0."""
    for name, size in sizes.items():
        if not size > 0:
            raise ConfigError(f"{name}={size}: must be above 0.")


def check_image(x: Tensor, channels: int, grid: tuple[int, int], patch_size: int) -> None:
    """Raises ConfigError unless x is (B, channels, H, W) of the size that the positions are of."""
    height, width = (n * patch_size for n in grid)
    if x.ndim != 4 or x.shape[1:] != (channels, height, width):
        raise ConfigError(
            f"images of shape {tuple(x.shape)}: this network takes (B, {channels}, {height}, {width}), "
            "for its tokens have positions; build it with another image_size or channels."
        )


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """(B, n, p p C), the channels of a pixel next to one another -> (B, C, H, W)."""
    rows, columns = grid
    pixels = tokens.unflatten(1, (rows, columns)).unflatten(3, (patch_size, patch_size, -1))
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class ClassTable(nn.Module):
    """A row (width,) for each class, and with `null` one more for no class, which is otherwise zeros.

    Soft labels, float (B, num_classes), are mixtures of rows; what they lack of a sum of 1 is no class.
    """

    def __init__(self, num_classes: int, width: int, null: bool, std: float):
        super().__init__()
        self.num_classes, self.null = num_classes, null
        self.weight = nn.Parameter(torch.randn(num_classes + null, width) * std)

    def forward(self, label: Tensor | None, like: Tensor) -> Tensor:
        """(B, width) for labels of the rows of `like`."""
        rows = layers.class_rows(label, self.num_classes, like)
        if self.null:
            rows = torch.cat([rows, 1 - rows.sum(1, keepdim=True)], 1)
        return rows @ self.weight


class SelfAttention(nn.Module):
    """(B, n, width) -> the same shape; the rows of `qkv.weight` are q, k, v, each head by head."""

    def __init__(self, width: int, heads: int, qkv_bias: bool):
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"width={width} cannot be shared out over heads={heads}: take a divisor of it.")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(width: int, ratio: float, approximate: str) -> nn.Sequential:
    """Two layers with a GELU between, exact ("none") or "tanh"."""
    inner = int(ratio * width + 1e-6)  # a ratio of two whole numbers gives the first of them
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate), nn.Linear(inner, width))
