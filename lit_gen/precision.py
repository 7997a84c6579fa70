"""Float32 that is float32: without the shortened products that GPUs take by default."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def switched(*wanted: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of objects, as (owner, name, value), set inside and put back after."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in wanted]
    try:
        for owner, name, value in wanted:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 and no bf16 inside float32 products and convolutions.

    TF32, which cuDNN takes for convolutions unless told otherwise, keeps 10 bits of 23: features move by
    1e-3, and an ODE solver meets noise above its tolerance.
    """
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    if hasattr(cuda.matmul, "fp32_precision"):  # from torch 2.9 on; the older switches refuse to be read then
        backends = (cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)
        wanted = [(backend, "fp32_precision", "ieee") for backend in backends]
    else:
        wanted = [(backend, "allow_tf32", False) for backend in (cuda.matmul, cudnn)]
    with switched(*wanted):
        yield
