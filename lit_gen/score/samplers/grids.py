"""Time grids: `grid(process, num_steps)` -> float64 times (num_steps + 1,), from t_max down, one sampler step
between two.

By default the last time is noise level 0, which a sampler reaches by one denoising. With `denoise=False` a
grid ends at t_min. Grids live on the CPU, so that a loop over one never waits for a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.score.sde import VP, DiscreteVP, Process

__all__ = ["Grid", "ascending", "geometric", "karras", "uniform_steps", "uniform_time", "vp_levels"]

Grid = Callable[[Process, int], Tensor]


def karras(process: Process, num_steps: int, *, rho: float = 7.0, denoise: bool = True) -> Tensor:
    """Noise levels whose rho-th roots are evenly spaced (EDM, Equation 5, https://arxiv.org/abs/2206.00364)."""
    high, low = _levels(process).pow(1 / rho)
    return _finish(process, process.time((high + _ramp(num_steps, denoise) * (low - high)) ** rho), denoise)


def geometric(process: Process, num_steps: int, *, denoise: bool = True) -> Tensor:
    """Noise levels in geometric progression, which is the grid uniform in log SNR (NCSN, VE, DPM-Solver)."""
    high, low = _levels(process).log()
    return _finish(process, process.time((high + _ramp(num_steps, denoise) * (low - high)).exp()), denoise)


def uniform_time(process: Process, num_steps: int, *, denoise: bool = True) -> Tensor:
    """Times evenly spaced, the grid of predictor-corrector samplers; linear in t for `Flow`."""
    ramp = _ramp(num_steps, denoise)
    return _finish(process, process.t_max + ramp * (process.t_min - process.t_max), denoise)


def uniform_steps(process: Process, num_steps: int, *, denoise: bool = True) -> Tensor:
    """Evenly spaced whole steps of a `DiscreteVP`, the last and the first among them (DDPM, DDIM). Raises
    ConfigError for any other process."""
    if not isinstance(process, DiscreteVP):
        raise ConfigError(
            f"uniform_steps needs a DiscreteVP process, not {type(process).__name__}; use uniform_time."
        )
    steps = ((process.num_steps - 1) * (1 - _ramp(num_steps, denoise))).round()
    return _finish(process, (steps + 1) / process.num_steps, denoise)


def vp_levels(
    process: Process, num_steps: int, *, beta_min: float = 0.1, beta_max: float = 20.0, denoise: bool = True
) -> Tensor:
    """Evenly spaced in the time of a VP process from the first to the last noise level of `process` (EDM,
    Table 1).
    """
    vp = VP(beta_min, beta_max)
    high, low = vp.time(_levels(process))
    levels = vp.noise_level(high + _ramp(num_steps, denoise) * (low - high))
    return _finish(process, process.time(levels), denoise)


def ascending(grid: Callable[..., Tensor]) -> Grid:
    """The times of `grid(process, num_steps, denoise=False)` from t_min up to t_max, with which a
    deterministic sampler turns an image into its latent.
    """
    return lambda process, num_steps: grid(process, num_steps, denoise=False).flip(0)


def _ramp(num_steps: int, denoise: bool) -> Tensor:
    if num_steps < 1:
        raise ConfigError(f"num_steps must be at least 1, got {num_steps}.")
    return torch.linspace(0, 1, num_steps + (not denoise), dtype=torch.float64)


def _levels(process: Process) -> Tensor:
    return process.noise_level(torch.tensor([process.t_max, process.t_min], dtype=torch.float64))


def _finish(process: Process, times: Tensor, denoise: bool) -> Tensor:
    return torch.cat([times, process.time(times.new_zeros(1))]) if denoise else times
