"""NCSNv2 (Song & Ermon 2020, https://arxiv.org/abs/2006.09011) and its two deeper forms."""

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.score.networks import layers
from lit_gen.score.networks.refinenet import instance_norm_plus, refine, refine_blocks, residual_stages

__all__ = ["NCSNv2"]

# Widths of the residual stages by depth, in base channels.
_WIDTHS = {4: (1, 2, 2, 2), 5: (1, 2, 2, 4, 4), 6: (1, 2, 2, 2, 4, 4)}


class NCSNv2(nn.Module):
    """Unconditional RefineNet: the noise level enters only as score = net(x) / sigma (Technique 3).

    `depth` residual stages: 4 for 32 to 64 pixels (29,694,083 parameters at 128 base channels), 5 ("deeper",
    128 pixels, 83,445,379) or 6 ("deepest", 256 pixels, 94,132,611). The division by sigma is c_out of the
    preconditioning, so the network ignores its noise label. It takes [-1, 1] data.

    Raises ConfigError for another depth, or an image size that its 1, 2 or 3 halvings do not divide.
    """

    def __init__(
        self,
        image_size: layers.ImageSize,  # one number, or (height, width)
        channels: int = 3,
        base_channels: int = 128,
        depth: int = 4,
        activation: str = "elu",  # or "silu", "relu", "leaky_relu"
    ):
        super().__init__()
        if depth not in _WIDTHS:
            raise ConfigError(
                f"depth={depth} of NCSNv2 is not known: take 4 (32 px), 5 (128 px) or 6 (256 px)."
            )
        self.num_levels = depth - 2
        layers.levels_of(image_size, self.num_levels)
        self.channels, self.num_classes, self.augment_dim = channels, 0, 0
        c = base_channels
        self.stem = nn.Conv2d(channels, c, 3, padding=1)
        widths = [c * m for m in _WIDTHS[depth]]
        self.stages = residual_stages(widths, _Norm, activation)
        self.refine = refine_blocks(widths, None, nn.MaxPool2d(5, 1, 2), activation)
        self.norm, self.act = _Norm(c), layers.activation_of(activation)
        self.head = nn.Conv2d(c, channels, 3, padding=1)

    def forward(
        self, x: Tensor, noise_label: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W) in [-1, 1] -> sigma times the score of [0, 1] data; noise_label has no effect."""
        layers.check_input(x, self.channels, self.num_levels)
        layers.refuse_labels(label, 0, augment_label, 0)
        h = self.stem(layers.laid_out_as(self.stem.weight, x))
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
