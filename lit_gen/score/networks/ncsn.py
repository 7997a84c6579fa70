"""The noise-conditional score network, NCSN (Song & Ermon 2019, https://arxiv.org/abs/1907.05600)."""

import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.score.networks import layers
from lit_gen.score.networks.refinenet import instance_norm_plus, refine, refine_blocks, residual_stages

__all__ = ["NCSN"]


class NCSN(nn.Module):
    """RefineNet of dilated convolutions whose every norm knows the index of the noise level.

    The defaults are the CIFAR-10 network, 30,117,635 parameters. The output is the score itself, not divided
    by sigma (the reader of official weights halves the last layer, whose score was that of [0, 1] images).

    Raises ConfigError for an odd image size.
    """

    def __init__(
        self,
        image_size: layers.ImageSize,
        channels: int = 3,
        base_channels: int = 128,
        num_levels: int = 10,
    ):
        super().__init__()
        layers.levels_of(image_size, 2)
        self.channels, self.num_levels, self.num_classes, self.augment_dim = channels, num_levels, 0, 0
        c = base_channels

        def norm(channels: int) -> nn.Module:
            return _ConditionalNorm(channels, num_levels)

        self.stem = nn.Conv2d(channels, c, 3, padding=1)
        widths = [c, 2 * c, 2 * c, 2 * c]
        self.stages = residual_stages(widths, norm)
        self.refine = refine_blocks(widths, norm, nn.AvgPool2d(5, 1, 2))
        self.norm = norm(c)
        self.head = nn.Conv2d(c, channels, 3, padding=1)

    def forward(
        self, x: Tensor, noise_label: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W) in [-1, 1] and noise_label (B,), index of the noise level, largest first -> like x.

        The index is rounded and limited to what the network was trained on. No class or augmentation labels.
        """
        layers.check_input(x, self.channels, 2)
        layers.refuse_labels(label, 0, augment_label, 0)
        level = noise_label.round().long().clamp(0, self.num_levels - 1)
        h = self.stem(layers.laid_out_as(self.stem.weight, x))
        h = refine(self.stages, self.refine, h, level)
        return self.head(F.elu(self.norm(h, level)))


class _ConditionalNorm(nn.Module):
    """InstanceNorm++ with a row (gamma, alpha, beta) for each noise level."""

    def __init__(self, channels: int, num_levels: int):
        super().__init__()
        self.rows = nn.Embedding(num_levels, 3 * channels)
        nn.init.normal_(self.rows.weight[:, : 2 * channels], 1, 0.02)
        nn.init.zeros_(self.rows.weight[:, 2 * channels :])

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return instance_norm_plus(x, *self.rows(level).chunk(3, 1))
