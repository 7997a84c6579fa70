"""SiT's interpolants, losses, samplers, and likelihood against its code (sit_transport.* in
goldens/transformers).

Its time runs the other way: t = 0 is noise, and its velocity has the other sign.
"""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.rng import PerSample
from lit_gen.score.denoiser import Denoiser, GaussianDenoiser, GaussianMixtureDenoiser
from lit_gen.score.likelihood import exact_probes, log_likelihood
from lit_gen.score.losses import DenoisingLoss, UniformTime, likelihood, path_velocity, snr
from lit_gen.score.precondition import PredictPathVelocity, PredictScore
from lit_gen.score.samplers import (
    diffusion_form,
    encode,
    heun,
    interpolant_sde,
    probability_flow,
    rk45,
    runge_kutta,
    uniform_time,
    velocity,
)
from lit_gen.score.sde import GVP, VP, Flow

FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[1] / "goldens") / "transformers"
PATH = FOLDER / "sit_transport.json"
GOLDEN = json.loads(PATH.read_text()) if PATH.is_file() else {}
IO = {k: torch.from_numpy(v) for k, v in np.load(PATH.with_suffix(".npz")).items()} if GOLDEN else {}
PROCESSES = {"Linear": Flow, "GVP": GVP, "VP": VP}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def process_of(path: str, prediction: str):
    """A velocity needs no margin; on VP the last noise level is that of the official samplers."""
    if path == "VP":
        return VP(t_min=1e-3, t_max=1.0)
    return PROCESSES[path](*((0.0, 1.0) if prediction == "velocity" else (1e-3, 0.999)))


def training_times(path: str, prediction: str) -> UniformTime:
    return UniformTime(1e-5 if path == "VP" else None)


def numbers(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mixture(process) -> GaussianMixtureDenoiser:
    weights, variance = (numbers(GOLDEN[f"gmm_{name}"]) for name in ("weights", "variance"))
    return GaussianMixtureDenoiser(process, IO["gmm_means"].double(), variance, weights)


class Said(nn.Module):
    """A network that says one thing."""

    def __init__(self, out):
        super().__init__()
        self.out, self.weight = out, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, noise_label, label=None, augment_label=None):
        return self.out


@pytest.mark.parity
@pytest.mark.parametrize("path", GOLDEN.get("paths", {}))
def test_coefficients(path):
    golden, process = GOLDEN["paths"][path], PROCESSES[path]()
    t = 1 - numbers(golden["t"])
    close = {"rtol": 1e-11, "atol": 1e-12}  # 1 - t is off by 1e-16, and its inverse at 0.001 by 1e-13
    d_alpha, d_sigma = process.slopes(t)
    for ours, name in (
        (process.alpha(t), "alpha"),
        (-d_alpha, "d_alpha"),
        (process.sigma(t), "sigma"),
        (-d_sigma, "d_sigma"),
        (-process.drift(t), "d_alpha_over_alpha"),
        (process.diffusion(t).square() / 2, "drift_variance"),
    ):
        assert_close(ours, numbers(golden[name]), **close, msg=lambda m, name=name: f"{name}: {m}")
    assert_close(process.drift(t), numbers(golden["drift_of_x_equal_1"]), **close)
    forms = [key for key in golden if key.startswith("diffusion_")]
    assert forms
    for key in forms:
        _, form, norm = key.split("_")
        form = form.lower().replace("-", "_").replace("inccreasing", "increasing")
        ours = diffusion_form(process, t, form, float(norm.removeprefix("norm")))
        assert_close(ours, numbers(golden[key]), rtol=1e-11, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parity
@pytest.mark.parametrize("path", GOLDEN.get("paths", {}))
def test_directions_between_predictions(path):
    process = PROCESSES[path](0.0, 1.0) if path != "VP" else VP()
    x, v, t = (IO[f"{path}_{name}"].double() for name in "xvt")
    t = 1 - t
    moving = Denoiser(Said(v), process, PredictPathVelocity())
    assert_close(moving.score(x, t), IO[f"{path}_score_from_velocity"], rtol=1e-10, atol=1e-11)
    assert_close(moving.noise(x, t), IO[f"{path}_noise_from_velocity"], rtol=1e-10, atol=1e-11)
    pulled = Denoiser(Said(v), process, PredictScore(lambda process, t: t))
    assert_close(-velocity(pulled, x, t), IO[f"{path}_velocity_from_score"], rtol=1e-10, atol=1e-11)


@pytest.mark.parity
@pytest.mark.parametrize(
    "golden", GOLDEN.get("intervals", []), ids=lambda g: f"{g['path']}-{g['prediction']}"
)
def test_intervals(golden):
    told = golden["path"], golden["prediction"]
    process, times = process_of(*told), training_times(*told)
    t_min = process.t_min if times.t_min is None else times.t_min
    assert golden["train"] == pytest.approx([1 - process.t_max, 1 - t_min], abs=1e-12)
    assert golden["ode"] == pytest.approx([1 - process.t_max, 1 - process.t_min], abs=1e-12)
    assert golden["ode_reverse"] == pytest.approx([1 - end for end in golden["ode"]])  # not VP's in reverse
    for name in (name for name in golden if name.startswith("sde_")):
        last = float(name.partition("last")[2])
        assert golden[name] == pytest.approx([1 - process.t_max, 1 - (last or process.t_min)], abs=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("golden", GOLDEN.get("losses", []), ids=lambda g: f"{g['path']}-{g['prediction']}")
def test_loss(golden):
    told = golden["path"], golden["prediction"]
    process, times = process_of(*told), training_times(*told)
    t_0, t_1 = 1 - process.t_max, 1 - (process.t_min if times.t_min is None else times.t_min)
    assert_close(numbers(golden["t"]), t_0 + (t_1 - t_0) * IO["loss_u"].double(), rtol=1e-6, atol=1e-9)
    weight, factor = {
        None: (path_velocity if told[1] == "velocity" else snr, 1.0),
        "velocity": (path_velocity, 1.0),
        "likelihood": (likelihood, 0.5),  # SiT's has half the square of the diffusion
    }[golden["loss_weight"]]
    x_0, z = IO["loss_x1"].double(), IO["loss_x0"].double()
    ours = DenoisingLoss(times, weight)(mixture(process), x_0, 1 - numbers(golden["t"]), z)
    assert_close(factor * ours, numbers(golden["loss_per_image"]), rtol=1e-9, atol=1e-12)


class Recorded(PerSample):
    """Draws that were recorded, one after another."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def _stack(self, draw, shape, device, dtype):
        return next(self.draws).to(dtype)


FIXED = {
    "euler": partial(probability_flow, alpha=None),
    "midpoint": partial(probability_flow, alpha=0.5),
    "heun2": probability_flow,
    "heun3": partial(runge_kutta, order=3),
    "rk4": runge_kutta,
}


@pytest.mark.parity
@pytest.mark.parametrize("name", [n for n, g in GOLDEN.get("samplers", {}).items() if g["kind"] == "ode"])
def test_ode(name):
    golden, kept = GOLDEN["samplers"][name], IO[f"{name}_states"]
    path, z = golden["path"], IO["z"].double()
    ends = (1 - golden["t0"], 1 - golden["t1"])
    if golden["sampling_method"] == "dopri5":
        # The noise level is infinite or zero at an end; a hundred-millionth before it is near enough.
        margin = 0.0 if path == "VP" else 1e-8
        process = PROCESSES[path](t_min=max(min(ends), 1e-8), t_max=min(max(ends), 1 - margin))
        tolerances = {"rtol": golden["rtol"], "atol": golden["atol"]}
        if golden.get("reverse"):
            found = encode(mixture(process), z, **tolerances)
        else:
            found = rk45(mixture(process), z, **tolerances, denoise=min(ends) < process.t_min)
        assert_close(found, kept[-1], rtol=0, atol=1e-6)
        return
    states: list = []
    denoiser = mixture(PROCESSES[path](t_min=min(ends), t_max=max(ends)))

    def grid(process, num_steps):
        return torch.linspace(*ends, num_steps + 1, dtype=torch.float64)

    sampler = FIXED[golden["sampling_method"]]
    last = sampler(
        denoiser,
        z,
        num_steps=golden["num_steps"] - 1,
        grid=grid,
        denoise=False,
        trace=lambda step, x_t, x0_hat: states.append(x_t),
    )
    for index, expected in zip(golden["states_kept"], kept, strict=True):
        assert_close([*states, last][index], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parity
@pytest.mark.parametrize("name", [n for n, g in GOLDEN.get("samplers", {}).items() if g["kind"] == "sde"])
def test_sde(name):
    golden, kept = GOLDEN["samplers"][name], IO[f"{name}_states"]
    last = (golden["last_step"] or "").lower() or None
    t_min = 1 - golden["t1"] if last is None else 0.0 if golden["path"] != "VP" else 1e-3
    process = PROCESSES[golden["path"]](t_min=t_min, t_max=1 - golden["t0"])
    states: list = []
    form = golden["diffusion_form"].lower().replace("-", "_")
    options = {"form": form, "scale": golden.get("diffusion_norm", 1.0)}
    found = interpolant_sde(
        mixture(process),
        IO["z"].double(),
        num_steps=golden["num_steps"] - (last is None),
        **options,
        heun=golden["sampling_method"] == "Heun",
        last_step=last,
        last_step_size=golden.get("last_step_size") or 0.04,
        generator=Recorded(IO[f"{name}_noise"].double()),
        trace=lambda step, x_t, x0_hat: states.append(x_t),
    )
    if golden["sampling_method"] == "Heun":  # it looks at states that have the noise of their step already
        moves = golden["num_steps"] - 1
        h = (golden["t1"] - golden["t0"]) / moves
        times = 1 - torch.linspace(golden["t0"], golden["t1"], moves + 1, dtype=torch.float64)[:-1]
        stds = (2 * h * diffusion_form(process, times, **options)).sqrt()
        noise = IO[f"{name}_noise"].double() * stds[:, None, None, None, None]
        states = [state - z for state, z in zip(states, noise, strict=False)] + states[moves:]
    seen = [*states[1:], found] + [found] * (last is None)
    assert len(seen) == golden["num_states"]
    for index, expected in zip(golden["states_kept"], kept, strict=True):
        assert_close(seen[index], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parity
@pytest.mark.parametrize(
    "golden", GOLDEN.get("likelihood", []), ids=lambda g: f"{g['path']}-{g['prediction']}"
)
def test_likelihood(golden):
    margin = 0.0 if golden["path"] == "VP" else 1e-7
    process = PROCESSES[golden["path"]](t_min=1e-7, t_max=1 - margin)
    mean, variance = IO["gmm_means"][0].double(), numbers(GOLDEN["gmm_variance"])
    x = IO["likelihood_x"].double()
    probes = exact_probes(x)[:1]
    denoiser = GaussianDenoiser(process, mean, variance)
    found = log_likelihood(denoiser, x, probes=probes, rtol=golden["rtol"], atol=golden["atol"])
    assert_close(found.log_prob, numbers(golden["exact_nats"]), rtol=0, atol=1e-4)
    assert_close(found.log_prob, numbers(golden["log_likelihood_nats"]), rtol=0, atol=1e-4)


# Without goldens


@pytest.mark.parametrize("process", [Flow(0.0, 1.0), GVP(0.0, 1.0), VP()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("order", [3, 4])
def test_order_of_runge_kutta(process, order):
    """Half the step, at most an eighth or a sixteenth of the error."""
    denoiser = GaussianDenoiser(process, torch.full((1, 2, 2), 0.3), torch.tensor(0.4))
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = partial(uniform_time, denoise=False)
    run = partial(runge_kutta, denoiser, x, grid=grid, denoise=False)
    exact = run(num_steps=400)
    errors = [(run(num_steps=n, order=order) - exact).norm().item() for n in (30, 60)]
    assert errors[1] < 1e-4 and errors[0] / errors[1] > 2 ** (order - 0.3)


@pytest.mark.parametrize(
    "form", ["sigma", "sbdm", "linear", "decreasing", "increasing_decreasing", "constant"]
)
def test_every_form_has_the_distribution_of_the_data(form):
    denoiser = GaussianDenoiser(Flow(), torch.full((1, 1, 1), 0.5), torch.tensor(0.16))
    generator = torch.Generator().manual_seed(0)
    x = denoiser.process.prior_sample((40_000, 1, 1, 1), generator)
    for heun_rule in (False, True):
        x_0 = interpolant_sde(
            denoiser, x, num_steps=100, form=form, heun=heun_rule, last_step=None, generator=generator
        )
        assert x_0.mean().item() == pytest.approx(0.5, abs=0.02)
        assert x_0.std().item() == pytest.approx(0.4, abs=0.03)


def test_where_nothing_is_left_of_the_image():
    denoiser = GaussianDenoiser(Flow(0.0, 1.0), torch.zeros(1, 1, 1), torch.tensor(0.25))
    x = torch.randn(2, 1, 1, 1, dtype=torch.float64)
    for sampler in (heun, rk45, partial(interpolant_sde, form="sbdm")):
        with pytest.raises(ConfigError, match="nothing is left of the image"):
            sampler(denoiser, x)
    for sampler in (probability_flow, runge_kutta, interpolant_sde):
        assert sampler(denoiser, x).isfinite().all()
    with pytest.raises(ConfigError, match="t_max of GVP must be at most 1"):
        GVP(0.0, 1.1)
    with pytest.raises(ConfigError, match="form='sine' of interpolant_sde: take one of sigma"):
        interpolant_sde(denoiser, x, form="sine")
    with pytest.raises(ConfigError, match="order=5"):
        runge_kutta(denoiser, x, order=5)
