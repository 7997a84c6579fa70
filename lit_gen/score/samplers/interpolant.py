"""The SDEs of SiT (Ma et al. 2024, Section 2.4, https://arxiv.org/abs/2401.08740).

From noise to data, dx = (-dx_t/dt + w score) dt + sqrt(2 w) dW has the marginals of the process for every
w(t) >= 0, which is thus chosen after training. The paper's w_t is twice the w of its code and of this file.
"""

from itertools import pairwise

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.samplers.ode import Trace, noise_to, require_signal, velocity_to
from lit_gen.score.sde import Process, per_image, wide

__all__ = ["diffusion_form", "interpolant_sde"]

FORMS = ("sigma", "sbdm", "linear", "decreasing", "increasing_decreasing", "constant")


def diffusion_form(process: Process, t: Tensor, form: str = "sigma", scale: float = 1.0) -> Tensor:
    """w(t), of the shape of `t`. "sbdm" is g^2 / 2, which makes the SDE that of Song et al. 2021; it is
    infinite where alpha is 0.

    Raises ConfigError for an unknown form.
    """
    t = wide(t)
    cosine = (torch.pi * t).cos()
    if form not in FORMS:
        raise ConfigError(f"form={form!r} of interpolant_sde: take one of {', '.join(FORMS)}.")
    if form == "decreasing":
        return (1 - scale * cosine).square() / 4
    return (
        scale
        * {
            "sigma": lambda: process.sigma(t),
            "sbdm": lambda: process.diffusion(t).square() / 2,
            "linear": lambda: t,
            "increasing_decreasing": lambda: 1 - cosine.square(),
            "constant": lambda: torch.ones_like(t),
        }[form]()
    )


@torch.no_grad()
def interpolant_sde(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 250,
    form: str = "sigma",  # of w(t): one of FORMS
    scale: float = 1.0,  # of w(t)
    heun: bool = False,  # false: Euler-Maruyama
    last_step: str | None = "mean",  # "mean": no noise; "euler": of the ODE; "tweedie": denoising; None: none
    last_step_size: float = 0.04,  # the time at which the last step begins
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max by steps evenly spaced in time, from where the last one,
    of its own length, goes to t = 0; without it they go on to t_min.

    `num_steps` evaluations, or 2 num_steps - 1 with `heun` and a last step. Raises ConfigError for an
    unknown last step, or one that leaves room for no other.
    """
    process, x = denoiser.process, wide(x)
    if last_step not in ("mean", "euler", "tweedie", None):
        raise ConfigError(f"last_step={last_step} of interpolant_sde: take mean, euler, tweedie, or null.")
    end = process.t_min if last_step is None else last_step_size
    if not 0 <= end < process.t_max or num_steps < 2:
        raise ConfigError(
            f"interpolant_sde with last_step_size={last_step_size} and num_steps={num_steps}: the last step "
            f"begins below t_max={process.t_max:g} of {type(process).__name__}, after at least one other."
        )
    moves = num_steps - (last_step is not None)
    times = torch.linspace(process.t_max, end, moves + 1, dtype=torch.float64)
    if form == "sbdm":
        require_signal(process, times)

    def drift(x: Tensor, t: Tensor, x0_hat: Tensor) -> Tensor:
        sigma = per_image(process.sigma(t), x)
        score = -noise_to(process, x, t, x0_hat) / sigma.where(sigma > 0, torch.inf)
        return per_image(diffusion_form(process, t, form, scale), x) * score - velocity_to(
            process, x, t, x0_hat
        )

    def look(x: Tensor, t: Tensor, step: int) -> Tensor:
        x0_hat = denoiser(x, t, label)
        if trace is not None:
            trace(step, x, x0_hat)
        return x0_hat

    for step, (t, s) in enumerate(pairwise(times)):
        h, w = t - s, diffusion_form(process, t, form, scale)
        noise = (2 * w * h).sqrt() * randn(x.shape, generator, device=x.device, dtype=x.dtype)
        if heun:
            x = x + noise
            first = drift(x, t, look(x, t, step))
            ahead = x + h * first
            x = x + h / 2 * (first + drift(ahead, s, denoiser(ahead, s, label)))
        else:
            x = x + h * drift(x, t, look(x, t, step)) + noise
    if last_step is None:
        return x
    x0_hat = look(x, times[-1], moves)
    if last_step == "tweedie":
        return x0_hat
    slope = drift if last_step == "mean" else lambda x, t, x0_hat: -velocity_to(process, x, t, x0_hat)
    return x + end * slope(x, times[-1], x0_hat)
