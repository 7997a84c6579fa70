"""Learning-rate factors: `factor(step) -> float`, for `torch.optim.lr_scheduler.LambdaLR`. Steps are
optimizer steps. And the short training, under a one-cycle rate, of the networks that serve as a measure."""

import math
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR


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


def train_one_cycle(
    network: nn.Module,
    optimizer: Optimizer,
    losses: Iterable[Tensor],
    steps: int,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """A step of the optimizer for each of `steps` losses, its rate rising and falling once (Smith and Topin
    2017, https://arxiv.org/abs/1708.07120); the network is left in eval mode.

    `losses` computes each loss () when it is asked for, by the weights of that moment. `advance(1)` is called
    after every step.
    """
    rate = OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total_steps=max(2, steps))
    network.train()
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        advance(1)
    network.eval()
