"""The DDPM U-Net (Ho et al. 2020, https://arxiv.org/abs/2006.11239, appendix B), as in score_sde."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.score.networks import embeddings, layers

__all__ = ["DDPM"]

_SMALL = 1e-5  # gain of the layers that the paper starts at zero


class DDPM(nn.Module):
    """U-Net with plain residual blocks, strided convolutions and one attention head.

    The defaults are CIFAR-10's 35,218,947 parameters (score_sde's class: 32 groups, 1x1 convolutions where
    the width changes); `decoder_attention="each"` is Ho's own network, 35,746,307. CelebA-HQ 256 has
    `channel_mult=(1, 1, 2, 2, 4, 4)`.

    Raises ConfigError for an image size that cannot be halved len(channel_mult) - 1 times.
    """

    def __init__(
        self,
        image_size: layers.ImageSize,  # one number, or (height, width)
        channels: int = 3,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),  # width of each resolution, in base_channels
        num_blocks: int = 2,  # residual blocks per resolution on the way down; one more on the way up
        attention_resolutions: Sequence[int] = (16,),  # heights; the middle has attention besides
        dropout: float = 0.1,
        num_classes: int = 0,  # 0: unconditional
        out_channels: int | None = None,  # None: as `channels`; twice that for a learned variance
        checkpoint_blocks: bool = False,  # recompute blocks in the backward pass: less memory, 1/3 more time
        activation: str = "silu",  # or "elu", "relu", "leaky_relu"
        resample_conv: bool = True,  # False: 2x2 means and nearest neighbours, without weights
        vector_dim: int = 0,  # numbers of a condition's vector; 0: none
        condition_channels: int = 0,  # channels of a condition's image; 0: none
        patch: int = 1,  # the network sees squares of patch x patch pixels as channels
        decoder_attention: str = "last",  # block of a level on the way up; "each" in Ho's code and diffusers
    ):
        super().__init__()
        self.resolutions = layers.levels_of(image_size, len(channel_mult), patch)
        self.channels, self.out_channels = channels, out_channels or channels
        self.num_classes, self.augment_dim = num_classes, 0
        self.vector_dim, self.condition_channels = vector_dim, condition_channels
        self.checkpoint_blocks, self.resample_conv = checkpoint_blocks, resample_conv
        self.patch = patch
        if decoder_attention not in ("last", "each"):
            raise ConfigError(f"decoder_attention={decoder_attention!r}: take last or each.")
        c, c_emb = base_channels, 4 * base_channels
        waves = embeddings.PositionalEmbedding(c)
        self.noise = embeddings.NoiseMLP(waves, c, c_emb, num_classes, 0, activation, vector_dim)

        def block(c_in, c_out, attention=False):
            return _ResBlock(c_in, c_out, c_emb, dropout, attention, activation)

        widths = [base_channels * m for m in channel_mult]
        attend = [r in tuple(attention_resolutions) for r in self.resolutions]
        last = len(widths) - 1
        self.stem = layers.conv(layers.input_channels(channels, condition_channels) * patch**2, c)
        skips, self.encoder, self.decoder = [c], layers.Levels(), layers.Levels()
        for i, width in enumerate(widths):
            level = layers.Level()
            for _ in range(num_blocks):
                level.blocks.append(block(c, width, attend[i]))
                c = width
                skips.append(c)
            if i < last:
                level.resize = _Down(c) if resample_conv else nn.AvgPool2d(2)
                skips.append(c)
            self.encoder.append(level)
        self.middle = nn.ModuleList([block(c, c, attention=True), block(c, c)])
        for i in range(last, -1, -1):
            level = layers.Level()
            for n in range(num_blocks + 1):
                attends = attend[i] and (n == num_blocks or decoder_attention == "each")
                level.blocks.append(block(c + skips.pop(), widths[i], attends))
                c = widths[i]
            if i:
                level.resize = _Up(c) if resample_conv else _Double()
            self.decoder.append(level)
        last = layers.conv(c, self.out_channels * patch**2, gain=_SMALL)
        self.head = nn.Sequential(_norm(c), layers.activation_of(activation), last)

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        label: Tensor | None = None,
        augment_label: Tensor | None = None,
        vector: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W) and noise_label (B,), 0 to 999 -> (B, out_channels, H, W); the
        conditions as in NCSNpp."""
        layers.check_input(x, self.channels, len(self.resolutions), self.patch)
        emb = self.noise(noise_label, label, augment_label, vector)
        x = layers.to_patches(layers.with_condition(x, image, self.condition_channels), self.patch)
        h = self.stem(layers.laid_out_as(self.stem.weight, x))
        skips = [h]
        for level in self.encoder:
            for block in level.blocks:
                h = layers.run(block, h, emb, self.checkpoint_blocks)
                skips.append(h)
            if level.resize is not None:
                h = level.resize(h)
                skips.append(h)
        for block in self.middle:
            h = layers.run(block, h, emb, self.checkpoint_blocks)
        for level in self.decoder:
            for block in level.blocks:
                h = layers.run(block, torch.cat([h, skips.pop()], 1), emb, self.checkpoint_blocks)
            if level.resize is not None:
                h = level.resize(h)
        return layers.from_patches(self.head(h), self.patch)


class _ResBlock(nn.Module):
    """x + f(x, emb), then attention."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, dropout: float, attention: bool, activation: str):
        super().__init__()
        self.act = layers.activation_of(activation)
        self.dropout = dropout
        self.norm0 = _norm(c_in)
        self.conv0 = layers.conv(c_in, c_out)
        self.affine = layers.linear(c_emb, c_out)
        self.norm1 = _norm(c_out)
        self.conv1 = layers.conv(c_out, c_out, gain=_SMALL)
        self.skip = layers.conv(c_in, c_out, 1, gain=0.1**0.5) if c_in != c_out else None
        self.attention = _attention(c_out) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self.act(self.norm0(x))) + self.affine(emb)[:, :, None, None]
        h = self.act(self.norm1(h))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        h = h + (x if self.skip is None else self.skip(x))
        return h if self.attention is None else self.attention(h)


class _Down(nn.Module):
    """Strided convolution with the zeros on the right and below only, as in the TensorFlow original."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = layers.xavier(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class _Double(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return layers.double(h)


class _Up(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = layers.conv(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(layers.double(h))


def _norm(channels: int) -> nn.GroupNorm:
    return layers.group_norm(channels, smallest=1)


def _attention(channels: int) -> layers.Attention:
    attention = layers.Attention(channels, _norm(channels))
    # q, k, v are three layers in the paper: the bound of each is that of a square matrix.
    nn.init.uniform_(attention.qkv.weight, -((0.3 / channels) ** 0.5), (0.3 / channels) ** 0.5)
    nn.init.xavier_uniform_(attention.proj.weight, _SMALL)
    nn.init.zeros_(attention.qkv.bias)
    nn.init.zeros_(attention.proj.bias)
    return attention
