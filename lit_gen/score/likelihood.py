"""How probable an image is: exactly up to the trace estimate, by the probability-flow ODE, or as a bound, by
DDPM's sum.

    log p(x_0) = log p_T(x_T) + integral of div(dx/dt) over the ODE from x_0 at t_min to x_T at t_max

(Song et al. 2021, Section 4.3 and Appendix D.2, https://arxiv.org/abs/2011.13456), the divergence by the
estimate v^T J v of Skilling and Hutchinson with v of unit covariance. Holds for every process.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.precision import full_float32
from lit_gen.rng import Generator, rand, randint, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.samplers.grids import Grid, uniform_steps
from lit_gen.score.samplers.rk45 import integrate, log_level_flow, log_levels
from lit_gen.score.sde import DiscreteVP, Process, per_image, wide, wide_dtype


class Likelihood(NamedTuple):
    """log p in nats (B,), the latents (B, C, H, W) and how often the network saw each image, int64 (B,)."""

    log_prob: Tensor
    latent: Tensor
    evaluations: Tensor


def dequantize(
    images: Tensor,
    generator: Generator = None,
    low: float = -1.0,
    high: float = 1.0,
    num_levels: int = 256,
    first_level: float = 0,
) -> Tensor:
    """Integers (B, C, H, W) from `first_level` on -> float64 on [low, high): uniform noise fills each of the
    `num_levels` levels."""
    u = rand(images.shape, generator, device=images.device)
    return low + (wide(images) - first_level + wide(u)) * ((high - low) / num_levels)


def bits_per_dim(
    log_prob: Tensor, num_dims: int, low: float = -1.0, high: float = 1.0, num_levels: float = 256
) -> Tensor:
    """Nats (B,) of a density over [low, high] as bits per dimension of images with `num_levels` levels.

    A level is (high - low) / num_levels wide, so log2 of that many levels per unit is added: 7 for 8 bits on
    [-1, 1], 8 on [0, 1]. With the length of the data's range as `num_levels` it is the density of the data in
    their own unit, and negative where they are denser than one in a unit.
    """
    return -log_prob / (num_dims * math.log(2)) + math.log2(num_levels / (high - low))


def random_probes(x_0: Tensor, num_probes: int = 1, generator: Generator = None) -> Tensor:
    """Random signs (K, B, C, H, W), the probes of least variance."""
    draws = [randint(0, 2, x_0.shape, generator, device=x_0.device) for _ in range(num_probes)]
    return 2 * wide(torch.stack(draws)) - 1


def exact_probes(x_0: Tensor) -> Tensor:
    """The scaled unit vectors (D, B, C, H, W), whose mean of v^T J v is the trace; for small images."""
    d = x_0.shape[1:].numel()
    basis = math.sqrt(d) * torch.eye(d, dtype=wide_dtype(x_0.device), device=x_0.device)
    return basis.view(d, 1, *x_0.shape[1:]).expand(d, *x_0.shape)


@torch.no_grad()
@full_float32()
def log_likelihood(
    denoiser: AbstractDenoiser,
    x_0: Tensor,
    *,
    probes: Tensor | None = None,  # (K, B, C, H, W); None: one of random signs
    t_min: float | None = None,  # where the data are taken to be; None: the process's own
    rtol: float = 1e-5,
    atol: float = 1e-5,
    label: Tensor | None = None,
    generator: Generator = None,
) -> Likelihood:
    """log p(x_0) of images (B, C, H, W), each image to the tolerance by itself.

    One network call serves the ODE and the divergence. `t_min` is a time of the process: noise level 1e-5 for
    `EDM`, and the official 1e-5 for VE, VP and sub-VP.
    """
    process, shape = denoiser.process, x_0.shape[1:]
    probes = random_probes(x_0, generator=generator) if probes is None else wide(probes)

    def f(log_s: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        part = None if label is None else label[rows]
        with torch.enable_grad():
            u = state[:, :-1].reshape(-1, *shape).requires_grad_()
            v = log_level_flow(denoiser, u, log_s, part)
            products = [
                torch.autograd.grad(v, u, p, retain_graph=k + 1 < len(probes))[0].mul(p).flatten(1).sum(1)
                for k, p in enumerate(probes[:, rows])
            ]
        divergence = torch.stack(products).mean(0)
        return torch.cat([v.detach().flatten(1), divergence[:, None]], 1)

    t_min = process.t_min if t_min is None else t_min
    (first, scale), (last, last_scale) = log_levels(process, t_min, process.t_max)
    start = torch.cat([wide(x_0).flatten(1) / scale, wide(x_0.new_zeros(len(x_0), 1))], 1)
    end, evaluations = integrate(f, start, first, last, rtol=rtol, atol=atol)
    latent = end[:, :-1].view(x_0.shape) * last_scale
    change = shape.numel() * math.log(last_scale / scale)
    return Likelihood(process.prior_log_prob(latent) + end[:, -1] + change, latent, evaluations)


class Bound(NamedTuple):
    """Terms (B,) of the variational bound in bits per dimension; their sum is the bound."""

    prior: Tensor
    diffusion: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        return self.prior + self.diffusion + self.decoder


def kl_term(process: Process, x_0: Tensor, x0_hat: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x_0) || q(x_s | x_t, x0_hat)) in nats (B,) for s < t: (SNR(s) - SNR(t)) / 2 ||x_0 -
    x0_hat||^2 (Kingma et al. 2021, Equation 13, https://arxiv.org/abs/2107.00630).
    """
    gain = process.noise_level(s).pow(-2) - process.noise_level(t).pow(-2)
    return gain / 2 * (x_0 - x0_hat).square().flatten(1).sum(1)


@torch.no_grad()
@full_float32()
def variational_bound(
    denoiser: AbstractDenoiser,
    x_0: Tensor,
    *,
    num_steps: int | None = None,  # None: all steps of a DiscreteVP
    grid: Grid = uniform_steps,
    num_levels: int = 256,
    label: Tensor | None = None,
    generator: Generator = None,
) -> Bound:
    """DDPM's bound on -log2 P(x_0) per dimension (Ho et al. 2020, Equation 5,
    https://arxiv.org/abs/2006.11239).

    `x_0` (B, C, H, W) has `num_levels` levels evenly spread over [-1, 1] both ends included, float. The
    reverse steps have the posterior's variance; the decoder, at the first time, that of the step after it,
    which is the official choice.
    """
    process, x_0 = denoiser.process, wide(x_0)
    if num_steps is None:
        num_steps = process.num_steps if isinstance(process, DiscreteVP) else 0
    if num_steps < 2:
        raise ConfigError(
            f"variational_bound needs num_steps of at least 2 on {type(process).__name__}, got {num_steps}."
        )
    times = grid(process, num_steps)[:num_steps]
    scale = 1 / (x_0.shape[1:].numel() * math.log(2))

    def look(t: Tensor) -> Tensor:
        z = randn(x_0.shape, generator, device=x_0.device, dtype=x_0.dtype)
        return denoiser(process.marginal(x_0, t, z), t, label)

    alpha, sigma = process.alpha(times[0]), process.sigma(times[0])
    ratio = (sigma / process.prior_std).square()
    mean = per_image(alpha / process.prior_std, x_0) * x_0
    prior = (mean.square() + ratio - 1 - ratio.log()).flatten(1).sum(1) / 2
    diffusion = torch.zeros_like(prior)
    for t, s in pairwise(times):
        diffusion += kl_term(process, x_0, look(t), s, t)
    _, variance = process.transition(times[-1], times[-2])
    std = variance.sqrt() * process.sigma(times[-1]) / process.sigma(times[-2])
    decoder = -_log_of_level(x_0, look(times[-1]), std, num_levels).flatten(1).sum(1)
    return Bound(prior * scale, diffusion * scale, decoder * scale)


def _log_of_level(x: Tensor, mean: Tensor, std: Tensor, num_levels: int) -> Tensor:
    """log P of the level of each pixel under N(mean, std^2), the outermost levels open (Ho et al. 2020,
    Equation 13).
    """
    half = 1 / (num_levels - 1)
    upper, lower = (x - mean + half) / std, (x - mean - half) / std
    # On the side where both tails are small the difference keeps its digits.
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    first, last = x < -1 + half, x > 1 - half
    upper = upper.masked_fill((last & ~flip) | (first & flip), torch.inf)
    lower = lower.masked_fill((first & ~flip) | (last & flip), -torch.inf)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper))
