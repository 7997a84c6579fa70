"""Diffusion posterior sampling (Chung et al. 2023, Algorithm 1, https://arxiv.org/abs/2209.14687)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.restoration.noise import Noise, deviation
from lit_gen.score.restoration.observations import Observation
from lit_gen.score.restoration.operators import LinearOperator
from lit_gen.score.samplers.grids import Grid, uniform_time
from lit_gen.score.samplers.ode import Trace
from lit_gen.score.sde import wide

__all__ = ["dps"]


@torch.no_grad()
def dps(
    denoiser: AbstractDenoiser,
    x: Tensor,
    operator: LinearOperator | Observation,
    y: Tensor,
    *,
    noise_std: Noise = 0.0,  # a number cancels: the steps have the length that zeta says
    num_steps: int = 1000,
    zeta: float = 1.0,  # length of the gradient steps; 0.3 to 1 in the paper
    grid: Grid = uniform_time,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max that explains y = A x_0 + noise, on any process.

    Ancestral steps, each followed by zeta times the gradient of ||y - A x0_hat(x_t)|| (the official code's;
    Algorithm 1 has twice that). Runs in variance-preserving coordinates x_t / sqrt(alpha^2 + sigma^2), in
    which the paper's zeta is meant. Differentiates the network: about three times the cost of a sampler. A
    noise map weighs the pixels of y - A x0_hat by the inverse of their deviations, and so do the deviations
    of an `Observation` in the operator's place.
    """
    process, y = denoiser.process, wide(y)
    misfit = _misfit(operator, y, noise_std)
    times = grid(process, num_steps)
    levels = process.noise_level(times)
    x = wide(x) / (process.alpha(times[0]) * (1 + levels[0].square()).sqrt())
    units = (1 + levels.square()).sqrt()
    for step, t in enumerate(times[:-1]):
        (s, s_next), (unit, unit_next) = levels[step : step + 2], units[step : step + 2]
        with torch.enable_grad():
            x = x.requires_grad_()
            x_t = x * (unit * process.alpha(t))
            x0_hat = denoiser(x_t, t, label)
            distance = misfit(x0_hat)
            (gradient,) = torch.autograd.grad(distance.sum(), x)
        x, x0_hat = x.detach(), x0_hat.detach()
        if trace is not None:
            trace(step, x_t.detach(), x0_hat)
        fresh = s_next * (1 - (s_next / s).square()).sqrt()
        z = randn(x.shape, generator, device=x.device, dtype=x.dtype)
        ahead = x0_hat + (s_next / s).square() * (x * unit - x0_hat) + fresh * z
        x = ahead / unit_next - zeta * gradient
    return x * (process.alpha(times[-1]) * units[-1])


def _misfit(
    operator: LinearOperator | Observation, y: Tensor, noise_std: Noise
) -> Callable[[Tensor], Tensor]:
    """The function x0_hat -> ||y - A x0_hat|| (B,), with pixels weighed as their noise says."""
    if isinstance(operator, Observation):
        deviation(noise_std, y, operator)
        return lambda x0_hat: operator.distance(y, x0_hat)
    weights = _weights(noise_std, y, operator)
    return lambda x0_hat: (weights * (y - operator(x0_hat))).flatten(1).norm(dim=1)


def _weights(noise_std: Noise, y: Tensor, operator: LinearOperator) -> Tensor | float:
    """1 / noise_std over what the operator sees of y, scaled to a mean square of 1; 1 for a number. Raises
    ConfigError for maps with measured pixels that have no noise."""
    std = deviation(noise_std, y)
    if not isinstance(std, Tensor):
        return 1.0
    ones = torch.ones_like(y)
    seen = operator.solve(ones, 0.0, 1.0) > 0 if operator.pixelwise else ones.bool()
    if not bool(((std > 0) | ~seen).all()):
        raise ConfigError(
            "noise_std is a map with pixels that have no noise: method=dps, which weighs pixels by its "
            "inverse, would see these alone. Give them a little noise, or take method=pigdm or method=mmps."
        )
    weights = torch.where(seen, std, math.inf).reciprocal()
    mean_square = weights.square().flatten(1).sum(1) / seen.flatten(1).sum(1)
    return weights / mean_square.sqrt().reshape(-1, *(1,) * (y.ndim - 1))
