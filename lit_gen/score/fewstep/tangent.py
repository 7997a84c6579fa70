"""Directional derivatives of networks in forward mode, and two calls of a network with one dropout mask."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_gen.precision import full_float32

__all__ = ["jvp", "replayed"]


@contextmanager
def replayed(device: torch.device) -> Iterator[None]:
    """After the block, random numbers go on as if it had drawn none: the same calls after it get the same
    dropout masks. Generators live on the host, so that no device is waited for."""
    places = [torch.random] + ([torch.get_device_module(device)] if device.type != "cpu" else [])
    states = [place.get_rng_state() for place in places]
    try:
        yield
    finally:
        for place, state in zip(places, states, strict=True):
            place.set_rng_state(state)


def jvp(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(value, tangent): function(*primals), which is differentiated backward as ever, and the derivative of
    it along `tangents`, which has no gradient.

    The function is called twice with the same dropout masks, first for the tangent. A parameter then gets its
    gradient by the value alone, so that DistributedDataParallel sees nothing new, and no graph of the tangent
    is kept: half the time and memory of one call for both. Whatever the autocast, the tangent is taken in the
    function's own precision, since bfloat16 is wrong by per cents, and without TF32. Of the attention kernels
    only the plain one has a forward derivative. The networks must be neither compiled nor sharded.
    """
    device = primals[0].device
    plain = torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH)
    with replayed(device), torch.no_grad(), plain[0], plain[1], full_float32(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v.to(x)) for x, v in zip(primals, tangents, strict=True)]
        out, tangent = forward_ad.unpack_dual(function(*duals))
        tangent = torch.zeros_like(out) if tangent is None else tangent
    return function(*primals), tangent
