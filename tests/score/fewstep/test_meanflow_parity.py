"""MeanFlow against py-meanflow and FastGen (goldens/fewstep/{meanflow,fastgen_meanflow,fastgen}*.json).

Every case of the kinds below is read by its JSON and files alone; see the README beside them.
"""

import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lit_gen.callbacks.ema import EMA
from lit_gen.pretrained import edm, keymap, meanflow
from lit_gen.rng import PerSample
from lit_gen.score.fewstep import meanflow as ours
from lit_gen.score.fewstep.tangent import jvp
from lit_gen.score.losses import sum_of_pixels
from lit_gen.score.networks.ncsnpp import NCSNpp
from lit_gen.score.precondition import PredictFlow, ScaledTime
from lit_gen.score.samplers import meanflow as sampler
from lit_gen.score.sde import Flow, per_image

pytestmark = pytest.mark.parity
FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[2] / "goldens") / "fewstep"
IGNORED = ("resample_filter", "logvar_linear.weight", "logvar_linear.bias")


class Case:
    def __init__(self, path: Path):
        self.path, self.json = path, json.loads(path.read_text())

    def __repr__(self):
        return self.path.stem

    @cached_property
    def io(self) -> dict[str, torch.Tensor]:
        return {k: torch.from_numpy(v) for k, v in np.load(self.path.with_suffix(".io.npz")).items()}

    def draws(self, prefix: str = "draw") -> list[torch.Tensor]:
        return [self.io[k] for k in sorted(self.io) if k.startswith(prefix)]


def cases(*kinds):
    found = map(Case, sorted(FOLDER.glob("*.json")))
    return [case for case in found if case.json.get("kind") in kinds]


LOSSES, TIMES = cases("meanflow_loss"), cases("meanflow_times")
FASTGEN, SAMPLERS = cases("fastgen_meanflow_loss"), cases("meanflow_sampler", "fastgen_sampler")
RUNS = [
    (case, name)
    for case in SAMPLERS
    for name, run in case.json["runs"].items()
    if run.get("class", "MeanFlowModel") == "MeanFlowModel"
]


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    assert float((found.detach() - expected).abs().max()) <= tolerance * max(scale, 1e-30)


class SecondTimeItself(nn.Module):
    """FastGen tells its network r, not t - r."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, noise_label, label=None, augment_label=None, second_time=None):
        return self.net(x, noise_label, label, augment_label, second_time=noise_label - second_time)


def model(weights: str, kwargs: dict, second_is_r: bool):
    """(denoiser, network, rules from the official state dict), in float64."""
    state = {
        key.partition(".")[2]: value for key, value in torch.load(FOLDER / weights, weights_only=True).items()
    }
    _, arguments = edm.network_arguments(state)
    arguments |= {"embedding_mult": kwargs["channel_mult_noise"], "second_time": "concatenated"}
    arguments["fir"] = kwargs["resample_filter"]
    net = NCSNpp(**arguments, dropout=kwargs["dropout"]).double()
    rules = edm.rules(net) if second_is_r else meanflow.rules(net)
    keymap.apply(net, rules, state, "golden", IGNORED)
    shown = SecondTimeItself(net) if second_is_r else net
    return ours.MeanFlowDenoiser(shown, Flow(), PredictFlow(ScaledTime(1.0))), net, rules


def check_gradients(case: Case, loss, net, rules, prefix: str, tolerance=1e-7):
    """Of the total loss in every official parameter, by norm, and whole where the file has it."""
    own = dict(net.named_parameters())
    found = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
    norms = {}
    for mine, (theirs,), layout in rules:
        if mine not in found:
            continue
        expected = case.io.get(f"grad:{prefix}{theirs}")
        if expected is not None:
            close(found[mine], layout(expected), tolerance)
        norms[prefix + theirs] = float(found[mine].norm())
    golden = {name: norm for name, norm in case.json["grad_l2"].items() if norm is not None}
    largest = max(golden.values())
    assert norms == pytest.approx(golden, rel=tolerance, abs=tolerance * largest)
    total = torch.stack([g.norm() for g in found.values()]).norm()
    assert float(total) == pytest.approx(case.json["grad_global_l2"], rel=tolerance)


def law(options: dict) -> ours.TwoLogitNormals:
    assert options["tr_sampler"] in ("v0", "v1")
    return ours.TwoLogitNormals(
        options["P_mean_t"],
        options["P_std_t"],
        options["P_mean_r"],
        options["P_std_r"],
        options["ratio"],
        ordered=options["tr_sampler"] == "v0",
    )


class Replay(PerSample):
    """A generator of recorded draws."""

    def __init__(self, draws):
        self.draws = draws

    def _stack(self, fill, shape, device, dtype):
        return next(self.draws).to(dtype)


class Dropout:
    """Replays the recorded masks in order, from the first one in each call of the network."""

    def __init__(self, masks, p):
        self.masks, self.p, self.next = masks, p, 0

    def __call__(self, x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        assert p == self.p
        mask = self.masks[self.next % len(self.masks)]
        self.next += 1
        return x * mask.to(x) / (1 - p)


@pytest.mark.parametrize("case", LOSSES, ids=repr)
def test_loss_of_py_meanflow(case, monkeypatch):
    io, options, kwargs = case.io, case.json["loss_kwargs"], case.json["constructor_kwargs"]
    denoiser, net, rules = model(case.json["weights"], kwargs, second_is_r=False)
    net.train(case.json["mode"] == "train")
    if masks := case.draws("dropout_keep"):
        monkeypatch.setattr("torch.nn.functional.dropout", Dropout(masks, kwargs["dropout"]))
    z, normal, r_normal, uniform = case.draws()
    t, r = law(options).of(normal, r_normal, uniform)
    close(t, io["t"], 1e-12)
    close(r, io["r"], 1e-12)
    assert ((r == t).tolist()) == case.json["rows_with_r_equal_t"]
    told = {"augment_label": io.get("augment_labels"), "label": io.get("class_labels")}
    v, x_t = z - io["images"], denoiser.process.marginal(io["images"], t, z)
    close(v, io["v"], 1e-12)
    close(x_t, io["x_t"], 1e-12)
    u, dudt = jvp(
        lambda *point: denoiser.average_velocity(*point, **told),
        (x_t, t, r),
        (v, torch.ones_like(t), torch.zeros_like(r)),
    )
    close(u, io["u"], 1e-9)
    close(dudt, io["dudt"], 1e-9)
    loss = ours.MeanFlowLoss(law(options), options["norm_p"], options["norm_eps"])
    losses = loss(denoiser, io["images"], t, z, r, **told)
    close(losses, io["loss"], 1e-9)
    assert float(losses.mean()) == pytest.approx(case.json["loss_total_mean"], rel=1e-9)
    check_gradients(case, losses.mean(), net, rules, "net.")


@pytest.mark.parametrize("case", TIMES, ids=repr)
def test_times_of_py_meanflow(case):
    for name, options in case.json["sets"].items():
        t, r = law(options).of(*case.draws(f"{name}_draw"))
        close(t, case.io[f"{name}_t"], 1e-12)
        close(r, case.io[f"{name}_r"], 1e-12)
        assert int((t == r).sum()) == options["equal"]


@pytest.mark.parametrize("case", FASTGEN, ids=repr)
def test_loss_of_fastgen(case):
    """With its own choice of rows in which r = t, and r itself as the second time."""
    io, kwargs, options = case.io, case.json["constructor_kwargs"], case.json["loss_config"]
    denoiser, net, rules = model(case.json["weights"], kwargs, second_is_r=True)
    net.train(case.json["mode"] == "train")
    of_t, of_r = case.json["sample_t"], case.json["sample_r"]
    assert {of_t["time_dist_type"], of_r["time_dist_type"]} == {"logitnormal"}
    assert of_t["min_t"] == of_r["min_t"] == 0 and of_t["max_t"] == of_r["max_t"]
    laws = (of_t["train_p_mean"], of_t["train_p_std"], of_r["train_p_mean"], of_r["train_p_std"])
    normal, r_normal, uniform, *rest = case.draws()
    t, r = ours.TwoLogitNormals(*laws, 1.0, True, of_t["max_t"]).of(normal, r_normal, uniform)
    same = int((uniform >= of_t["r_sample_ratio"]).sum())
    r = t.where(torch.arange(len(t)) < same, r)
    close(t, io["t"], 1e-12)
    close(r, io["r"], 1e-12)
    told = {"label": io.get("class_labels_used", io.get("class_labels"))}
    v = io["v"]
    u, dudt = jvp(
        lambda *point: denoiser.average_velocity(*point, **told),
        (io["x_t"], t, r),
        (v, torch.ones_like(t), torch.zeros_like(r)),
    )
    close(u, io["u"], 1e-9)
    close(dudt, io["dudt"], 1e-9)
    if options["loss_type"] != "l2" or not options["norm_method"].startswith("poly_"):
        pytest.skip("u and its derivative agree; this loss is not built: it normalises the tangent")
    if case.json["guidance_scale"] is not None:
        pytest.skip("u and its derivative agree; guidance within the target is not built")
    target = v - per_image(t - r, v) * case.json["warmup_weight"] * dudt
    close(target, io["tangent_or_target"], 1e-9)
    power = float(options["norm_method"].removeprefix("poly_"))
    z = rest[-1]
    close(z - io["images"], v, 1e-12)
    close(denoiser.process.marginal(io["images"], t, z), io["x_t"], 1e-12)
    losses = ours.MeanFlowLoss(norm_p=power, norm_eps=options["norm_const"])(
        denoiser, io["images"], t, z, r, **told
    )
    close(losses, io["loss"], 1e-9)
    squares = sum_of_pixels((u.detach() - target).square())
    close((squares + options["norm_const"]) ** -power, io["weight"], 1e-9)
    check_gradients(case, losses.mean(), net, rules, "model.")


@pytest.mark.parametrize(("case", "name"), RUNS, ids=repr)
def test_samples(case, name):
    run = case.json["runs"][name]
    fastgen = case.json["kind"] == "fastgen_sampler"
    told = run if fastgen else case.json
    denoiser, net, _ = model(told["weights"], told["constructor_kwargs"], second_is_r=fastgen)
    net.eval()
    *times, last = run["t_list" if fastgen else "t_steps"]
    assert last == 0
    noise = case.io["noise" if fastgen else "latents"]
    draws = iter(case.draws(f"{name}_noise"))
    label = case.io.get(f"{name}_class_labels", case.io.get("class_labels"))
    evaluations = []
    out = sampler(
        denoiser,
        noise * denoiser.process.prior_std,
        num_steps=len(times),
        times=times,
        renoise=run.get("student_sample_type") == "sde",
        label=label,
        generator=Replay(draws),
        trace=lambda *a: evaluations.append(a),
    )
    close(out, case.io[f"{name}_out"], 1e-9)
    assert len(evaluations) == run["nfe"] and next(draws, None) is None


@pytest.mark.parametrize("case", cases("meanflow_ema"), ids=repr)
def test_average_of_py_meanflow(case):
    for decay, expected in case.json["average_after_update_i"].items():
        ema, weights = EMA(float(decay), warmup=False, every=16), {"w": torch.ones(1)}
        ema.shadow = {"w": torch.ones(1)}
        found = []
        for i in range(1, len(expected) + 1):
            weights["w"].fill_(1 + i)
            ema.update(weights)
            found.append(float(ema.shadow["w"]))
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", LOSSES[:1], ids=repr)
def test_checkpoints_are_read(case):
    state = torch.load(FOLDER / case.json["weights"], weights_only=True)
    averages = {key.replace("net.", "net_ema.", 1): 2 * value for key, value in state.items()}
    others = {key.replace("net.", "net_ema1.", 1): 3 * value for key, value in state.items()}
    content = {"model": state | averages | others | {"num_updates": torch.tensor(32)}, "epoch": 1}
    assert meanflow.is_meanflow(content)
    for ema, factor in ((True, 2), (False, 1)):
        net, info = meanflow.read(content, ema=ema, dropout=0.2)
        assert (info.step, info.weights, net.second_time) == (32, "ema" if ema else "model", "concatenated")
        assert torch.equal(net.noise.hidden.bias, factor * state["net.map_layer0.bias"].float())
