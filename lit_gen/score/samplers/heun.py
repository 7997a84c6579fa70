"""Heun's method with churn (Karras et al. 2022, Algorithms 1 and 2, https://arxiv.org/abs/2206.00364)."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.samplers.grids import Grid, karras
from lit_gen.score.samplers.ode import Trace, begin, denoised

__all__ = ["heun"]


@torch.no_grad()
def heun(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 18,
    grid: Grid = karras,
    S_churn: float = 0.0,  # 0 = Algorithm 1, deterministic
    S_min: float = 0.0,  # noise is added only at noise levels from S_min ...
    S_max: float = math.inf,  # ... to S_max
    S_noise: float = 1.0,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max, by 2 num_steps - 1 evaluations; the last step, to noise
    level 0, is Euler's.
    """
    levels, y, alpha = begin(denoiser, x, grid, num_steps)
    gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
    for step, (s, s_next) in enumerate(pairwise(levels)):
        if gamma > 0 and S_min <= s <= S_max:
            s_hat = s * (1 + gamma)
            z = randn(y.shape, generator, device=y.device, dtype=y.dtype)
            y, s = y + (s_hat.square() - s.square()).sqrt() * S_noise * z, s_hat
        x0_hat = denoised(denoiser, y, s, label, trace, step)
        d, h = (y - x0_hat) / s, s_next - s
        if s_next == 0:
            y = x0_hat
        else:
            y_next = y + h * d
            d_next = (y_next - denoised(denoiser, y_next, s_next, label)) / s_next
            y = y + h * (d + d_next) / 2
    return y * alpha
