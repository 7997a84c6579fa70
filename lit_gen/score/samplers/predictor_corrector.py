"""Predictor-corrector sampling (Song et al. 2021, Algorithms 1-5 and Appendices E-G,
https://arxiv.org/abs/2011.13456).

A sampler is put together from three functions: a discretisation says how the forward process goes from time s
to t, a predictor reverses such a step, a corrector moves at one time. `x_t = ratio x_s + sqrt(variance) z` is
all that a predictor knows. `x`, `score`, and `z` are (B, C, H, W), times are ().
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.samplers.grids import Grid, uniform_time
from lit_gen.score.samplers.ode import Trace, require_signal
from lit_gen.score.sde import VE, VP, Process, per_image, wide

__all__ = [
    "AnnealedLangevin",
    "FixedStep",
    "Langevin",
    "OfficialSteps",
    "Step",
    "ancestral",
    "euler_maruyama",
    "exact",
    "predictor_corrector",
    "probability_flow_step",
    "reverse_diffusion",
]


class Step(NamedTuple):
    """A forward step from s to t: x_t = ratio x_s + sqrt(variance) z; `ancestral_std` is what ancestral
    sampling adds.
    """

    ratio: Tensor
    variance: Tensor
    ancestral_std: Tensor


Discretization = Callable[[Process, Tensor, Tensor], Step]
Predictor = Callable[[Tensor, Tensor, Step, Tensor], tuple[Tensor, Tensor]]
Corrector = Callable[[AbstractDenoiser, Tensor, Tensor, Step, Tensor | None, Generator], Tensor]
Constrain = Callable[[Tensor, Tensor], Tensor]


# --- discretisations: (process, s, t) -> Step ---------------------------------------------------------------


def exact(process: Process, s: Tensor, t: Tensor) -> Step:
    """The process's own transition, the ancestral noise that of the posterior q(x_s | x_t, x_0)."""
    ratio, variance = process.transition(s, t)
    return Step(ratio, variance, variance.sqrt() * process.sigma(s) / process.sigma(t))


def euler_maruyama(process: Process, s: Tensor, t: Tensor) -> Step:
    """One Euler-Maruyama step of the SDE; the last one, to noise level 0, is exact."""
    return exact(process, s, t) if process.noise_level(s) == 0 else FixedStep(float(t - s))(process, s, t)


@dataclass(frozen=True)
class FixedStep:
    """Euler-Maruyama steps of length `dt` whatever the grid: 1 / N in the official sampler."""

    dt: float

    def __call__(self, process: Process, s: Tensor, t: Tensor) -> Step:
        variance = process.diffusion(t).square() * self.dt
        return Step(1 + process.drift(t) * self.dt, variance, variance.sqrt())


@dataclass(frozen=True)
class OfficialSteps:
    """The steps of the official code for `num_steps` N: those of the discrete model nearest below t (N - 1).

    VE: the geometric levels; VP: beta_i = beta(i / (N - 1)) / N with the larger ancestral variance; others:
    Euler-Maruyama. They differ from `exact` steps by O(1 / N). VP needs N > beta_max, or beta_i would exceed
    1.
    """

    num_steps: int = 1000

    def __call__(self, process: Process, s: Tensor, t: Tensor) -> Step:
        n = self.num_steps
        i = (wide(t) / process.t_max * (n - 1)).floor()
        if isinstance(process, VE):
            high = process.sigma(i / (n - 1)).square()
            low = torch.where(i > 0, process.sigma((i - 1) / (n - 1)).square(), 0)
            return Step(torch.ones_like(high), high - low, (low * (high - low) / high).sqrt())
        if isinstance(process, VP):
            beta = process.beta(i / (n - 1)) / n
            if beta >= 1:
                raise ConfigError(
                    f"OfficialSteps({n}) on VP needs num_steps > beta_max={process.beta_max:g}; use `exact`."
                )
            return Step((1 - beta).sqrt(), beta, beta.sqrt())
        return FixedStep(1 / n)(process, s, t)


# --- predictors: (x_t, score, step, z) -> (mean of x_s, x_s) ------------------------------------------------


def reverse_diffusion(x: Tensor, score: Tensor, step: Step, z: Tensor) -> tuple[Tensor, Tensor]:
    """x - (ratio - 1) x + variance score + sqrt(variance) z (Equation 46); with `euler_maruyama` steps that
    sampler.
    """
    mean = (2 - step.ratio) * x + step.variance * score
    return mean, mean + step.variance.sqrt() * z


def ancestral(x: Tensor, score: Tensor, step: Step, z: Tensor) -> tuple[Tensor, Tensor]:
    """(x + variance score) / ratio, DDPM's mean, and `ancestral_std` z (Equations 4 and 47)."""
    mean = (x + step.variance * score) / step.ratio
    return mean, mean + step.ancestral_std * z


def probability_flow_step(x: Tensor, score: Tensor, step: Step, z: Tensor) -> tuple[Tensor, Tensor]:
    """x - (ratio - 1) x + variance score / 2, no noise (Appendix D.3)."""
    mean = (2 - step.ratio) * x + step.variance * score / 2
    return mean, mean


# --- correctors ---------------------------------------------------------------------------------------------


class _LangevinSteps(ABC):
    """`num_steps` Langevin steps at one time."""

    num_steps: int

    @abstractmethod
    def size(self, score: Tensor, z: Tensor, ratio: Tensor, sigma: Tensor) -> Tensor:
        """The length of a step, to multiply (B, ...)."""

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        x: Tensor,
        t: Tensor,
        step: Step,
        label: Tensor | None = None,
        generator: Generator = None,
    ) -> Tensor:
        for _ in range(self.num_steps):
            score = denoiser.score(x, t, label)
            z = randn(x.shape, generator, device=x.device, dtype=x.dtype)
            size = self.size(score, z, step.ratio, denoiser.process.sigma(t))
            x = x + size * score + (2 * size).sqrt() * z
        return x


@dataclass(frozen=True)
class Langevin(_LangevinSteps):
    """Langevin steps of length 2 ratio^2 (snr ||z|| / ||score||)^2 (Algorithms 4 and 5).

    Each image has its own step size. With `per_image=False` the norms are averaged over the batch, the
    official rule, under which an image depends on its batch mates.
    """

    snr: float = 0.16
    num_steps: int = 1
    per_image: bool = True

    def size(self, score: Tensor, z: Tensor, ratio: Tensor, sigma: Tensor) -> Tensor:
        return 2 * ratio.square() * (self.snr * self._norm(z) / self._norm(score)).square()

    def _norm(self, v: Tensor) -> Tensor:
        norm = v.flatten(1).norm(dim=1)
        return per_image(norm if self.per_image else norm.mean(), v)


@dataclass(frozen=True)
class AnnealedLangevin(_LangevinSteps):
    """Langevin steps of length 2 ratio^2 (snr sigma)^2, the corrector "ALD" of the official code."""

    snr: float = 0.176
    num_steps: int = 5

    def size(self, score: Tensor, z: Tensor, ratio: Tensor, sigma: Tensor) -> Tensor:
        return 2 * (ratio * self.snr * sigma).square()


@torch.no_grad()
def predictor_corrector(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 1000,
    predictor: Predictor = reverse_diffusion,
    corrector: Corrector = Langevin(),
    discretization: Discretization = exact,
    grid: Grid = uniform_time,
    constrain: Constrain | None = None,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max: at each time the corrector, then the predictor to the
    next.

    On a grid that ends at noise level 0 the last predictor's mean is the result, which denoises.
    `constrain(x_t, t)` changes the state after every move. `num_steps` evaluations by the predictor, and
    those of the corrector.
    """
    process, x = denoiser.process, wide(x)
    constrain = constrain or (lambda x_t, t: x_t)
    times = grid(process, num_steps)
    require_signal(process, times)
    for k, (t, s) in enumerate(pairwise(times)):
        step = discretization(process, s, t)
        if corrector is not None:
            x = constrain(corrector(denoiser, x, t, step, label, generator), t)
        if predictor is None and trace is None:
            continue
        x0_hat = denoiser(x, t, label)
        if trace is not None:
            trace(k, x, x0_hat)
        if predictor is not None:
            score = (process.alpha(t) * x0_hat - x) / process.sigma(t).square()
            mean, x = predictor(x, score, step, randn(x.shape, generator, device=x.device, dtype=x.dtype))
            x = constrain(mean if process.noise_level(s) == 0 else x, s)
    return x
