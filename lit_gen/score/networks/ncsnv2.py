"""NCSNv2 (Song & Ermon 2020, https://arxiv.org/abs/2006.09011) and its two deeper forms."""

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.score.networks.layers import activation_of, check_input, laid_out_as, levels_of, refuse_labels
from lit_gen.score.networks.ncsn import refine
from lit_gen.score.networks.refinenet import RefineBlock, ResBlock, instance_norm_plus

__all__ = ["NCSNv2"]

# Residual stages (in, out, down, dilation) and refine blocks (in, out), widths in base channels. With a
# dilation `down` widens the field of view, not the stride.
_DEPTHS = {
    4: (
        [(1, 1, False, 1), (1, 2, True, 1), (2, 2, True, 2), (2, 2, True, 4)],
        [(2, 2), (2, 2), (2, 1), (1, 1)],
    ),
    5: (
        [(1, 1, False, 1), (1, 2, True, 1), (2, 2, True, 1), (2, 4, True, 2), (4, 4, True, 4)],
        [(4, 4), (4, 2), (2, 2), (2, 1), (1, 1)],
    ),
    6: (
        [
            (1, 1, False, 1),
            (1, 2, True, 1),
            (2, 2, True, 1),
            (2, 2, True, 1),
            (2, 4, True, 2),
            (4, 4, True, 4),
        ],
        [(4, 4), (4, 2), (2, 2), (2, 2), (2, 1), (1, 1)],
    ),
}


class NCSNv2(nn.Module):
    """Unconditional RefineNet: the noise level enters only as score = net(x) / sigma (Technique 3).

    `depth` residual stages: 4 for 32 to 64 pixels (29,694,083 parameters at 128 base channels), 5 ("deeper",
    128 pixels, 83,445,379) or 6 ("deepest", 256 pixels, 94,132,611). The division by sigma is c_out of the
    preconditioning, so the network ignores its noise label. It takes [-1, 1] data.

    Raises ConfigError for another depth, or an image size that its 1, 2 or 3 halvings do not divide.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        base_channels: int = 128,
        depth: int = 4,
        activation: str = "elu",  # or "silu", "relu", "leaky_relu"
    ):
        super().__init__()
        if depth not in _DEPTHS:
            raise ConfigError(
                f"depth={depth} of NCSNv2 is not known: take 4 (32 px), 5 (128 px) or 6 (256 px)."
            )
        stages, blocks = _DEPTHS[depth]
        self.num_levels = depth - 2
        levels_of(image_size, self.num_levels)
        self.channels, self.num_classes, self.augment_dim = channels, 0, 0
        c = base_channels
        self.stem = nn.Conv2d(channels, c, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                [
                    ResBlock(a * c, b * c, _Norm, down, d, activation),
                    ResBlock(b * c, b * c, _Norm, False, d, activation),
                ]
            )
            for a, b, down, d in stages
        )
        pool = nn.MaxPool2d(5, 1, 2)
        self.refine = nn.ModuleList(
            RefineBlock([a * c] * (2 if i else 1), b * c, None, pool, i == depth - 1, activation)
            for i, (a, b) in enumerate(blocks)
        )
        self.norm, self.act = _Norm(c), activation_of(activation)
        self.head = nn.Conv2d(c, channels, 3, padding=1)

    def forward(
        self, x: Tensor, noise_label: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W) in [-1, 1] -> sigma times the score of [0, 1] data; noise_label has no effect."""
        check_input(x, self.channels, self.num_levels)
        refuse_labels(label, 0, augment_label, 0)
        h = self.stem(laid_out_as(self.stem.weight, x))
        h = refine(self.stages, self.refine, h, None)
        return self.head(self.act(self.norm(h, None)))


class _Norm(nn.Module):
    """InstanceNorm++."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(1 + 0.02 * torch.randn(channels))
        self.alpha = nn.Parameter(1 + 0.02 * torch.randn(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        return instance_norm_plus(x, self.gamma, self.alpha, self.beta)
