"""The KL autoencoder of latent diffusion (Rombach et al. 2022, https://arxiv.org/abs/2112.10752), and the
discriminator of patches (Isola et al. 2017, https://arxiv.org/abs/1611.07004) that it may be trained against.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gen.errors import ConfigError

EPS = 1e-6  # of the group norms


class AutoencoderKL(nn.Module):
    """Images (B, channels, H, W) in [-1, 1] <-> latents (B, latent_channels, H / f, W / f), where f is 2 to
    the number of levels less one.

    A level has `blocks` residual blocks of its width in `widths` (one more in the decoder); the lowest one
    has an `attention` between two blocks, and `groups` are those of all norms. Without `projections`, two
    convolutions of one pixel about the latents are left out, as SD3 and Flux do. The default is that of
    Stable Diffusion, 83,653,863 parameters. Raises ConfigError for widths that the groups do not divide, and
    for sizes below 1.
    """

    def __init__(
        self,
        channels: int = 3,
        latent_channels: int = 4,
        widths: Sequence[int] = (128, 256, 512, 512),
        blocks: int = 2,
        groups: int = 32,
        attention: bool = True,
        projections: bool = True,
    ):
        super().__init__()
        least = {"channels": channels, "latent_channels": latent_channels, "blocks": blocks, "groups": groups}
        for name, size in least.items():
            if size < 1:
                raise ConfigError(f"model.network.{name}={size}: must be at least 1.")
        if not widths or any(width < 1 or width % groups for width in widths):
            raise ConfigError(
                f"model.network.widths={list(widths)}: give at least one, all multiples of model.network."
                f"groups={groups}."
            )
        self.options: dict[str, Any] = {
            "channels": channels,
            "latent_channels": latent_channels,
            "widths": list(widths),
            "blocks": blocks,
            "groups": groups,
            "attention": attention,
            "projections": projections,
        }
        self.channels, self.latent_channels = channels, latent_channels
        self.factor = 2 ** (len(widths) - 1)
        self.encoder = Encoder(channels, 2 * latent_channels, widths, blocks, groups, attention)
        self.decoder = Decoder(latent_channels, channels, widths, blocks, groups, attention)
        moments, latents = (n * latent_channels for n in (2, 1))
        self.to_moments = nn.Conv2d(moments, moments, 1) if projections else nn.Identity()
        self.from_latents = nn.Conv2d(latents, latents, 1) if projections else nn.Identity()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation of each latent, (B, latent_channels, H / f, W / f) both."""
        self.check_size(x.shape[-2:])
        mean, log_variance = self.to_moments(self.encoder(x)).chunk(2, 1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()

    def decode(self, z: Tensor) -> Tensor:
        """The images (B, channels, H, W) of latents, about in [-1, 1]."""
        return self.decoder(self.from_latents(z))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(images of latents drawn with `noise`, their mean, their standard deviation)"""
        mean, deviation = self.encode(x)
        return self.decode(mean + deviation * noise), mean, deviation

    def check_size(self, size: Sequence[int]) -> None:
        """Raises ConfigError for images (height, width) that it cannot halve that often."""
        if any(side % self.factor for side in size):
            raise ConfigError(
                f"Images of {size[0]}x{size[1]} (height x width): the autoencoder takes multiples of "
                f"{self.factor}."
            )


class Encoder(nn.Module):
    """(B, channels, H, W) -> (B, out_channels, H / f, W / f)"""

    def __init__(
        self, channels: int, out: int, widths: Sequence[int], blocks: int, groups: int, attention: bool
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        into = [widths[0], *widths]
        last = len(widths) - 1
        self.levels = nn.ModuleList(
            Level(into[i], into[i + 1], blocks, groups, None if i == last else Down) for i in range(last + 1)
        )
        self.middle = _middle(widths[-1], groups, attention)
        self.norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """(B, channels, h, w) -> (B, out_channels, f h, f w)"""

    def __init__(
        self, channels: int, out: int, widths: Sequence[int], blocks: int, groups: int, attention: bool
    ):
        super().__init__()
        into = [widths[-1], *reversed(widths)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(channels, into[0], 3, padding=1)
        self.middle = _middle(into[0], groups, attention)
        self.levels = nn.ModuleList(
            Level(into[i], into[i + 1], blocks + 1, groups, None if i == last else Up)
            for i in range(last + 1)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], out, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.middle(self.conv_in(z))
        for level in self.levels:
            z = level(z)
        return self.conv_out(F.silu(self.norm_out(z)))


class Level(nn.Module):
    """Residual blocks of one resolution, and the way to the next one."""

    def __init__(self, width_in: int, width: int, blocks: int, groups: int, resample: type[nn.Module] | None):
        super().__init__()
        widths = [width_in] + [width] * blocks
        self.blocks = nn.Sequential(*(Block(a, b, groups) for a, b in pairwise(widths)))
        self.resample = nn.Identity() if resample is None else resample(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.blocks(x))


class Block(nn.Module):
    """Two convolutions beside the identity, (B, width_in, H, W) -> (B, width, H, W)."""

    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, EPS)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """All pixels attend to all, with one head, beside the identity: (B, width, H, W) in and out."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, EPS)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)[:, None]
        h = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        return x + self.out(h)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class Down(nn.Module):
    """Half the height and width; the border is on the right and below."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Twice the height and width."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PatchDiscriminator(nn.Module):
    """How real each patch of an image looks: (B, channels, H, W) -> (B, 1, H', W').

    `layers` convolutions halve the resolution, the first of them to `width` channels, then to twice as many
    each, 8 width at most. Norms are of groups, so that no image's answer depends on the rest of the batch.
    Raises ConfigError for a width that is no multiple of 4, and without layers.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3):
        super().__init__()
        if layers < 1 or width < 1 or width % 4:
            raise ConfigError(
                f"model.discriminator.width={width}, layers={layers}: give a multiple of 4 and at least 1."
            )
        self.channels, self.smallest = channels, 3 * 2**layers  # pixels that leave one number at the end
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        steps: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(pairwise(widths), 1):
            stride = 2 if i < layers else 1
            steps += [nn.Conv2d(a, b, 4, stride, 1), nn.GroupNorm(8, b), nn.LeakyReLU(0.2)]
        self.steps = nn.Sequential(*steps, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x)


def _middle(width: int, groups: int, attention: bool) -> nn.Sequential:
    between = Attention(width, groups) if attention else nn.Identity()
    return nn.Sequential(Block(width, width, groups), between, Block(width, width, groups))


def kl_divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """(B,) nats from N(mean, deviation^2) to N(0, I), summed over a latent's numbers."""
    variance = deviation.square()
    return (mean.square() + variance - 1 - variance.log()).flatten(1).sum(1) / 2


def as_moments(mean: Tensor, deviation: Tensor) -> Tensor:
    """Both in one tensor (B, 2 C, h, w), the mean first, as they are stored."""
    return torch.cat([mean, deviation], 1)
