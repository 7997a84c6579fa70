"""NCSN++ and DDPM++, the networks of the score SDE paper (https://arxiv.org/abs/2011.13456, appendix H).

EDM's "SongUNet" (https://arxiv.org/abs/2206.00364, table 7) is the same function, so one class serves both
releases and reads both checkpoints. Continuous or discrete time is the business of the noise label alone, and
the division by sigma of the official VE networks is c_out of the VE precondition: neither is an option here.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.score.networks import embeddings, layers

__all__ = ["NCSNpp"]

_SMALL = 1e-5  # gain of the layers that the papers start at zero


class NCSNpp(nn.Module):
    """U-Net of BigGAN residual blocks.

    The defaults are DDPM++ for CIFAR-10 (61,804,419 parameters). NCSN++ is `embedding="fourier",
    fir=(1, 3, 3, 1), input_pyramid="residual"` (62,758,787); "deep" is `num_blocks=8`; the 256-pixel style is
    NCSN++ with `channel_mult=(1, 1, 2, 2, 2, 2, 2), num_blocks=2`, both pyramids "skip".

    Raises ConfigError for an image size that cannot be halved len(channel_mult) - 1 times, and for classes or
    augmentation labels of a network that is not `conditional`.
    """

    def __init__(
        self,
        image_size: layers.ImageSize,  # one number, or (height, width)
        channels: int = 3,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),  # width of each resolution, in base_channels
        num_blocks: int = 4,  # residual blocks per resolution on the way down; one more on the way up
        attention_resolutions: Sequence[int] = (16,),  # heights; the middle has attention besides
        embedding: str = "positional",  # of the noise label; "fourier"; "fourier_edm", rounded as EDM does
        embedding_mult: int | None = None,  # its channels in base_channels; None: 1 positional, 2 Fourier
        fourier_scale: float = 16.0,
        emb_mult: int = 4,  # width of the conditioning vector, in base_channels
        fir: Sequence[float] = (1, 1),  # resampling filter; NCSN++ (1, 3, 3, 1)
        input_pyramid: str = "none",  # or "skip", "cat", "residual", "strided": see _PYRAMIDS
        output_pyramid: str = "none",  # "none" or "skip": the output is a sum over resolutions
        dropout: float = 0.1,
        num_classes: int = 0,  # 0: unconditional
        augment_dim: int = 0,  # length of the augmentation label, EDM's is 9; 0: none
        out_channels: int | None = None,  # None: as `channels`; twice that for a learned variance
        checkpoint_blocks: bool = False,  # recompute blocks in the backward pass: less memory, 1/3 more time
        block: str = "biggan",  # resamples inside residual blocks; "ddpm": between them, without weights
        activation: str = "silu",  # or "elu", "relu", "leaky_relu"
        rescale: bool = True,  # sums of a signal and its residual are divided by sqrt 2
        conditional: bool = True,  # False: the network ignores its noise label
        vector_dim: int = 0,  # numbers of a condition's vector; 0: none
        condition_channels: int = 0,  # channels of a condition's image; 0: none
        patch: int = 1,  # the network sees squares of patch x patch pixels as channels
        second_time: str = "none",  # how a second time enters: "concatenated" or "added", see NoiseMLP
    ):
        super().__init__()
        self.resolutions = layers.levels_of(image_size, len(channel_mult), patch)
        _check_choices(
            embedding=embedding, input_pyramid=input_pyramid, output_pyramid=output_pyramid, block=block
        )
        _check_unconditional(conditional, num_classes, augment_dim, vector_dim, second_time)
        self.channels, self.out_channels, self.num_blocks = channels, out_channels or channels, num_blocks
        self.num_classes, self.augment_dim = num_classes, augment_dim
        self.vector_dim, self.condition_channels = vector_dim, condition_channels
        self.in_channels = layers.input_channels(channels, condition_channels) * patch**2
        self.patch = patch
        self.input_pyramid, self.output_pyramid = input_pyramid, output_pyramid
        self.block, self.activation, self.checkpoint_blocks = block, activation, checkpoint_blocks
        self.embedding, self.rescale, self.conditional = embedding, rescale, conditional
        self.second_time = second_time
        c_emb = emb_mult * base_channels if conditional else 0
        self.noise = None
        if conditional:
            waves = _waves(embedding, base_channels, embedding_mult, fourier_scale)
            self.noise = embeddings.NoiseMLP(
                waves, waves.channels, c_emb, num_classes, augment_dim, activation, vector_dim, second_time
            )
        self.resample = layers.Resample(fir)

        def residual(c_in, c_out, attention=False, mode="same"):
            if block == "ddpm" and mode != "same":
                return _Resize(self.resample, mode)
            return ResBlock(c_in, c_out, c_emb, dropout, attention, mode, self.resample, activation, rescale)

        widths = [base_channels * m for m in channel_mult]
        attend = [r in tuple(attention_resolutions) for r in self.resolutions]
        self.stem = layers.conv(self.in_channels, base_channels)
        self.encoder, skips = self._encoder(residual, base_channels, widths, attend)
        middle = partial(residual, skips[-1], skips[-1])
        self.middle = nn.ModuleList([middle(attention=True), middle()])
        self.decoder = self._decoder(residual, skips, widths, attend)

    def _encoder(
        self, residual: Callable[..., nn.Module], c: int, widths: list[int], attend: list[bool]
    ) -> tuple[layers.Levels, list[int]]:
        """The levels on the way down, and the widths of the signals that the way up takes in."""
        levels, skips, c_image = layers.Levels(), [c], self.in_channels
        for i, width in enumerate(widths):
            level = layers.Level()
            if i:
                level.resize = residual(c, c, mode="down")
                level.pyramid = _PYRAMIDS[self.input_pyramid](c_image, c, self.resample, self.rescale)
                c_image = c if self.input_pyramid in ("residual", "strided") else c_image
                c = 2 * c if self.input_pyramid == "cat" else c
                skips.append(c)
            for _ in range(self.num_blocks):
                level.blocks.append(residual(c, width, attend[i]))
                c = width
                skips.append(c)
            levels.append(level)
        return levels, skips

    def _decoder(
        self, residual: Callable[..., nn.Module], skips: list[int], widths: list[int], attend: list[bool]
    ) -> layers.Levels:
        """The levels on the way up, which use up `skips`."""
        levels, c = layers.Levels(), skips[-1]
        for i, width in reversed(list(enumerate(widths))):
            level = layers.Level()
            if i < len(widths) - 1:
                level.resize = residual(c, c, mode="up")
            for n in range(self.num_blocks + 1):
                level.blocks.append(residual(c + skips.pop(), width, attend[i] and n == self.num_blocks))
                c = width
            if i == 0 or self.output_pyramid == "skip":
                last = layers.conv(c, self.out_channels * self.patch**2, gain=_SMALL)
                level.head = nn.Sequential(layers.group_norm(c), layers.activation_of(self.activation), last)
            levels.append(level)
        return levels

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        label: Tensor | None = None,
        augment_label: Tensor | None = None,
        vector: Tensor | None = None,
        image: Tensor | None = None,
        second_time: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W) and noise_label (B,) -> (B, out_channels, H, W).

        label: int64 (B,), -1 for no class, or float (B, num_classes); None is no class. augment_label: float
        (B, augment_dim); None is not augmented. vector: float (B, vector_dim) in the units of the data, NaN
        for what is not known; None is nothing known. image: the condition's, see `layers.with_condition`.
        second_time: float (B,); None is zeros. Raises ConfigError for shapes that do not fit.
        """
        layers.check_input(x, self.channels, len(self.resolutions), self.patch)
        x = layers.to_patches(layers.with_condition(x, image, self.condition_channels), self.patch)
        pyramid = x = layers.laid_out_as(self.stem.weight, x)
        emb = self._embed(noise_label, label, augment_label, vector, second_time)
        h = self.stem(x)
        skips = [h]
        for level in self.encoder:
            if level.resize is not None:
                h = layers.run(level.resize, h, emb, self.checkpoint_blocks)
                if level.pyramid is not None:
                    h, pyramid = level.pyramid(h, pyramid)
                skips.append(h)
            for block in level.blocks:
                h = layers.run(block, h, emb, self.checkpoint_blocks)
                skips.append(h)
        for block in self.middle:
            h = layers.run(block, h, emb, self.checkpoint_blocks)
        out: Tensor | None = None
        for level in self.decoder:
            if level.resize is not None:
                h = layers.run(level.resize, h, emb, self.checkpoint_blocks)
            for block in level.blocks:
                h = layers.run(block, torch.cat([h, skips.pop()], 1), emb, self.checkpoint_blocks)
            if level.head is not None:
                out = level.head(h) if out is None else self.resample.up(out) + level.head(h)
        assert out is not None  # the last level has a head
        return layers.from_patches(out, self.patch)

    def _embed(self, noise_label: Tensor, *told: Tensor | None) -> Tensor | None:
        if self.noise is not None:
            return self.noise(noise_label, *told)
        label, augment_label, vector, second_time = told
        if second_time is not None:
            raise ConfigError("second_time is given to a network without conditioning.")
        layers.refuse_labels(label, 0, augment_label, 0)
        layers.refuse_vector(vector, None)
        return None


class ResBlock(nn.Module):
    """(x + f(x, emb)) / sqrt 2, then attention likewise; "down" and "up" resample after the first norm.

    Without `rescale` the sums stay as they are; `c_emb` 0 is a block without conditioning, called with None.
    """

    def __init__(
        self, c_in, c_out, c_emb, dropout, attention, mode, resample, activation="silu", rescale=True
    ):
        super().__init__()
        self.mode, self.dropout = mode, dropout
        self.resample, self.rescale, self.act = resample, rescale, layers.activation_of(activation)
        self.norm0 = layers.group_norm(c_in)
        self.conv0 = layers.conv(c_in, c_out)
        self.affine = layers.linear(c_emb, c_out) if c_emb else None
        self.norm1 = layers.group_norm(c_out)
        self.conv1 = layers.conv(c_out, c_out, gain=_SMALL)
        self.skip = layers.conv(c_in, c_out, 1) if c_in != c_out or mode != "same" else None
        self.attention = _attention(c_out) if attention else None

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h = self.resample(self.act(self.norm0(x)), self.mode)
        h = self.conv0(h) if self.affine is None else self.conv0(h) + self.affine(emb)[:, :, None, None]
        h = self.act(self.norm1(h))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        h = _rescaled(h + self._skip(x), self.rescale)
        return h if self.attention is None else _rescaled(self.attention(h), self.rescale)

    def _skip(self, x: Tensor) -> Tensor:
        if self.skip is None:
            return x
        if self.mode == "up":  # a 1x1 convolution commutes with resampling; before it, it costs a quarter
            assert self.skip.bias is not None
            return self.resample.up(F.conv2d(x, self.skip.weight)) + self.skip.bias[:, None, None]
        return self.skip(self.resample(x, self.mode))


class _Resize(nn.Module):
    """Resampling alone, in the place of a residual block."""

    def __init__(self, resample: layers.Resample, mode: str):
        super().__init__()
        self.resample, self.mode = resample, mode

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        return self.resample(x, self.mode)


class _InputSkip(nn.Module):
    """A 1x1 convolution of the shrunk input image is added to h, or put before it: (h, image) -> (h, smaller
    image).
    """

    def __init__(self, c_image, c, resample, rescale, cat=False):
        super().__init__()
        self.resample, self.cat = resample, cat
        self.conv = layers.conv(c_image, c, 1)

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        image = self.resample.down(image)
        return torch.cat([self.conv(image), h], 1) if self.cat else h + self.conv(image), image


class _InputResidual(nn.Module):
    """h' = (h + strided convolution of the image) / sqrt 2, also the next image: (h, image) -> (h', h').

    Without the `filtered` image the zeros stand on the right and below only.
    """

    def __init__(self, c_image, c, resample, rescale, filtered=True):
        super().__init__()
        self.resample, self.rescale, self.filtered = resample, rescale, filtered
        self.conv = layers.conv(c_image, c, padding=0)

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.filtered:
            image = self.resample.down_conv(image, self.conv)
        else:
            image = F.conv2d(F.pad(image, (0, 1, 0, 1)), self.conv.weight, self.conv.bias, stride=2)
        h = _rescaled(h + image, self.rescale)
        return h, h


_PYRAMIDS = {
    "none": lambda *_: None,
    "skip": _InputSkip,  # EDM's "skip"; "input_skip" of score_sde, progressive_combine "sum"
    "cat": partial(_InputSkip, cat=True),  # the same with progressive_combine "cat"
    "residual": _InputResidual,  # of both; NCSN++
    "strided": partial(_InputResidual, filtered=False),  # score_sde's "residual" without a filter
}


def _waves(
    embedding: str, base_channels: int, mult: int | None, scale: float
) -> embeddings.PositionalEmbedding | embeddings.FourierEmbedding:
    if embedding == "positional":
        return embeddings.PositionalEmbedding(base_channels * (mult or 1))
    return embeddings.FourierEmbedding(base_channels * (mult or 2), scale, radians=embedding == "fourier_edm")


def _rescaled(h: Tensor, rescale: bool) -> Tensor:
    return h.mul_(math.sqrt(0.5)) if rescale else h


def _attention(channels: int) -> layers.Attention:
    attention = layers.Attention(channels, layers.group_norm(channels))
    nn.init.xavier_uniform_(attention.qkv.weight, math.sqrt(0.2))
    nn.init.xavier_uniform_(attention.proj.weight, _SMALL)
    nn.init.zeros_(attention.qkv.bias)
    nn.init.zeros_(attention.proj.bias)
    return attention


def _check_unconditional(conditional: bool, *sizes: int | str) -> None:
    """Raises ConfigError for what a network that ignores its noise label would ignore too."""
    if not conditional and any(size not in (0, "none") for size in sizes):
        options = zip(("num_classes", "augment_dim", "vector_dim", "second_time"), sizes, strict=True)
        told = ", ".join(f"{name}={size}" for name, size in options if size not in (0, "none"))
        raise ConfigError(f"{told}: give conditional=True, for this enters with the noise level.")


def _check_choices(**choices: str) -> None:
    allowed = {
        "embedding": ("positional", "fourier", "fourier_edm"),
        "input_pyramid": tuple(_PYRAMIDS),
        "output_pyramid": ("none", "skip"),
        "block": ("biggan", "ddpm"),
    }
    for name, value in choices.items():
        if value not in allowed[name]:
            raise ConfigError(f"{name}={value!r} is not known: take one of {', '.join(allowed[name])}.")
