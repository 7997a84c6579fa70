"""The noise on a measurement, one deviation for all of it or a map with one for each pixel, and what is known
of each coordinate of an image because of it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.score.restoration.observations import Observation
from lit_gen.score.restoration.operators import LinearOperator
from lit_gen.score.sde import wide_dtype

__all__ = ["Evidence", "Noise", "check_fractions", "deviation", "evidence"]

Noise = float | Tensor
"""`noise_std`: a number, or a tensor that broadcasts to the measurement."""

LARGEST_GAIN = 2.0  # of noise on a measurement that is taken as exact


def deviation(noise_std: Noise, y: Tensor, operator: LinearOperator | Observation | None = None) -> Noise:
    """`noise_std` as a float, or as a map beside `y` in its `wide_dtype`.

    Raises ConfigError if it is negative or no number, if a map does not fit y, and, with `operator`, for a
    map where A A^T is not diagonal in pixels, so that nothing is diagonal beside the noise, and for anything
    but 0 beside an observation. `y` is (B, ...).
    """
    if isinstance(operator, Observation) and (isinstance(noise_std, Tensor) or noise_std != 0):
        raise ConfigError(
            f"noise_std={'a map' if isinstance(noise_std, Tensor) else noise_std}: "
            f"{type(operator).__name__} says how noisy it is; leave noise_std at 0."
        )
    if not isinstance(noise_std, Tensor) or noise_std.ndim == 0:
        if not 0 <= (number := float(noise_std)) < math.inf:
            raise ConfigError(f"noise_std={noise_std}: a standard deviation is a number from 0 on.")
        return number
    if not bool((noise_std.isfinite() & (noise_std >= 0)).all()):
        raise ConfigError("noise_std is a map with values that are negative or no numbers.")
    lead = zip(reversed(noise_std.shape), reversed(y.shape), strict=False)
    if noise_std.ndim > y.ndim or any(a not in (1, b) for a, b in lead):
        raise ConfigError(
            f"noise_std is a map {tuple(noise_std.shape)}, which does not fit a measurement {tuple(y.shape)}."
        )
    if isinstance(operator, LinearOperator) and not operator.pixelwise:
        raise ConfigError(
            f"noise_std is a map, and {type(operator).__name__} mixes pixels: its singular vectors do not "
            "keep the noise of one pixel apart from that of another. Take method=mmps or method=dps."
        )
    return noise_std.to(y.device, wide_dtype(y.device))


def check_fractions(**parts: float) -> None:
    """Raises ConfigError for options, by name, that are not from 0 to 1."""
    for name, part in parts.items():
        if not 0 <= part <= 1:
            raise ConfigError(f"method.{name}={part}: must be from 0 to 1.")


def check_linear(operator: LinearOperator | Observation, method: str) -> None:
    """Raises ConfigError for an observation, of a method that needs A x."""
    if isinstance(operator, Observation):
        raise ConfigError(
            f"{type(operator).__name__} is no linear operator, which method={method} needs. Take "
            "method=pigdm or method=dps."
        )


def check_exact(noise_std: Noise, operator: LinearOperator, x: Tensor, method: str) -> None:
    """Raises ConfigError for a map, and where undoing the operator on images like `x` (B, C, H, W) would blow
    the noise up: of a method that takes what was measured as exact."""
    check_linear(operator, method)
    others = "Take method=dps, pigdm, ddrm, ddnm, diffpir, or mmps, which model the noise."
    if isinstance(noise_std, Tensor) and noise_std.ndim > 0:
        raise ConfigError(f"noise_std is a map: method={method} takes what was measured as exact. {others}")
    if deviation(noise_std, x) == 0:
        return
    v = operator.coordinates(x.new_zeros(1, *x.shape[1:]))
    s = operator.singular_values(v).expand(v.shape)
    gain = float(torch.where(s > 0, s, math.inf).square().reciprocal().mean().sqrt())
    if gain > LARGEST_GAIN:
        raise ConfigError(
            f"noise_std={noise_std}: method={method} takes what was measured as exact, and undoing this "
            f"operator would make the noise {gain:.0f} times larger. {others}"
        )


@dataclass(frozen=True)
class Evidence:
    """What y = A x + n says of v = V^T x: v = `mean` + `std` n, with n ~ N(0, 1), where `seen`; nothing of
    the others, where `mean` and `std` are 0. All broadcast to v."""

    seen: Tensor
    mean: Tensor
    std: Tensor


def evidence(operator: LinearOperator, y: Tensor, noise_std: Noise) -> Evidence:
    """Of a measurement y (B, ...) and its noise. Raises ConfigError, see `deviation`."""
    noise_std = deviation(noise_std, y, operator)
    u = operator.measured_coordinates(y)
    s = operator.singular_values(u)
    seen = s > 0
    inverse = torch.where(seen, s, math.inf).reciprocal()
    if isinstance(noise_std, Tensor):
        noise_std = operator.measured_coordinates(noise_std.expand(y.shape))
    return Evidence(seen, inverse * u, inverse * noise_std)
