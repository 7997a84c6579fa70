"""The abstract device itself: it must see what it is there for."""

import pytest
import torch
from torch import nn


def test_it_refuses_to_mix_devices(cuda):
    x = cuda.put(torch.zeros(3))
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.zeros(3)
    assert (x + torch.tensor(1.0)).device == cuda.device  # kernels take a number of the host


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x + torch.ones(3).to(x),
        lambda x: x + torch.tensor(1.0).to(x),
        lambda x: x + torch.tensor(1.0, device=x.device),
        lambda x: x.new_tensor(2.0),
    ],
    ids=[
        "item",
        "bool",
        "tolist",
        "cpu",
        "nonzero",
        "mask",
        "host index",
        "to",
        "number to",
        "tensor",
        "new",
    ],
)
def test_it_counts_a_wait(cuda, act):
    x = cuda.put(torch.ones(3))
    with cuda.counting() as waits:
        act(x)
    assert waits


def test_it_counts_nothing_else(cuda):
    x = cuda.put(torch.ones(3))
    with cuda.counting() as waits:
        y = (x * torch.tensor(2.0) + torch.full((), 3.0, device=x.device)).clamp(min=0)
        y = torch.where(y > 1, y, 0.0).masked_fill(y > 2, 0.0)
        y[y > 0.5] = 1.0
        nn.functional.pad(y, (1, 1)).sum().sqrt()
        torch.arange(3, device=x.device).flip(0)
    assert waits == []


def test_autocast_is_the_gpus(cuda):
    x = cuda.put(torch.ones(1, 1, 2, 2))
    with cuda.autocast():
        assert (x @ x).dtype == torch.bfloat16
        # Nearest-neighbor upsampling is on the float32 list of CUDA alone.
        assert nn.functional.interpolate((x @ x), scale_factor=2).dtype == torch.float32


def test_gradients_have_the_dtype_of_their_tensors(cuda):
    layer = cuda.put(nn.Linear(3, 2))
    x = cuda.put(torch.ones(4, 3)).requires_grad_()
    with cuda.autocast():
        loss = layer(x).float().square().mean()
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + g.square().sum()).backward()
    assert g.dtype == x.dtype and {p.grad.dtype for p in layer.parameters()} == {torch.float32}
