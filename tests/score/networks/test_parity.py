"""Networks, readers and training steps against numbers of the official codes; see the README beside them.

Generic over what lies in the folder: a case is a .json with its .io.npz and weights, and says itself what it
is: "peer" names the official code, "config" or "...kwargs" the network.
"""

import json
import os
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from official import Uncertainty, ncsn_state, score_sde_state
from torch import Tensor
from torch.func import functional_call

from lit_gen import pretrained
from lit_gen.errors import ConfigError
from lit_gen.pretrained import edm, ncsn, score_sde, unpickle
from lit_gen.rng import PerSample
from lit_gen.score.denoiser import AbstractDenoiser, Denoiser
from lit_gen.score.losses import (
    DenoisingLoss,
    EDMWeight,
    half_sum_of_pixels,
    mean_of_pixels,
    snr,
)
from lit_gen.score.networks.ncsnpp import NCSNpp
from lit_gen.score.precondition import (
    EDMPrecondition,
    LevelIndex,
    LogNoiseLevel,
    PredictNoise,
    PredictScaledScore,
    PredictScore,
    ScaledTime,
    StepIndex,
)
from lit_gen.score.samplers import annealed_langevin
from lit_gen.score.sde import EDM, VE, VP, DiscreteVP, SubVP, cosine_betas, linear_betas

pytestmark = pytest.mark.parity

FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[2] / "goldens") / "score"
ACTIVATIONS = {"elu": "elu", "relu": "relu", "lrelu": "leaky_relu", "swish": "silu"}


class Case:
    """One golden network: its JSON, arrays and weights, read when first asked for."""

    def __init__(self, path: Path):
        self.stem, self.json = path.with_suffix(""), json.loads(path.read_text())

    def __repr__(self):
        return self.stem.name

    @cached_property
    def io(self) -> dict[str, Tensor]:
        return {k: torch.from_numpy(v) for k, v in np.load(f"{self.stem}.io.npz").items()}

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.stem.parent.glob(self.stem.name + pattern))

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The official state dict that `out` and the gradients were computed with."""
        found = self.files(".init_model.*") or self.files(".state_dict*.pt") or self.files(".state_dict*")
        if found:
            return {k: v for path in found for k, v in unpickle.load(path).items()}
        checkpoint = unpickle.load(self.files(".ckpt.pth")[0])
        return checkpoint["model"] if isinstance(checkpoint, dict) else checkpoint[0]

    @property
    def peer(self) -> str:
        """Repository and, for ncsn's, nothing of the commit."""
        return self.json["peer"].partition("@")[0].rpartition("/")[2]

    @property
    def config(self) -> dict:
        return self.json["config"]

    @property
    def kwargs(self) -> dict:
        """Constructor arguments of an EDM or EDM2 network."""
        return next(value for key, value in self.json.items() if key.endswith("kwargs"))

    def draws(self, step: int) -> list[Tensor]:
        return [self.io[k] for k in sorted(self.io) if k.startswith(f"step{step}_draw")]

    @property
    def tolerance(self) -> float:
        fourier = any(k.endswith(("all_modules.0.W", "map_noise.freqs", "fourier.freqs")) for k in self.state)
        return 2e-5 if fourier else 1e-5

    @property
    def kinked(self) -> bool:
        """Whether gradients jump, with max pooling (NCSNv2) or relus: where two pixels tie, rounding decides.

        NCSNv2's official code on one thread and on two differs by up to 2.4 % in the gradient of a parameter.
        """
        model = self.json.get("config", {}).get("model", {})
        return self.peer == "ncsnv2" or str(model.get("nonlinearity", "")).lower() in ("relu", "lrelu")


CASES = [Case(p) for p in sorted(FOLDER.glob("*.json")) if p.with_suffix(".io.npz").is_file()]
SONG = [case for case in CASES if case.peer == "score_sde_pytorch"]
ERMON = [case for case in CASES if case.peer in ("ncsn", "ncsnv2")]
KARRAS = [case for case in CASES if case.peer in ("edm", "edm2")]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_case_is_of_a_known_code(case):
    assert case in SONG + ERMON + KARRAS, case.json["peer"]


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().item()
    assert (actual.detach() - expected).abs().max().item() <= tolerance * scale


# Networks as functions of the official tensors, so that gradients are those of the official parameters


def song_net(case: Case):
    return score_sde.from_state_dict(case.state, config=case.config)[0]


def is_fourier(net) -> bool:
    return isinstance(net, NCSNpp) and net.embedding != "positional"


def song(case: Case, tensors: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """score_sde's `model(x, labels)`."""
    net = song_net(case)
    fourier = is_fourier(net)
    out = official(
        net, score_sde.rules(net), tensors, as_net_sees(case, x), labels.log() if fourier else labels
    )
    if case.config["model"]["scale_by_sigma"]:
        sigma = labels if fourier else song_levels(case)[labels.long()]
        out = out / sigma[:, None, None, None]
    return out


def song_process(case: Case):
    """The process of a case, on the images of its data: [-1, 1] where they are `centered`, else [0, 1]."""
    model = case.config["model"]
    if case.config["training"]["sde"] == "vesde":
        return VE(model["sigma_min"], model["sigma_max"])
    kind = {"vpsde": VP, "subvpsde": SubVP}[case.config["training"]["sde"]]
    return kind(model["beta_min"], model["beta_max"])


def song_labels(case: Case, t: Tensor) -> Tensor:
    """What get_score_fn tells the network at times t: 999 t, step, sigma, or the index of a level."""
    n, process = case.config["model"]["num_scales"], song_process(case)
    continuous = case.config["training"]["continuous"]
    if isinstance(process, VE):
        return process.sigma(t).float() if continuous else ((1 - t) * (n - 1)).round().long()
    return t * (999 if continuous or isinstance(process, SubVP) else n - 1)


def song_levels(case: Case) -> Tensor:
    """The descending table of sigmas, in float32."""
    model = case.config["model"]
    ends = np.log(model["sigma_max"]), np.log(model["sigma_min"])
    return torch.linspace(*ends, model["num_scales"], dtype=torch.float64).exp().float()


def song_table(case: Case) -> DiscreteVP:
    model = case.config["model"]
    return DiscreteVP(linear_betas(model["num_scales"], model["beta_min"] / 1000, model["beta_max"] / 1000))


def ermon(case: Case, tensors: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """`scorenet(x, labels)` of ncsn and ncsnv2."""
    net, info = ncsn.from_state_dict(case.state, **ermon_arguments(case))
    rescaled = case.config["data"].get("rescaled", False) or case.config["data"]["logit_transform"]
    out = official(net, ncsn.rules(net), tensors, x if rescaled else 2 * x - 1, labels.float())
    return 2 * out if info.release == "ncsn" else out / info.sigmas[labels][:, None, None, None]


def ermon_arguments(case: Case) -> dict:
    model, arguments = case.config["model"], {"image_size": case.config["data"]["image_size"]}
    if "normalizer.gamma" in {key.removeprefix("module.") for key in case.state}:
        arguments["activation"] = ACTIVATIONS[model["nonlinearity"].lower()]
    elif model.get("normalization", "InstanceNorm++") != "InstanceNorm++":
        with pytest.raises(ConfigError):
            ncsn.from_state_dict(case.state)
        pytest.skip(f"no such network here: normalization={model['normalization']}")
    return arguments


def karras(case: Case, tensors: dict[str, Tensor], x: Tensor, noise_labels: Tensor, **labels) -> Tensor:
    net, _ = karras_net(case)
    return official(net, edm.rules(net), tensors, x, noise_labels, **labels)


def karras_net(case: Case):
    return edm.from_state_dict(case.state, hidden=edm.hidden_arguments(case.kwargs))


def official(net, rules, tensors: dict[str, Tensor], *args, **labels) -> Tensor:
    own = {ours: layout(*(tensors[k] for k in keys)) for ours, keys, layout in rules}
    return functional_call(net, own, args, labels)


def as_net_sees(case: Case, x: Tensor) -> Tensor:
    return x if case.config["data"]["centered"] else 2 * x - 1


def leaves(case: Case) -> dict[str, Tensor]:
    """The official tensors by name without prefix, float32; those that train ask for gradients."""
    tensors = {}
    for key, value in case.state.items():
        key = key.removeprefix("module.").removeprefix("model.").removeprefix("unet.")
        tensors[key] = value.float().clone()
        if any(name.endswith(key) for name in case.json["grad_l2"]):
            tensors[key].requires_grad_()
    return tensors


# Outputs and gradients


def check_gradients(case: Case, tensors: dict[str, Tensor], out: Tensor) -> None:
    """L2 norm of d/dp sum(out v) of every parameter; those far below the largest to its rounding only."""
    wanted = {name: value for name, value in case.json["grad_l2"].items() if value is not None}
    short = {
        name: name.removeprefix("model.").removeprefix("unet.").removeprefix("module.") for name in wanted
    }
    used = {name: tensors[key] for name, key in short.items() if key in tensors}
    assert len(used) >= 0.9 * len(wanted)
    grads = torch.autograd.grad((out * case.io["grad_cotangent"]).sum(), list(used.values()))
    floor = 1e-5 * max(wanted.values())
    for name, grad in zip(used, grads, strict=True):
        rel = 0.05 if case.kinked else 2e-4
        assert grad.norm().item() == pytest.approx(wanted[name], rel=rel, abs=floor), name


@pytest.mark.parametrize("case", SONG, ids=repr)
def test_score_sde_outputs_and_gradients(case):
    tensors, io = leaves(case), case.io
    out = song(case, tensors, io["x"], io["labels"])
    close(out, io["out"].float(), case.tolerance)
    check_gradients(case, tensors, out)
    net = song_net(case)
    if not isinstance(net, NCSNpp) or net.conditional:
        assert sum(p.numel() for p in net.parameters()) == case.json["trainable"]


@pytest.mark.parametrize("case", ERMON, ids=repr)
def test_ncsn_outputs_and_gradients(case):
    tensors = leaves(case)
    out = ermon(case, tensors, case.io["x"], case.io["labels"])
    close(out, case.io["out"], case.tolerance)
    check_gradients(case, tensors, out)


@pytest.mark.parametrize("case", [c for c in KARRAS if "raw_out" in c.io], ids=repr)
def test_edm_outputs_and_gradients(case):
    io, tensors = case.io, leaves(case)
    labels = {"label": io.get("class_labels"), "augment_label": io.get("augment_labels")}
    out = karras(case, tensors, io["x"], io["raw_noise_labels"], **labels)
    close(out, io["raw_out"], case.tolerance)
    check_gradients(case, tensors, out)
    if "raw_out_no_augment" in io:
        plain = karras(case, tensors, io["x"], io["raw_noise_labels"], label=labels["label"])
        close(plain, io["raw_out_no_augment"], case.tolerance)


def rows(case: Case) -> dict:
    """Process and precondition by the name of EDM's class; "Precond" is EDM2's."""
    karras = EDM(), EDMPrecondition(case.kwargs.get("sigma_data", 0.5))
    return {
        "EDMPrecond": karras,
        "Precond": karras,
        "VPPrecond": (VP(), PredictNoise()),
        "VEPrecond": (VE(), PredictScaledScore()),
        "iDDPMPrecond": (DiscreteVP(cosine_betas()), PredictNoise(StepIndex(nearest=True))),
    }


def row_names(case: Case) -> list[str]:
    """The rows that a case has recorded; EDM2 has one only, which may go without its name."""
    named = [key[2:] for key in case.io if key.startswith("D_") and not key.startswith("D_uncond")]
    return named or (["Precond"] if case.peer == "edm2" and "D" in case.io else [])


ROW_CASES = [(case, name) for case in KARRAS for name in row_names(case)]


@pytest.mark.parametrize(("case", "name"), ROW_CASES, ids=repr)
def test_edm_preconditioned_outputs_and_losses(case, name):
    """D(x; sigma) and the loss of each of EDM's rows, x = x_0 + sigma n taken to the row's own process."""
    io, (net, _), (process, row) = case.io, karras_net(case), rows(case)[name]
    if name == "iDDPMPrecond" and net.out_channels == net.channels:
        pytest.skip("made with another network, of twice the output channels")
    denoiser, t = Denoiser(net, process, row), process.time(io["sigma"])
    x_t = process.alpha(t)[:, None, None, None] * io["x"].double()
    extra = {"augment_label": io["augment_labels"]} if "augment_labels" in io else {}
    # The peer inverts sigma(t) in float32, and Fourier features see 999 t: there is no more in these numbers.
    fourier = "noise.embedding.frequencies" in net.state_dict()
    tolerance = 2e-3 if fourier and name == "VPPrecond" else case.tolerance
    expected = io[f"D_{name}"] if f"D_{name}" in io else io["D"]
    close(denoiser(x_t, t, io.get("class_labels"), **extra), expected, tolerance)
    if f"D_uncond_{name}" in io:
        close(denoiser(x_t, t, **extra), io[f"D_uncond_{name}"], tolerance)
    draws = [io[k] for k in sorted(io) if k.startswith(f"loss_{name}_draw")]
    if draws:
        sigma, weight = edm_sigma_and_weight(name, draws[0].flatten().double(), row)
        loss = DenoisingLoss(None, weight, mean_of_pixels)
        per_image = loss(denoiser, io["images"], process.time(sigma), draws[1], label=io.get("class_labels"))
        if name == "Precond":
            u = Uncertainty(case.state)(sigma.log().float() / 4)
            per_image = per_image / u.exp() + u
        expected = io[f"loss_{name}_per_element_mean"]
        torch.testing.assert_close(per_image.float(), expected, rtol=10 * tolerance, atol=0.0)


def edm_sigma_and_weight(name: str, draw: Tensor, row):
    """The noise levels and weights that EDM's three losses, and EDM2's, make of their first draw."""
    if name == "VPPrecond":
        t = 1 + draw * (1e-5 - 1)
        return VP().noise_level(t), snr
    if name == "VEPrecond":
        return 0.02 * 5000**draw, snr
    if name == "Precond":
        return (-0.4 + draw).exp(), EDMWeight(row.sigma_data)
    return (-1.2 + 1.2 * draw).exp(), EDMWeight(getattr(row, "sigma_data", 0.5))


@pytest.mark.parametrize("case", [c for c in KARRAS if any("logvar" in k for k in c.io)], ids=repr)
def test_edm2_uncertainty(case):
    io = case.io
    c_noise = io["sigma"].flatten().log() / 4 if "sigma" in io else io["raw_noise_labels"]
    u = Uncertainty(case.state)(c_noise)
    close(u, next(v for k, v in io.items() if "logvar" in k).flatten(), case.tolerance)


# Three training steps with recorded draws


class Average:
    """score_sde's moving average of nameless tensors, with its warm-up (1 + n) / (10 + n)."""

    def __init__(self, tensors: list[Tensor], decay: float, warmup: bool):
        self.tensors, self.decay, self.warmup, self.n = (
            [t.detach().clone() for t in tensors],
            decay,
            warmup,
            0,
        )

    def update(self, tensors: list[Tensor]) -> None:
        self.n += 1
        decay = min(self.decay, (1 + self.n) / (10 + self.n)) if self.warmup else self.decay
        for mine, theirs in zip(self.tensors, tensors, strict=True):
            mine.lerp_(theirs.detach(), 1 - decay)


def song_loss(case: Case, forward, draws: list[Tensor]) -> Tensor:
    """The objective of score_sde's losses.py at given draws; `forward(x, labels)` is the official model."""
    training, process = case.config["training"], song_process(case)
    data, z = case.io["data"], draws[1]
    reduce = mean_of_pixels if training["reduce_mean"] else half_sum_of_pixels
    if not training["continuous"]:
        return reduce(discrete_residual(case, forward, data, draws).square()).mean()
    t = draws[0].double() * (1 - 1e-5) + 1e-5
    sigma = process.sigma(t).float()[:, None, None, None]
    x_t = process.marginal(data.double(), t, z.double()).float()
    # The network says -sigma times the score in VP models, the score in VE ones.
    out = forward(x_t, song_labels(case, t.float()))
    residual = sigma * out + z if isinstance(process, VE) else z - out
    per_image = reduce(residual.square())
    if training["likelihood_weighting"]:
        per_image = per_image * (process.diffusion(t) / process.sigma(t)).square()
    return per_image.mean()


def discrete_residual(case: Case, forward, data: Tensor, draws: list[Tensor]) -> Tensor:
    """z + sigma score for a table of noise levels (VE), z - net for DDPM's steps (VP)."""
    process, (labels, z) = song_process(case), draws
    if isinstance(process, VE):
        sigma = song_levels(case)[labels][:, None, None, None]
        return z + sigma * forward(data + sigma * z, labels)
    table = song_table(case)
    x_t = table.marginal(data.double(), (labels + 1) / table.num_steps, z.double())
    return z - forward(x_t.float(), labels)


def ermon_loss(case: Case, forward, draws: list[Tensor]) -> Tensor:
    """Annealed denoising score matching, 0.5 sum (sigma score + z)^2 times sigma^(anneal_power - 2)."""
    sigma = case.io["sigmas"][case.io["labels"]][:, None, None, None]
    data, z = case.io["data"], draws[-1]
    residual = sigma * forward(data + sigma * z, case.io["labels"]) + z
    per_image = half_sum_of_pixels(residual.square())
    return (per_image * sigma.flatten() ** (case.config["training"]["anneal_power"] - 2)).mean()


def train(case: Case, call, loss, optimizer, average: Average | None, warmup: int = 0, clip: float = -1):
    """(losses, tensors) after the recorded steps; the tensors are those of `optimizer`, in place."""
    parameters, losses = optimizer.param_groups[0]["params"], []
    lr = optimizer.param_groups[0]["lr"]
    for step in range(len(case.json["train_losses"])):
        value = loss(case, call, case.draws(step))
        optimizer.zero_grad()
        value.backward()
        if warmup:
            optimizer.param_groups[0]["lr"] = lr * min(step / warmup, 1)
        if clip >= 0:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if average:
            average.update(parameters)
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("case", [c for c in SONG if c.json["train_losses"]], ids=repr)
def test_score_sde_training_steps(case):
    tensors, optim = leaves(case), case.config["optim"]
    parameters = [t for t in tensors.values() if t.requires_grad]
    average = Average(parameters, case.config["model"]["ema_rate"], warmup=True)
    betas = optim["beta1"], 0.999
    adam = torch.optim.Adam(parameters, optim["lr"], betas, optim["eps"], optim["weight_decay"])
    losses = train(
        case,
        lambda x, labels: song(case, tensors, x, labels),
        song_loss,
        adam,
        average,
        optim["warmup"],
        optim["grad_clip"],
    )
    assert losses == pytest.approx(case.json["train_losses"], rel=1e-3 if case.kinked else 2 * case.tolerance)
    # Adam's first steps are signs of gradients, however small.
    io, tolerance = case.io, 0.05 if case.kinked else 5 * case.tolerance
    close(song(case, tensors, io["x"], io["labels"]), io["out_after"].float(), tolerance)
    with torch.no_grad():
        for tensor, mean in zip(parameters, average.tensors, strict=True):
            tensor.copy_(mean)
    close(song(case, tensors, io["x"], io["labels"]), io["out_after_ema"].float(), tolerance)
    draws = [io[k] for k in sorted(io) if k.startswith("eval_draw")]
    if draws:
        value = song_loss(case, lambda x, labels: song(case, tensors, x, labels), draws)
        assert value.item() == pytest.approx(case.json["eval_loss_with_ema"], rel=2 * tolerance)


@pytest.mark.parametrize("case", [c for c in ERMON if c.json["train_losses"]], ids=repr)
def test_ncsn_training_steps(case):
    tensors, optim = leaves(case), case.config["optim"]
    parameters = [t for t in tensors.values() if t.requires_grad]
    rate = case.config["model"]["ema_rate"] if case.config["model"].get("ema") else None
    average = Average(parameters, rate, warmup=False) if rate else None
    adam = torch.optim.Adam(
        parameters,
        optim["lr"],
        (optim["beta1"], 0.999),
        optim.get("eps", 1e-8),
        optim["weight_decay"],
        optim["amsgrad"],
    )
    losses = train(case, lambda x, labels: ermon(case, tensors, x, labels), ermon_loss, adam, average)
    assert losses == pytest.approx(case.json["train_losses"], rel=1e-3 if case.kinked else 2 * case.tolerance)
    io, tolerance = case.io, 0.01 if case.kinked else 5 * case.tolerance
    close(ermon(case, tensors, io["x"], io["labels"]), io["out_after"], tolerance)
    for path in case.files(".ckpt.pth"):
        saved = unpickle.load(path)
        if average and len(saved) > 4:
            names = [name for name, tensor in tensors.items() if tensor.requires_grad]
            for name, mean in zip(names, average.tensors, strict=True):
                torch.testing.assert_close(mean, saved[4][name], rtol=1e-4, atol=1e-5, msg=name)


class Recorded(PerSample):
    """A generator that hands out recorded draws in order."""

    def __init__(self, draws: list[Tensor]):
        self.draws = iter(draws)

    def _stack(self, draw, shape, device, dtype):
        return next(self.draws).to(dtype)


class ByLevel(AbstractDenoiser):
    """The official network of [0, 1] images, told the number of the level that the sampler is at."""

    def __init__(self, case: Case, levels: Tensor):
        super().__init__()
        self.process, self.levels = VE(float(levels.min()), float(levels.max())), levels
        self.call = partial(ermon, case, leaves(case))

    def forward(self, x_t, t, label=None):
        level = (self.levels - self.process.sigma(t)).abs().argmin()
        score = self.call(x_t.float(), level.expand(len(x_t)))
        return x_t + self.process.sigma(t).square() * score.double()


@pytest.mark.parametrize("case", [c for c in ERMON if "ald_final" in c.io], ids=repr)
def test_annealed_langevin(case):
    """The official loop over recorded noise, its last step of denoising included."""
    io, levels = case.io, case.io["ald_sigmas"].double()
    draws = [io[k] for k in sorted(io) if k.startswith("ald_draw")]
    denoiser = ByLevel(case, levels)
    options = {"num_steps": len(levels), "steps_per_level": len(draws) // len(levels)}
    options["step_size"] = case.config["sampling"]["step_lr"]
    for denoise, name in ((False, "ald_last_before_denoise"), (True, "ald_final")):
        out = annealed_langevin(
            denoiser,
            io["ald_x0"],
            grid=lambda process, num_steps: process.time(levels),
            denoise=denoise,
            generator=Recorded(draws),
            **options,
        )
        close(out, io[name], 10 * case.tolerance)


@pytest.mark.parametrize("case", [c for c in SONG if c.files(".ckpt.pth")], ids=repr)
def test_score_sde_checkpoint(case):
    """The file after training: its last weights and its nameless moving average give the recorded outputs."""
    for weights, name in (("model", "out_after"), ("ema", "out_after_ema")):
        key = name if name in case.io else "out"
        file = case.files(".ckpt.pth")[0]
        net, info = pretrained.load(file, ema=weights == "ema", config=case.config)
        tensors = {k.removeprefix("module."): v for k, v in score_sde_state(net).items()}
        close(song(case, tensors, case.io["x"], case.io["labels"]), case.io[key].float(), case.tolerance)
        assert info.weights == weights or key == "out"


@pytest.mark.parametrize("case", [c for c in ERMON if c.files(".ckpt.pth")], ids=repr)
def test_ncsn_checkpoint(case):
    net, _ = pretrained.load(case.files(".ckpt.pth")[0], ema=False, **ermon_arguments(case))
    tensors = {k.removeprefix("module."): v for k, v in ncsn_state(net).items()}
    close(ermon(case, tensors, case.io["x"], case.io["labels"]), case.io["out_after"], case.tolerance)


@pytest.mark.parametrize("case", SONG, ids=repr)
def test_score_sde_scores(case):
    """get_score_fn: its labels at times t, and the score that it makes of the network's output."""
    io, process = case.io, song_process(case)
    labels = song_labels(case, io["t"])
    torch.testing.assert_close(io["labels"].to(labels.dtype), labels, rtol=1e-5, atol=1e-5)
    score = song(case, leaves(case), io["x"], io["labels"]).detach()
    if not isinstance(process, VE):
        std = process.sigma(io["t"].double())
        if not case.config["training"]["continuous"] and not isinstance(process, SubVP):
            table = song_table(case)
            std = table.sigma((labels.long() + 1) / table.num_steps)
        score = -score / std.float()[:, None, None, None]
    # In float32 the peer's std is off by per mille at small t.
    close(score, io["score"].float(), 1e-3 if io["t"].min() < 1e-2 else 5 * case.tolerance)


def denoiser_row(case: Case):
    """(process on [-1, 1] images, times, precondition, their score over that of the case) or None where the
    official score is none of a denoiser: a VP network divided by sigma, on [0, 1] images, or between two of
    its steps; a VE network that takes a sigma for an index.
    """
    model, data, t = case.config["model"], case.config["data"], case.io["t"].double()
    process, net = song_process(case), song_net(case)
    fourier, n = is_fourier(net), model["num_scales"]
    if not isinstance(process, VE):
        discrete = not case.config["training"]["continuous"] and not isinstance(process, SubVP)
        if model["scale_by_sigma"] or not data["centered"] or discrete:
            return None
        return process, t, PredictNoise((lambda _, t: (999 * t).log()) if fourier else ScaledTime()), 1.0
    unit = 1 if data["centered"] else 2
    low, high = unit * model["sigma_min"], unit * model["sigma_max"]
    if case.config["training"]["continuous"]:
        label = LogNoiseLevel(1.0, unit)
    else:
        label, t = LevelIndex(n, high, low), 1 - song_labels(case, t) / (n - 1)
    if fourier == case.config["training"]["continuous"]:
        # Of scores s = d log p / dx: those of images twice as large are half as large.
        row, factor = (PredictScaledScore, 1 / unit) if model["scale_by_sigma"] else (PredictScore, 1.0)
        return VE(low, high), t, row(label), factor
    return None


@pytest.mark.parametrize("case", SONG, ids=repr)
def test_score_sde_scores_through_the_denoiser(case):
    """A checkpoint behind our process and precondition, on [-1, 1] images, has the score of get_score_fn."""
    found, io = denoiser_row(case), case.io
    if found is None:
        pytest.skip("the official score is not that of a denoiser here")
    process, t, row, factor = found
    score = Denoiser(song_net(case), process, row).score(as_net_sees(case, io["x"]), t)
    worst = 1e-3 if io["t"].min() < 1e-2 else 5 * case.tolerance
    close(score, io["score"].float() * factor, worst)
