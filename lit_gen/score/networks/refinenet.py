"""Parts of NCSN and NCSNv2: dilated residual stages and the RefineNet cascade that merges them.

`norm(channels)` makes a layer called as `norm(x, level)`; blocks pass the index of the noise level on.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.score.networks import layers

Norm = Callable[[int], nn.Module]


def instance_norm_plus(x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Instance norm that keeps the channel means, themselves normalised over the channels (InstanceNorm++).

    gamma (IN(x) + alpha (m - mean(m)) / std(m)) + beta, m the channel means of an image, std unbiased;
    appendix A of https://arxiv.org/abs/1907.05600. x (B, C, H, W); gamma, alpha and beta (B, C) or (C,).
    """
    means = x.mean((2, 3))
    means = (means - means.mean(1, keepdim=True)) / (means.var(1, keepdim=True) + 1e-5).sqrt()
    shift = torch.addcmul(beta, gamma, alpha * means)[:, :, None, None]
    # The channels_last kernel loses the deviation of channels whose mean is large; a copy costs less than it.
    h = torch.group_norm(x.contiguous(), x.shape[1], eps=1e-5)
    if not x.is_contiguous():
        h = h.contiguous(memory_format=torch.channels_last)
    return torch.addcmul(shift, h, gamma[..., None, None])


class ResBlock(nn.Module):
    """shortcut(x) + conv2(act(norm2(conv1(act(norm1(x)))))).

    `down` halves the resolution (mean of 2x2 after the convolution), but with `dilation` > 1 it does not.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        norm: Norm,
        down: bool = False,
        dilation: int = 1,
        activation: str = "elu",
    ):
        super().__init__()
        self.act = layers.activation_of(activation)
        self.halve = down and dilation == 1
        c_mid = c_in if down else c_out
        self.norm1 = norm(c_in)
        self.conv1 = _conv3(c_in, c_mid, dilation)
        self.norm2 = norm(c_mid)
        self.conv2 = _conv3(c_mid, c_out, dilation)
        self.shortcut = None
        if down or c_in != c_out:
            self.shortcut = _conv3(c_in, c_out, dilation) if dilation > 1 else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        h = self.conv1(self.act(self.norm1(x, level)))
        h = self.conv2(self.act(self.norm2(h, level)))
        if self.halve:
            assert self.shortcut is not None
            # The mean commutes with a 1x1 convolution and is cheaper before it.
            return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))
        return h + (x if self.shortcut is None else self.shortcut(x))


class RefineBlock(nn.Module):
    """Adapts, fuses and pools its inputs, the finer first: (B, c_in[i], H_i, W_i) -> (B, c_out, H_0, W_0).

    RefineNet, https://arxiv.org/abs/1611.06612. `norm` None leaves out all norms, as NCSNv2 does.
    """

    def __init__(
        self,
        c_in: Sequence[int],
        c_out: int,
        norm: Norm | None,
        pool: nn.Module,
        end: bool = False,
        activation: str = "elu",
    ):
        super().__init__()
        act = layers.activation_of(activation)
        self.adapt = nn.ModuleList(_ConvUnits(c, 2, 2, norm, act) for c in c_in)
        self.fuse = _Fuse(c_in, c_out, norm) if len(c_in) > 1 else None
        self.pool = _ChainedPool(c_out, norm, pool, act)
        self.output = _ConvUnits(c_out, 3 if end else 1, 2, norm, act)

    def forward(self, xs: Sequence[Tensor], level: Tensor | None) -> Tensor:
        hs = [adapt(x, level) for adapt, x in zip(self.adapt, xs, strict=True)]
        h = hs[0] if self.fuse is None else self.fuse(hs, level)
        return self.output(self.pool(h, level), level)


def residual_stages(widths: Sequence[int], norm: Norm, activation: str = "elu") -> nn.ModuleList:
    """Two residual blocks of each width. All stages but the first halve the resolution; the last two widen
    the field of view instead, by a dilation of 2 and of 4."""
    stages, dilations = nn.ModuleList(), [1] * (len(widths) - 2) + [2, 4]
    for i, (c, dilation) in enumerate(zip(widths, dilations, strict=True)):
        first = ResBlock(widths[max(i - 1, 0)], c, norm, i > 0, dilation, activation)
        stages.append(nn.ModuleList([first, ResBlock(c, c, norm, False, dilation, activation)]))
    return stages


def refine_blocks(
    widths: Sequence[int], norm: Norm | None, pool: nn.Module, activation: str = "elu"
) -> nn.ModuleList:
    """The cascade for the outputs of `residual_stages` of these widths, the last one first."""
    c_in, last = widths[::-1], len(widths) - 1
    return nn.ModuleList(
        RefineBlock([c] * (2 if i else 1), c_in[min(i + 1, last)], norm, pool, i == last, activation)
        for i, c in enumerate(c_in)
    )


def refine(stages: nn.ModuleList, blocks: nn.ModuleList, h: Tensor, level: Tensor | None) -> Tensor:
    """Down the residual stages, then up the RefineNet cascade, which meets them last first."""
    outputs = []
    for stage in stages:
        assert isinstance(stage, nn.ModuleList)
        for block in stage:
            h = block(h, level)
        outputs.append(h)
    h = blocks[0]([outputs.pop()], level)
    for block in blocks[1:]:
        h = block([outputs.pop(), h], level)
    return h


class _ConvUnits(nn.Module):
    """`num_blocks` residual blocks of `num_stages` times norm, activation, 3x3 convolution."""

    def __init__(self, c: int, num_blocks: int, num_stages: int, norm: Norm | None, act: nn.Module):
        super().__init__()
        self.act = act
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for _ in range(num_blocks):
            self.convs.append(nn.ModuleList(_conv3(c, c, bias=False) for _ in range(num_stages)))
            self.norms.append(nn.ModuleList(_norm_or_none(norm, c) for _ in range(num_stages)))

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        for convs, norms in zip(self.convs, self.norms, strict=True):
            assert isinstance(convs, nn.ModuleList) and isinstance(norms, nn.ModuleList)
            h = x
            for conv, norm in zip(convs, norms, strict=True):
                h = conv(self.act(norm(h, level)))
            x = x + h
        return x


class _Fuse(nn.Module):
    """Sum of the convolved inputs, bilinearly resized to the size of the first."""

    def __init__(self, c_in: Sequence[int], c_out: int, norm: Norm | None):
        super().__init__()
        self.convs = nn.ModuleList(_conv3(c, c_out) for c in c_in)
        self.norms = nn.ModuleList(_norm_or_none(norm, c) for c in c_in)

    def forward(self, xs: Sequence[Tensor], level: Tensor | None) -> Tensor:
        hs = []
        for x, conv, norm in zip(xs, self.convs, self.norms, strict=True):
            h = conv(norm(x, level))
            if h.shape[2:] != xs[0].shape[2:]:
                h = F.interpolate(h, size=xs[0].shape[2:], mode="bilinear", align_corners=True)
            hs.append(h)
        return sum(hs[1:], start=hs[0])


class _ChainedPool(nn.Module):
    """x + the sum of two stages of pooling and convolution, each fed by the one before."""

    def __init__(self, c: int, norm: Norm | None, pool: nn.Module, act: nn.Module):
        super().__init__()
        self.act = act
        self.convs = nn.ModuleList(_conv3(c, c, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(_norm_or_none(norm, c) for _ in range(2))
        self.pool = pool

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        x = path = self.act(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            path = conv(self.pool(norm(path, level)))
            x = x + path
        return x


class _NoNorm(nn.Module):
    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        return x


def _norm_or_none(norm: Norm | None, channels: int) -> nn.Module:
    return _NoNorm() if norm is None else norm(channels)


def _conv3(c_in: int, c_out: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation, bias=bias)
