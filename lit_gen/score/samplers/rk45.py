"""The probability-flow ODE by adaptive Runge-Kutta: every row of a batch has its own step size and tolerance.

The method is the fifth-order pair of Dormand & Prince (1980) with the step control of Hairer, Norsett &
Wanner, "Solving ODEs I", II.4, as in scipy's RK45: a row takes the steps that scipy would take for that row
alone. Networks run in full float32 inside, without TF32, whose rounding is above the tolerance.
"""

from collections.abc import Callable, Sequence

import torch
from scipy.integrate import RK45
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.precision import full_float32
from lit_gen.rng import Generator
from lit_gen.score.denoiser import AbstractDenoiser, half_precision
from lit_gen.score.samplers.ode import Trace, require_signal
from lit_gen.score.sde import Process, per_image, wide

__all__ = ["encode", "integrate", "rk45"]

# The tableau: nodes, weights of the stages, of the fifth order, and of its difference from the fourth.
_NODES, _FIFTH, _ERROR = (row.tolist() for row in (RK45.C, RK45.B, RK45.E))
_STAGES = [row[:i].tolist() for i, row in enumerate(RK45.A)]


def integrate(
    f: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    start: float,
    end: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 10_000,
) -> tuple[Tensor, Tensor]:
    """y(end) of dy/dt = f(t, y, rows) from y(start) (B, D) in float64, and how often each row was evaluated,
    int64 (B,).

    `f` gets the times (b,) and states (b, D) of the rows still on their way, and which rows these are, int64
    (b,). Raises ConfigError where `end` is `start`, RuntimeError after `max_steps` steps. A step waits for
    the device once, to know which rows are on their way.
    """
    if start == end:
        raise ConfigError(f"integrate needs two different times, got {start} twice.")
    rows = torch.arange(len(y), device=y.device)
    y, t = wide(y).clone(), wide(y.new_full((len(y),), start))
    slope = f(t, y, rows)
    h = _first_step(f, y, slope, t, end, rtol, atol, rows)
    calls, rejected = torch.full_like(rows, 2), torch.zeros_like(rows, dtype=torch.bool)
    for _ in range(max_steps):
        rows = ((end - t) * (end - start) > 0).nonzero()[:, 0]
        if len(rows) == 0:
            return y, calls
        t_r, y_r, h_r = t[rows], y[rows], h[rows]
        h_r = torch.where((t_r + h_r - end) * (end - start) > 0, end - t_r, h_r)
        k = [slope[rows]]
        for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
            k.append(f(t_r + node * h_r, y_r + h_r[:, None] * _combine(weights, k), rows))
        y_new, t_new = y_r + h_r[:, None] * _combine(_FIFTH, k), t_r + h_r
        k.append(f(t_new, y_new, rows))
        calls[rows] += 6
        scale = atol + rtol * torch.maximum(y_r.abs(), y_new.abs())
        error = _rms(h_r[:, None] * _combine(_ERROR, k) / scale)
        accepted = error < 1
        grow = (0.9 * error.clamp(min=1e-12) ** -0.2).clamp(0.2, 10)
        h[rows] = h_r * torch.where(rejected[rows], grow.clamp(max=1), grow)  # no growth after a rejection
        rejected[rows] = ~accepted
        t[rows] = torch.where(accepted, t_new, t_r)
        y[rows] = torch.where(accepted[:, None], y_new, y_r)
        slope[rows] = torch.where(accepted[:, None], k[-1], k[0])
    raise RuntimeError(
        f"The ODE was not solved in {max_steps} steps; raise rtol and atol, now {rtol} and {atol}."
    )


def _combine(weights: Sequence[float], k: list[Tensor]) -> Tensor:
    first, *others = [w * k_i for w, k_i in zip(weights, k, strict=True) if w]
    return sum(others, start=first)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()


def _first_step(f, y, slope, t, end, rtol, atol, rows) -> Tensor:
    """A signed first step from the sizes of y, its slope and its curvature (Hairer et al., II.4)."""
    span = end - t
    scale = atol + rtol * y.abs()
    d0, d1 = _rms(y / scale), _rms(slope / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    h0 = torch.minimum(h0, span.abs()) * span.sign()
    d2 = _rms((f(t + h0, y + h0[:, None] * slope, rows) - slope) / scale) / h0.abs()
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (h0.abs() * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    return torch.minimum(torch.minimum(100 * h0.abs(), h1), span.abs()) * span.sign()


@torch.no_grad()
@full_float32()
def rk45(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    denoise: bool = True,  # one denoising at t_min
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 by the probability-flow ODE from t_max to t_min, each image to the
    tolerance by itself (Song et al. 2021, https://arxiv.org/abs/2011.13456). Draws nothing.
    """
    process = denoiser.process
    x = _solve(denoiser, x, process.t_max, process.t_min, rtol, atol, label)
    if not denoise and trace is None:
        return x
    x0_hat = denoiser(x, torch.tensor(process.t_min, dtype=torch.float64), label)
    if trace is not None:
        trace(0, x, x0_hat)
    return x0_hat if denoise else x


@torch.no_grad()
@full_float32()
def encode(
    denoiser: AbstractDenoiser,
    x_0: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    label: Tensor | None = None,
) -> Tensor:
    """The latent of `x_0` (B, C, H, W): where the probability flow takes it from t_min to t_max."""
    return _solve(denoiser, x_0, denoiser.process.t_min, denoiser.process.t_max, rtol, atol, label)


def log_level_flow(
    denoiser: AbstractDenoiser, u: Tensor, log_s: Tensor, label: Tensor | None = None
) -> Tensor:
    """du/d ln s for u (B, C, H, W) and ln s (B,)."""
    process, s = denoiser.process, log_s.exp()
    t, norm = process.time(s), (1 + s.square()).sqrt()
    x0_hat = denoiser(u * per_image(process.alpha(t) * norm, u), t, label)
    return u / per_image(norm.square(), u) - x0_hat / per_image(norm, u)


def log_levels(process: Process, *times: float) -> list[tuple[float, float]]:
    """(ln s, alpha sqrt(1 + s^2)) at each time."""
    t = torch.tensor(times, dtype=torch.float64)
    require_signal(process, t)
    s = process.noise_level(t)
    return list(zip(s.log().tolist(), (process.alpha(t) * (1 + s.square()).sqrt()).tolist(), strict=True))


def _solve(denoiser, x, start, end, rtol, atol, label) -> Tensor:
    if half_precision(denoiser):
        raise ConfigError(
            "rk45 solves to a tolerance below what a network in half precision tells apart: "
            "precision=float32, or a sampler of fixed steps."
        )
    (first, scale), (last, last_scale) = log_levels(denoiser.process, start, end)

    def f(log_s: Tensor, u: Tensor, rows: Tensor) -> Tensor:
        part = None if label is None else label[rows]
        return log_level_flow(denoiser, u.view(-1, *x.shape[1:]), log_s, part).flatten(1)

    u, _ = integrate(f, wide(x).flatten(1) / scale, first, last, rtol=rtol, atol=atol)
    return u.view(x.shape) * last_scale
