"""Learned variances and guidance of some channels, against DiT's and SiT's codes (goldens/transformers)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.pretrained import transformers, unpickle
from lit_gen.rng import PerSample
from lit_gen.score.condition import Condition
from lit_gen.score.denoiser import ConditionedDenoiser, Denoiser, GaussianDenoiser, ReparameterizedDenoiser
from lit_gen.score.guidance import classifier_free_guidance
from lit_gen.score.learned_variance import HybridLoss, iddpm
from lit_gen.score.losses import UniformStep
from lit_gen.score.precondition import PredictNoise, StepIndex
from lit_gen.score.samplers import ddim, uniform_steps
from lit_gen.score.sde import EDM, VP, DiscreteVP, linear_betas

FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[1] / "goldens") / "transformers"
CASES = [p.with_suffix("") for p in sorted(FOLDER.glob("*.json")) if p.with_suffix(".io.npz").is_file()]
PROCESS = DiscreteVP(linear_betas())
HYBRID = HybridLoss(UniformStep(1000))


def read(stem: Path):
    """The JSON, the arrays, and the network in float64 of a case."""
    golden = json.loads(stem.with_suffix(".json").read_text())
    io = {k: torch.from_numpy(v) for k, v in np.load(f"{stem}.io.npz").items()}
    state = {k: v.float() for k, v in unpickle.load(f"{stem}.state_dict.pt").items()}
    options = golden["constructor_kwargs"]
    null_class = options.get("class_dropout_prob", 0.1) > 0 and golden["class"] != "UViT"
    net, _ = transformers.read(state, heads=options["num_heads"], null_class=null_class)
    return golden, io, net.double()


def keyed(name: str):
    """The cases that have an array whose name begins like this."""
    arrays = {case: json.loads(case.with_suffix(".json").read_text())["io"] for case in CASES}
    told = [case for case in CASES if any(key.startswith(name) for key in arrays[case])]
    return pytest.mark.parametrize("case", told, ids=[c.name for c in told])


@pytest.mark.parity
@keyed("cfg_out")
def test_guidance_of_three_channels(case):
    golden, io, net = read(case)
    half = len(io["cfg_x"]) // 2
    x, t, y = (io[f"cfg_{name}"][:half] for name in "xty")

    def image(process, t):  # the network's output is the image
        one = torch.ones_like(t)
        return torch.zeros_like(t), one, one, t

    denoiser = Denoiser(net, EDM(), image)
    for scale in golden["cfg_scales"]:
        guided = classifier_free_guidance(denoiser, scale, channels=3)
        out = guided(x.double(), t.double(), y)
        expected = io.get(f"cfg_out_scale{scale:g}_float64", io[f"cfg_out_scale{scale:g}"])[:half]
        top = expected.abs().max().item()
        assert (out - expected[:, : x.shape[1]]).abs().max().item() <= 1e-5 * top
        if expected.shape[1] > x.shape[1]:
            _, v = guided.with_variance(x.double(), t.double(), y)
            assert (v - expected[:, x.shape[1] :]).abs().max().item() <= 1e-5 * top


@pytest.mark.parity
@keyed("loss_")
def test_loss(case):
    golden, io, net = read(case)
    denoiser = Denoiser(net, PROCESS, PredictNoise(StepIndex()))
    t = (io["loss_t"] + 1).double() / 1000
    y = io["y"].masked_fill(io["y"] == golden["null_label"], -1)
    error, bound = HYBRID.terms(denoiser, io["loss_x0"].double(), t, io["loss_noise"].double(), label=y)
    assert_close(error, io["loss_mse_float64"], rtol=1e-5, atol=1e-6)
    assert_close(bound, io["loss_vb_float64"], rtol=1e-5, atol=1e-5 * io["loss_vb_float64"].max().item())
    assert_close(error + bound, io["loss_loss_float64"], rtol=1e-5, atol=1e-5)


class Recorded(PerSample):
    """Draws that were recorded, one after another."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def _stack(self, draw, shape, device, dtype):
        return next(self.draws).to(dtype)


@pytest.mark.parity
@keyed("ancestral_")
def test_respaced_ancestral_steps(case):
    golden, io, net = read(case)
    told, start = golden["ancestral"], io["ancestral_start"]
    steps = told["timesteps"]
    half = len(start)
    y = io["cfg_y"][:half]
    states: list = []
    guided = classifier_free_guidance(
        Denoiser(net, PROCESS, PredictNoise(StepIndex())), told["cfg_scale"], channels=3
    )
    assert (uniform_steps(PROCESS, len(steps))[:-1] * 1000 - 1).round().tolist() == steps
    out = iddpm(
        guided,
        start.double(),
        num_steps=len(steps),
        label=y,
        generator=Recorded(io["ancestral_noise"][:, :half].double()),
        trace=lambda step, x_t, x0_hat: states.append(x_t),
    )
    top = io["ancestral_states"].abs().max().item()
    for ours, expected in zip([*states[1:], out], io["ancestral_states"][:, :half], strict=True):
        assert (ours - expected).abs().max().item() <= 1e-5 * top


# Without goldens


class Told(nn.Module):
    """Says the exact noise of Gaussian data, and a variance."""

    def __init__(self, exact, variance):
        super().__init__()
        self.exact, self.variance = exact, variance
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, noise_label, label=None, augment_label=None):
        t = (noise_label + 1) / 1000
        return torch.cat([self.exact.noise(x, t), torch.full_like(x, self.variance)], 1)


def gaussian(variance):
    exact = GaussianDenoiser(PROCESS, torch.zeros(1, 2, 2), torch.tensor(0.3))
    return Denoiser(Told(exact, variance), PROCESS, PredictNoise(StepIndex())), exact


def test_the_smallest_variance_is_that_of_the_posterior():
    """v = -1 makes it ancestral sampling, which exact denoisers and their wrappers do besides."""
    denoiser, exact = gaussian(-1.0)
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = {"num_steps": 20, "generator": PerSample.keyed(0, range(3))}
    options = [run | {"generator": PerSample.keyed(0, range(3))} for _ in range(4)]
    expected = ddim(exact, x, eta=1.0, grid=uniform_steps, **options[0])
    wrapped = ConditionedDenoiser(denoiser, Condition(label=torch.zeros(3, dtype=torch.int64)))
    for one, told in zip((exact, denoiser, wrapped), options[1:], strict=True):
        assert_close(iddpm(one, x, **told), expected, rtol=1e-9, atol=1e-9)


def test_the_bound_is_least_at_the_variance_of_the_exact_step():
    """p(x_s | x_t) has the variance of the posterior, and that of the image beyond it."""
    generator = torch.Generator().manual_seed(0)
    x_0, z = (torch.randn(4000, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.full((4000,), 0.004, dtype=torch.float64)
    bounds = []
    for v in torch.linspace(-1, 1, 9).tolist():
        bounds.append(HYBRID.terms(gaussian(v)[0], x_0 * 0.3**0.5, t, z)[1].mean().item())
    s, t = t[0] - 1e-3, t[0]
    _, beta = PROCESS.transition(s, t)
    noise = PROCESS.sigma(t).square()
    least = beta * PROCESS.sigma(s).square() / noise
    spread = 0.3 * noise / (0.3 * PROCESS.alpha(t).square() + noise)  # of the image, given x_t
    exact = least + (PROCESS.alpha(s) * beta / noise).square() * spread
    f = ((exact / least).log() / (beta / least).log()).item()
    best = int(torch.tensor(bounds).argmin())
    assert abs(best / 8 - f) <= 1 / 16 + 0.01


def test_the_mean_gets_no_gradient_of_the_bound():
    denoiser, _ = gaussian(0.0)
    x_0 = torch.zeros(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.001, 0.5], dtype=torch.float64)
    v = torch.zeros_like(x_0, requires_grad=True)
    x0_hat = torch.full_like(x_0, 2e-3, requires_grad=True)
    denoiser.with_variance = lambda *_, **__: (x0_hat * 1, v * 1)
    _, bound = HYBRID.terms(denoiser, x_0.detach(), t, torch.ones_like(x_0))
    gradients = torch.autograd.grad(bound.sum(), [x0_hat, v], allow_unused=True)
    assert gradients[0] is None and gradients[1].abs().min() > 0


def test_what_has_no_learned_variance_is_refused():
    exact = GaussianDenoiser(PROCESS, torch.zeros(1, 2, 2), torch.tensor(0.3))
    x, t = torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)

    class Mean(nn.Module):
        def forward(self, x, noise_label, label=None, augment_label=None):
            return x

    without = Denoiser(Mean(), PROCESS, PredictNoise(StepIndex()))
    with pytest.raises(ConfigError, match="says no variance: it needs out_channels=2"):
        iddpm(without, x)
    with pytest.raises(ConfigError, match="ReparameterizedDenoiser tells no learned variance"):
        iddpm(ReparameterizedDenoiser(without, PROCESS), x)
    with pytest.raises(ConfigError, match="does not say"):
        HYBRID(exact, x, t, x)
    with pytest.raises(ConfigError, match="DiscreteVP, not of VP"):
        HYBRID(GaussianDenoiser(VP(), torch.zeros(1, 2, 2), torch.tensor(0.3)), x, t, x)
