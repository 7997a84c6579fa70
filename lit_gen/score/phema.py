"""EDM2's power-function averages of weights, and any other average made from stored ones after training
(Karras et al. 2024, Section 3 and Appendix C, https://arxiv.org/abs/2312.02696).

The average at training time T weighs the weights of time t by t^gamma. Its length is told by its relative
deviation `std`, the standard deviation of that profile over T: 0.05 and 0.10 are the two averages that EDM2
keeps.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lit_gen.errors import ConfigError


@cache
def exponent(std: float) -> float:
    """gamma of a relative deviation: the root of (gamma + 1) = std^2 (gamma + 2)^2 (gamma + 3) (Equations 18
    and 126).
    """
    if not 0 < std < 12**-0.5:
        raise ConfigError(
            f"The relative deviation of a power-function average is between 0 and 0.2886, got {std}."
        )
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_beta(std: float, t_next: float, t_delta: float) -> float:
    """The decay of the update that takes the average from time t_next - t_delta to t_next (Equation 127)."""
    return (1 - t_delta / t_next) ** (exponent(std) + 1)


def post_hoc_coefficients(
    times: Sequence[float], stds: Sequence[float], target_time: float, target_std: float
) -> np.ndarray:
    """The weights (N,) with which N stored averages, of `times` and `stds`, come nearest the target profile
    (Algorithm 3).
    """
    t, gamma = np.asarray(times, float), np.array([exponent(s) for s in stds])
    gram = _inner(t[:, None], gamma[:, None], t[None], gamma[None])
    return np.linalg.solve(gram, _inner(t, gamma, float(target_time), exponent(target_std)))


def post_hoc_average(
    snapshots: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    """The state dict sum_i coefficients[i] snapshots[i], summed in float64; integer buffers are those of the
    last snapshot.
    """
    result = {}
    for name, last in snapshots[-1].items():
        if last.is_floating_point():
            total = torch.zeros_like(last, dtype=torch.float64)
            for c, snapshot in zip(coefficients, snapshots, strict=True):
                total += c * snapshot[name].to(torch.float64)
            last = total.to(last.dtype)
        result[name] = last
    return result


def _inner(t_a, gamma_a, t_b, gamma_b):
    """The inner product of two normalised profiles t^gamma on [0, t_a] and [0, t_b] (Equation 151)."""
    ratio = t_a / t_b
    power = np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**power / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))
