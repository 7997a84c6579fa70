"""DiffPIR (Zhu et al. 2023, "Denoising Diffusion Models for Plug-and-Play Image Restoration", Algorithm 1,
https://arxiv.org/abs/2305.08995)."""

from itertools import pairwise

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.restoration.noise import Noise, check_fractions, check_linear, deviation
from lit_gen.score.restoration.operators import LinearOperator
from lit_gen.score.samplers.grids import Grid, uniform_time
from lit_gen.score.samplers.ode import Trace, begin, denoised
from lit_gen.score.sde import DiscreteVP, Process, wide

__all__ = ["data_step", "diffpir"]


def data_step(x0_hat: Tensor, operator: LinearOperator, y: Tensor, rho: Tensor | float) -> Tensor:
    """argmin_p ||y - A p||^2 + rho ||p - x0_hat||^2; at rho = 0 the nearest p with A p = y. As a map `rho`
    weighs the pixels of y: it is the variance of each over that of x0_hat. `x0_hat` is (B, C, H, W)."""
    return x0_hat + operator.adjoint(operator.solve(y - operator(x0_hat), rho, 1.0))


@torch.no_grad()
def diffpir(
    denoiser: AbstractDenoiser,
    x: Tensor,
    operator: LinearOperator,
    y: Tensor,
    *,
    noise_std: Noise = 0.0,
    num_steps: int = 100,
    prior_weight: float = 1.0,  # lambda; the official code's, with the noise of images in [0, 1]
    zeta: float = 1.0,  # fresh instead of predicted noise; the scripts take 1 for inpainting, else 0.1
    eta: float = 0.0,  # fresh noise as in DDIM, by the betas of a discrete process
    guidance_scale: float = 1.0,  # of the way from the denoised image to the one that explains y
    inner_steps: int = 1,
    clip: bool = True,  # the denoised image to [-1, 1]
    grid: Grid = uniform_time,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max that explains y = A x_0 + noise, num_steps inner_steps
    evaluations, on any process.

    Half-quadratic splitting: the denoised image gives way to the `data_step` with rho = lambda noise_std^2 /
    s^2, and noise of the next level is added. The official scripts begin near y, and end at t_min: with
    `denoise=False` a grid does. Without noise A x_0 = y; the scripts take at least 0.001 of noise. Raises
    ConfigError for negative weights, no inner step, and `eta` on a process without betas.
    """
    check_linear(operator, "diffpir")
    check_fractions(zeta=zeta)
    if prior_weight < 0 or eta < 0:
        raise ConfigError(f"method.prior_weight={prior_weight}, method.eta={eta}: neither may be negative.")
    process, measured = denoiser.process, wide(y)
    variance = (deviation(noise_std, measured, operator) / 2) ** 2  # of images in [0, 1]
    if inner_steps < 1:
        raise ConfigError(f"inner_steps={inner_steps}: must be at least 1.")
    if eta > 0 and not isinstance(process, DiscreteVP):
        raise ConfigError(
            f"eta={eta}: this noise of DiffPIR is defined by the betas of a discrete process, and "
            f"{type(process).__name__} has none. Take eta=0, and zeta for fresh noise."
        )
    levels, state, alpha = begin(denoiser, x, grid, num_steps)
    for step, (s, s_next) in enumerate(pairwise(levels)):
        rho = prior_weight * variance / s.square()
        for inner in range(inner_steps):
            x0_hat = denoised(denoiser, state, s, label, trace, step * inner_steps + inner)
            if clip:
                x0_hat = x0_hat.clamp(-1, 1)
            x0_tilde = x0_hat + guidance_scale * (data_step(x0_hat, operator, measured, rho) - x0_hat)
            eps = (state - x0_tilde) / s  # of the corrected image
            fresh = eta * s_next * _beta(process, s) if eta > 0 else s_next.new_zeros(())
            noise = (s_next.square() - fresh.square()).clamp(min=0).sqrt() * eps
            if fresh > 0:
                noise = noise + fresh * randn(x.shape, generator, device=x.device, dtype=state.dtype)
            z = randn(x.shape, generator, device=x.device, dtype=state.dtype)
            state = x0_tilde + (1 - zeta) ** 0.5 * noise + zeta**0.5 * s_next * z
            if inner + 1 < inner_steps:
                z = randn(x.shape, generator, device=x.device, dtype=state.dtype)
                state = state + (s.square() - s_next.square()).sqrt() * z
    return state * alpha


def _beta(process: Process, s: Tensor) -> Tensor:
    """sqrt(beta_t) / sigma_t, at the time t of noise level s, of a discrete process."""
    assert isinstance(process, DiscreteVP)
    t = process.time(s)
    _, beta = process.transition(t - 1 / process.num_steps, t)
    return beta.sqrt() / process.sigma(t)
