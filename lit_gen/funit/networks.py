"""The networks of FUNIT (Liu et al. 2019, https://arxiv.org/abs/1905.01723, appendix A).

A translation is `decode(content_code(x), class_code(y_1 ... y_K))`: where things are from the content image,
what they look like from K images of a class. Images are float (B, C, H, W) in [-1, 1]. The class speaks only
through the scale and shift of AdaIN, and those are arguments of the decoder, never state of a layer: the
networks copy, compile and share between threads like any other. The defaults are the official 128 x 128
animal-faces configuration (29,866,435 and, at 119 classes, 54,252,599 parameters).
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.errors import ConfigError


def kaiming_(network: nn.Module) -> None:
    """The official start: weights N(0, 2 / fan_in), biases zero, in every convolution and linear layer."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias) if layer.bias is not None else None


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution with reflected borders: keeps H x W (stride 1) or halves them (kernel 4, stride 2)."""
    padding = (kernel - 1) // 2
    return nn.Conv2d(c_in, c_out, kernel, stride, padding, padding_mode="reflect" if padding else "zeros")


def adain(x: Tensor, bias: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Adaptive instance normalization, `weight (x - mean) / sqrt(var + eps) + bias` with the moments of
    each map.

    x: (B, C, H, W). bias, weight: (B, C). Huang & Belongie 2017, eq. 8, https://arxiv.org/abs/1703.06868.
    """
    maps = x.flatten(0, 1)[None]  # one batch norm over B * C channels: one kernel, scale and shift fused
    y = F.batch_norm(maps, None, None, weight.flatten(), bias.flatten(), training=True, eps=eps)
    return y.view_as(x)


class UpsampleConv(nn.Conv2d):
    """5 x 5 convolution with reflected border of the image enlarged twice (nearest), without enlarging it.

    An enlarged image repeats its pixels, so an even output row sees taps (w0 + w1, w2 + w3, w4) of three
    small rows and an odd one (w0, w1 + w2, w3 + w4): four 3 x 3 kernels do the work of one 5 x 5 on four
    times the area, at 9/25 of the cost. Repeated border pixels differ from reflected ones in the outermost of
    two alone, which only the outermost output pixels see: those get the difference added.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 5)

    def forward(self, input: Tensor) -> Tensor:
        x, bias = input, self.bias
        assert bias is not None
        kernels = [kernel for rows in _halved(self.weight, 2) for kernel in _halved(rows, 3)]
        kernel = torch.stack(kernels, 1).flatten(0, 1)
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        y = F.pixel_shuffle(F.conv2d(padded, kernel, bias.repeat_interleave(4)), 2)
        top, bottom = self.weight[:, :, 0], self.weight[:, :, -1]
        left, right = self.weight[..., 0], self.weight[..., -1]
        rows = F.pad(_doubled(_steps(x, 2)), (2, 2), mode="reflect")
        columns = _doubled(F.pad(_steps(x, 3), (1, 1), mode="replicate"))
        first_row, last_row = F.conv1d(rows, torch.cat([top, bottom]), groups=2).chunk(2, 1)
        first_column, last_column = F.conv1d(columns, torch.cat([left, right]), groups=2).chunk(2, 1)
        y[:, :, 0] += first_row
        y[:, :, -1] += last_row
        y[..., 0] += first_column
        y[..., -1] += last_column
        return y


def _halved(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Five taps on repeated pixels -> three on single ones, for even and for odd places."""
    w0, w1, w2, w3, w4 = weight.unbind(dim)
    return torch.stack([w0 + w1, w2 + w3, w4], dim), torch.stack([w0, w1 + w2, w3 + w4], dim)


def _steps(x: Tensor, dim: int) -> Tensor:
    """(B, C, H, W) -> (B, 2 C, the other side): from the border line inwards, at the beginning and at the end
    of `dim`."""
    first = x.select(dim, 1) - x.select(dim, 0)
    return torch.cat([first, x.select(dim, -2) - x.select(dim, -1)], 1)


def _doubled(line: Tensor) -> Tensor:
    return line.repeat_interleave(2, -1)


class ResBlock(nn.Module):
    """x + IN(conv(ReLU(IN(conv(x))))): nothing follows the sum."""

    def __init__(self, width: int):
        super().__init__()
        self.conv0 = conv(width, width, 3)
        self.conv1 = conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu_(F.instance_norm(self.conv0(x)))
        return x + F.instance_norm(self.conv1(h))


class AdaINResBlock(nn.Module):
    """The same with AdaIN. `params` (B, 4 C) holds bias and weight of the first norm, then of the second."""

    def __init__(self, width: int):
        super().__init__()
        self.conv0 = conv(width, width, 3)
        self.conv1 = conv(width, width, 3)

    def forward(self, x: Tensor, params: Tensor) -> Tensor:
        bias0, weight0, bias1, weight1 = params.chunk(4, dim=1)
        h = F.relu_(adain(self.conv0(x), bias0, weight0))
        return x + adain(self.conv1(h), bias1, weight1)


class ContentEncoder(nn.Module):
    """Image (B, C, H, W) -> content code (B, width 2^downs, H / 2^downs, W / 2^downs).

    Instance normalization takes the style out.

    Raises ConfigError where H or W is no multiple of 2^downs or below 2 * 2^downs.
    """

    def __init__(self, channels: int = 3, width: int = 64, downs: int = 3, num_res_blocks: int = 2):
        super().__init__()
        widths = [width * 2**i for i in range(downs + 1)]
        self.downs, self.width = downs, widths[-1]
        self.stem = conv(channels, width, 7)
        self.down = nn.ModuleList(conv(a, b, 4, stride=2) for a, b in itertools.pairwise(widths))
        self.blocks = nn.ModuleList(ResBlock(widths[-1]) for _ in range(num_res_blocks))

    def forward(self, x: Tensor) -> Tensor:
        step = 2**self.downs
        if any(side % step or side < max(2 * step, 4) for side in x.shape[-2:]):
            raise ConfigError(
                f"A content image of {x.shape[-2]} x {x.shape[-1]} pixels does not fit: with {self.downs} "
                f"downsamplings both sides must be multiples of {step}, at least {max(2 * step, 4)}: resize."
            )
        for layer in (self.stem, *self.down):
            x = F.relu_(F.instance_norm(layer(x)))
        for block in self.blocks:
            x = block(x)
        return x


class ClassEncoder(nn.Module):
    """Image (B, C, H, W) -> class code (B, code_size), unnormalized; the mean over places forgets the pose.

    Raises ConfigError where H or W is below 2^downs.
    """

    def __init__(self, channels: int = 3, width: int = 64, downs: int = 4, code_size: int = 64):
        super().__init__()
        widths = [width * 2 ** min(i, 2) for i in range(downs + 1)]
        self.downs = downs
        self.stem = conv(channels, width, 7)
        self.down = nn.ModuleList(conv(a, b, 4, stride=2) for a, b in itertools.pairwise(widths))
        self.out = nn.Conv2d(widths[-1], code_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        smallest = max(2**self.downs, 4)
        if min(x.shape[-2:]) < smallest:
            raise ConfigError(
                f"A class image of {x.shape[-2]} x {x.shape[-1]} pixels does not fit: with {self.downs} "
                f"downsamplings both sides must be at least {smallest}. Resize it."
            )
        for layer in (self.stem, *self.down):
            x = F.relu_(layer(x))
        return self.out(x.mean((2, 3), keepdim=True)).flatten(1)


class Decoder(nn.Module):
    """Content code (B, C, h, w), AdaIN parameters (B, num_params) -> image (B, channels, H, W).

    `adain_ups`: AdaIN follows the enlarging convolutions too, in the place of instance normalization.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        ups: int = 3,
        num_res_blocks: int = 2,
        adain_ups: bool = False,
    ):
        super().__init__()
        widths = [width * 2**i for i in reversed(range(ups + 1))]
        self.sizes = [4 * widths[0]] * num_res_blocks + [2 * w if adain_ups else 0 for w in widths[1:]]
        self.num_params = sum(self.sizes)
        self.blocks = nn.ModuleList(AdaINResBlock(widths[0]) for _ in range(num_res_blocks))
        self.up = nn.ModuleList(UpsampleConv(a, b) for a, b in itertools.pairwise(widths))
        self.out = conv(width, channels, 7)

    def forward(self, content: Tensor, params: Tensor) -> Tensor:
        x, parts = content, iter(params.split(self.sizes, dim=1))
        for block, part in zip(self.blocks, parts, strict=False):
            x = block(x, part)
        for layer, part in zip(self.up, parts, strict=True):
            bias, weight = part.chunk(2, dim=1)
            x = layer(x)
            x = F.relu_(adain(x, bias, weight) if part.shape[1] else F.instance_norm(x))
        return torch.tanh(self.out(x))


class MLP(nn.Sequential):
    """Class code (B, c_in) -> AdaIN parameters (B, c_out): linear layers with ReLU between them."""

    def __init__(self, c_in: int, width: int, c_out: int, num_layers: int):
        sizes = [c_in, *[width] * (num_layers - 1), c_out]
        layers = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers[:-1])


class FewShotGenerator(nn.Module):
    """Translates a content image into the class that a few images show (FUNIT eq. 1).

    Arguments
        channels: of the images, 1 or 3.
        width: maps of the first layers; they double where the image is halved.
        code_size: length of the class code.
        content_downs, class_downs: halvings in the two encoders; the decoder doubles as often.
        num_res_blocks: in the content encoder and in the decoder.
        mlp_width, num_mlp_layers: of the network from class code to AdaIN parameters.
        adain_ups: AdaIN also where the decoder enlarges (not in FUNIT).
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        code_size: int = 64,
        content_downs: int = 3,
        class_downs: int = 4,
        num_res_blocks: int = 2,
        mlp_width: int = 256,
        num_mlp_layers: int = 3,
        adain_ups: bool = False,
    ):
        super().__init__()
        _check_counts(locals(), zero=("content_downs", "adain_ups"))
        self.class_encoder = ClassEncoder(channels, width, class_downs, code_size)
        self.content_encoder = ContentEncoder(channels, width, content_downs, num_res_blocks)
        self.decoder = Decoder(channels, width, content_downs, num_res_blocks, adain_ups)
        self.mlp = MLP(code_size, mlp_width, self.decoder.num_params, num_mlp_layers)
        kaiming_(self)

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.content_encoder.stem.in_channels

    def content_code(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width 2^content_downs, H / 2^content_downs, W / 2^content_downs)."""
        return self.content_encoder(images)

    def class_code(self, images: Tensor) -> Tensor:
        """(B, C, H, W), or (B, K, C, H, W) for the mean code of K images -> (B, code_size)."""
        if images.ndim == 4:
            return self.class_encoder(images)
        if images.ndim != 5 or images.shape[1] == 0:
            raise ConfigError(
                f"Class images have shape {tuple(images.shape)}; give (B[, K], C, H, W) with K >= 1."
            )
        return self.class_encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)

    def decode(self, content: Tensor, code: Tensor) -> Tensor:
        """Content code (B, ...) and class code (B, code_size) -> image (B, C, H, W) in (-1, 1)."""
        return self.decoder(content, self.mlp(code))

    def forward(self, content: Tensor, classes: Tensor) -> Tensor:
        """Content images (B, C, H, W), class images (B[, K], C, H, W) -> translations (B, C, H, W)."""
        return self.decode(self.content_code(content), self.class_code(classes))


class ContentConditionedGenerator(FewShotGenerator):
    """A `FewShotGenerator` whose class code is conditioned on the content that is decoded: COCO-FUNIT (Saito
    et al. 2020, https://arxiv.org/abs/2007.07431), against translations that lose the content.

    With s the class code, b a constant style bias (learned, the same for all images), and m the mean of the
    content code over places, AdaIN's parameters come, instead of s, from the product by element

        style = zeta_c * zeta_s,   zeta_s = W [s, b] + w,   zeta_c = MLP(m), which begins as 1.

    `class_code` returns s. The conditioning is affine in s, so the mean code of K images gives the mean of
    their styles, and a way between two codes is the way between their styles. The paper's second encoder of
    the content image is the content encoder here. `style_bias` is the length of b (1024 in the authors'
    configuration); the other arguments are those of `FewShotGenerator`.
    """

    def __init__(self, *args: Any, style_bias: int = 1024, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _check_counts({"style_bias": style_bias})
        code_size = self.class_encoder.out.out_channels
        self.style_bias = nn.Parameter(torch.randn(style_bias))
        self.style = nn.Linear(code_size + style_bias, code_size)
        self.content_style = MLP(self.content_encoder.width, code_size, code_size, 2)
        kaiming_(self.style), kaiming_(self.content_style)
        last: Any = self.content_style[-1]
        nn.init.zeros_(last.weight), nn.init.ones_(last.bias)

    def conditioned(self, content: Tensor, code: Tensor) -> Tensor:
        """Content code (B, ...) and class code (B, code_size) -> style (B, code_size)."""
        bias = self.style_bias.to(code.dtype).expand(len(code), -1)
        return self.style(torch.cat([code, bias], 1)) * self.content_style(content.mean((2, 3)))

    def decode(self, content: Tensor, code: Tensor) -> Tensor:
        """As `FewShotGenerator.decode`, with the style in the place of the class code."""
        return super().decode(content, self.conditioned(content, code))


class ActFirstResBlock(nn.Module):
    """Residual block whose activations come before its convolutions (FUNIT appendix A, "ActFirstResBlk").

    The official code activates in place, which overwrites the block's input before an identity shortcut reads
    it, but not before a learned one does (that one reads a copy). So, with a = LeakyReLU(x):
        equal widths      a + conv1(LeakyReLU(conv0(a)))            and not   x + ...
        other widths      shortcut(x) + conv1(LeakyReLU(conv0(a)))
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        hidden = min(c_in, c_out)
        self.conv0 = conv(c_in, hidden, 3)
        self.conv1 = conv(hidden, c_out, 3)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(x, 0.2)
        h = self.conv1(F.leaky_relu_(self.conv0(a), 0.2))
        return h + (a if self.shortcut is None else self.shortcut(x))


class PatchDiscriminator(nn.Module):
    """One real/fake judgment per patch and per class (FUNIT section 3.2, appendix A).

    Arguments
        num_classes: source classes, which the labels index.
        channels: of the images.
        width: maps of the first stage; they double from stage to stage up to `max_width`.
        num_res_blocks: two per stage, so an even number; between stages H x W halve (rounding up).
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 3,
        width: int = 64,
        num_res_blocks: int = 10,
        max_width: int = 1024,
    ):
        super().__init__()
        if num_res_blocks < 2 or num_res_blocks % 2:
            raise ConfigError(
                f"num_res_blocks={num_res_blocks}: a stage has two blocks; give an even number of at least 2."
            )
        _check_counts(locals())
        self.num_classes = num_classes
        self.stem = conv(channels, width, 7)
        self.stages = nn.ModuleList()
        for _ in range(num_res_blocks // 2):
            wider = min(2 * width, max_width)
            self.stages.append(nn.Sequential(ActFirstResBlock(width, width), ActFirstResBlock(width, wider)))
            width = wider
        self.head = nn.Conv2d(width, num_classes, 1)
        kaiming_(self)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', h, w), after the last activation: what feature matching compares."""
        smallest = max(2 ** (len(self.stages) - 1) + 1, 4)
        if min(x.shape[-2:]) < smallest:
            raise ConfigError(
                f"A discriminator of {len(self.stages)} stages needs {smallest} x {smallest} pixels or more, "
                f"got {x.shape[-2]} x {x.shape[-1]}. Use larger images or fewer num_res_blocks."
            )
        x = self.stages[0](self.stem(x))
        for stage in self.stages[1:]:
            x = stage(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, stride=2))
        return F.leaky_relu_(x, 0.2)

    def forward(self, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), labels (B,) -> logits of that class (B, h, w), features (B, C', h, w)."""
        features = self.features(x)
        logits = self.head(features)
        index = label.view(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
        return logits.gather(1, index).squeeze(1), features


def _check_counts(arguments: dict[str, Any], zero: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for a whole number below 1 among the arguments; those named in `zero` may be 0."""
    for name, value in arguments.items():
        least = 0 if name in zero else 1
        if isinstance(value, int) and value < least:
            raise ConfigError(f"{name}={value}; it must be a whole number of at least {least}.")
