"""Processes, preconditions and losses against the official codes (goldens/score/sde_*.json)."""

import json
import os
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_gen.callbacks.ema import EMA, HalfLife
from lit_gen.rng import PerSample
from lit_gen.score import phema
from lit_gen.score.denoiser import AbstractDenoiser, Denoiser
from lit_gen.score.losses import (
    DenoisingLoss,
    EDMWeight,
    LogNormal,
    UncertaintyLoss,
    edm_loss,
    half_sum_of_pixels,
    likelihood,
    mean_of_pixels,
    snr,
    sum_of_pixels,
)
from lit_gen.score.networks.embeddings import PositionalEmbedding
from lit_gen.score.networks.layers import Resample
from lit_gen.score.precondition import (
    EDMPrecondition,
    LevelIndex,
    PredictNoise,
    PredictScaledScore,
    PredictScore,
    ScaledTime,
    StepIndex,
)
from lit_gen.score.samplers import karras
from lit_gen.score.samplers.predictor_corrector import (
    AnnealedLangevin,
    FixedStep,
    Langevin,
    OfficialSteps,
    ancestral,
    reverse_diffusion,
)
from lit_gen.score.sde import EDM, VE, VP, DiscreteVP, SubVP, cosine_betas, linear_betas, per_image

pytestmark = pytest.mark.parity
FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[1] / "goldens") / "score"


@cache
def load(stem: str) -> dict:
    path = FOLDER / f"{stem}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def numbers(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


SONG, OFFICIAL_EDM = load("sde_song"), load("sde_edm")
NEEDS_SONG = pytest.mark.skipif(not SONG, reason=f"no sde_song.json in {FOLDER}")
NEEDS_EDM = pytest.mark.skipif(not OFFICIAL_EDM, reason=f"no sde_edm.json in {FOLDER}")


def song_process(name: str):
    """The process of a name ("VE", "VP_N100", "VE_celeba" ...), whose parameters its drift or levels say."""
    kind, golden = name.partition("_")[0], SONG.get(name, {})
    if kind == "VE":
        levels = golden.get("discrete_sigmas_at") or {"0": 0.01, "last": 50.0}
        return VE(float(f"{levels['0']:.6g}"), float(f"{list(levels.values())[-1]:.6g}"))
    ends = (0.1, 20.0)
    if golden:
        # beta(t) from drift = -beta x / 2 at two of the times.
        x, drift, t = (numbers(v) for v in (SONG["x"], golden["drift"], SONG["t"]))
        beta = (-2 * (drift / x).flatten(1).median(1).values)[[3, -1]]
        slope = (beta[1] - beta[0]) / (t[-1] - t[3])
        ends = tuple(float(f"{b:.4g}") for b in (beta[1] - slope * t[-1], beta[1] + slope * (1 - t[-1])))
    return {"VP": VP, "subVP": SubVP}[kind](*ends)


# --- score_sde_pytorch ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [k for k in SONG if "N" in SONG[k] and "marginal_std" in SONG[k]])
def test_process_has_the_official_coefficients(name):
    golden, process = SONG[name], song_process(name)
    x, score, t = (numbers(SONG[k]) for k in ("x", "score", "t"))
    # In float32 the official deviations lose digits at small t: compare from 1e-3 on.
    fair = t > 9e-4
    close = {"rtol": 2e-4, "atol": 1e-6}
    assert_close(per_image(process.alpha(t), x) * x, numbers(golden["marginal_mean"]), rtol=1e-5, atol=1e-6)
    assert_close(process.sigma(t)[fair], numbers(golden["marginal_std"])[fair], rtol=1e-3, atol=0)
    assert_close(process.sigma(t)[t > 9e-3], numbers(golden["marginal_std"])[t > 9e-3], rtol=1e-4, atol=0)
    assert_close(per_image(process.drift(t), x) * x, numbers(golden["drift"]), **close)
    assert_close(process.diffusion(t)[fair], numbers(golden["diffusion"])[fair], rtol=1e-3, atol=0)
    assert_close(process.prior_log_prob(x), numbers(golden["prior_logp"]), rtol=1e-6, atol=1e-4)
    for flow, factor in (("pf0", 1.0), ("pf1", 0.5)):
        g = process.diffusion(t)
        reverse = per_image(process.drift(t), x) * x - factor * per_image(g.square(), x) * score
        assert_close(reverse, numbers(golden[f"reverse_drift_{flow}"]), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", [k for k in SONG if "N" in SONG[k] and "marginal_std" in SONG[k]])
def test_tables_of_discrete_models(name):
    golden, process = SONG[name], song_process(name)
    n = golden["N"]
    if "discrete_sigmas_at" in golden:
        steps = numbers([int(k) for k in golden["discrete_sigmas_at"]])
        levels = numbers(list(golden["discrete_sigmas_at"].values()))
        assert_close(process.sigma(steps / (n - 1)), levels, rtol=2e-5, atol=0)
    if "discrete_betas_at" in golden:
        betas = linear_betas(n, process.beta_min / 1000, process.beta_max / 1000)
        steps = torch.tensor([int(k) for k in golden["discrete_betas_at"]])
        for ours, key in (
            (betas[steps], "discrete_betas_at"),
            (DiscreteVP(betas).alpha((steps + 1) / n).square(), "alphas_cumprod_at"),
        ):
            assert_close(ours, numbers(list(golden[key].values())), rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", [k for k in SONG if "N" in SONG[k] and "discretize_G" in SONG[k]])
def test_official_steps(name):
    golden, process = SONG[name], song_process(name)
    x, score, t = (numbers(SONG[k]) for k in ("x", "score", "t"))
    # The official t is float32, and so is the number of its step.
    steps = [OfficialSteps(golden["N"])(process, t_i, t_i.float().double()) for t_i in t]
    ratio, variance = (torch.stack([s[i] for s in steps]) for i in (0, 1))
    fair = t > 9e-4 if name.startswith("sub") else t > 0
    close = {"rtol": 2e-4, "atol": 2e-7}
    assert_close(variance.sqrt()[fair], numbers(golden["discretize_G"])[fair], rtol=1e-3, atol=0)
    f = per_image(ratio - 1, x) * x
    assert_close(f, numbers(golden["discretize_f"]), rtol=2e-3, atol=3e-7)
    for flow, factor in (("pf0", 1.0), ("pf1", 0.5)):
        reverse = f - factor * per_image(variance, x) * score
        assert_close(reverse, numbers(golden[f"reverse_discretize_f_{flow}"]), **close)


class ScoreOf(AbstractDenoiser):
    """A denoiser whose score is a given function."""

    def __init__(self, process, function):
        super().__init__()
        self.process, self.function = process, function

    def forward(self, x_t, t, label=None):
        alpha, sigma = (per_image(c, x_t) for c in (self.process.alpha(t), self.process.sigma(t)))
        return (x_t + sigma.square() * self.function(x_t)) / alpha


@NEEDS_SONG
@pytest.mark.parametrize("name", [k for k in SONG.get("one_step", {}) if "." in k])
def test_one_step_of_each_predictor_and_corrector(name):
    golden = SONG["one_step"]
    kind, method, *options = name.split(".", 2)
    snr = float(re.search(r"snr([\d.]+?)(?=\.[a-z]|$)", options[0])[1]) if options else 0.0
    a, b = (float(v) for v in re.findall(r"(-?[\d.]+)\*", golden["score_fn"]))
    process, x, score = song_process(kind), numbers(SONG["x"]), numbers(SONG["score"])
    t, noise = torch.tensor(golden["t"], dtype=torch.float64), [numbers(z) for z in golden[name]["noise"]]
    denoiser = ScoreOf(process, lambda x_t: a * x_t + b * score)
    step = (FixedStep(1e-3) if method == "euler_maruyama" else OfficialSteps(1000))(process, t, t)
    if method in ("langevin", "ald"):
        make = {"langevin": Langevin(snr, 1, per_image=False), "ald": AnnealedLangevin(snr, 1)}[method]
        after = x
        for z in noise:
            after = make(denoiser, after, t, step, generator=Replay(z))
    else:
        predictor = ancestral if method == "ancestral_sampling" else reverse_diffusion
        mean, after = predictor(x, denoiser.score(x, t), step, noise[0])
        assert_close(mean, numbers(golden[name]["x_mean"]), rtol=1e-5, atol=1e-6)
    assert_close(after, numbers(golden[name]["x"]), rtol=1e-5, atol=2e-6)


class Replay(PerSample):
    """A generator with one recorded draw."""

    def __init__(self, z):
        self.z = z

    def _stack(self, draw, shape, device, dtype):
        return self.z.to(dtype)


class Toy(nn.Module):
    """The closed-form network of the golden losses."""

    def forward(self, x, noise_label, label=None, augment_label=None):
        return 0.3 * x + 0.1 * (noise_label / 100).sin()[:, None, None, None]


def song_loss_case(name: str, golden: dict):
    """The denoiser, times and weight of a case's name."""
    kind, *_ = name.split(".")
    if kind in ("VE", "VP", "subVP"):
        process = song_process(kind)
        ve = PredictScore(lambda process, t: process.sigma(t))
        row = ve if kind == "VE" else PredictNoise(ScaledTime(999))
        weight = likelihood if "likelihood_weighting=True" in name else snr
        return Denoiser(Toy(), process, row), numbers(golden["u"]) * (1 - 1e-5) + 1e-5, weight
    if kind == "smld_discrete":
        row = PredictScore(LevelIndex(1000, 50.0, 0.01))
        return Denoiser(Toy(), VE(0.01, 50.0), row), 1 - numbers(golden["labels"]) / 999, snr
    process = DiscreteVP(linear_betas())
    return Denoiser(Toy(), process, PredictNoise(StepIndex())), (numbers(golden["labels"]) + 1) / 1000, snr


@NEEDS_SONG
@pytest.mark.parametrize("name", [k for k in SONG.get("losses", {}) if "." in k])
def test_loss(name):
    golden, x_0 = SONG["losses"][name], numbers(SONG["losses"]["data"])
    denoiser, t, weight = song_loss_case(name, golden)
    pixels = mean_of_pixels if "reduce_mean=True" in name else half_sum_of_pixels
    losses = DenoisingLoss(LogNormal(), weight, pixels)(denoiser, x_0, t, numbers(golden["z"]))
    assert losses.mean().item() == pytest.approx(golden["loss"], rel=2e-5)


@NEEDS_SONG
def test_embedding_and_filters():
    golden = SONG["timestep_embedding_song"]
    waves = PositionalEmbedding(golden["dim"])(torch.tensor(golden["t"]))
    assert_close(waves, torch.tensor(golden["emb"]), rtol=0, atol=1e-4)
    fir = SONG["fir"]
    x, box, resample = numbers(fir["x"]), Resample().double(), Resample(fir["kernel"]).double()
    conv = nn.Conv2d(2, 3, 3, bias=False).double()
    conv.weight.data = numbers(fir["w"])
    for name, out in {
        "upsample_2d": resample.up(x),
        "downsample_2d": resample.down(x),
        "naive_up": box.up(x),
        "naive_down": box.down(x),
        "conv_downsample_2d": resample.down_conv(x, conv),
    }.items():
        assert_close(out, numbers(fir[name]), rtol=1e-5, atol=1e-5, msg=name)


@NEEDS_SONG
def test_warm_up_of_the_moving_average():
    ema = EMA(0.9999)
    for updates, decay in SONG["ema_decay_rule"].items():
        assert ema.decay_of(int(updates)) == pytest.approx(decay, abs=1e-12)


# --- EDM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFICIAL_EDM.get("edm_sigma_steps", {}))
def test_karras_grid(name):
    told = {key: float(value) for key, _, value in (part.partition("=") for part in name.split(","))}
    process = EDM(told.get("sigma_min", 0.002), told.get("sigma_max", 80.0))
    grid = karras(process, int(told["N"]), rho=told["rho"])
    assert_close(grid, numbers(OFFICIAL_EDM["edm_sigma_steps"][name]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OFFICIAL_EDM.get("precond", {}))
def test_precondition(name):
    golden = OFFICIAL_EDM["precond"][name]
    sigma = numbers(golden["sigma"])
    process, row = {
        "EDMPrecond": (EDM(), EDMPrecondition()),
        "VPPrecond": (VP(), PredictNoise(ScaledTime(999))),
        "VEPrecond": (VE(), PredictScaledScore()),
        "iDDPMPrecond": (DiscreteVP(cosine_betas()), PredictNoise(StepIndex(nearest=True))),
    }[name]
    t = process.time(sigma)
    c_skip, c_out, c_in, c_noise = row(process, t)
    alpha = process.alpha(t)  # EDM's rows act on x_t / alpha
    assert_close(c_skip * alpha, numbers(golden["c_skip"]), rtol=1e-5, atol=0)
    assert_close(c_out, numbers(golden["c_out"]), rtol=2e-5, atol=0)
    assert_close(c_in * alpha, numbers(golden["c_in"]), rtol=1e-5, atol=0)
    # VPPrecond's t is a difference of near-equal float32 numbers at the first level.
    close = {"rtol": 3e-2, "atol": 0} if name == "VPPrecond" else {"rtol": 1e-5, "atol": 1e-6}
    assert_close(c_noise, numbers(golden["c_noise"]), **close)


@NEEDS_EDM
def test_noise_levels_of_vp_and_iddpm():
    golden = OFFICIAL_EDM["vp_sigma_of_t"]
    t = numbers(golden["t"])
    assert_close(VP().noise_level(t)[1:], numbers(golden["sigma"])[1:], rtol=3e-4, atol=0)
    process = DiscreteVP(cosine_betas())
    for j, u in OFFICIAL_EDM["iddpm_u"].items():
        level = process.noise_level(torch.tensor((1000 - int(j)) / 1000, dtype=torch.float64))
        assert level.item() == pytest.approx(u, rel=1e-3)  # theirs are float32


class Halved(AbstractDenoiser):
    process = EDM()

    def forward(self, x_t, t, label=None):
        return 0.5 * x_t / (1 + per_image(t, x_t))


class GivenUncertainty(UncertaintyLoss):
    def uncertainty(self, process, t):
        return 0.1 * t.log()


@pytest.mark.parametrize(
    "name", [k for k in OFFICIAL_EDM.get("losses", {}) if k.isupper() or k[-1].isdigit()]
)
def test_edm_loss(name):
    golden = OFFICIAL_EDM["losses"][name]
    x_0, first = numbers(OFFICIAL_EDM["losses"]["images"]), numbers(golden["draw0"])
    z = numbers(golden["draw1"])
    sigma, loss = {
        "EDM": ((-1.2 + 1.2 * first).exp(), edm_loss(reduction=sum_of_pixels)),
        "VP": (VP().noise_level(1 + first * (1e-5 - 1)), DenoisingLoss(LogNormal(), snr, sum_of_pixels)),
        "VE": (0.02 * 5000**first, DenoisingLoss(LogNormal(), snr, sum_of_pixels)),
        "EDM2": (
            (-0.4 + first).exp(),
            GivenUncertainty(DenoisingLoss(LogNormal(-0.4, 1.0), EDMWeight(), sum_of_pixels)),
        ),
    }[name]
    expected = numbers(golden["per_element"]).flatten(1).sum(1)
    assert_close(loss(Halved(), x_0, sigma, z), expected, rtol=1e-4, atol=1e-4)
    if "reported_scalar" in golden:
        mean = loss(Halved(), x_0, sigma, z).mean().item()
        assert mean == pytest.approx(golden["reported_scalar"], rel=1e-4)


@NEEDS_EDM
def test_half_life_of_edm():
    decay = HalfLife(500_000, 512)
    for images, beta in OFFICIAL_EDM["edm_ema_beta"].items():
        if int(images):  # the official first update, before any image, copies the weights
            assert decay(int(images) / 512) == pytest.approx(beta, rel=1e-9)


@NEEDS_EDM
def test_power_function_ema():
    golden = OFFICIAL_EDM["phema"]
    for std, gamma in golden["std_to_exp"].items():
        assert phema.exponent(float(std)) == pytest.approx(gamma, rel=1e-9)
    for name, beta in golden["beta"].items():
        std, t, d = (float(part.split("=")[1]) for part in name.split(","))
        assert phema.power_beta(std, t, d) == pytest.approx(beta, abs=1e-12)
