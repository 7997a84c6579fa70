"""Denoising diffusion restoration models (Kawar et al. 2022, https://arxiv.org/abs/2201.11793)."""

from itertools import pairwise

import torch
from torch import Tensor

from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.restoration.noise import Evidence, Noise, check_fractions, check_linear, evidence
from lit_gen.score.restoration.operators import LinearOperator
from lit_gen.score.samplers.grids import Grid, uniform_time
from lit_gen.score.samplers.ode import Trace, denoised
from lit_gen.score.sde import wide

__all__ = ["ddrm"]


@torch.no_grad()
def ddrm(
    denoiser: AbstractDenoiser,
    x: Tensor,
    operator: LinearOperator,
    y: Tensor,
    *,
    noise_std: Noise = 0.0,
    num_steps: int = 20,
    # The part of a level's noise that every step, however short, draws afresh (not DDIM's eta): where x_t is
    # quieter than y (eta_A of the code), and where y shows nothing (eta_C). Both are the paper's eta.
    eta_quieter: float = 0.85,
    eta_unseen: float = 0.85,
    eta_noisier: float = 1.0,  # weight of y where x_t is noisier than y; eta_b
    strict: bool = False,  # the official code's comparison: what is as noisy as y counts as unseen
    grid: Grid = uniform_time,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max that explains y = A x_0 + noise, one evaluation a step,
    on any process.

    A sampler in the coordinates V^T x of the operator: each is drawn from y, the denoised image, and fresh
    noise, as far as y is less noisy than x_t there. Without noise A x_0 = y where `eta_noisier` is 1. With
    `strict` that fails at the last step, where both have noise 0.
    """
    check_linear(operator, "ddrm")
    check_fractions(eta_quieter=eta_quieter, eta_noisier=eta_noisier, eta_unseen=eta_unseen)
    process, y = denoiser.process, wide(y)
    times = grid(process, num_steps)
    levels, known = process.noise_level(times), evidence(operator, y, noise_std)
    v = start(operator.coordinates(wide(x) / process.prior_std), known, levels[0])
    etas = eta_quieter, eta_noisier, eta_unseen
    for step, (s, s_next) in enumerate(pairwise(levels)):
        x0_hat = denoised(denoiser, operator.image(v), s, label, trace, step)
        z = randn(x.shape, generator, device=x.device, dtype=y.dtype)
        p, z = operator.coordinates(x0_hat), operator.coordinates(z)
        v = advance(v, p, z, known, s, s_next, etas, strict)
    return operator.image(v) * process.alpha(times[-1])


def start(z: Tensor, known: Evidence, s: Tensor) -> Tensor:
    """V^T x_T / alpha at noise level s from z ~ N(0, I): around y where that is quieter, else around 0."""
    around = known.seen & (known.std < s)
    fresh = (s.square() - known.std.square()).clamp(min=0).sqrt()
    return torch.where(around, known.mean + fresh * z, s * z)


def advance(
    v: Tensor,
    p: Tensor,
    z: Tensor,
    known: Evidence,
    s: Tensor,
    s_next: Tensor,
    etas: tuple[float, float, float],
    strict: bool = False,
) -> Tensor:
    """V^T x / alpha at noise level s_next, from `v` at s, the denoised `p`, and one draw z (Equations 7 and
    8).

    With z ~ N(0, I) and p the true image, the result is N(p, s_next^2 I) whatever the etas.
    """
    quieter, noisier, unseen = etas
    keep = known.seen & (known.std < s_next if strict else known.std <= s_next)
    lead = known.seen & (known.std > s_next)
    around = (1 - noisier) * p + noisier * known.mean
    around = around + (s_next.square() - (noisier * known.std).square()).clamp(min=0).sqrt() * z
    direction = (known.mean - p) / torch.where(lead, known.std, 1.0)
    toward = p + s_next * ((1 - quieter**2) ** 0.5 * direction + quieter * z)
    free = p + s_next * ((1 - unseen**2) ** 0.5 * (v - p) / s + unseen * z)
    return torch.where(keep, around, torch.where(lead, toward, free))
