"""Sampling from consistency models (Song et al. 2023, Algorithm 1, https://arxiv.org/abs/2303.01469)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.samplers.grids import Grid, karras
from lit_gen.score.samplers.ode import Trace, denoised
from lit_gen.score.sde import Process, wide

__all__ = ["consistency", "consistency_levels"]

between = partial(karras, rho=20.0, denoise=False)
"""Noise levels of which the middle one of two steps from 80 to 0.002 is 0.80."""


def consistency_levels(
    process: Process, num_steps: int, grid: Grid, levels: Sequence[float] | None
) -> Tensor:
    """The noise levels (num_steps,) in float64 at which the model is asked: that of t_max, then `levels`, or
    without these those of the grid, whose last time is left out.

    Raises ConfigError for levels that are not `num_steps` - 1 decreasing ones.
    """
    if levels is None:
        return process.noise_level(grid(process, num_steps)[:num_steps])
    first = process.noise_level(torch.tensor([process.t_max], dtype=torch.float64))
    found = torch.cat([first, torch.tensor(list(levels), dtype=torch.float64)])
    if len(found) != num_steps or bool((found.diff() >= 0).any()) or found[-1] <= 0:
        raise ConfigError(
            f"levels={list(levels)} with num_steps={num_steps}: give {num_steps - 1} noise levels below "
            f"{found[0]:g} and above 0, the highest first."
        )
    return found


@torch.no_grad()
def consistency(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 2,
    levels: Sequence[float] | None = None,  # of all steps but the first; None: those of `grid`
    grid: Grid = between,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max by `num_steps` evaluations of a consistency model: each
    image that it gives gets new noise of the next level, and is denoised again.
    """
    found = consistency_levels(denoiser.process, num_steps, grid, levels)
    y = wide(x) / denoiser.process.alpha(torch.tensor(denoiser.process.t_max, dtype=torch.float64))
    x0_hat = denoised(denoiser, y, found[0], label, trace, 0)
    for step, s in enumerate(found[1:], 1):
        y = x0_hat + s * randn(y.shape, generator, device=y.device, dtype=y.dtype)
        x0_hat = denoised(denoiser, y, s, label, trace, step)
    return x0_hat
