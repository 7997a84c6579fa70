"""Images as latents of the probability flow, and the way between two of them."""

import torch
from torch import Tensor

__all__ = ["slerp"]


def slerp(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """From `a` (weight 0) to `b` (weight 1), both (B, ...), along the great circle through each row (Shoemake
    1985).

    Latents (`samplers.encode`) have nearly the norm of noise, which a straight line would leave. `weight` is
    a number or (B,).
    """
    weight = torch.as_tensor(weight, dtype=a.dtype, device=a.device).reshape(-1, *(1,) * (a.ndim - 1))
    norms = [x.flatten(1).norm(dim=1).reshape(-1, *(1,) * (a.ndim - 1)) for x in (a, b)]
    cosine = (a * b).flatten(1).sum(1).reshape(norms[0].shape) / (norms[0] * norms[1])
    angle = cosine.clamp(-1, 1).acos()
    # Parallel rows: sin(w angle) / sin(angle) -> w.
    small = angle.sin() < 1e-7
    sine = torch.where(small, torch.ones_like(angle), angle.sin())
    first = torch.where(small, 1 - weight, ((1 - weight) * angle).sin() / sine)
    second = torch.where(small, weight + 0 * angle, (weight * angle).sin() / sine)
    return first * a + second * b
