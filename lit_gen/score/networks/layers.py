"""What the networks share: levels, resampling, attention, group norm, rows of conditions, checks."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_gen.errors import ConfigError
from lit_gen.images import height_and_width

ImageSize = int | Sequence[int]
"""The side of square images, or (height, width)."""

L = TypeVar("L", nn.Linear, nn.Conv2d)


class Level(nn.Module):
    """One resolution on the way down or up: what changes the size, the blocks; a pyramid or output head."""

    def __init__(self):
        super().__init__()
        self.resize: nn.Module | None = None
        self.pyramid: nn.Module | None = None
        self.head: nn.Module | None = None
        self.blocks = nn.ModuleList()


if TYPE_CHECKING:

    class Levels(nn.ModuleList):
        """A list of `Level`s."""

        def __iter__(self) -> Iterator[Level]: ...

else:
    Levels = nn.ModuleList


def encoder_levels(
    block: Callable[..., nn.Module], widths: Sequence[int], attend: Sequence[bool], num_blocks: int
) -> tuple[Levels, list[int]]:
    """The levels on the way down, and the widths of the signals that the way up takes in, the stem's first.

    `block(c_in, c_out, attention, mode="same")` makes a residual block; all but the first level open with one
    that halves the resolution.
    """
    c, levels = widths[0], Levels()
    skips = [c]
    for i, width in enumerate(widths):
        level = Level()
        if i:
            level.resize = block(c, c, mode="down")
            skips.append(c)
        for _ in range(num_blocks):
            level.blocks.append(block(c, width, attend[i]))
            c = width
            skips.append(c)
        levels.append(level)
    return levels, skips


def decoder_levels(
    block: Callable[..., nn.Module],
    widths: Sequence[int],
    attend: Sequence[bool],
    num_blocks: int,
    skips: list[int],
) -> Levels:
    """The levels on the way up, which take in and use up `skips`; see `encoder_levels`."""
    c, levels = skips[-1], Levels()
    for i in range(len(widths) - 1, -1, -1):
        level = Level()
        level.resize = block(c, c, mode="up") if i < len(widths) - 1 else None
        for _ in range(num_blocks + 1):
            level.blocks.append(block(c + skips.pop(), widths[i], attend[i]))
            c = widths[i]
        levels.append(level)
    return levels


def run(block: nn.Module, h: Tensor, emb: Tensor | None, recompute: bool) -> Tensor:
    """block(h, emb); with `recompute` its activations are not kept for the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, h, emb, use_reentrant=False)
    return block(h, emb)


class Resample(nn.Module):
    """Halves or doubles the resolution with the separable filter `taps`; zeros beyond the border.

    (1, 1) is the 2x2 mean and nearest neighbour; (1, 3, 3, 1) the smoothing FIR of StyleGAN2 and NCSN++
    (https://arxiv.org/abs/1912.04958, https://arxiv.org/abs/2011.13456 section 4.1).
    """

    kernel: Tensor

    def __init__(self, taps: Sequence[float] = (1, 1)):
        super().__init__()
        if len(taps) % 2 or not sum(taps):
            raise ConfigError(
                f"fir={tuple(taps)} cannot resample by 2: give an even number of taps, as (1, 3, 3, 1)."
            )
        row = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)
        self.pad = (len(taps) - 1) // 2
        self.box = tuple(taps) == (1, 1)

    def forward(self, x: Tensor, mode: str) -> Tensor:
        """x "down", "up", or the "same"."""
        return self.down(x) if mode == "down" else self.up(x) if mode == "up" else x

    def down(self, x: Tensor) -> Tensor:
        if self.box:
            return F.avg_pool2d(x, 2)
        c = x.shape[1]
        return F.conv2d(x, self.kernel.expand(c, -1, -1, -1), stride=2, padding=self.pad, groups=c)

    def up(self, x: Tensor) -> Tensor:
        if self.box:
            return double(x)
        c = x.shape[1]
        return F.conv_transpose2d(
            x, (4 * self.kernel).expand(c, -1, -1, -1), stride=2, padding=self.pad, groups=c
        )

    def down_conv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """`conv` (odd kernel, no padding of its own), then `down`: filtered first, at half the outputs."""
        c, pad = x.shape[1], self.pad + conv.kernel_size[0] // 2
        x = F.conv2d(x, self.kernel.expand(c, -1, -1, -1), padding=pad, groups=c)
        return F.conv2d(x, conv.weight, conv.bias, stride=2)


class Attention(nn.Module):
    """x + self-attention over the pixels of group-normalised x, (B, C, H, W) -> the same shape.

    The rows of `qkv.weight` are q, k, v, each head by head. With channels_last memory no permutation copies.
    """

    def __init__(self, channels: int, norm: nn.Module, heads: int = 1):
        super().__init__()
        assert channels % heads == 0, (channels, heads)
        self.heads, self.norm = heads, norm
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        q, k, v = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.proj(out).view(b, h, w, c).permute(0, 3, 1, 2)


def laid_out_as(weight: Tensor, x: Tensor) -> Tensor:
    """x (B, C, H, W) in channels_last memory if the convolution weight (O, C, k, k) is, else contiguous: a
    network whose images and weights differ converts one of them in every layer."""
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def double(x: Tensor) -> Tensor:
    """Every pixel four times, (B, C, 2H, 2W), in the dtype of x: CUDA's autocast would return float32, and
    all that is added to it would be."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest").to(x.dtype)


def group_norm(channels: int, eps: float = 1e-6, smallest: int = 4) -> nn.GroupNorm:
    """32 groups, or as many of at least `smallest` channels as divide C evenly."""
    groups = max(min(channels // smallest, 32), 1)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps)


def conv(c_in: int, c_out: int, kernel: int = 3, gain: float = 1.0, padding: int | None = None) -> nn.Conv2d:
    """Same-size convolution, weights U(+-gain sqrt(6 / (fan_in + fan_out))), zero bias."""
    return xavier(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2 if padding is None else padding), gain)


def linear(c_in: int, c_out: int, gain: float = 1.0, bias: bool = True) -> nn.Linear:
    """A linear layer that begins as `xavier` says."""
    return xavier(nn.Linear(c_in, c_out, bias), gain)


def xavier(layer: L, gain: float = 1.0) -> L:
    """`layer` with weights U(+-gain sqrt(6 / (fan_in + fan_out))) and zero bias."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def class_rows(label: Tensor | None, num_classes: int, like: Tensor) -> Tensor:
    """Class conditioning as rows (B, num_classes): one-hot of int64 (B,), float rows as given, None as zeros.

    The index -1 is a row of zeros too: no class, for some images of a batch.
    """
    if label is None or label.is_floating_point():
        return rows("label", label, num_classes, like)
    if label.shape != like.shape[:1]:
        raise ConfigError(
            f"label of shape {tuple(label.shape)}: give class indices, int64 ({len(like)},), "
            f"or float rows {(len(like), num_classes)}."
        )
    return (label[:, None] == torch.arange(num_classes, device=label.device)).to(like.dtype)


def rows(name: str, value: Tensor | None, width: int, like: Tensor) -> Tensor:
    """A condition (B, width) as given, None (no class, not augmented) as zeros, and a vector that is None as
    NaN; ConfigError for others."""
    if value is None:
        return like.new_full((like.shape[0], width), torch.nan if name == "vector" else 0.0)
    if value.shape != (like.shape[0], width):
        raise ConfigError(f"{name} of shape {tuple(value.shape)}: give {(len(like), width)}.")
    return value.to(like.dtype)


def refuse_labels(label: Tensor | None, num_classes: int, augment_label: Tensor | None, augment_dim: int):
    """Raises ConfigError for a label that the network would have to ignore. Both have a row for each image,
    (B,) or (B, n)."""
    if label is not None and not num_classes:
        raise ConfigError("label given to a network of num_classes=0: pass None, or build it with classes.")
    if augment_label is not None and not augment_dim:
        raise ConfigError("augment_label given to a network of augment_dim=0: pass None, or set augment_dim.")


def refuse_vector(vector: Tensor | None, embedding: nn.Module | None) -> None:
    """Raises ConfigError for a vector that the network would have to ignore. `vector` is (B, n)."""
    if vector is not None and embedding is None:
        raise ConfigError(
            "vector given to a network of vector_dim=0: pass None, or build it with vector_dim."
        )


def input_channels(channels: int, condition_channels: int) -> int:
    """How many channels `with_condition` makes."""
    return channels + (condition_channels + 1 if condition_channels else 0)


def with_condition(x: Tensor, image: Tensor | None, condition_channels: int) -> Tensor:
    """x (B, C, H, W), the condition image (B, Cc, h, w) and a channel of where it is known (1, else 0), one
    above the other: (B, C + Cc + 1, H, W). NaN and None are unknown and become zeros.

    By concatenation as in SR3 (https://arxiv.org/abs/2104.07636) and Palette
    (https://arxiv.org/abs/2111.05826); a smaller image is enlarged by bicubic interpolation first, as in SR3.
    A network of condition_channels=0 takes x alone. ConfigError for an image of other channels, or larger
    than x.
    """
    if not condition_channels:
        if image is not None:
            raise ConfigError(
                "A condition image given to a network of condition_channels=0: pass None, or build it with "
                "condition_channels."
            )
        return x
    b, _, h, w = x.shape
    if image is None:
        return torch.cat([x, x.new_zeros(b, condition_channels + 1, h, w)], 1)
    if (
        image.ndim != 4
        or image.shape[:2] != (b, condition_channels)
        or image.shape[2] > h
        or image.shape[3] > w
    ):
        raise ConfigError(
            f"condition image of shape {tuple(image.shape)}: give ({b}, {condition_channels}, h, w) with h "
            f"at most {h} and w at most {w}."
        )
    if image.shape[2:] != (h, w):
        image = F.interpolate(image.float(), (h, w), mode="bicubic", align_corners=False)
    known = ~image.isnan()
    image = image.where(known, 0.0).to(x.dtype)
    return torch.cat([x, image, known.all(1, keepdim=True).to(x.dtype)], 1)


def activation_of(name: str) -> nn.Module:
    """The nonlinearity of that name; ConfigError for one that no network has."""
    known = {"silu": nn.SiLU, "elu": nn.ELU, "relu": nn.ReLU, "leaky_relu": partial(nn.LeakyReLU, 0.2)}
    if name not in known:
        raise ConfigError(f"activation={name!r} is not known: take one of {', '.join(known)}.")
    return known[name]()


def levels_of(image_size: ImageSize, num_levels: int, patch: int = 1) -> list[int]:
    """The heights of a U-Net's levels, the first in squares of `patch` pixels, each half the one before;
    ConfigError where a height or a width leaves a remainder, and where there is no level."""
    if num_levels < 1:
        raise ConfigError("channel_mult is empty: give a width for each resolution, [1,2] for instance.")
    if patch < 1:
        raise ConfigError(f"patch={patch}: the side of a square is 1 pixel at least.")
    sides, factor = height_and_width(image_size), patch * 2 ** (num_levels - 1)
    if any(side < factor or side % factor for side in sides):
        fitting = [factor * max(side // factor, 1) for side in sides]
        larger = [x if x == side else x + factor for x, side in zip(fitting, sides, strict=True)]
        shown = [x[0] if isinstance(image_size, int) else x for x in (fitting, larger)]
        cut = f"cut into squares of {patch} and " if patch > 1 else ""
        raise ConfigError(
            f"image_size={image_size} cannot be {cut}halved {num_levels - 1} times: take multiples of "
            f"{factor} (e.g. {shown[0]} or {shown[1]}), or a channel_mult of fewer levels."
        )
    return [sides[0] // patch >> level for level in range(num_levels)]


def check_input(x: Tensor, channels: int, num_levels: int, patch: int = 1) -> None:
    """Raises ConfigError unless x is (B, channels, H, W), H and W multiples of patch 2^(num_levels - 1)."""
    factor = patch * 2 ** (num_levels - 1)
    if x.ndim != 4 or x.shape[1] != channels:
        raise ConfigError(
            f"images of shape {tuple(x.shape)}: this network takes (B, {channels}, H, W); see its `channels`."
        )
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ConfigError(
            f"images of {x.shape[2]}x{x.shape[3]} pixels cannot be halved {num_levels - 1} times: "
            f"this network takes heights and widths that are multiples of {factor}."
        )


def zeroed(layer: L) -> L:
    """The layer, all its parameters 0: a branch that ends in it is nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def to_patches(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, C patch^2, H / patch, W / patch): squares of pixels become channels."""
    return x if patch == 1 else F.pixel_unshuffle(x, patch)


def from_patches(x: Tensor, patch: int) -> Tensor:
    """The inverse of `to_patches`."""
    return x if patch == 1 else F.pixel_shuffle(x, patch)
