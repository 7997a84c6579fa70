"""Annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1, https://arxiv.org/abs/1907.05600; 2020,
https://arxiv.org/abs/2006.09011)."""

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.samplers.grids import Grid, geometric
from lit_gen.score.samplers.ode import Trace, denoised
from lit_gen.score.sde import wide

__all__ = ["annealed_langevin"]


@torch.no_grad()
def annealed_langevin(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 232,  # noise levels; NCSNv2 on CIFAR-10
    steps_per_level: int = 5,
    step_size: float = 4 * 6.2e-6,  # at the last level; 4 times the official one, whose images live on [0, 1]
    grid: Grid = geometric,
    denoise: bool = True,  # end with the denoising step of NCSNv2
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 by `steps_per_level` Langevin steps at each of `num_steps` noise levels s,
    on any process.

    In y = x_t / alpha: y <- y + e score + sqrt(2 e) z with e = step_size (s / s_last)^2. num_steps
    steps_per_level evaluations and one to denoise. The official codes start from U[0, 1] images, which makes
    no difference at the first level. Raises ConfigError for a step so long that the noise of the last level
    would grow.
    """
    process = denoiser.process
    levels = process.noise_level(grid(process, num_steps))[:num_steps]
    y = wide(x) / process.alpha(process.time(levels[0]))
    longest = 2 * float(levels[-1]) ** 2
    if not 0 < step_size < longest:
        raise ConfigError(
            f"step_size must be between 0 and {longest:.3g}, twice the square of the last noise level, "
            f"beyond which Langevin dynamics diverges; got {step_size}."
        )
    step = 0
    for s in levels:
        epsilon = step_size * (s / levels[-1]).square()
        for _ in range(steps_per_level):
            score = (denoised(denoiser, y, s, label, trace, step) - y) / s.square()
            z = randn(y.shape, generator, device=y.device, dtype=y.dtype)
            y, step = y + epsilon * score + (2 * epsilon).sqrt() * z, step + 1
    if denoise:
        y = denoised(denoiser, y, levels[-1], label, trace, step)
    return y
