"""DPM-Solver and DPM-Solver++ (Lu et al. 2022, https://arxiv.org/abs/2206.00927 and
https://arxiv.org/abs/2211.01095).

With lambda = -ln s the probability flow is linear but for the network: d(y / s)/dlambda = x0_hat / s for y =
x_t / alpha (data prediction, "++"), and dy/dlambda = -s z_hat (noise prediction). Both are du/dlambda = -/+
(u - m) after a change of u, so one step serves both: u' = e^H u - phi_1(H) m - ..., with u = y, H = -h for
the data and u = y / s, H = h for the noise.
"""

from itertools import pairwise

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.samplers.grids import Grid, geometric, karras
from lit_gen.score.samplers.ode import Trace, begin, denoised

__all__ = ["dpm_solver_multistep", "dpm_solver_singlestep"]


@torch.no_grad()
def dpm_solver_multistep(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 15,
    order: int = 2,  # 1 (DDIM), 2 (2M) or 3 (3M)
    grid: Grid = karras,
    data_prediction: bool = True,  # DPM-Solver++; False: DPM-Solver
    eta: float = 0.0,  # 1: SDE-DPM-Solver++; between: less noise
    curvature: float = 1.0,  # of order 3's parabola; the official codes have 1/2, which makes it order 2
    lower_order_final: bool = True,  # the last steps of order 2 and 1, without which few steps are unstable
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max, one evaluation a step: DPM-Solver++ (2M), (3M) and their
    SDE versions.

    The order rises from 1 as evaluations come in, and a last step to noise level 0 is one denoising.
    """
    _check(order, data_prediction, eta)
    levels, y, alpha = begin(denoiser, x, grid, num_steps)
    past: list[tuple[Tensor, Tensor]] = []  # (lambda, prediction), the newest first
    for step, (s, s_next) in enumerate(pairwise(levels)):
        x0_hat = denoised(denoiser, y, s, label, trace, step)
        if s_next == 0:
            y = x0_hat
            break
        past = [(-s.log(), x0_hat if data_prediction else (y - x0_hat) / s), *past[: order - 1]]
        now = min(len(past), num_steps - step if lower_order_final else order)
        h = (s / s_next).log()
        u, H = (y, (-1 - eta) * h) if data_prediction else (y / s, h)
        u = _step(u, past[:now], h, H, curvature)
        y = u if data_prediction else u * s_next
        if eta > 0:
            z = randn(y.shape, generator, device=y.device, dtype=y.dtype)
            y = y + s_next * (-(-2 * eta * h).expm1()).sqrt() * z
    return y * alpha


def _step(u: Tensor, past: list[tuple[Tensor, Tensor]], h: Tensor, H: Tensor, curvature: float) -> Tensor:
    """From the newest prediction over lambda + h; divided differences of the older ones give the higher
    orders.
    """
    phi_1 = H.expm1()
    lambda_0, m_0 = past[0]
    u = H.exp() * u - phi_1 * m_0
    if len(past) == 1:
        return u
    r_0 = (lambda_0 - past[1][0]) / h
    d_0 = (m_0 - past[1][1]) / r_0
    if len(past) == 2:
        return u - phi_1 / 2 * d_0
    phi_2 = phi_1 / H - 1
    phi_3 = phi_2 / H - 0.5
    r_1 = (past[1][0] - past[2][0]) / h
    half_second = (d_0 - (past[1][1] - past[2][1]) / r_1) / (r_0 + r_1)
    return u - phi_2 * (d_0 + r_0 * half_second) - phi_3 * 2 * curvature * half_second


@torch.no_grad()
def dpm_solver_singlestep(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 15,  # evaluations
    order: int = 3,
    grid: Grid = geometric,
    data_prediction: bool = True,  # DPM-Solver++; False: DPM-Solver
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 in float64 from `x` at t_max by steps of `order` evaluations each, the grid's times in groups
    (DPM-Solver-2, -3).

    The last groups are shorter if need be, and the one that ends at noise level 0 is one denoising. Order 3
    wants groups evenly spaced in lambda, as `geometric` has them.
    """
    _check(order, data_prediction, 0.0)
    levels, y, alpha = begin(denoiser, x, grid, num_steps)
    start = 0
    for size in _groups(num_steps, order, denoise=bool(levels[-1] == 0)):
        s = levels[start : start + size + 1]
        x0_hat = denoised(denoiser, y, s[0], label, trace, start)
        start += size
        if s[-1] == 0:
            y = x0_hat
            break
        u, m = (y, x0_hat) if data_prediction else (y / s[0], (y - x0_hat) / s[0])
        H = (s[0] / s[1:]).log() * (-1 if data_prediction else 1)

        def look(u_i: Tensor, s_i: Tensor) -> Tensor:
            y_i = u_i if data_prediction else u_i * s_i
            x_i = denoised(denoiser, y_i, s_i, label)
            return x_i if data_prediction else (y_i - x_i) / s_i

        u = _single(u, m, H, lambda u_i, i: look(u_i, s[i]))  # noqa: B023
        y = u if data_prediction else u * s[-1]
    return y * alpha


def _single(u: Tensor, m: Tensor, H: Tensor, look) -> Tensor:
    """One step over H[-1] by way of the nodes before it (Algorithms 1 and 2 of DPM-Solver)."""
    phi = H.expm1()
    if len(H) == 1:
        return H[0].exp() * u - phi[0] * m
    difference = look(H[0].exp() * u - phi[0] * m, 1) - m
    if len(H) == 2:
        return H[1].exp() * u - phi[1] * m - phi[1] * H[1] / (2 * H[0]) * difference
    phi_2 = phi / H - 1
    difference = look(H[1].exp() * u - phi[1] * m - H[1] / H[0] * phi_2[1] * difference, 2) - m
    return H[2].exp() * u - phi[2] * m - H[2] / H[1] * phi_2[2] * difference


def _groups(num_steps: int, order: int, denoise: bool) -> list[int]:
    """Sizes that sum to `num_steps`, all `order` but for the last one or two (Section 3.4 of DPM-Solver); the
    last is 1 if it has to denoise.
    """
    if denoise:
        return [*_groups(num_steps - 1, order, False), 1] if num_steps > 1 else [1]
    full, rest = divmod(num_steps, order)
    if order == 3 and rest == 0 and full > 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * (rest > 0)


def _check(order: int, data_prediction: bool, eta: float) -> None:
    if order not in (1, 2, 3):
        raise ConfigError(f"DPM-Solver has orders 1, 2 and 3, got order={order}.")
    if eta < 0 or (eta > 0 and not data_prediction):
        raise ConfigError(f"eta must be 0 or, with data_prediction=True, positive; got eta={eta}.")
