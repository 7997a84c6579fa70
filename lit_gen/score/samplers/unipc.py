"""UniPC (Zhao et al. 2023, https://arxiv.org/abs/2302.04867)."""

import math

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.samplers.grids import Grid, karras
from lit_gen.score.samplers.ode import Trace, begin, denoised

__all__ = ["unipc"]

Prediction = tuple[Tensor, Tensor]  # (lambda, x0_hat)


@torch.no_grad()
def unipc(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    num_steps: int = 15,
    order: int = 2,  # of the predictor; the corrector raises it by one
    grid: Grid = karras,
    lower_order_final: bool = True,  # the last steps of order 2 and 1, without which few steps are unstable
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max, one evaluation a step: UniPC with B(h) = e^h - 1 on data
    predictions.

    The evaluation at the predicted point corrects that point before it serves the next step, at no further
    cost. The last steps are of lower order, and one to noise level 0 is one denoising. Draws nothing.
    Raises ConfigError for an order below 1.
    """
    if order < 1:
        raise ConfigError(f"order of UniPC must be at least 1, got {order}.")
    levels, y, alpha = begin(denoiser, x, grid, num_steps)
    x0_hat = denoised(denoiser, y, levels[0], label, trace, 0)
    past = [(-levels[0].log(), x0_hat)]  # (lambda, prediction), the newest first
    for step, s_next in enumerate(levels[1:]):
        if s_next == 0:
            y = past[0][1]
            break
        past = past[: min(order, num_steps - step) if lower_order_final else order]
        lambda_next = -s_next.log()
        predicted = _step(y, past, lambda_next)
        if step == num_steps - 1:
            y = predicted
            break
        new = (lambda_next, denoised(denoiser, predicted, s_next, label, trace, step + 1))
        y = _step(y, past, lambda_next, new)
        past = [new, *past]
    return y * alpha


def _step(y: Tensor, past: list[Prediction], lambda_next: Tensor, new: Prediction | None = None) -> Tensor:
    """y at lambda_next from the predictions `past`, and `new` at lambda_next itself (the corrector).

    Solves Equation 10 for the weights of the differences to the newest of `past`.
    """
    (lambda_0, m_0), others = past[0], past[1:] + ([new] if new else [])
    H = lambda_0 - lambda_next  # -h
    y = H.exp() * y - H.expm1() * m_0
    if not others:
        return y
    nodes = torch.stack([(l - lambda_0) / -H for l, _ in others])
    phi, right = H.expm1() / H - 1, []
    for k in range(1, len(others) + 1):
        right.append(phi * math.factorial(k) / H.expm1())
        phi = phi / H - 1 / math.factorial(k + 1)
    powers = nodes[None] ** torch.arange(len(others), dtype=nodes.dtype)[:, None]
    # With one older prediction the paper takes 1/2 for the predictor and the corrector alike.
    weights = torch.linalg.solve(powers, torch.stack(right)) if len(others) > 1 else nodes.new_full((1,), 0.5)
    return y - H.expm1() * sum(w * (m - m_0) / r for w, r, (_, m) in zip(weights, nodes, others, strict=True))
