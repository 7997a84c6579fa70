"""Solvers of linear systems that are known by their products alone, one system for each image.

`solver(system, b, iterations=...) -> v` with `system(v)` linear in v (B, ...) and nothing shared between
rows. They start from 0, run the given number of iterations, and never wait for the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Solver", "cg", "gmres"]

Solver = Callable[..., Tensor]


def gmres(system: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int = 1) -> Tensor:
    """The v of least residual in the Krylov space of `iterations` dimensions, for any matrix (Saad & Schultz
    1986, https://doi.org/10.1137/0907058); without restarts.

    Arnoldi with modified Gram-Schmidt; the small least-squares problem by Givens rotations.
    """
    tiny = torch.finfo(b.dtype).eps
    norm = _norm(b)
    basis, columns, rotations = [b / _over(norm, tiny, b)], [], []
    residual = [norm]
    for _ in range(iterations):
        w = system(basis[-1])
        column = []
        for q in basis:
            column.append(_dot(q, w))
            w = w - _over(column[-1], None, b) * q
        below = _norm(w)
        basis.append(w / _over(below, tiny, b))
        for k, (c, s) in enumerate(rotations):
            column[k], column[k + 1] = c * column[k] + s * column[k + 1], c * column[k + 1] - s * column[k]
        length = (column[-1].square() + below.square()).sqrt().clamp(min=tiny)
        c, s = column[-1] / length, below / length
        column[-1] = length
        rotations.append((c, s))
        columns.append(column)
        residual[-1:] = [c * residual[-1], -s * residual[-1]]
    weights: list[Tensor] = []
    for k in reversed(range(iterations)):
        known = sum((columns[k + 1 + i][k] * w for i, w in enumerate(weights)), torch.zeros_like(norm))
        weights.insert(0, (residual[k] - known) / columns[k][k])
    return sum((_over(w, None, b) * q for w, q in zip(weights, basis, strict=False)), torch.zeros_like(b))


def cg(system: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int = 1) -> Tensor:
    """Conjugate gradients, for symmetric positive matrices (Hestenes & Stiefel 1952). A row stops where the
    matrix is not positive along its direction, as the Jacobian of a network may be.
    """
    tiny = torch.finfo(b.dtype).tiny
    v, r, p = torch.zeros_like(b), b, b
    square = _dot(r, r)
    active = torch.ones_like(square, dtype=torch.bool)
    for _ in range(iterations):
        moved = system(p)
        curvature = _dot(p, moved)
        active = active & (curvature > 0)
        step = (square / curvature.where(active, 1.0)).where(active, 0.0)
        step = _over(step, None, b)
        v, r = v + step * p, r - step * moved
        square, before = _dot(r, r), square
        p = r + _over(square / before.clamp(min=tiny), None, b) * p
    return v


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B,)."""
    return torch.einsum("bi,bi->b", a.flatten(1), b.flatten(1))


def _norm(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()


def _over(rows: Tensor, least: float | None, like: Tensor) -> Tensor:
    """(B,), at least `least`, shaped to go with (B, ...)."""
    rows = rows if least is None else rows.clamp(min=least)
    return rows.reshape(-1, *(1,) * (like.ndim - 1))
