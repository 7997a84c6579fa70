"""DiT (Peebles & Xie 2023, https://arxiv.org/abs/2212.09748), the network of SiT too (Ma et al. 2024,
https://arxiv.org/abs/2401.08740)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.score.networks import embeddings, layers, tokens

__all__ = ["DiT"]

_SINUSOIDS = 256


class DiT(nn.Module):
    """Transformer whose blocks are scaled, shifted, and gated by noise level and class ("adaLN-Zero"): at
    first each block changes nothing and the output is zero.

    The defaults with `image_size=32, channels=4, num_classes=1000, out_channels=8` are "XL/2" on latents of
    256 pixels, 674,834,720 parameters. The noise label is a step, 0 to 999, or t in [0, 1] in SiT. An image
    of another size than `image_size` is refused.

    Raises ConfigError for an image size that patches do not fill, a width that heads do not share or 4 does
    not divide, and sizes that are not above 0.
    """

    positions: Tensor

    def __init__(
        self,
        image_size: layers.ImageSize,  # one number, or (height, width)
        channels: int = 3,
        patch_size: int = 2,
        width: int = 1152,  # S 384, B 768, L 1024, XL 1152
        depth: int = 28,  # S and B 12, L 24, XL 28
        heads: int = 16,  # S 6, B 12, L and XL 16
        mlp_ratio: float = 4.0,
        num_classes: int = 0,  # 0: unconditional
        null_class: bool = True,  # a row for no class, as of official models that drop classes; else zeros
        out_channels: int | None = None,  # None: as `channels`; twice that for a learned variance
        checkpoint_blocks: bool = False,  # recompute blocks in the backward pass: less memory, 1/3 more time
        vector_dim: int = 0,  # numbers of a condition's vector; 0: none
        condition_channels: int = 0,  # channels of a condition's image; 0: none
    ):
        super().__init__()
        tokens.check_sizes(channels=channels, width=width, depth=depth, mlp_ratio=mlp_ratio)
        self.grid, self.patch_size = tokens.grid_of(image_size, patch_size), patch_size
        self.channels, self.out_channels = channels, out_channels or channels
        self.num_classes, self.augment_dim = num_classes, 0
        self.null_class = null_class and num_classes > 0
        self.vector_dim, self.condition_channels = vector_dim, condition_channels
        self.checkpoint_blocks = checkpoint_blocks
        self.stem = nn.Conv2d(
            layers.input_channels(channels, condition_channels), width, patch_size, patch_size
        )
        self.register_buffer("positions", _positions(self.grid, width))
        self.time = nn.Sequential(nn.Linear(_SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))
        self.label = tokens.ClassTable(num_classes, width, null_class, 0.02) if num_classes else None
        self.blocks = nn.ModuleList(_Block(width, heads, mlp_ratio) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch_size**2 * self.out_channels)
        self.vector = None
        if vector_dim:
            self.vector = embeddings.VectorEmbedding(vector_dim, nn.Linear(2 * vector_dim, width, bias=False))
        self._initialize()

    def _initialize(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layers.xavier(layer)
        nn.init.xavier_uniform_(self.stem.weight.view(len(self.stem.weight), -1))  # as a matrix
        for name, parameter in self.named_parameters():
            if "modulation" in name or name.startswith("head.") or name == "stem.bias":
                nn.init.zeros_(parameter)
            elif name.startswith("time.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        label: Tensor | None = None,
        augment_label: Tensor | None = None,
        vector: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W) and noise_label (B,) -> (B, out_channels, H, W); the conditions as in NCSNpp."""
        tokens.check_image(x, self.channels, self.grid, self.patch_size)
        layers.refuse_labels(label, self.num_classes, augment_label, 0)
        layers.refuse_vector(vector, self.vector)
        c = self.time(tokens.sinusoids(noise_label, _SINUSOIDS).to(self.head.weight.dtype))
        if self.label is not None:
            c = c + self.label(label, c)
        if self.vector is not None:
            c = c + self.vector(vector, c)
        c = F.silu(c)
        h = self.stem(layers.with_condition(x, image, self.condition_channels)).flatten(2).mT + self.positions
        for block in self.blocks:
            h = layers.run(block, h, c, self.checkpoint_blocks)
        h = self.head(_modulated(h, *self.modulation(c)[:, None].chunk(2, 2)))
        return tokens.unpatchify(h, self.grid, self.patch_size)


class _Block(nn.Module):
    """Attention, then two layers, on the modulated norm of their inputs; what they add is gated."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attention = tokens.SelfAttention(width, heads, qkv_bias=True)
        self.mlp = tokens.mlp(width, mlp_ratio, "tanh")
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)[:, None].chunk(6, 2)
        x = x + gate_a * self.attention(_modulated(x, shift_a, scale_a))
        return x + gate_m * self.mlp(_modulated(x, shift_m, scale_m))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _positions(grid: tuple[int, int], width: int) -> Tensor:
    """Sinusoids of the column, then of the row, of each token: (1, n, width)."""
    if width % 4:
        raise ConfigError(f"width={width}: the positions of DiT need a multiple of 4.")
    quarter = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    phases = [place.flatten()[:, None] * 10000**-quarter for place in (columns, rows)]
    waves = [wave(phase) for phase in phases for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, 1)[None].float()
