"""Reverse steps with a learned variance (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672; DiT).

Beyond the image's channels the network says v of the same shape, and the variance of the step from t to s is
between that of the forward step, beta, and that of the posterior q(x_s | x_t, x_0), in the logarithm:

    ln variance = f ln beta + (1 - f) ln posterior,    f = (v + 1) / 2.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.losses import DenoisingLoss, NoiseDistribution, mean_of_pixels, snr
from lit_gen.score.samplers.grids import Grid, uniform_steps
from lit_gen.score.samplers.ode import Trace
from lit_gen.score.sde import DiscreteVP, Process, per_image, wide

__all__ = ["HybridLoss", "iddpm"]


class _Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(of_image x_0 + of_state x_t, variance), and the variance beta of q(x_t | x_s)."""

    of_image: Tensor
    of_state: Tensor
    beta: Tensor
    variance: Tensor

    def mean(self, x_0: Tensor, x_t: Tensor) -> Tensor:
        return per_image(self.of_image, x_t) * x_0 + per_image(self.of_state, x_t) * x_t

    def log_variance(self, v: Tensor) -> Tensor:
        """Between the two, by the network's v (B, C, H, W)."""
        high, low = (per_image(c.log(), v) for c in (self.beta, self.variance))
        return low + (v + 1) / 2 * (high - low)


def _posterior(process: Process, s: Tensor, t: Tensor) -> _Posterior:
    ratio, beta = process.transition(s, t)
    before, after = process.sigma(s).square(), process.sigma(t).square()
    return _Posterior(process.alpha(s) * beta / after, ratio * before / after, beta, beta * before / after)


@torch.no_grad()
def iddpm(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 250,
    grid: Grid = uniform_steps,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 by ancestral steps with the variance that the network says, one evaluation
    each; the last one is a denoising. Any number of the steps of a `DiscreteVP` is taken, "respaced".

    An exact denoiser, which says none, takes the posterior's variance. Raises ConfigError for a network
    without one.
    """
    process, x = denoiser.process, wide(x)
    for step, (t, s) in enumerate(pairwise(grid(process, num_steps))):
        x0_hat, v = denoiser.with_variance(x, t, label)
        if trace is not None:
            trace(step, x, x0_hat)
        if process.noise_level(s) == 0:
            return x0_hat
        posterior = _posterior(process, s, t)
        log_variance = posterior.log_variance(-torch.ones_like(x) if v is None else v)
        z = randn(x.shape, generator, device=x.device, dtype=x.dtype)
        x = posterior.mean(x0_hat, x) + (log_variance / 2).exp() * z
    return x


@dataclass(frozen=True)
class HybridLoss:
    """The squared error of the noise and the term of the variational bound, in bits per dimension, of the
    step, which trains the variance alone: the gradient does not go through its mean.

    As in DiT the second term is not divided by the number of steps. Both are means over pixels.
    """

    noise_distribution: NoiseDistribution
    num_levels: int = 256  # of the images, for the first step's probability of a level

    def draw(
        self, process: Process, x_0: Tensor, generator: Generator = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """t (B,) in float64, of steps of a `DiscreteVP`, and z of the shape of `x_0`."""
        return DenoisingLoss(self.noise_distribution, snr).draw(process, x_0, generator, step)

    def __call__(
        self, denoiser: AbstractDenoiser, x_0: Tensor, t: Tensor, z: Tensor, **conditions: Any
    ) -> Tensor:
        """(B,) in float64."""
        return sum(self.terms(denoiser, x_0, t, z, **conditions), start=torch.zeros_like(t))

    def terms(
        self, denoiser: AbstractDenoiser, x_0: Tensor, t: Tensor, z: Tensor, **conditions: Any
    ) -> tuple[Tensor, Tensor]:
        """The squared error of the noise, and the bound's term in bits per dimension, each (B,). Raises
        ConfigError for a process without steps, or a denoiser without a variance."""
        process, x_0 = denoiser.process, wide(x_0)
        if not isinstance(process, DiscreteVP):
            raise ConfigError(
                f"A learned variance is that of the steps of a DiscreteVP, not of {type(process).__name__}: "
                "take model/process=ddpm or cosine."
            )
        x_t = process.marginal(x_0, t, wide(z))
        x0_hat, v = denoiser.with_variance(x_t, t, **conditions)
        error = snr(process, t) * mean_of_pixels((x0_hat - x_0).square())
        if v is None:
            raise ConfigError("HybridLoss trains a variance, which this denoiser does not say.")
        dt = 1 / process.num_steps
        posterior = _posterior(process, t - dt, t)
        # The first step's posterior has no variance: that of the second stands in, as in the official codes.
        later = t.clamp(min=2 * dt)
        variance = _posterior(process, later - dt, later).variance
        posterior = posterior._replace(variance=variance)
        log_variance, true = posterior.log_variance(v), per_image(variance.log(), x_t)
        mean = posterior.mean(x0_hat.detach(), x_t)
        distance = (posterior.mean(x_0, x_t) - mean).square()
        kl = (log_variance - true - 1 + (true - log_variance).exp() + distance / log_variance.exp()) / 2
        level = -_log_of_level(x_0, mean, log_variance / 2, self.num_levels)
        nats = torch.where(per_image(t < 1.5 * dt, x_t).bool(), level, kl)
        return error, mean_of_pixels(nats) / math.log(2)


def _log_of_level(x: Tensor, mean: Tensor, log_std: Tensor, num_levels: int) -> Tensor:
    """log P of the level of each pixel on [-1, 1], the outermost ones open, by the official approximation of
    the normal distribution function."""
    half = 1 / (num_levels - 1)

    def below(edge: Tensor) -> Tensor:
        u = (edge - mean) / log_std.exp()
        return (1 + (math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)).tanh()) / 2

    upper, lower = below(x + half), below(x - half)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
