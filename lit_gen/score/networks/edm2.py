"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, https://arxiv.org/abs/2312.02696, config G)."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.score.networks import embeddings, layers

__all__ = ["EDM2", "MPFourier", "MPLinear", "renormalize"]


class EDM2(nn.Module):
    """U-Net in which every layer preserves the magnitude of its activations and has weights of unit norm.

    No biases, no group norms: while training, each forward pass first puts the weights back on the unit
    sphere (forced weight normalisation, equation 66), so the effective learning rate is the optimiser's. The
    defaults with `image_size=64, num_classes=1000` are the "S" network of ImageNet-64; the preconditioning is
    EDM's.

    Raises ConfigError for an image size that cannot be halved len(channel_mult) - 1 times.
    """

    def __init__(
        self,
        image_size: layers.ImageSize,  # one number, or (height, width)
        channels: int = 3,
        base_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),  # width of each resolution, in base_channels
        noise_mult: int | None = None,  # width of the noise embedding; None: the first of channel_mult
        emb_mult: int | None = None,  # width of the conditioning vector; None: the largest of channel_mult
        num_blocks: int = 3,  # residual blocks per resolution on the way down; one more on the way up
        attention_resolutions: Sequence[int] = (16, 8),  # heights; the middle has attention besides
        head_channels: int = 64,  # of an attention head; narrower blocks have one head
        attention_width: int = 1,  # narrowest block with attention; the official code has none below one head
        label_balance: float = 0.5,  # weight of the class against the noise level
        concat_balance: float = 0.5,  # weight of the skip against the main path
        res_balance: float = 0.3,  # weight of a residual branch
        attention_balance: float = 0.3,  # weight of an attention branch
        clip: float | None = 256.0,  # activations are limited to +-clip
        fir: Sequence[float] = (1, 1),  # resampling filter
        dropout: float = 0.0,
        num_classes: int = 0,  # 0: unconditional
        checkpoint_blocks: bool = False,  # recompute blocks in the backward pass: less memory, 1/3 more time
        vector_dim: int = 0,  # numbers of a condition's vector, weighed as the class is; 0: none
        condition_channels: int = 0,  # channels of a condition's image; 0: none
        patch: int = 1,  # the network sees squares of patch x patch pixels as channels
    ):
        super().__init__()
        self.resolutions = layers.levels_of(image_size, len(channel_mult), patch)
        self.channels, self.num_classes, self.augment_dim = channels, num_classes, 0
        self.vector_dim, self.condition_channels = vector_dim, condition_channels
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.checkpoint_blocks, self.patch = checkpoint_blocks, patch
        widths = [base_channels * m for m in channel_mult]
        c_noise = base_channels * noise_mult if noise_mult else widths[0]
        c_emb = base_channels * emb_mult if emb_mult else max(widths)
        self.embedding = MPFourier(c_noise)
        self.noise = MPLinear(c_noise, c_emb)
        self.label = MPLinear(num_classes, c_emb) if num_classes else None
        self.vector = None
        if vector_dim:
            self.vector = embeddings.VectorEmbedding(vector_dim, MPLinear(2 * vector_dim, c_emb))
        self.out_gain = nn.Parameter(torch.zeros([]))
        resample = layers.Resample(fir)

        def block(encoder, c_in, c_out, attention=False, mode="same"):
            heads = max(c_out // head_channels, 1) if attention and c_out >= attention_width else 0
            balances = (res_balance, attention_balance)
            return _Block(encoder, c_in, c_out, c_emb, dropout, heads, balances, clip, mode, resample)

        attend = [r in tuple(attention_resolutions) for r in self.resolutions]
        c_in = layers.input_channels(channels, condition_channels) * patch**2
        self.stem = MPConv(c_in + 1, widths[0], 3)
        self.encoder, skips = layers.encoder_levels(partial(block, True), widths, attend, num_blocks)
        c = skips[-1]
        self.middle = nn.ModuleList([block(False, c, c, attention=True), block(False, c, c)])
        self.decoder = layers.decoder_levels(partial(block, False), widths, attend, num_blocks, skips)
        self.head = MPConv(widths[0], channels * patch**2, 3)

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        label: Tensor | None = None,
        augment_label: Tensor | None = None,
        vector: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W) and noise_label (B,), ln(sigma) / 4 -> like x; the conditions as in NCSNpp."""
        layers.check_input(x, self.channels, len(self.resolutions), self.patch)
        if self.training:
            renormalize(self)
        emb = self._condition(noise_label, label, augment_label, vector)
        x = layers.to_patches(layers.with_condition(x, image, self.condition_channels), self.patch)
        # A channel of ones stands in for the bias of the first layer.
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
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
                h = layers.run(
                    block, mp_cat(h, skips.pop(), self.concat_balance), emb, self.checkpoint_blocks
                )
        return layers.from_patches(self.head(h, self.out_gain), self.patch)

    def _condition(
        self, noise_label: Tensor, label: Tensor | None, augment_label: Tensor | None, vector: Tensor | None
    ) -> Tensor:
        layers.refuse_labels(label, self.num_classes, augment_label, 0)
        layers.refuse_vector(vector, self.vector)
        emb = self.noise(self.embedding(noise_label).to(self.noise.weight.dtype))
        if self.label is not None:
            rows = layers.class_rows(label, self.num_classes, emb) * math.sqrt(self.num_classes)
            emb = mp_sum(emb, self.label(rows), self.label_balance)
        if self.vector is not None:
            emb = mp_sum(emb, self.vector(vector, emb), self.label_balance)
        return mp_silu(emb)


def renormalize(net: nn.Module) -> None:
    """Forced weight normalisation of all magnitude-preserving layers of `net`, in place (equation 66)."""
    for module in net.modules():
        if isinstance(module, _MPWeight):
            module.renormalize()


class MPFourier(nn.Module):
    """sqrt 2 cos(2 pi (w c + u)), frozen w ~ N(0, 1), u ~ U(0, 1); (B,) -> (B, channels). Equation 75."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, noise_label: Tensor) -> Tensor:
        phase = noise_label.to(self.frequencies.dtype)[:, None] * self.frequencies + self.phases
        return phase.cos() * math.sqrt(2)


class _MPWeight(nn.Module):
    """A weight whose rows count by their direction only; `renormalize` gives them unit variance per entry."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    @torch.no_grad()
    def renormalize(self) -> None:
        self.weight.copy_(normalize(self.weight))

    def effective(self, gain: Tensor | float = 1.0) -> Tensor:
        """The normalised weight times gain / sqrt(fan_in); the gradient is orthogonal to the weight."""
        return normalize(self.weight) * (gain / math.sqrt(self.weight[0].numel()))


class MPLinear(_MPWeight):
    """Linear map of rows, no bias. Equation 47."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_out, c_in)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return F.linear(x, self.effective(gain).to(x.dtype))


class MPConv(_MPWeight):
    """Same-size convolution, no bias. Equation 47."""

    def __init__(self, c_in: int, c_out: int, kernel: int):
        super().__init__(c_out, c_in, kernel, kernel)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return F.conv2d(x, self.effective(gain).to(x.dtype), padding=self.weight.shape[2] // 2)


class _Block(nn.Module):
    """Figure 21: resample, a residual branch scaled by the conditioning vector, attention.

    In the encoder the main path is widened and pixel-normalised first, in the decoder widened at the sum.
    """

    def __init__(self, encoder, c_in, c_out, c_emb, dropout, heads, balances, clip, mode, resample):
        super().__init__()
        self.encoder, self.mode, self.dropout, self.clip = encoder, mode, dropout, clip
        self.balance, attention_balance = balances
        self.resample = resample
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv0 = MPConv(c_out if encoder else c_in, c_out, 3)
        self.affine = MPLinear(c_emb, c_out)
        self.conv1 = MPConv(c_out, c_out, 3)
        self.skip = MPConv(c_in, c_out, 1) if c_in != c_out else None
        self.attention = _Attention(c_out, heads, attention_balance) if heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resample(x, self.mode)
        if self.encoder:
            x = normalize(x if self.skip is None else self.skip(x), dim=1)
        scale = self.affine(emb, self.emb_gain) + 1
        h = mp_silu(self.conv0(mp_silu(x)) * scale[:, :, None, None])
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        if not self.encoder and self.skip is not None:
            x = self.skip(x)
        h = mp_sum(x, h, self.balance)
        if self.attention is not None:
            h = self.attention(h)
        return h if self.clip is None else h.clamp(-self.clip, self.clip)


class _Attention(nn.Module):
    """Cosine attention: q, k and v have unit variance per pixel and head; the rows of `qkv` are q, k, v."""

    def __init__(self, channels: int, heads: int, balance: float):
        super().__init__()
        self.heads, self.balance = heads, balance
        self.qkv = MPLinear(channels, 3 * channels)
        self.proj = MPLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(x.permute(0, 2, 3, 1).reshape(b, h * w, c))
        qkv = normalize(qkv.view(b, h * w, 3, self.heads, c // self.heads), dim=4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(out.transpose(1, 2).reshape(b, h * w, c))
        return mp_sum(x, out.view(b, h, w, c).permute(0, 3, 1, 2), self.balance)


def normalize(x: Tensor, dim: int | None = None, eps: float = 1e-4) -> Tensor:
    """x / (eps + rms of x over `dim`), by default all axes but the first; the rms in float32 at least. `x`
    has any shape."""
    dims = list(range(1, x.ndim)) if dim is None else [dim]
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    size = x.numel() // norm.numel()
    return x / (norm / math.sqrt(size) + eps).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596: unit variance for a unit normal x. Equation 81."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2). Equation 88. Of any one shape."""
    return a.lerp(b.to(a.dtype), t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenation in which a and b contribute as (1 - t) to t, whatever their widths. Equation 103. (B,
    C_a, ...) and (B, C_b, ...) give (B, C_a + C_b, ...)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], 1)
