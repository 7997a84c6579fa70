"""DDNM and DDNM+ (Wang et al. 2023, "Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model",
https://arxiv.org/abs/2212.00490)."""

from itertools import pairwise

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.restoration.noise import (
    Evidence,
    Noise,
    check_fractions,
    check_linear,
    deviation,
    evidence,
)
from lit_gen.score.restoration.operators import LinearOperator
from lit_gen.score.samplers.grids import Grid, uniform_time
from lit_gen.score.samplers.ode import Trace, begin, denoised
from lit_gen.score.sde import wide

__all__ = ["ddnm", "travel"]


def travel(num_steps: int, length: int, repeats: int) -> list[int]:
    """The grid indices that DDNM visits, from 0 to num_steps: at every place that is a multiple of `length`
    from the end, but for the first, it goes back `length` steps, `repeats` - 1 times."""
    left = {num_steps - 1 - k: repeats - 1 for k in range(0, num_steps - length, length)}
    path = [0]
    while path[-1] < num_steps:
        i = path[-1]
        if left.get(i, 0) > 0:
            left[i] -= 1
            path += range(i - 1, i - length - 1, -1)
        path.append(path[-1] + 1)
    return path


@torch.no_grad()
def ddnm(
    denoiser: AbstractDenoiser,
    x: Tensor,
    operator: LinearOperator,
    y: Tensor,
    *,
    noise_std: Noise = 0.0,
    num_steps: int = 100,
    eta: float = 0.85,  # part of a level's noise that every step, however short, draws afresh (not DDIM's)
    travel_length: int = 1,
    travel_repeats: int = 1,  # 1: no time travel
    grid: Grid = uniform_time,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max that explains y = A x_0 + noise, about num_steps
    travel_repeats evaluations, on any process.

    In the denoised image what A sees is replaced by A^+ y (Equation 12); with no noise A x_0 = y. With noise
    it is DDNM+ (Equation 17): the correction, and the noise that is added, are scaled in the coordinates V^T
    x so that x_t has the noise of its time and no more. Raises ConfigError for travels below 1 or longer
    than the sampling.
    """
    check_linear(operator, "ddnm")
    check_fractions(eta=eta)
    if travel_repeats > 1 and travel_length >= num_steps:
        raise ConfigError(f"method.travel_length={travel_length}: must be below num_steps={num_steps}.")
    if travel_length < 1 or travel_repeats < 1:
        raise ConfigError(
            f"travel_length and travel_repeats must be at least 1, got {travel_length}, {travel_repeats}."
        )
    measured = wide(y)
    noise_std = deviation(noise_std, measured, operator)
    exact = not isinstance(noise_std, Tensor) and noise_std == 0
    known = evidence(operator, measured, noise_std)
    levels, state, alpha = begin(denoiser, x, grid, num_steps)
    x0_hat = state
    for step, (i, j) in enumerate(pairwise(travel(num_steps, travel_length, travel_repeats))):
        s, s_next = levels[i], levels[j]
        z = randn(x.shape, generator, device=x.device, dtype=state.dtype)
        if j < i:  # a fresh marginal around the last uncorrected image
            state = x0_hat + s_next * z
            continue
        x0_hat = denoised(denoiser, state, s, label, trace, step)
        eps = (state - x0_hat) / s
        if exact:
            corrected = x0_hat + operator.pseudo_inverse(measured - operator(x0_hat))
            state = corrected + s_next * (eta * z + (1 - eta**2) ** 0.5 * eps)
        else:
            p, z, eps = (operator.coordinates(part) for part in (x0_hat, z, eps))
            state = operator.image(advance(p, z, eps, known, s_next, eta))
    return state * alpha


def advance(p: Tensor, z: Tensor, eps: Tensor, known: Evidence, s_next: Tensor, eta: float) -> Tensor:
    """V^T x / alpha at noise level s_next by DDNM+, from the denoised `p`, a draw z, and the predicted noise.

    If p is the true image, the result is N(p, s_next^2 I) over z, eps, and the noise of y.
    """
    kept = (1 - eta**2) ** 0.5
    noisier = known.std <= s_next
    scale = torch.where(noisier, 1.0, s_next * kept / torch.where(noisier, 1.0, known.std))
    fresh = torch.where(noisier, (s_next.square() - known.std.square()).clamp(min=0).sqrt(), eta * s_next)
    seen = p + scale * (known.mean - p) + fresh * z
    return torch.where(known.seen, seen, p + s_next * (eta * z + kept * eps))
