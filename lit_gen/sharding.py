"""Networks whose weights are shared out over the processes (torch's fully_shard, FSDP2): each process keeps
its part of every weight, gradient, average and optimizer state, and gathers a block of layers to compute.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication


def units(network: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network that are gathered one after another: its children with parameters, looked for
    inside containers, which are never called themselves (ModuleList, the levels of a U-Net) or only call
    their children (Sequential)."""
    for child in network.children():
        if isinstance(child, nn.Sequential) or type(child).forward is nn.Module.forward:
            yield from units(child)
        elif any(True for _ in child.parameters()):
            yield child


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each process of the one-dimensional mesh its rows (axis 0) of every weight, in place; names in a
    `state_dict` do not change. Scalar parameters, which have no rows, stay whole on every process.

    Gathered weights are freed after the forward pass of their unit and gathered again in the backward pass.
    """
    network.to(memory_format=torch.contiguous_format)  # the only one that fully_shard takes
    scalars = {p for p in network.parameters() if p.ndim == 0}
    for part in (*units(network), network):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is shared out over the processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


_mixes = False


@contextmanager
def mixing(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, one kernel may take sharded tensors, if there are any, together with those that are whole on
    every process."""
    global _mixes
    if _mixes or not is_sharded(tensors):  # torch's own cannot be nested
        yield
        return
    with implicit_replication():
        _mixes = True
        try:
            yield
        finally:
            _mixes = False


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory; a tensor that is not sharded itself. Of any shape."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every process, all of which must call it. Of any shape."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages over the processes the gradients that `fully_shard` does not: those of parameters which are
    whole on every process."""
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if grads:
        flat = torch.cat([g.flatten() for g in grads]) / distributed.get_world_size()
        distributed.all_reduce(flat)
        for grad, average in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(average.view_as(grad))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights of the module's sharded networks, so that each may call them as
    often as it likes; all processes must enter and leave."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
