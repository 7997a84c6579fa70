"""Observations pixel by pixel: y = h(x) + s n, where h may be curved and the deviation s may depend on x.

What PiGDM and DPS need of one are its value, its slope, and its deviation at the current estimate of the
image. `NoisyPixels` is denoising and inpainting with a deviation for each pixel; `Masked` is a picture of
logarithms of powers under a noise whose power adds.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gen.errors import ConfigError

__all__ = ["Linearized", "Masked", "NoisyPixels", "Observation"]


class Linearized(NamedTuple):
    """h(x), h'(x), and s(x) > 0 at each pixel; slope and deviation broadcast to the value. The value may be
    differentiated."""

    value: Tensor
    slope: Tensor
    deviation: Tensor


class Observation(ABC):
    """y = h(x) + s(x) n at each pixel by itself, with n ~ N(0, 1); x and y are (B, C, H, W)."""

    @abstractmethod
    def at(self, x: Tensor) -> Linearized:
        """The observation around x (B, C, H, W)."""

    def __call__(self, x: Tensor) -> Tensor:
        """h(x): what is observed but for the noise."""
        return self.at(x).value

    def pull(self, y: Tensor, x0_hat: Tensor, variance: Tensor) -> Tensor:
        """h' (y - h) / (s^2 + h'^2 `variance`) at x0_hat: the gradient of log q(y | x0) if x0 were
        N(x0_hat, `variance` I) and h its tangent; 0 where the slope is 0."""
        value, slope, std = self.at(x0_hat)
        rest = torch.where(slope > 0, y - value, 0.0)
        return slope * rest / (std.square() + slope.square() * variance)

    def distance(self, y: Tensor, x: Tensor) -> Tensor:
        """(B,): the norm of y - h(x), pixels weighed by 1 / s(x) with a mean square of 1 over those whose
        slope is not 0. Differentiates h but not the weights."""
        value, slope, std = self.at(x)
        seen = (slope > 0).expand_as(value)
        weights = torch.where(seen, std.detach().reciprocal(), 0.0)
        mean_square = weights.square().flatten(1).sum(1) / seen.flatten(1).sum(1).clamp(min=1)
        rest = torch.where(seen, y - value, 0.0) * weights
        return rest.flatten(1).norm(dim=1) / mean_square.sqrt().clamp(min=torch.finfo(value.dtype).tiny)


class NoisyPixels(Observation):
    """h(x) = x with the deviation `std`, a positive number or a map that broadcasts to (B, C, H, W); pixels
    where `seen` (a mask that broadcasts, all by default) is false are not observed.

    Raises ConfigError for deviations that are not positive numbers.
    """

    def __init__(self, std: Tensor | float, seen: Tensor | None = None):
        self.std = _positive("std", std)
        self.seen = torch.ones(()) if seen is None else seen.to(torch.bool)

    def at(self, x: Tensor) -> Linearized:
        self.std, self.seen = self.std.to(x), self.seen.to(x)
        return Linearized(x * self.seen, self.seen, self.std)


class Masked(Observation):
    """The sum of two powers on a logarithmic scale: that of x, and a noise of the level `floor`.

    h(x) = log(e^(rate x) + e^(rate floor)) / rate, h'(x) = 1 / (1 + e^(-rate (x - floor))), and s^2 = std^2 +
    ((1 - h') floor_std)^2: where x is louder it is seen with the deviation `std`, and where the noise is
    louder, y is the noise, with its own deviation `floor_std`, and says only that x is below it (the bounded
    marginalization of Cooke et al. 2001, https://doi.org/10.1016/S0167-6393(00)00034-0, made smooth).

    `rate` is the natural logarithm of the factor in power for which one unit of x stands. `floor`, `std`, and
    `floor_std` are numbers or maps that broadcast to (B, C, H, W); a floor of -infinity masks nothing, one of
    +infinity everything. Raises ConfigError for deviations or a rate that are not positive, and for a floor
    that is not a number.
    """

    def __init__(
        self,
        floor: Tensor | float,
        *,
        rate: float = 3 * math.log(10),  # one unit for 30 dB
        std: Tensor | float = 0.07,
        floor_std: Tensor | float = 0.05,
    ):
        if not 0 < rate < math.inf:
            raise ConfigError(f"rate={rate}: must be a positive number.")
        self.rate, self.floor = rate, torch.as_tensor(floor, dtype=torch.float64)
        if bool(self.floor.isnan().any()):
            raise ConfigError("The floor of the noise holds NaN; -inf stands for no noise.")
        self.std, self.floor_std = _positive("std", std), _positive("floor_std", floor_std)

    def at(self, x: Tensor) -> Linearized:
        self.floor, self.std, self.floor_std = (v.to(x) for v in (self.floor, self.std, self.floor_std))
        above = self.rate * (x - self.floor)
        # softplus(above) is log(1 + e^above); a floor of -inf leaves x itself.
        value = torch.where(self.floor == -math.inf, x, self.floor + F.softplus(above) / self.rate)
        slope = above.detach().sigmoid()
        std = (self.std.square() + ((1 - slope) * self.floor_std).square()).sqrt()
        return Linearized(value, slope, std)


def _positive(name: str, given: Tensor | float) -> Tensor:
    std = torch.as_tensor(given, dtype=torch.float64)
    if not bool((std.isfinite() & (std > 0)).all()):
        shown = given if std.ndim == 0 else f"a map from {float(std.min())} to {float(std.max())}"
        raise ConfigError(f"{name}={shown}: deviations of observed pixels are positive numbers.")
    return std
