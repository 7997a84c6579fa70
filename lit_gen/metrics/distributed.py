"""What the metrics need of torch.distributed: sums over ranks, and one rank's answer for all."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


def world_size() -> int:
    """How many processes there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def own_batches(n: int, size: int) -> list[range]:
    """This rank's part of n rows in batches of `size`: whole batches, number r, r + W, ... of W ranks, each
    composed as one process would compose it."""
    starts = range(rank() * size, n, world_size() * size)
    return [range(start, min(start + size, n)) for start in starts]


def gather_batches(own: Sequence[Tensor], n: int, size: int) -> Tensor | None:
    """Rank 0: all n rows in order, (n, ...), of what every rank made of its `own_batches(n, size)`; the
    others: None. Every rank must call."""
    if world_size() == 1:
        return torch.cat(list(own))
    if own and own[0].dtype == torch.uint16:  # which neither gloo nor NCCL moves
        moved = gather_batches([x.contiguous().view(torch.uint8) for x in own], n, size)
        return None if moved is None else moved.view(torch.uint16)
    whole = own[0].new_empty(n, *own[0].shape[1:]) if rank() == 0 else None
    for i, start in enumerate(range(0, n, size)):
        turn, owner = divmod(i, world_size())
        if whole is None:
            if owner == rank():
                dist.send(own[turn].contiguous().to(_device(own[turn].device)), 0)
        elif owner == 0:
            whole[start : start + size] = own[turn]
        else:
            part = whole[start : start + size].to(_device(whole.device))
            dist.recv(part, owner)
            whole[start : start + size] = part
    return whole


def all_gather(x: Tensor) -> Tensor:
    """Every rank's x, of one shape on all of them, as (ranks, *x.shape)."""
    if world_size() == 1:
        return x[None]
    own = x.detach().contiguous().to(_device(x.device))
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return torch.stack(parts).to(x.device)


def all_reduce_sum(x: Tensor, group: Any = None) -> list[Tensor]:
    """[sum of x over the ranks], a `dist_sync_fn` for `torchmetrics.Metric` states with
    `dist_reduce_fx="sum"`.

    Its memory does not grow with the number of ranks, as the default's does (it gathers every rank's copy
    everywhere). `x` has any shape, the same on all ranks.
    """
    total = x.detach().clone().to(_device(x.device))
    dist.all_reduce(total, group=group)
    return [total.to(x.device)]


def from_rank_zero(compute: Callable[[], T]) -> T:
    """`compute()` of rank 0 on every rank: bit-identical, whatever the ranks' machines. Its exception is
    raised on all.

    The others wait in a broadcast, which gives up after the process group's timeout (minutes): what may take
    longer goes through `long_from_rank_zero`.
    """
    if world_size() == 1:
        return compute()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = compute()
        except Exception as error:  # the other ranks wait in the broadcast and must hear of it
            answer[1] = error
    dist.broadcast_object_list(answer, device=_device(torch.device("cpu")))
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def long_from_rank_zero(compute: Callable[[Callable[[], None]], T], every: float = 20.0) -> T:
    """As `from_rank_zero`, for work of any length that calls its argument, `compute(beat)`, now and then.

    A beat tells the waiting ranks, at most once in `every` seconds, that there is more to wait for: each of
    their collectives then takes seconds, and none runs into the process group's timeout.
    """
    if world_size() == 1:
        return compute(lambda: None)
    newest = time.monotonic()

    def beat() -> None:
        nonlocal newest
        if time.monotonic() - newest >= every:
            _rank_zero_says(True)
            newest = time.monotonic()

    def whole() -> T:
        try:
            return compute(beat)
        finally:
            _rank_zero_says(False)

    while rank() != 0 and _rank_zero_says(True):
        pass
    return from_rank_zero(whole)


def _rank_zero_says(more: bool) -> bool:
    """Rank 0's `more` on every rank."""
    flag = torch.full((), more, dtype=torch.uint8, device=_device(torch.device("cpu")))
    dist.broadcast(flag, 0)
    return bool(flag)


def _device(preferred: torch.device) -> torch.device:
    """NCCL moves CUDA tensors only, gloo is for those of the CPU."""
    if dist.get_backend() == "nccl" and preferred.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if dist.get_backend() == "gloo" else preferred
