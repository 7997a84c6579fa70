"""A classifier of noisy images, for classifier guidance (Dhariwal & Nichol 2021, Section 4.1,
https://arxiv.org/abs/2105.05233): the downward half of a denoiser's U-Net, then the mean over pixels."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lit_gen.errors import ConfigError
from lit_gen.score.networks import embeddings, layers
from lit_gen.score.networks.ncsnpp import ResBlock

__all__ = ["NoisyClassifier"]


class NoisyClassifier(nn.Module):
    """`net(x, noise_label) -> logits`, with the blocks of `NCSNpp`.

    Raises ConfigError for an image size that cannot be halved len(channel_mult) - 1 times.
    """

    def __init__(
        self,
        image_size: layers.ImageSize,  # one number, or (height, width)
        num_classes: int,
        channels: int = 3,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),  # width of each resolution, in base_channels
        num_blocks: int = 2,  # residual blocks per resolution
        attention_resolutions: Sequence[int] = (16,),  # heights; the last level has attention besides
        emb_mult: int = 4,  # width of the conditioning vector, in base_channels
        dropout: float = 0.1,
    ):
        super().__init__()
        if num_classes < 2:
            raise ConfigError(f"num_classes={num_classes}: a classifier needs two classes at least.")
        self.resolutions = layers.levels_of(image_size, len(channel_mult))
        self.channels, self.num_classes = channels, num_classes
        c_emb, c, resample = emb_mult * base_channels, base_channels, layers.Resample()
        self.noise = embeddings.NoiseMLP(embeddings.PositionalEmbedding(c), c, c_emb)
        self.stem = layers.conv(channels, c)
        self.encoder = layers.Levels()
        for i, resolution in enumerate(self.resolutions):
            level, width = layers.Level(), base_channels * channel_mult[i]
            if i:
                level.resize = ResBlock(c, c, c_emb, dropout, False, "down", resample)
            for n in range(num_blocks):
                last = i == len(self.resolutions) - 1 and n == num_blocks - 1
                attend = last or resolution in tuple(attention_resolutions)
                level.blocks.append(ResBlock(c, width, c_emb, dropout, attend, "same", resample))
                c = width
            self.encoder.append(level)
        self.norm, self.head = layers.group_norm(c), layers.linear(c, num_classes)

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        """x (B, C, H, W) and noise_label (B,) -> (B, num_classes)."""
        layers.check_input(x, self.channels, len(self.resolutions))
        emb = self.noise(noise_label, None, None)
        h = self.stem(x)
        for level in self.encoder:
            if level.resize is not None:
                h = level.resize(h, emb)
            for block in level.blocks:
                h = block(h, emb)
        return self.head(F.silu(self.norm(h)).mean((2, 3)))
