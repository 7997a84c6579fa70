"""What conditions the blocks of a network: embeddings of noise levels, vectors, and classes."""

import math

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.score.networks import layers


class FourierEmbedding(nn.Module):
    """Random Fourier features sin(2 pi w c), cos(2 pi w c), frozen w ~ N(0, scale^2); (B,) -> (B, channels).

    https://arxiv.org/abs/2006.10739; NCSN++ (https://arxiv.org/abs/2011.13456) takes c = ln(sigma). Phases
    are hundreds of radians, so the order of the product shows in the fifth digit of a network's output: (w c)
    2 pi as in score_sde, or with `radians` (2 pi w) c as in EDM.
    """

    frequencies: Tensor

    def __init__(self, channels: int, scale: float = 16.0, radians: bool = False):
        super().__init__()
        self.channels, self.radians = channels, radians
        self.register_buffer("frequencies", torch.randn((channels + 1) // 2) * scale)

    def forward(self, noise_label: Tensor) -> Tensor:
        # float32 whatever the autocast: a phase of hundreds of radians has no room for rounding.
        c, turn = noise_label.to(self.frequencies.dtype)[:, None], 2 * math.pi
        phase = c * (turn * self.frequencies) if self.radians else c * self.frequencies * turn
        return torch.cat([phase.sin(), phase.cos()], 1)[:, : self.channels]


class PositionalEmbedding(nn.Module):
    """Sinusoids sin(c f_i), cos(c f_i), f_i from 1 down to 1/10000 in geometric steps; (B,) -> (B, channels).

    https://arxiv.org/abs/1706.03762. With `endpoint` the last frequency is exactly 1/10000 (DDPM, DDPM++),
    without it one step short (ADM); `cos_first` is ADM's order.
    """

    frequencies: Tensor

    def __init__(self, channels: int, endpoint: bool = True, cos_first: bool = False):
        super().__init__()
        half = (channels + 1) // 2
        exponent = torch.arange(half, dtype=torch.float32) / max(half - int(endpoint), 1)
        self.register_buffer("frequencies", 10000.0**-exponent, persistent=False)
        self.channels, self.cos_first = channels, cos_first

    def forward(self, noise_label: Tensor) -> Tensor:
        phase = noise_label.to(self.frequencies.dtype)[:, None] * self.frequencies
        waves = [phase.sin(), phase.cos()]
        return torch.cat(waves[::-1] if self.cos_first else waves, 1)[:, : self.channels]


class VectorEmbedding(nn.Module):
    """A linear map, `project`, of a vector (B, V), None for no vector: its standardized numbers, and which of
    them are known.

    As EDM embeds its augmentation label (https://arxiv.org/abs/2206.00364, appendix F.2), but for the flags,
    1 for a number and 0 for NaN: an unknown number is told from the mean, and nothing known adds nothing.
    `mean` and `std`, each (V,), are those of the training set: `fit` sets them, and they go with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, project: nn.Module):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.project = project

    @property
    def is_fitted(self) -> bool:
        return bool((self.mean != 0).any() or (self.std != 1).any())

    def fit(self, vectors: Tensor) -> None:
        """Takes the mean and standard deviation of a training set (N, V), unless they have been set before;
        NaN are left out. A number that never changes is divided by 1."""
        if self.is_fitted:
            return
        vectors = vectors.to(self.mean.device, torch.float64)
        mean = vectors.nanmean(0)
        std = (vectors - mean).square().nanmean(0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(std.where(std > 0, 1.0))

    def forward(self, vector: Tensor | None, like: Tensor) -> Tensor:
        # float32 whatever the autocast: a year has no room in half precision
        vector = layers.rows("vector", vector, len(self.mean), like.float())
        standard = (vector - self.mean) / self.std
        known = ~standard.isnan()
        return self.project(torch.cat([standard.where(known, 0.0), known.to(standard)], 1).to(like.dtype))


class NoiseMLP(nn.Module):
    """The vector that conditions all blocks, activated: noise level, class, augmentation, vector -> (B,
    width).

    The layout of NCSN++, DDPM++ and DDPM: `embedding` of the noise label, to which the projected class row
    (scaled by sqrt(num_classes), EDM's unit variance), augmentation label and vector are added, then two
    layers. A `second_time` (B,), None for zeros, is embedded too (MeanFlow,
    https://arxiv.org/abs/2505.13447): "concatenated" with the first embedding, before the rest is added, or
    "added" to it through a layer that starts at zero.
    """

    def __init__(
        self,
        embedding: nn.Module,
        channels: int,
        width: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        activation: str = "silu",
        vector_dim: int = 0,
        second_time: str = "none",
    ):
        super().__init__()
        if second_time not in ("none", "concatenated", "added"):
            raise ConfigError(f"second_time={second_time!r}: take none, concatenated, or added.")
        self.act = layers.activation_of(activation)
        self.second_embedding = PositionalEmbedding(channels) if second_time == "added" else None
        c_in, self.concatenates = channels, second_time == "concatenated"
        channels *= 1 + self.concatenates
        self.embedding, self.num_classes, self.augment_dim = embedding, num_classes, augment_dim
        self.label = layers.linear(num_classes, channels) if num_classes else None
        self.augment = layers.linear(augment_dim, channels, bias=False) if augment_dim else None
        self.hidden = layers.linear(channels, width)
        self.out = layers.linear(width, width)
        self.vector = None  # after the others, whose first weights are then those without it
        if vector_dim:
            self.vector = VectorEmbedding(vector_dim, layers.linear(2 * vector_dim, channels, bias=False))
        self.second = None
        if second_time == "added":
            self.second = nn.Linear(c_in, channels, bias=False)
            nn.init.zeros_(self.second.weight)

    def forward(
        self,
        noise_label: Tensor,
        label: Tensor | None,
        augment_label: Tensor | None,
        vector: Tensor | None = None,
        second_time: Tensor | None = None,
    ) -> Tensor:
        layers.refuse_labels(label, self.num_classes, augment_label, self.augment_dim)
        layers.refuse_vector(vector, self.vector)
        emb = self.embedding(noise_label).to(self.hidden.weight.dtype)
        emb = self._with_second_time(emb, torch.zeros_like(noise_label), second_time)
        if self.label is not None:
            emb = emb + self.label(
                layers.class_rows(label, self.num_classes, emb) * math.sqrt(self.num_classes)
            )
        if self.augment is not None:
            emb = emb + self.augment(layers.rows("augment_label", augment_label, self.augment_dim, emb))
        if self.vector is not None:
            emb = emb + self.vector(vector, emb)
        return self.act(self.out(self.act(self.hidden(emb))))

    def _with_second_time(self, emb: Tensor, zeros: Tensor, second_time: Tensor | None) -> Tensor:
        """The embedding of the first time beside, or plus, that of the second."""
        second = zeros if second_time is None else second_time
        if self.concatenates:
            return torch.cat([emb, self.embedding(second).to(emb.dtype)], 1)
        if self.second_embedding is not None and self.second is not None:
            return emb + self.second(self.second_embedding(second).to(emb.dtype))
        if second_time is not None:
            raise ConfigError("second_time given to a network that has none: build it with second_time.")
        return emb
