"""Preconditioning: how a network becomes a denoiser (Table 1 of Karras et al. 2022,
https://arxiv.org/abs/2206.00364).

`precondition(process, t)` returns (c_skip, c_out, c_in, c_noise), each of the shape of `t`, and

    x0_hat = c_skip x_t + c_out net(c_in x_t, c_noise).

The preconditioning says what the network predicts; its `label(process, t)` computes c_noise, what the network
is conditioned on. Each holds for every process. EDM's "VP" and "iDDPM" columns are `PredictNoise` on `VP` and
`DiscreteVP(cosine_betas())`, its "VE" column is `PredictScaledScore` on `VE`; to sample such a model on
another process, see `denoiser.ReparameterizedDenoiser`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.score.sde import DiscreteVP, Process

__all__ = [
    "EDMPrecondition",
    "LevelIndex",
    "LogNoiseLevel",
    "NoiseLabel",
    "Precondition",
    "PredictFlow",
    "PredictImage",
    "PredictNoise",
    "PredictPathVelocity",
    "PredictScaledScore",
    "PredictScore",
    "PredictVelocity",
    "RemainingTime",
    "ScaledTime",
    "StepIndex",
    "check_defined",
]

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]
Precondition = Callable[[Process, Tensor], Coefficients]
NoiseLabel = Callable[[Process, Tensor], Tensor]


@dataclass(frozen=True)
class ScaledTime:
    """scale t: 999 t in the official VP and sub-VP models, whatever their number of steps."""

    scale: float = 999.0

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return self.scale * t


@dataclass(frozen=True)
class RemainingTime:
    """1 - t, the time of SiT, which is 0 in noise and 1 in data."""

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return 1 - t


@dataclass(frozen=True)
class LogNoiseLevel:
    """scale ln(s / unit): ln(s) / 4 for EDM, ln(s / 2) for NCSN++, whose images live on [0, 1]."""

    scale: float = 0.25
    unit: float = 1.0

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return self.scale * (process.noise_level(t) / self.unit).log()


@dataclass(frozen=True)
class StepIndex:
    """The step of a `DiscreteVP`, from 0; times between two steps get numbers between unless `nearest`.

    `nearest` takes the step whose noise level is nearest, -1 standing for no noise, as EDM does for iDDPM's
    networks.
    """

    nearest: bool = False

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        if not isinstance(process, DiscreteVP):
            raise ConfigError(
                f"StepIndex numbers the steps of a DiscreteVP process, not of {type(process).__name__}."
            )
        index = process.index(t)
        if not self.nearest:
            return index
        low, level = index.floor(), process.noise_level(t)
        below, above = (process.noise_level((i + 1) / process.num_steps) for i in (low, low + 1))
        return torch.where(level - below <= above - level, low, low + 1)


@dataclass(frozen=True)
class LevelIndex:
    """The nearest of `num_levels` geometric noise levels, counted from the largest (NCSN, NCSNv2, discrete
    VE).
    """

    num_levels: int
    sigma_max: float
    sigma_min: float

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        span = math.log(self.sigma_max / self.sigma_min)
        depth = (self.sigma_max / process.noise_level(t)).log() / span
        return (depth * (self.num_levels - 1)).round().clamp(0, self.num_levels - 1)


@dataclass(frozen=True)
class EDMPrecondition:
    """Unit variance of the network's input and target for data of deviation `sigma_data`."""

    sigma_data: float = 0.5
    label: NoiseLabel = LogNoiseLevel()

    def __call__(self, process: Process, t: Tensor) -> Coefficients:
        alpha, s = process.alpha(t), process.noise_level(t)
        total = s.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = s * self.sigma_data / total.sqrt()
        return c_skip / alpha, c_out, 1 / (total.sqrt() * alpha), self.label(process, t)


@dataclass(frozen=True)
class PredictNoise:
    """The network predicts z: x0_hat = (x_t - sigma net) / alpha (DDPM; VP and sub-VP, whose score is -net /
    sigma).
    """

    label: NoiseLabel = ScaledTime()

    def __call__(self, process: Process, t: Tensor) -> Coefficients:
        alpha = process.alpha(t)
        return 1 / alpha, -process.noise_level(t), torch.ones_like(alpha), self.label(process, t)


@dataclass(frozen=True)
class PredictScaledScore:
    """The network predicts sigma times the score, -z: x0_hat = (x_t + sigma net) / alpha.

    NCSNv2 and NCSN++, whose division of the output by sigma belongs here and is no part of our networks.
    """

    label: NoiseLabel = LogNoiseLevel(1.0, 2.0)

    def __call__(self, process: Process, t: Tensor) -> Coefficients:
        alpha = process.alpha(t)
        return 1 / alpha, process.noise_level(t), torch.ones_like(alpha), self.label(process, t)


@dataclass(frozen=True)
class PredictScore:
    """The network predicts the score: x0_hat = (x_t + sigma^2 net) / alpha (NCSN, with `LevelIndex`)."""

    label: NoiseLabel = LogNoiseLevel()

    def __call__(self, process: Process, t: Tensor) -> Coefficients:
        alpha, sigma = process.alpha(t), process.sigma(t)
        return 1 / alpha, sigma.square() / alpha, torch.ones_like(alpha), self.label(process, t)


@dataclass(frozen=True)
class PredictImage:
    """The network predicts x_0."""

    label: NoiseLabel = ScaledTime()

    def __call__(self, process: Process, t: Tensor) -> Coefficients:
        one = torch.ones_like(process.alpha(t))
        return torch.zeros_like(one), one, one, self.label(process, t)


@dataclass(frozen=True)
class PredictVelocity:
    """The network predicts v = alpha z - sigma x_0 (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512)."""

    label: NoiseLabel = ScaledTime()

    def __call__(self, process: Process, t: Tensor) -> Coefficients:
        alpha, sigma = process.alpha(t), process.sigma(t)
        power = alpha.square() + sigma.square()
        return alpha / power, -sigma / power, torch.ones_like(alpha), self.label(process, t)


@dataclass(frozen=True)
class PredictFlow:
    """The network predicts z - x_0, the velocity of rectified flow (Liu et al. 2022,
    https://arxiv.org/abs/2209.03003).
    """

    label: NoiseLabel = ScaledTime()

    def __call__(self, process: Process, t: Tensor) -> Coefficients:
        alpha, sigma = process.alpha(t), process.sigma(t)
        total = alpha + sigma
        return 1 / total, -sigma / total, torch.ones_like(alpha), self.label(process, t)


@dataclass(frozen=True)
class PredictPathVelocity:
    """The network predicts -dx_t/dt = -(alpha' x_0 + sigma' z), SiT's velocity from noise to data on any
    process (Ma et al. 2024, https://arxiv.org/abs/2401.08740, Equation 5); on `Flow`, x_0 - z.
    """

    label: NoiseLabel = RemainingTime()

    def __call__(self, process: Process, t: Tensor) -> Coefficients:
        alpha, sigma = process.alpha(t), process.sigma(t)
        d_alpha, d_sigma = process.slopes(t)
        rate = alpha * d_sigma - sigma * d_alpha
        return d_sigma / rate, sigma / rate, torch.ones_like(alpha), self.label(process, t)


def check_defined(precondition: Precondition, process: Process, t: Tensor, key: str) -> None:
    """Raises ConfigError for a time that the coefficients are not finite at, such as t = 1 of `Flow`, where
    nothing is left of the image; `key` is where the time was given."""
    if not all(bool((c.abs() < 1e12).all()) for c in precondition(process, t)):
        raise ConfigError(
            f"{key}: {type(precondition).__name__} on {type(process).__name__} is not defined at "
            f"t={float(t.max()):g}: start at an earlier time, such as 0.999, or take a precondition that "
            "predicts a velocity."
        )
