"""The ADM U-Net (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233) in EDM's form, "DhariwalUNet"."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.score.networks import embeddings, layers

__all__ = ["ADM"]

_HEAD = 64  # channels of an attention head


class ADM(nn.Module):
    """U-Net with scale-and-shift conditioning, multi-head attention and plain residual sums.

    The defaults with `num_classes=1000` are EDM's ImageNet-64 network (https://arxiv.org/abs/2206.00364,
    table 7), 295,899,267 parameters. Layers start as torch makes them, those that end a branch at zero.

    Raises ConfigError for an image size that cannot be halved len(channel_mult) - 1 times.
    """

    def __init__(
        self,
        image_size: layers.ImageSize,  # one number, or (height, width)
        channels: int = 3,
        base_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),  # width of each resolution, in base_channels
        num_blocks: int = 3,  # residual blocks per resolution on the way down; one more on the way up
        attention_resolutions: Sequence[int] = (32, 16, 8),  # heights; the middle has attention besides
        attention_width: int = 1,  # narrowest block with attention; EDM's code has none below one head, 64
        emb_mult: int = 4,  # width of the conditioning vector, in base_channels
        dropout: float = 0.1,
        num_classes: int = 0,  # 0: unconditional
        augment_dim: int = 0,  # length of the augmentation label, EDM's is 9; 0: none
        out_channels: int | None = None,  # None: as `channels`; twice that for a learned variance
        checkpoint_blocks: bool = False,  # recompute blocks in the backward pass: less memory, 1/3 more time
        vector_dim: int = 0,  # numbers of a condition's vector; 0: none
        condition_channels: int = 0,  # channels of a condition's image; 0: none
        patch: int = 1,  # the network sees squares of patch x patch pixels as channels
    ):
        super().__init__()
        self.resolutions = layers.levels_of(image_size, len(channel_mult), patch)
        self.channels, self.out_channels = channels, out_channels or channels
        self.num_classes, self.augment_dim = num_classes, augment_dim
        self.vector_dim, self.condition_channels = vector_dim, condition_channels
        self.checkpoint_blocks, self.patch = checkpoint_blocks, patch
        c_emb = emb_mult * base_channels
        self.noise = _NoiseMLP(base_channels, c_emb, num_classes, augment_dim, vector_dim)

        def block(c_in, c_out, attention=False, mode="same"):
            return _ResBlock(c_in, c_out, c_emb, dropout, attention and c_out >= attention_width, mode)

        widths = [base_channels * m for m in channel_mult]
        attend = [r in tuple(attention_resolutions) for r in self.resolutions]
        c_in = layers.input_channels(channels, condition_channels) * patch**2
        self.stem = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.encoder, skips = layers.encoder_levels(block, widths, attend, num_blocks)
        c = skips[-1]
        self.middle = nn.ModuleList([block(c, c, attention=True), block(c, c)])
        self.decoder = layers.decoder_levels(block, widths, attend, num_blocks, skips)
        head = layers.zeroed(nn.Conv2d(widths[0], self.out_channels * patch**2, 3, padding=1))
        self.head = nn.Sequential(layers.group_norm(widths[0], 1e-5), nn.SiLU(), head)

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        label: Tensor | None = None,
        augment_label: Tensor | None = None,
        vector: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W) and noise_label (B,) -> (B, out_channels, H, W); the conditions as in
        NCSNpp."""
        layers.check_input(x, self.channels, len(self.resolutions), self.patch)
        emb = self.noise(noise_label, label, augment_label, vector)
        x = layers.to_patches(layers.with_condition(x, image, self.condition_channels), self.patch)
        h = self.stem(layers.laid_out_as(self.stem.weight, x))
        skips = [h]
        for level in self.encoder:
            if level.resize is not None:
                h = layers.run(level.resize, h, emb, self.checkpoint_blocks)
                skips.append(h)
            for block in level.blocks:
                h = layers.run(block, h, emb, self.checkpoint_blocks)
                skips.append(h)
        for block in self.middle:
            h = layers.run(block, h, emb, self.checkpoint_blocks)
        for level in self.decoder:
            if level.resize is not None:
                h = layers.run(level.resize, h, emb, self.checkpoint_blocks)
            for block in level.blocks:
                h = layers.run(block, torch.cat([h, skips.pop()], 1), emb, self.checkpoint_blocks)
        return layers.from_patches(self.head(h), self.patch)


class _NoiseMLP(nn.Module):
    """The conditioning vector through silu: as embeddings.NoiseMLP, but the class joins after both layers."""

    def __init__(self, base: int, width: int, num_classes: int, augment_dim: int, vector_dim: int):
        super().__init__()
        self.num_classes, self.augment_dim = num_classes, augment_dim
        self.embedding = embeddings.PositionalEmbedding(base, endpoint=False, cos_first=True)
        self.augment = layers.zeroed(nn.Linear(augment_dim, base, bias=False)) if augment_dim else None
        self.hidden = nn.Linear(base, width)
        self.out = nn.Linear(width, width)
        self.label = nn.Linear(num_classes, width, bias=False) if num_classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight)
        self.vector = None
        if vector_dim:
            self.vector = embeddings.VectorEmbedding(vector_dim, nn.Linear(2 * vector_dim, base, bias=False))

    def forward(
        self, noise_label: Tensor, label: Tensor | None, augment_label: Tensor | None, vector: Tensor | None
    ) -> Tensor:
        layers.refuse_labels(label, self.num_classes, augment_label, self.augment_dim)
        layers.refuse_vector(vector, self.vector)
        emb = self.embedding(noise_label).to(self.hidden.weight.dtype)
        if self.augment is not None:
            emb = emb + self.augment(layers.rows("augment_label", augment_label, self.augment_dim, emb))
        if self.vector is not None:
            emb = emb + self.vector(vector, emb)
        emb = self.out(F.silu(self.hidden(emb)))
        if self.label is not None:
            emb = emb + self.label(layers.class_rows(label, self.num_classes, emb))
        return F.silu(emb)


class _ResBlock(nn.Module):
    """x + f(x, emb), then attention; "down" and "up" resample after the first norm."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, dropout: float, attention: bool, mode: str):
        super().__init__()
        self.mode, self.dropout = mode, dropout
        self.resample = layers.Resample()
        self.norm0 = layers.group_norm(c_in, 1e-5)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(c_emb, 2 * c_out)
        self.norm1 = layers.group_norm(c_out, 1e-5)
        self.conv1 = layers.zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None
        self.attention = _attention(c_out) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.resample(F.silu(self.norm0(x)), self.mode)
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, 1)
        h = F.silu(torch.addcmul(shift, self.norm1(self.conv0(h)), scale + 1))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = self.resample(x, self.mode)
        h = h + (x if self.skip is None else self.skip(x))
        return h if self.attention is None else self.attention(h)


def _attention(channels: int) -> layers.Attention:
    heads = max(channels // _HEAD, 1)
    while channels % heads:
        heads -= 1
    attention = layers.Attention(channels, layers.group_norm(channels, 1e-5), heads)
    layers.zeroed(attention.proj)
    return attention
