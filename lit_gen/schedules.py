"""Learning-rate factors: `factor(step) -> float`, for `torch.optim.lr_scheduler.LambdaLR`. Steps are
optimizer steps."""

import math

__all__ = ["inverse_sqrt", "warmup", "warmup_cosine"]


def warmup(step: int, *, steps: int) -> float:
    """Rises linearly to 1 over `steps` steps (the first step is not wasted on a rate of 0), then stays."""
    return min((step + 1) / max(steps, 1), 1.0)


def warmup_cosine(step: int, *, steps: int, total: int, floor: float = 0.0) -> float:
    """`warmup`, then half a cosine down to `floor` at `total` steps, where it stays."""
    if step < steps:
        return warmup(step, steps=steps)
    progress = min((step - steps) / max(total - steps, 1), 1.0)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def inverse_sqrt(step: int, *, steps: int, constant: int) -> float:
    """`warmup`, constant up to step `constant`, then 1 / sqrt(step / constant) (EDM2,
    https://arxiv.org/abs/2312.02696)."""
    return warmup(step, steps=steps) / math.sqrt(max((step + 1) / max(constant, 1), 1.0))
