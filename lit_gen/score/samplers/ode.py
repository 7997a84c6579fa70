"""The probability-flow ODE by fixed steps (Song et al. 2021, https://arxiv.org/abs/2011.13456).

Most samplers use the form that all processes share: y = x_t / alpha is x_0 + s z, and dy/ds = (y - x0_hat) /
s with s the noise level. `probability_flow` and `runge_kutta` step x_t itself in time.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.samplers.grids import Grid, karras, uniform_time
from lit_gen.score.sde import Process, per_image, wide

__all__ = ["Trace", "begin", "denoised", "euler", "probability_flow", "runge_kutta", "velocity"]

Trace = Callable[[int, Tensor, Tensor], None]
"""`trace(step, x_t, x0_hat)` watches a trajectory."""


def begin(denoiser: AbstractDenoiser, x: Tensor, grid: Grid, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The grid's noise levels, y = x / alpha in float64 at the first, and alpha at the last. `x` is (B, C,
    H, W)."""
    process = denoiser.process
    times = grid(process, num_steps)
    require_signal(process, times)
    return process.noise_level(times), wide(x) / process.alpha(times[0]), process.alpha(times[-1])


def require_signal(process: Process, times: Tensor) -> None:
    """Raises ConfigError where something is divided by alpha, and it is 0 at one of the times, on the CPU.
    `times` is (num_steps + 1,)."""
    if not bool((process.alpha(times) > 1e-12).all()):
        raise ConfigError(
            f"The times of {process} reach 1, where nothing is left of the image and the noise level is "
            "infinite: take sampler=probability_flow, runge_kutta, or interpolant_sde, or "
            "model.process.t_max=0.999."
        )


def denoised(
    denoiser: AbstractDenoiser,
    y: Tensor,
    s: Tensor,
    label: Tensor | None = None,
    trace: Trace | None = None,
    step: int = 0,
) -> Tensor:
    """x0_hat for y = x_t / alpha at noise level s. `y` is (B, C, H, W), `s` is ()."""
    t = denoiser.process.time(s)
    x_t = y * denoiser.process.alpha(t)
    x0_hat = denoiser(x_t, t, label)
    if trace is not None:
        trace(step, x_t, x0_hat)
    return x0_hat


def velocity(denoiser: AbstractDenoiser, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    """dx/dt = f x - g^2 score / 2 of the probability flow, for t of shape () or (B,). Where sigma is 0 it is
    alpha' x."""
    return velocity_to(denoiser.process, x_t, t, denoiser(x_t, t, label))


def noise_to(process: Process, x_t: Tensor, t: Tensor, x0_hat: Tensor) -> Tensor:
    """z of x_t = alpha x0_hat + sigma z; 0, to which it tends, where sigma is. Images are (B, C, H, W), `t`
    is () or (B,)."""
    alpha, sigma = (per_image(c, x_t) for c in (process.alpha(t), process.sigma(t)))
    # The choice is made of coefficients: one on the host and a tensor of a GPU would wait for the GPU.
    return (x_t - alpha * x0_hat) / sigma.where(sigma > 0, torch.inf)


def velocity_to(process: Process, x_t: Tensor, t: Tensor, x0_hat: Tensor) -> Tensor:
    """alpha' x0_hat + sigma' z, the velocity of the probability flow where x0_hat is the image. Images are
    (B, C, H, W), `t` is () or (B,)."""
    d_alpha, d_sigma = (per_image(c, x_t) for c in process.slopes(t))
    return d_alpha * x0_hat + d_sigma * noise_to(process, x_t, t, x0_hat)


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
    denoise: bool = True,  # a last step to noise level 0 is one denoising; false: a step like the others
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 in float64 by steps of x_t in t, the process's own time (EDM's Algorithm 3 without churn).

    `num_steps` evaluations with `alpha=None`, else 2 num_steps - 1 with a denoising at the end. `x` is (B,
    C, H, W) at t_max.
    """
    process, x = denoiser.process, wide(x)
    for step, (t, t_next) in enumerate(pairwise(grid(process, num_steps))):
        x0_hat = denoiser(x, t, label)
        if trace is not None:
            trace(step, x, x0_hat)
        if denoise and process.noise_level(t_next) == 0:
            return x0_hat
        h, d = t_next - t, velocity_to(process, x, t, x0_hat)
        if alpha is not None:
            d_again = velocity(denoiser, x + alpha * h * d, t + alpha * h, label)
            d = d + (d_again - d) / (2 * alpha)
        x = x + h * d
    return x


# Of the third order (Heun), and of the fourth (Kutta's rule of 3/8): the stages, and their weights.
_STAGES = {
    3: (((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    4: (((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}


@torch.no_grad()
def runge_kutta(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 12,
    order: int = 4,  # or 3
    grid: Grid = uniform_time,
    denoise: bool = True,  # a last step to noise level 0 is one denoising; false: a step like the others
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 in float64 by steps of x_t in t, as `probability_flow`, by `order` evaluations each but for a
    denoising. The rules are those of torchdiffeq, "heun3" and "rk4". Raises ConfigError for any other
    order.
    """
    if order not in _STAGES:
        raise ConfigError(f"order={order} of runge_kutta: take 3 or 4, or sampler=probability_flow for less.")
    stages, weights = _STAGES[order]
    process, x = denoiser.process, wide(x)
    for step, (t, t_next) in enumerate(pairwise(grid(process, num_steps))):
        x0_hat, h = denoiser(x, t, label), t_next - t
        if trace is not None:
            trace(step, x, x0_hat)
        if denoise and process.noise_level(t_next) == 0:
            return x0_hat
        slopes = [velocity_to(process, x, t, x0_hat)]
        for row in stages:
            part = sum(a * k for a, k in zip(row, slopes, strict=True))
            slopes.append(velocity(denoiser, x + h * part, t + sum(row) * h, label))
        x = x + h * sum(w * k for w, k in zip(weights, slopes, strict=True))
    return x
