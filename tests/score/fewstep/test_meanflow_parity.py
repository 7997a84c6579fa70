"""MeanFlow against py-meanflow and FastGen (goldens/fewstep/{meanflow,fastgen_meanflow,fastgen}*.json).

Every case of the kinds below is read by its JSON and files alone; see the README beside them.
"""

import pytest
import torch
from fewstep_goldens import Case, Replay, cases, close, load, recorded_dropout
from torch import nn

from lit_gen.callbacks.ema import EMA
from lit_gen.pretrained import edm, keymap, meanflow
from lit_gen.score.fewstep import meanflow as ours
from lit_gen.score.fewstep.tangent import jvp
from lit_gen.score.losses import sum_of_pixels
from lit_gen.score.networks.ncsnpp import NCSNpp
from lit_gen.score.precondition import PredictFlow, ScaledTime
from lit_gen.score.samplers import meanflow as sampler
from lit_gen.score.sde import Flow, per_image

pytestmark = pytest.mark.parity
IGNORED = ("resample_filter", "logvar_linear.weight", "logvar_linear.bias")
LOSSES, TIMES = cases("meanflow_loss"), cases("meanflow_times")
FASTGEN = cases("fastgen_meanflow_loss")
RUNS = [
    (case, name)
    for case in cases("meanflow_sampler", "fastgen_sampler")
    for name, run in case.json["runs"].items()
    if run.get("class", "MeanFlowModel") == "MeanFlowModel"
]


def draws(case: Case, prefix: str = "draw", function: str = "") -> list[torch.Tensor]:
    """The recorded random numbers, in their order."""
    found = sorted(k for k in case.io if k.startswith(prefix))
    return [case.io[k] for k in found if not function or k.endswith(f"_{function}")]


class SecondTimeItself(nn.Module):
    """FastGen tells its network r, not t - r."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, noise_label, label=None, augment_label=None, second_time=None):
        return self.net(x, noise_label, label, augment_label, second_time=noise_label - second_time)


def model(weights: str, kwargs: dict, second_is_r: bool):
    """(denoiser, network, rules from the official state dict), in float64."""
    state = {key.partition(".")[2]: value for key, value in load(weights).items()}
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


def check_tangent(case: Case, denoiser, x_t, t, r, told):
    """(u, du/dt) along the recorded velocity, with the recorded masks in both calls."""
    with recorded_dropout(case, calls=2):
        u, dudt = jvp(
            lambda *point: denoiser.average_velocity(*point, **told),
            (x_t, t, r),
            (case.io["v"], torch.ones_like(t), torch.zeros_like(r)),
        )
    close(u, case.io["u"], 1e-9)
    close(dudt, case.io["dudt"], 1e-9)
    return u.detach(), dudt


@pytest.mark.parametrize("case", LOSSES, ids=repr)
def test_loss_of_py_meanflow(case):
    io, options, kwargs = case.io, case.json["loss_kwargs"], case.json["constructor_kwargs"]
    denoiser, net, rules = model(case.json["weights"], kwargs, second_is_r=False)
    net.train(case.json["mode"] == "train")
    z, normal, r_normal, uniform = draws(case)
    t, r = law(options).of(normal, r_normal, uniform)
    close(t, io["t"], 1e-12)
    close(r, io["r"], 1e-12)
    assert ((r == t).tolist()) == case.json["rows_with_r_equal_t"]
    told = {"augment_label": io.get("augment_labels"), "label": io.get("class_labels")}
    v, x_t = z - io["images"], denoiser.process.marginal(io["images"], t, z)
    close(v, io["v"], 1e-12)
    close(x_t, io["x_t"], 1e-12)
    check_tangent(case, denoiser, x_t, t, r, told)
    loss = ours.MeanFlowLoss(law(options), options["norm_p"], options["norm_eps"])
    with recorded_dropout(case, calls=2):
        losses = loss(denoiser, io["images"], t, z, r, **told)
    close(losses, io["loss"], 1e-9)
    assert float(losses.mean()) == pytest.approx(case.json["loss_total_mean"], rel=1e-9)
    check_gradients(case, losses.mean(), net, rules, "net.")


@pytest.mark.parametrize("case", TIMES, ids=repr)
def test_times_of_py_meanflow(case):
    for name, options in case.json["sets"].items():
        t, r = law(options).of(*draws(case, f"{name}_draw"))
        close(t, case.io[f"{name}_t"], 1e-12)
        close(r, case.io[f"{name}_r"], 1e-12)
        assert int((t == r).sum()) == options["equal"]


def fastgen_times(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Ordered times, of which the first rows get r = t."""
    of_t, of_r = case.json["sample_t"], case.json["sample_r"]
    if {of_t["time_dist_type"], of_r["time_dist_type"]} != {"logitnormal"} or of_t["min_t"] or of_r["min_t"]:
        return case.io["t"], case.io["r"]  # laws that MeanFlow has not
    assert of_t["max_t"] == of_r["max_t"]
    laws = (of_t["train_p_mean"], of_t["train_p_std"], of_r["train_p_mean"], of_r["train_p_std"])
    uniform = draws(case, function="rand")[0]
    law = ours.TwoLogitNormals(*laws, different=1.0, ordered=True, largest=of_t["max_t"])
    t, r = law.of(*draws(case, function="randn"), uniform)
    same = int((uniform >= of_t["r_sample_ratio"]).sum())
    return t, t.where(torch.arange(len(t)) < same, r)


@pytest.mark.parametrize("case", FASTGEN, ids=repr)
def test_loss_of_fastgen(case):
    """With its own choice of rows in which r = t, and r itself as the second time."""
    io, kwargs, options = case.io, case.json["constructor_kwargs"], case.json["loss_config"]
    denoiser, net, rules = model(case.json["weights"], kwargs, second_is_r=True)
    net.train(case.json["mode"] == "train")
    t, r = fastgen_times(case)
    close(t, io["t"], 1e-12)
    close(r, io["r"], 1e-12)
    told = {"label": io.get("class_labels_used", io.get("class_labels"))}
    v = io["v"]
    u, dudt = check_tangent(case, denoiser, io["x_t"], t, r, told)
    if options["loss_type"] != "l2" or not options["norm_method"].startswith("poly_"):
        pytest.skip("u and its derivative agree; this loss is not built: it normalises the tangent")
    if case.json["guidance_scale"] is not None:
        pytest.skip("u and its derivative agree; guidance within the target is not built")
    target = v - per_image(t - r, v) * case.json["warmup_weight"] * dudt
    close(target, io["tangent_or_target"], 1e-9)
    power = float(options["norm_method"].removeprefix("poly_"))
    (z,) = draws(case, function="randn_like")
    close(z - io["images"], v, 1e-12)
    close(denoiser.process.marginal(io["images"], t, z), io["x_t"], 1e-12)
    loss = ours.MeanFlowLoss(norm_p=power, norm_eps=options["norm_const"])
    with recorded_dropout(case, calls=2):
        losses = loss(denoiser, io["images"], t, z, r, **told)
    close(losses, io["loss"], 1e-9)
    squares = sum_of_pixels((u - target).square())
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
    generator = Replay(*draws(case, f"{name}_noise"))
    label = case.io.get(f"{name}_class_labels", case.io.get("class_labels"))
    evaluations = []
    out = sampler(
        denoiser,
        noise * denoiser.process.prior_std,
        num_steps=len(times),
        times=times,
        renoise=run.get("student_sample_type") == "sde",
        label=label,
        generator=generator,
        trace=lambda *a: evaluations.append(a),
    )
    close(out, case.io[f"{name}_out"], 1e-9)
    assert len(evaluations) == run["nfe"] and not generator.numbers


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
    state = load(case.json["weights"])
    averages = {key.replace("net.", "net_ema.", 1): 2 * value for key, value in state.items()}
    others = {key.replace("net.", "net_ema1.", 1): 3 * value for key, value in state.items()}
    content = {"model": state | averages | others | {"num_updates": torch.tensor(32)}, "epoch": 1}
    assert meanflow.is_meanflow(content)
    for ema, factor in ((True, 2), (False, 1)):
        net, info = meanflow.read(content, ema=ema, dropout=0.2)
        assert (info.step, info.weights, net.second_time) == (32, "ema" if ema else "model", "concatenated")
        assert torch.equal(net.noise.hidden.bias, factor * state["net.map_layer0.bias"].float())
