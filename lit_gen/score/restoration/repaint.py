"""RePaint (Lugmayr et al. 2022, Algorithm 1, https://arxiv.org/abs/2201.09865)."""

from itertools import pairwise

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.restoration.noise import Noise, check_exact
from lit_gen.score.restoration.operators import LinearOperator
from lit_gen.score.restoration.replacement import Replace
from lit_gen.score.samplers.grids import Grid, uniform_time
from lit_gen.score.samplers.ode import Trace
from lit_gen.score.sde import wide

__all__ = ["repaint", "walk"]


def walk(num_steps: int, jump_length: int, num_resamples: int) -> list[int]:
    """The grid indices that RePaint visits: every `jump_length` steps it goes back as many and does them
    again, each stretch `num_resamples` times in all. Ends at num_steps.
    """
    path, index = [0], 0
    while index < num_steps:
        stretch = min(jump_length, num_steps - index)
        down = list(range(index + 1, index + stretch + 1))
        up = list(range(index + stretch - 1, index - 1, -1))
        path += (down + up) * (num_resamples - 1) + down
        index += stretch
    return path


@torch.no_grad()
def repaint(
    denoiser: AbstractDenoiser,
    x: Tensor,
    operator: LinearOperator,
    y: Tensor,
    *,
    noise_std: Noise = 0.0,
    num_steps: int = 250,
    jump_length: int = 10,
    num_resamples: int = 10,
    grid: Grid = uniform_time,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 with A x_0 = y from `x` at t_max, on any process and with any operator.

    Ancestral steps with the seen part replaced, and jumps back to more noise in between, which let the unseen
    part come to terms with it. About num_steps num_resamples evaluations. For measurements without noise:
    raises ConfigError for what A^+ would blow up.
    """
    if jump_length < 1 or num_resamples < 1:
        raise ConfigError(
            f"jump_length and num_resamples must be at least 1, got {jump_length}, {num_resamples}."
        )
    check_exact(noise_std, operator, x, "repaint")
    process, x = denoiser.process, wide(x)
    times, replace = grid(process, num_steps), Replace(denoiser.process, operator, y, generator)
    path = walk(num_steps, jump_length, num_resamples)
    for step, (i, j) in enumerate(pairwise(path)):
        t, s = times[i], times[j]
        z = randn(x.shape, generator, device=x.device, dtype=x.dtype)
        if j < i:
            ratio, variance = process.transition(t, s)
            x = ratio * x + variance.sqrt() * z
            continue
        x0_hat = denoiser(x, t, label)
        if trace is not None:
            trace(step, x, x0_hat)
        # The posterior q(x_s | x_t, x0_hat).
        ratio, variance = process.transition(s, t)
        keep = ratio * (process.sigma(s) / process.sigma(t)).square()
        mean = keep * x + process.alpha(s) * variance / process.sigma(t).square() * x0_hat
        x = replace(mean + (variance.sqrt() * process.sigma(s) / process.sigma(t)) * z, s)
    return x
