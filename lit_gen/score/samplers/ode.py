"""The probability-flow ODE by fixed steps (Song et al. 2021, https://arxiv.org/abs/2011.13456).

Most samplers use the form that all processes share: y = x_t / alpha is x_0 + s z, and dy/ds = (y - x0_hat) /
s with s the noise level. `probability_flow` alone steps x_t itself in time.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lit_gen.rng import Generator
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.samplers.grids import Grid, karras, uniform_time
from lit_gen.score.sde import Process, per_image, wide

__all__ = ["Trace", "begin", "denoised", "euler", "probability_flow", "velocity"]

Trace = Callable[[int, Tensor, Tensor], None]
"""`trace(step, x_t, x0_hat)` watches a trajectory."""


def begin(denoiser: AbstractDenoiser, x: Tensor, grid: Grid, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The grid's noise levels, y = x / alpha in float64 at the first, and alpha at the last."""
    process = denoiser.process
    times = grid(process, num_steps)
    return process.noise_level(times), wide(x) / process.alpha(times[0]), process.alpha(times[-1])


def denoised(
    denoiser: AbstractDenoiser,
    y: Tensor,
    s: Tensor,
    label: Tensor | None = None,
    trace: Trace | None = None,
    step: int = 0,
) -> Tensor:
    """x0_hat for y = x_t / alpha at noise level s."""
    t = denoiser.process.time(s)
    x_t = y * denoiser.process.alpha(t)
    x0_hat = denoiser(x_t, t, label)
    if trace is not None:
        trace(step, x_t, x0_hat)
    return x0_hat


def velocity(denoiser: AbstractDenoiser, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    """dx/dt = f x - g^2 score / 2 of the probability flow, for t of shape () or (B,)."""
    return _velocity(denoiser.process, x_t, t, denoiser(x_t, t, label))


def _velocity(process: Process, x_t: Tensor, t: Tensor, x0_hat: Tensor) -> Tensor:
    rate = (process.diffusion(t) / process.sigma(t)).square() / 2
    f, rate, alpha = (per_image(c, x_t) for c in (process.drift(t), rate, process.alpha(t)))
    return f * x_t + rate * (x_t - alpha * x0_hat)


@torch.no_grad()
def euler(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 18,
    grid: Grid = karras,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max by Euler steps in the noise level, one evaluation each.

    This is DDIM with eta = 0 on a variance-preserving process (`ddim`), and Euler's method in t on `Flow`.
    With `ascending(grid)` it is DDIM's inverse, from an image to its latent. Draws nothing.
    """
    levels, y, alpha = begin(denoiser, x, grid, num_steps)
    for step, (s, s_next) in enumerate(pairwise(levels)):
        x0_hat = denoised(denoiser, y, s, label, trace, step)
        y = x0_hat + s_next / s * (y - x0_hat)
    return y * alpha


@torch.no_grad()
def probability_flow(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 18,
    grid: Grid = uniform_time,
    alpha: float | None = 1.0,  # where in a step the slope is seen again: 1 Heun, 1/2 midpoint; None: Euler
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 in float64 by steps of x_t in t, the process's own time (EDM's Algorithm 3 without churn).

    `num_steps` evaluations with `alpha=None`, else 2 num_steps - 1; a last step to noise level 0 is one
    denoising.
    """
    process, x = denoiser.process, wide(x)
    for step, (t, t_next) in enumerate(pairwise(grid(process, num_steps))):
        x0_hat = denoiser(x, t, label)
        if trace is not None:
            trace(step, x, x0_hat)
        if process.noise_level(t_next) == 0:
            return x0_hat
        h, d = t_next - t, _velocity(process, x, t, x0_hat)
        if alpha is not None:
            d_again = velocity(denoiser, x + alpha * h * d, t + alpha * h, label)
            d = d + (d_again - d) / (2 * alpha)
        x = x + h * d
    return x
