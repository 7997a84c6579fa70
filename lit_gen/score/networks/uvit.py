"""U-ViT (Bao et al. 2023, https://arxiv.org/abs/2209.12152)."""

import torch
from torch import Tensor, nn

from lit_gen.score.networks import embeddings, layers, tokens

__all__ = ["UViT"]


class UViT(nn.Module):
    """Transformer in which everything is a token, noise level and class included, and whose blocks of the
    second half are told what the mirrored ones of the first half said.

    The defaults are the "S/2" of CIFAR-10, 44,255,328 parameters; its noise label is 999 t. An image of
    another size than `image_size` is refused, for tokens have trained positions. Nothing starts at zero.

    Raises ConfigError for an image size that patches do not fill, a width that heads do not share, and sizes
    that are not above 0.
    """

    def __init__(
        self,
        image_size: layers.ImageSize,  # one number, or (height, width)
        channels: int = 3,
        patch_size: int = 2,
        width: int = 512,
        depth: int = 12,  # blocks, but for one in the middle: an odd number is the same as the one below
        heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        time_mlp: bool = False,  # two layers between the sinusoids of the noise label and its token
        skip: bool = True,
        conv: bool = True,  # a 3x3 convolution at the end
        num_classes: int = 0,  # 0: unconditional
        null_class: bool = False,  # a row for no class, the 1001st of the official latent models; else zeros
        checkpoint_blocks: bool = False,  # recompute blocks in the backward pass: less memory, 1/3 more time
        vector_dim: int = 0,  # numbers of a condition's vector, which the time's token is told; 0: none
        condition_channels: int = 0,  # channels of a condition's image; 0: none
    ):
        super().__init__()
        tokens.check_sizes(channels=channels, width=width, depth=depth, mlp_ratio=mlp_ratio)
        self.grid, self.patch_size = tokens.grid_of(image_size, patch_size), patch_size
        self.channels, self.num_classes, self.augment_dim = channels, num_classes, 0
        self.null_class = null_class and num_classes > 0
        self.vector_dim, self.condition_channels = vector_dim, condition_channels
        self.width, self.checkpoint_blocks = width, checkpoint_blocks
        self.stem = nn.Conv2d(
            layers.input_channels(channels, condition_channels), width, patch_size, patch_size
        )
        self.time = None
        if time_mlp:
            self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.label = tokens.ClassTable(num_classes, width, null_class, 1.0) if num_classes else None
        self.extras = 1 + (num_classes > 0)
        self.positions = nn.Parameter(torch.randn(1, self.extras + self.grid[0] * self.grid[1], width) * 0.02)

        def block(skips: bool) -> _Block:
            return _Block(width, heads, mlp_ratio, qkv_bias, skips)

        self.encoder = nn.ModuleList(block(False) for _ in range(depth // 2))
        self.middle = block(False)
        self.decoder = nn.ModuleList(block(skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch_size**2 * channels)
        self.vector = None
        if vector_dim:
            self.vector = embeddings.VectorEmbedding(vector_dim, nn.Linear(2 * vector_dim, width, bias=False))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        label: Tensor | None = None,
        augment_label: Tensor | None = None,
        vector: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W) and noise_label (B,) -> like x; the conditions as in NCSNpp."""
        tokens.check_image(x, self.channels, self.grid, self.patch_size)
        layers.refuse_labels(label, self.num_classes, augment_label, 0)
        layers.refuse_vector(vector, self.vector)
        time = tokens.sinusoids(noise_label, self.width).to(self.positions.dtype)
        if self.time is not None:
            time = self.time(time)
        if self.vector is not None:
            time = time + self.vector(vector, time)
        h = self.stem(layers.with_condition(x, image, self.condition_channels)).flatten(2).mT
        told = [time[:, None]] if self.label is None else [self.label(label, time)[:, None], time[:, None]]
        h = torch.cat([part.to(self.positions.dtype) for part in (*told, h)], 1) + self.positions
        skips: list[Tensor] = []
        for block in self.encoder:
            h = layers.run(block, h, None, self.checkpoint_blocks)
            skips.append(h)
        h = layers.run(self.middle, h, None, self.checkpoint_blocks)
        for block in self.decoder:
            h = layers.run(block, h, skips.pop(), self.checkpoint_blocks)
        h = tokens.unpatchify(self.head(self.norm(h[:, self.extras :])), self.grid, self.patch_size)
        return h if self.smooth is None else self.smooth(h)


class _Block(nn.Module):
    """Attention, then two layers, each on the norm of its input and added to it. With `skips` the input and
    that of the mirrored block are mixed first."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, skips: bool):
        super().__init__()
        self.mix = nn.Linear(2 * width, width) if skips else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = tokens.SelfAttention(width, heads, qkv_bias)
        self.mlp = tokens.mlp(width, mlp_ratio, "none")

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if self.mix is not None and skip is not None:
            x = self.mix(torch.cat([x, skip], 2))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))
