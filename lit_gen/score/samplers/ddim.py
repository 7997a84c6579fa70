"""DDIM and ancestral sampling (Song et al. 2020, https://arxiv.org/abs/2010.02502; Ho et al. 2020)."""

from itertools import pairwise

import torch
from torch import Tensor

from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.samplers.grids import Grid, uniform_time
from lit_gen.score.samplers.ode import Trace, begin, denoised

__all__ = ["ddim"]


@torch.no_grad()
def ddim(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 50,
    grid: Grid = uniform_time,
    eta: float = 0.0,  # 0: deterministic; 1: ancestral sampling, DDPM's with its smaller variance
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max, one evaluation a step, on any process.

    In y = x_t / alpha, of noise level s, a step keeps the part of the predicted noise that leaves room for
    fresh noise of deviation eta s_next sqrt(1 - s_next^2 / s^2), Equation 16 (k-diffusion's "ancestral" on
    `EDM`). `euler` with `ascending(grid)` is the inverse.
    """
    levels, y, alpha = begin(denoiser, x, grid, num_steps)
    for step, (s, s_next) in enumerate(pairwise(levels)):
        x0_hat = denoised(denoiser, y, s, label, trace, step)
        fresh = eta * s_next * (1 - (s_next / s).square()).clamp(min=0).sqrt()
        y = x0_hat + (s_next.square() - fresh.square()).clamp(min=0).sqrt() * (y - x0_hat) / s
        if fresh > 0:
            y = y + fresh * randn(y.shape, generator, device=y.device, dtype=y.dtype)
    return y * alpha
