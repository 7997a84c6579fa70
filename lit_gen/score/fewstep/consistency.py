"""Consistency models: the denoiser gives the same image along a path of the probability flow, so that one
evaluation at t_max samples (Song et al. 2023, https://arxiv.org/abs/2303.01469).

One loss for easy consistency tuning (ECT, Geng et al. 2024, https://arxiv.org/abs/2406.14548), which begins
with a diffusion model (`weights=`), for consistency training from nothing, and for distillation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.precision import full_float32
from lit_gen.rng import Generator
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.fewstep.tangent import replayed
from lit_gen.score.fewstep.teacher import Distillation
from lit_gen.score.losses import NoiseDistribution, noise, sum_of_pixels
from lit_gen.score.sde import Process, per_image, wide

__all__ = ["ConsistencyLoss", "Stages", "inverse_gap"]

Weight = Callable[[Tensor, Tensor], Tensor]
"""`weight(s, r)`: the weight of a pair of noise levels r < s, of their shape."""


@dataclass(frozen=True)
class Stages:
    """The noise level r < s of a pair, as in ECT: r = max(low, s - s (1 - ratio) (1 + k sigmoid(-b
    s))) with ratio = 1 - 1 / q^(stage + 1), at most `max_ratio`.

    Stage 0 begins with the first batch, stage i after batch i `batches` + 1, as in ECT's code; None: there is
    but stage 0. With k = 0 r is ratio s. r = 0 stands for the image itself.
    """

    batches: int | None = 25_000
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    max_ratio: float = 0.999
    low: float = 0.0

    def __post_init__(self):
        if self.q <= 1 or not 0 < self.max_ratio <= 1 or self.k < 0 or self.low < 0:
            raise ConfigError(f"{self}: q must be above 1, max_ratio in (0, 1], k and low at least 0.")
        if self.batches is not None and self.batches < 1:
            raise ConfigError(f"{self}: a stage has at least one batch.")

    def stage(self, step: int) -> int:
        """The stage of a training that has seen `step` batches."""
        return 0 if self.batches is None else max(step - 1, 0) // self.batches

    def __call__(self, s: Tensor, step: int) -> Tensor:
        """r, of the shape of the noise levels `s`."""
        gap = max(self.q ** -(self.stage(step) + 1), 1 - self.max_ratio)
        return (s - s * gap * (1 + self.k * (-self.b * s).sigmoid())).clamp(min=self.low)


def inverse_gap(s: Tensor, r: Tensor) -> Tensor:
    """1 / (s - r). Of the shape of `s` and `r`."""
    return (s - r).reciprocal()


class ConsistencyLoss(Distillation):
    """weight(s, r) d(D(x_s, s), stop(D(x_r, r))) for noise levels r < s of one image and one noise; at r = 0
    D is the identity, and the target x_0.

    `noise_distribution` draws s, `pairs` says r. The distance is sqrt(S + c^2) - c of S, the sum of squares
    over the pixels, or S itself with `c` None. x_r is x_0 with the noise of x_s: consistency training, which
    with a diffusion model to start from is consistency tuning. With `distill` it is an Euler step of the
    teacher's probability flow from x_s to r.

    Both calls have the same dropout mask. Late pairs are so close that the target differs from the prediction
    by less than half precision or TF32 resolve: both calls run in full float32 whatever the autocast.
    """

    def __init__(
        self,
        noise_distribution: NoiseDistribution,
        pairs: Stages,
        c: float | None = 1e-8,
        weight: Weight = inverse_gap,
        distill: bool = False,
        guidance: float = 1.0,
        tune: bool = False,
    ):
        super().__init__(distill, guidance, tune)
        if c is not None and c < 0:
            raise ConfigError(f"model.loss.c={c}: must be at least 0, or null for the squared distance.")
        self.noise_distribution, self.pairs, self.c, self.weight = noise_distribution, pairs, c, weight

    def draw(
        self, process: Process, x_0: Tensor, generator: Generator = None, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The times t (B,), the noise z like `x_0`, and the earlier times (B,) of the pairs."""
        s = process.noise_level(self.noise_distribution(process, x_0, generator))
        r = self.pairs(s, step)
        s = s.where(s > r, r + 1e-6)  # below `pairs.low`
        return process.time(s), noise(x_0, generator), process.time(r)

    def forward(
        self, denoiser: AbstractDenoiser, x_0: Tensor, t: Tensor, z: Tensor, earlier: Tensor, **told: Any
    ) -> Tensor:
        """(B,) in float64. `told` goes to the denoiser: `label` and `augment_label`."""
        process, x_0, z = denoiser.process, wide(x_0), wide(z)
        s, r = process.noise_level(t), process.noise_level(earlier)
        x_t = process.marginal(x_0, t, z)
        with torch.autocast(x_0.device.type, enabled=False), full_float32():
            with replayed(x_0.device):
                x0_hat = denoiser(x_t, t, **told)
            with torch.no_grad():
                y_r = self._earlier(process, x_0, z, x_t, t, r, **told)
                # No network at r = 0, where ln r and all after it are not finite.
                is_noisy = r > 0
                u = earlier.where(is_noisy, t)
                x_r = per_image(process.alpha(u), y_r) * y_r
                target = torch.where(_rows(is_noisy, y_r), denoiser(x_r, u, **told), y_r)
        return self.weight(s, r) * self.distance(x0_hat, target)

    def distance(self, x0_hat: Tensor, target: Tensor) -> Tensor:
        """Of images (B, C, H, W) from their targets, (B,)."""
        squares = sum_of_pixels((x0_hat - target).square())
        if self.c is None:
            return squares
        # The slope of a root at 0 is not finite: equal images have none.
        return (squares + self.c**2).clamp(min=1e-30).sqrt() - self.c

    def _earlier(
        self, process: Process, x_0: Tensor, z: Tensor, x_t: Tensor, t: Tensor, r: Tensor, **told: Any
    ) -> Tensor:
        """x_r / alpha, which is x_0 + r z, or on the teacher's path through x_t."""
        if not self.distill:
            return x_0 + per_image(r, x_0) * z
        x0_hat = self.taught(x_t, t, **told)
        y = x_t / per_image(process.alpha(t), x_t)
        return x0_hat + per_image(r / process.noise_level(t), y) * (y - x0_hat)


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *(1,) * (like.ndim - 1))
