"""Forward derivatives through every network against central differences, and gradients of the value."""

import pytest
import torch
from torch.testing import assert_close

from lit_gen.score.denoiser import Denoiser
from lit_gen.score.fewstep.tangent import jvp, replayed
from lit_gen.score.networks.dit import DiT
from lit_gen.score.networks.uvit import UViT
from lit_gen.score.precondition import EDMPrecondition
from lit_gen.score.sde import EDM
from tests.score.networks import test_networks
from tests.score.networks.test_networks import SMALL, small

TIMED = ("ncsnpp", "ddpmpp", "256px", "cat", "adm", "edm2")  # the noise level has an effect, a smooth one
TRANSFORMERS = {
    "uvit": lambda: UViT(8, 1, 2, 16, 2, 2, time_mlp=True, num_classes=3),
    "dit": lambda: DiT(8, 1, 2, 16, 2, 2, num_classes=3),
}


@pytest.fixture(autouse=True)
def transformers_too(monkeypatch):
    monkeypatch.setattr(test_networks, "SMALL", SMALL | TRANSFORMERS)


def along(name, **options):
    """f(x, t) of a small network in float64, its point and direction."""
    net, inputs = small(name, **options)
    net.double()
    x, t = inputs.pop("x").double(), inputs.pop("noise_label").double()
    labels = {k: v if k == "label" else v.double() for k, v in inputs.items()}
    return net, lambda x, t: net(x, t, **labels), (x, t), (torch.randn_like(x), torch.randn_like(t))


def central(function, primals, tangents, h=1e-5):
    """Of fourth order in h."""

    def difference(h):
        ends = (function(*(x + s * v for x, v in zip(primals, tangents, strict=True))) for s in (h, -h))
        return next(ends) - next(ends)

    return (8 * difference(h) - difference(2 * h)) / (12 * h)


@pytest.mark.parametrize("name", [*SMALL, *TRANSFORMERS])
@pytest.mark.parametrize("training", [False, True])
def test_tangent_is_the_derivative(name, training):
    net, function, primals, tangents = along(name)
    net.train(training)
    for module in net.modules():
        if "dropout" in vars(module):
            module.dropout = 0.0  # central differences would see other masks
    for _ in range(3):
        function(*primals)  # while it trains, EDM2 moves its weights to the unit sphere, call by call
    value, tangent = jvp(function, primals, tangents)
    with torch.no_grad():
        expected = central(function, primals, tangents)
    largest = float(expected.abs().max())
    assert_close(tangent, expected, rtol=0, atol=1e-7 * largest)
    assert_close(value, function(*primals), rtol=0, atol=1e-9 if name == "edm2" else 0)
    assert value.requires_grad and not tangent.requires_grad
    if name in (*TIMED, *TRANSFORMERS):
        in_time = torch.zeros_like(primals[0]), tangents[1]
        along_t = jvp(function, primals, in_time)[1]
        with torch.no_grad():
            assert_close(along_t, central(function, primals, in_time), rtol=0, atol=1e-7 * largest)
        assert along_t.abs().max() > 1e-4 * largest


@pytest.mark.parametrize("name", ["ddpmpp", "adm", "edm2"])
def test_value_has_the_gradients_of_an_ordinary_call(name):
    net, function, primals, tangents = along(name)
    net.train()
    for _ in range(3):
        function(*primals)  # EDM2's weights, as above
    torch.manual_seed(1)
    wanted = torch.autograd.grad(function(*primals).square().sum(), list(net.parameters()))
    torch.manual_seed(1)
    found = torch.autograd.grad(jvp(function, primals, tangents)[0].square().sum(), list(net.parameters()))
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, rtol=0, atol=1e-9 * float(b.abs().max()) if name == "edm2" else 0)


def test_value_and_tangent_have_one_dropout_mask():
    net, function, primals, _ = along("ddpmpp", dropout=0.5)
    net.train()
    torch.manual_seed(3)
    once = function(*primals)
    after = torch.rand(1)
    torch.manual_seed(3)
    # Of degree one in all weights of the head: along the weights' own direction the derivative is the value.
    last = net.decoder[-1].head[2]
    weights = last.weight.detach(), last.bias.detach()

    def of_head(weight, bias):
        with torch.no_grad():
            return torch.func.functional_call(
                net, {"decoder.1.head.2.weight": weight, "decoder.1.head.2.bias": bias}, primals
            )

    value, tangent = jvp(of_head, weights, weights)
    assert torch.equal(value, once)
    assert_close(tangent, value, rtol=1e-9, atol=1e-12)
    assert torch.equal(torch.rand(1), after)
    assert not torch.equal(value, function(*primals))  # another mask


def test_replayed_gives_the_numbers_again_also_after_an_error():
    torch.manual_seed(0)
    with replayed(torch.device("cpu")):
        a = torch.rand(3)
    assert torch.equal(torch.rand(3), a)
    with pytest.raises(RuntimeError), replayed(torch.device("cpu")):
        b = torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.rand(3), b)


def test_tangent_under_autocast_is_that_of_float32():
    net, inputs = small("ddpmpp")
    denoiser = Denoiser(net, EDM(), EDMPrecondition())
    x, t = inputs["x"].double(), inputs["noise_label"].double()
    directions = torch.randn_like(x), torch.ones_like(t)
    exact = jvp(denoiser, (x, t), directions)
    with torch.autocast("cpu", torch.bfloat16):
        value, tangent = jvp(denoiser, (x, t), directions)
    assert torch.equal(tangent, exact[1]) and tangent.dtype == torch.float64
    assert 1e-4 < (value - exact[0]).abs().max() < 0.1
