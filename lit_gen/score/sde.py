"""Processes: how an image becomes noise, x_t = alpha(t) x_0 + sigma(t) z with z ~ N(0, I).

A process is its signal factor `alpha` and its `noise_level` sigma / alpha; everything else follows. `t` is a
float tensor of shape () or (B,); coefficients come back with the shape of `t`, in float64 (`wide`), because 1
- exp(-small) in float32 is wrong by per cents where sampling ends.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn

__all__ = [
    "EDM",
    "GVP",
    "VE",
    "VP",
    "DiscreteVP",
    "Flow",
    "Process",
    "SubVP",
    "cosine_betas",
    "linear_betas",
    "per_image",
    "per_row",
    "sigmoid_betas",
    "wide",
    "wide_dtype",
]


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, the precision of coefficients and of a sampler's state; float32 on Apple's GPUs, which have no
    float64.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """`x` in the `wide_dtype` of its device."""
    return x.to(wide_dtype(x.device))


def per_image(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape () or (B,) in the dtype of `x` (B, ...), shaped to multiply it.

    A single number on the CPU stays there: kernels of every device take it as it is, and to copy it to a GPU
    would wait for that GPU.
    """
    if _is_host_number(coefficient):
        return coefficient.to(x.dtype)
    return coefficient.to(x).reshape(-1, *(1,) * (x.ndim - 1))


def per_row(value: Tensor, x: Tensor) -> Tensor:
    """A value of shape () or (B,) as (B,), in the dtype and beside `x` (B, ...); see `per_image`."""
    n = x.shape[0]
    return x.new_empty(n).fill_(value) if _is_host_number(value) else value.to(x).expand(n)


def _is_host_number(x: Tensor) -> bool:
    return x.ndim == 0 and x.device.type == "cpu"


class Process(ABC):
    """The interface. `t_max` is where sampling starts, `t_min` where it ends."""

    t_min: float
    t_max: float

    @property
    def prior_std(self) -> float:
        """The standard deviation of the prior."""
        return 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the image in x_t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The standard deviation of the noise in x_t."""

    @abstractmethod
    def noise_level(self, t: Tensor) -> Tensor:
        """sigma / alpha, strictly increasing in t: the noise of x_t / alpha."""

    @abstractmethod
    def time(self, noise_level: Tensor) -> Tensor:
        """The inverse of `noise_level`."""

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f(t) in dx = f(t) x dt + g(t) dw, the derivative of log alpha."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) in dx = f(t) x dt + g(t) dw; g^2 = d(sigma^2)/dt - 2 f sigma^2."""

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt), finite wherever the process may start or end."""
        f, sigma = self.drift(t), self.sigma(t)
        return f * self.alpha(t), f * sigma + self.diffusion(t).square() / (2 * sigma)

    def marginal(self, x_0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x_t for an image (B, ...) and its noise z of the same shape."""
        return per_image(self.alpha(t), x_0) * x_0 + per_image(self.sigma(t), x_0) * z

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(ratio, variance) of x_t = ratio x_s + sqrt(variance) z for s <= t; `s` may be the time of noise
        level 0.
        """
        ratio = self.alpha(t) / self.alpha(s)
        return ratio, self.alpha(t).square() * (self.noise_level(t).square() - self.noise_level(s).square())

    def prior_sample(
        self, shape: Sequence[int], generator: Generator = None, *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The start of sampling, N(0, prior_std^2), float32 of `shape` (B, ...)."""
        return self.prior_std * randn(shape, generator, device=device)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log N(x; 0, prior_std^2) in nats, summed over each row of (B, ...) -> (B,) in float64."""
        x = wide(x).flatten(1)
        constant = x.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(self.prior_std))
        return -x.square().sum(1) / (2 * self.prior_std**2) - constant


def _increasing(low: float, high: float, names: str, *, floor: float = 0.0) -> None:
    if not floor <= low < high:
        raise ConfigError(f"{names} must be increasing and at least {floor:g}, got {low} and {high}.")


class _ConstantSignal(Process):
    """alpha = 1: the noise level is sigma."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(wide(t))

    def noise_level(self, t: Tensor) -> Tensor:
        return self.sigma(t)

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(wide(t))


@dataclass(frozen=True)
class EDM(_ConstantSignal):
    """x_t = x_0 + t z: time is the noise level (Karras et al. 2022, Section 4,
    https://arxiv.org/abs/2206.00364).
    """

    t_min: float = 0.002
    t_max: float = 80.0

    def __post_init__(self):
        _increasing(self.t_min, self.t_max, "t_min, t_max")

    @property
    def prior_std(self) -> float:
        return self.t_max

    def sigma(self, t: Tensor) -> Tensor:
        return wide(t)

    def time(self, noise_level: Tensor) -> Tensor:
        return wide(noise_level)

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * wide(t)).sqrt()


@dataclass(frozen=True)
class VE(_ConstantSignal):
    """x_t = x_0 + sigma(t) z, sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021,
    https://arxiv.org/abs/2011.13456).

    On [-1, 1] data the deviations are twice those of the official configurations, whose images live on [0,
    1]. With `t_min` 0 and n times spread evenly it has the geometric levels of NCSN.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self):
        _increasing(self.sigma_min, self.sigma_max, "sigma_min, sigma_max", floor=1e-12)
        _increasing(self.t_min, self.t_max, "t_min, t_max")

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    @property
    def log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (wide(t) * self.log_ratio).exp()

    def time(self, noise_level: Tensor) -> Tensor:
        return (wide(noise_level) / self.sigma_min).log() / self.log_ratio

    def diffusion(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self.log_ratio)


class _VariancePreserving(Process):
    """alpha = exp(-B / 2), sigma^2 = 1 - exp(-B) with B the integral of beta."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def integral(self, t: Tensor) -> Tensor:
        """B(t), the integral of beta from 0."""

    @abstractmethod
    def inverse(self, integral: Tensor) -> Tensor:
        """t of B."""

    def alpha(self, t: Tensor) -> Tensor:
        return (-self.integral(t) / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-(-self.integral(t)).expm1()).sqrt()

    def noise_level(self, t: Tensor) -> Tensor:
        return self.integral(t).expm1().sqrt()

    def time(self, noise_level: Tensor) -> Tensor:
        return self.inverse(wide(noise_level).square().log1p())

    def drift(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()


@dataclass(frozen=True)
class VP(_VariancePreserving):
    """Variance preserving with beta = beta_min + t (beta_max - beta_min) (Song et al. 2021).

    `t_min` 1e-3 is where the official samplers end; they train from 1e-5 on (`losses.UniformTime`).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self):
        _increasing(self.beta_min, self.beta_max, "beta_min, beta_max", floor=1e-12)
        _increasing(self.t_min, self.t_max, "t_min, t_max")

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + wide(t) * (self.beta_max - self.beta_min)

    def integral(self, t: Tensor) -> Tensor:
        t = wide(t)
        return t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)

    def inverse(self, integral: Tensor) -> Tensor:
        # The root of the quadratic without the difference of near-equal numbers.
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral).sqrt()
        return 2 * integral / (self.beta_min + root)


@dataclass(frozen=True)
class SubVP(Process):
    """The drift of `VP` with sigma = 1 - exp(-B), not its root (Song et al. 2021, Equation 29)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self):
        VP(self.beta_min, self.beta_max, self.t_min, self.t_max)

    @property
    def _vp(self) -> VP:
        return VP(self.beta_min, self.beta_max)

    def alpha(self, t: Tensor) -> Tensor:
        return self._vp.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return -(-self._vp.integral(t)).expm1()

    def noise_level(self, t: Tensor) -> Tensor:
        return 2 * (self._vp.integral(t) / 2).sinh()

    def time(self, noise_level: Tensor) -> Tensor:
        return self._vp.inverse(2 * (wide(noise_level) / 2).asinh())

    def drift(self, t: Tensor) -> Tensor:
        return self._vp.drift(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return (-self._vp.beta(t) * (-2 * self._vp.integral(t)).expm1()).sqrt()


@dataclass(frozen=True)
class _Interpolant(Process):
    """From x_0 at t = 0 to z at t = 1 (Albergo & Vanden-Eijnden 2022, https://arxiv.org/abs/2209.15571).

    Starts short of t = 1 by default, where the noise level is infinite: only `probability_flow`,
    `runge_kutta`, and `interpolant_sde`, which step x_t itself, can start there.
    """

    t_min: float = 1e-3
    t_max: float = 0.999

    def __post_init__(self):
        _increasing(self.t_min, self.t_max, "t_min, t_max")
        if self.t_max > 1:
            raise ConfigError(
                f"t_max of {type(self).__name__} must be at most 1, where nothing is left of the image; got "
                f"{self.t_max}."
            )

    @property
    def prior_std(self) -> float:
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))


@dataclass(frozen=True)
class Flow(_Interpolant):
    """Rectified flow: x_t = (1 - t) x_0 + t z (Liu et al. 2022, https://arxiv.org/abs/2209.03003)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - wide(t)

    def sigma(self, t: Tensor) -> Tensor:
        return wide(t)

    def noise_level(self, t: Tensor) -> Tensor:
        return wide(t) / (1 - wide(t))

    def time(self, noise_level: Tensor) -> Tensor:
        return wide(noise_level) / (1 + wide(noise_level))

    def drift(self, t: Tensor) -> Tensor:
        return -1 / (1 - wide(t))

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * self.noise_level(t)).sqrt()

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(wide(t))
        return -one, one


@dataclass(frozen=True)
class GVP(_Interpolant):
    """The "generalized VP" interpolant: x_t = cos(pi t / 2) x_0 + sin(pi t / 2) z, whose variance is
    preserved (SiT, Ma et al. 2024, https://arxiv.org/abs/2401.08740, Section 3.1).
    """

    def alpha(self, t: Tensor) -> Tensor:
        return (wide(t) * (math.pi / 2)).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return (wide(t) * (math.pi / 2)).sin()

    def noise_level(self, t: Tensor) -> Tensor:
        return (wide(t) * (math.pi / 2)).tan()

    def time(self, noise_level: Tensor) -> Tensor:
        return wide(noise_level).atan() * (2 / math.pi)

    def drift(self, t: Tensor) -> Tensor:
        return self.noise_level(t) * (-math.pi / 2)

    def diffusion(self, t: Tensor) -> Tensor:
        return (math.pi * self.noise_level(t)).sqrt()

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.sigma(t) * (-math.pi / 2), self.alpha(t) * (math.pi / 2)


class DiscreteVP(_VariancePreserving):
    """DDPM: alpha^2 = prod (1 - beta_i) (Ho et al. 2020, https://arxiv.org/abs/2006.11239), made continuous.

    Step i of N is the time (i + 1) / N; between two of them log alpha is linear, so that every sampler runs
    on it and the given betas are its exact transitions. `index(t)` is the step as a number, N t - 1.
    """

    def __init__(self, betas: Sequence[float] | Tensor):
        betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ConfigError(
                f"betas must be at least two numbers between 0 and 1, got {betas.tolist()[:4]} ..."
            )
        # -2 log alpha at t = 0, 1/N, ..., 1.
        self._knots = torch.cat([betas.new_zeros(1), -(-betas).log1p().cumsum(0)])
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # the knots, by place
        self.num_steps = len(betas)
        self.t_min, self.t_max = 1 / len(betas), 1.0

    def index(self, t: Tensor) -> Tensor:
        return wide(t) * self.num_steps - 1

    def beta(self, t: Tensor) -> Tensor:
        _, low, high = self._segment(t)
        return (high - low) * self.num_steps

    def integral(self, t: Tensor) -> Tensor:
        part, low, high = self._segment(t)
        return low + part * (high - low)

    def inverse(self, integral: Tensor) -> Tensor:
        knots = self._table(integral)
        k = torch.bucketize(integral, knots).clamp(1, self.num_steps)
        return (k - 1 + (integral - knots[k - 1]) / (knots[k] - knots[k - 1])) / self.num_steps

    def _table(self, like: Tensor) -> Tensor:
        """The knots beside `like`, copied once: a copy waits for the device."""
        place = like.device, like.dtype
        if place not in self._tables:
            self._tables[place] = self._knots.to(like)
        return self._tables[place]

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position = wide(t) * self.num_steps
        knots = self._table(position)
        k = position.ceil().long().clamp(1, self.num_steps)  # the segment that ends at step k - 1
        return position - (k - 1), knots[k - 1], knots[k]


def linear_betas(num_steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Ho et al. 2020; both ends are scaled by 1000 / num_steps, so that x_T is as noisy for any number of
    steps.
    """
    return torch.linspace(first, last, num_steps, dtype=torch.float64) * (1000 / num_steps)


def cosine_betas(num_steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    """alpha^2 = cos^2((t + offset) / (1 + offset) pi / 2) (Nichol & Dhariwal 2021,
    https://arxiv.org/abs/2102.09672).
    """
    t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    return _betas_of(((t + offset) / (1 + offset) * math.pi / 2).cos().square(), largest)


def sigmoid_betas(num_steps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    """alpha^2 falls from 1 to 0 along a sigmoid on [start, end] / tau (Jabri et al. 2022,
    https://arxiv.org/abs/2212.11972).
    """
    t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    signal = -((t * (end - start) + start) / tau).sigmoid()
    return _betas_of((signal - signal[-1]) / (signal[0] - signal[-1]), 0.999)


def _betas_of(alpha_squared: Tensor, largest: float) -> Tensor:
    return (1 - alpha_squared[1:] / alpha_squared[:-1]).clamp(max=largest)
