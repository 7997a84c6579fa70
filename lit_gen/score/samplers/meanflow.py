"""Sampling from MeanFlow models (Geng et al. 2025, Equation 12, https://arxiv.org/abs/2505.13447)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.fewstep.meanflow import MeanFlowDenoiser, heading
from lit_gen.score.precondition import check_defined
from lit_gen.score.samplers.ode import Trace
from lit_gen.score.sde import wide

__all__ = ["meanflow"]


@torch.no_grad()
def meanflow(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 1,
    times: Sequence[float] | None = None,  # where the steps start; None: evenly spread from t_max down
    renoise: bool = False,  # each step goes to t = 0 and gets new noise, as a consistency model's
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max by `num_steps` evaluations: jumps along average
    velocities, x_r = x_t - (t - r) u.

    A denoiser without a second time makes Euler steps. Draws nothing unless it is to `renoise`. Raises
    ConfigError for times that are not `num_steps` decreasing ones above 0.
    """
    process = denoiser.process
    starts = _starts(process.t_max, num_steps, times)
    for part in denoiser.modules():
        if isinstance(part, MeanFlowDenoiser):
            check_defined(part.precondition, process, starts[:1], "sampler.times")
    # The prior is noise alone, also at another first time.
    x = wide(x) * (process.sigma(starts[0]) / process.prior_std)
    end = process.time(torch.zeros((), dtype=starts.dtype))
    for step, t in enumerate(starts):
        r = starts[step + 1] if step + 1 < num_steps else end
        with heading(denoiser, process.noise_level(end if renoise else r)):
            x0_hat = denoiser(x, t, label)
        if trace is not None:
            trace(step, x, x0_hat)
        if r == end:
            return x0_hat * process.alpha(end)
        if renoise:
            x = process.marginal(x0_hat, r, randn(x.shape, generator, device=x.device, dtype=x.dtype))
        else:
            z = (x - process.alpha(t) * x0_hat) / process.sigma(t)
            x = process.marginal(x0_hat, r, z)
    raise AssertionError("the last step ends the loop")


def _starts(t_max: float, num_steps: int, times: Sequence[float] | None) -> Tensor:
    """The times (num_steps,) in float64 from which the steps go."""
    if num_steps < 1:
        raise ConfigError(f"num_steps must be at least 1, got {num_steps}.")
    if times is None:
        return torch.linspace(t_max, 0, num_steps + 1, dtype=torch.float64)[:-1]
    found = torch.tensor(list(times), dtype=torch.float64)
    if len(found) != num_steps or bool((found.diff() >= 0).any()) or not 0 < found[-1] <= found[0] <= 1:
        raise ConfigError(
            f"times={list(times)} with num_steps={num_steps}: give as many times as steps, from 1 down, all "
            "above 0."
        )
    return found
