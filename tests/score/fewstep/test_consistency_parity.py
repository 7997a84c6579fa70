"""Consistency models against ECT's and FastGen's codes (goldens/fewstep)."""

import pytest
import torch
from fewstep_goldens import Official, Replay, cases, close, gradients_match, recorded_dropout
from torch import Tensor
from torch.testing import assert_close

from lit_gen.score.denoiser import Denoiser
from lit_gen.score.fewstep.consistency import ConsistencyLoss, Stages, inverse_gap
from lit_gen.score.fewstep.teacher import Distillation
from lit_gen.score.losses import LogNormal, TruncatedLogNormal
from lit_gen.score.precondition import EDMPrecondition, LogNoiseLevel
from lit_gen.score.samplers import consistency
from lit_gen.score.sde import EDM

pytestmark = pytest.mark.parity

ECT, FASTGEN = cases("ect_loss"), cases("cm_loss")


def at_ratio(ratio: float, **options) -> Stages:
    """Pairs of one stage."""
    return Stages(None, q=1 / (1 - ratio), max_ratio=1.0, **options)


def denoiser(case, weights: str = "weights") -> Denoiser:
    net = Official(case.json[weights], case.json["constructor_kwargs"])
    return Denoiser(net, EDM(), EDMPrecondition(case.json["constructor_kwargs"].get("sigma_data", 0.5)))


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def check(case, loss: Distillation, denoiser: Denoiser, draws: tuple[Tensor, ...]) -> None:
    losses = loss(denoiser, case.io["images"], *draws, label=case.labels)
    close(losses, case.io["loss"], 1e-9)
    losses.mean().backward()
    gradients_match(case, denoiser.net, 1e-7)


@pytest.mark.parametrize("case", ECT, ids=repr)
def test_tuning(case):
    told, stage = case.json["loss_kwargs"], case.json["stage"]
    k = {"sigmoid": told["k"], "const": 0.0}[told.get("adj", "sigmoid")]
    pairs = Stages(1, told["q"], k, told["b"], max_ratio=1.0)
    assert 1 - told["q"] ** -(stage + 1) == pytest.approx(case.json["ratio"], abs=1e-15)
    loss = ConsistencyLoss(LogNormal(told["P_mean"], told["P_std"]), pairs, told["c"])
    generator = Replay(case.draw(0).flatten(), case.draw(1))
    draws = loss.draw(EDM(), case.io["images"], generator, step=stage + 1)
    for actual, name in zip(draws, ("t", "draw001_randn_like", "r"), strict=True):
        close(actual, case.io[name], 1e-9)
    assert (draws[2] == 0).tolist() == case.json["rows_with_r_0"]
    with recorded_dropout(case, calls=2):
        check(case, loss, denoiser(case), draws)


def weighting(name: str):
    """FastGen's choices of a weight; ours is the first."""

    def c_out(s, r):
        return 0.5 * s / (s.square() + 0.25).sqrt()

    return {
        "default": inverse_gap,
        "sqrt": lambda s, r: (s - r).rsqrt(),
        "c_out": lambda s, r: 1 / c_out(s, r),
        "c_out_sq": lambda s, r: c_out(s, r) ** -2,
        "sigma_sq": lambda s, r: s**-2,
        "one": lambda s, r: torch.ones_like(s),
    }[name]


@pytest.mark.parametrize("case", FASTGEN, ids=repr)
def test_training_and_distillation(case):
    law, told = case.json["sample_t"], case.json["loss_config"]
    if law["time_dist_type"] != "lognormal" or law.get("quantize"):
        pytest.skip(f"times by {law['time_dist_type']}, which is not built")
    distribution = TruncatedLogNormal(law["train_p_mean"], law["train_p_std"], law["min_t"], law["max_t"])
    pairs = at_ratio(case.json["ratio"], low=max(0.002, law["min_r"]))
    c = None if told["use_squared_l2"] else told["huber_const"]
    weight = weighting(told["weighting_ct_loss"])
    guidance = case.json.get("guidance_scale") or 1.0
    distill = told["use_cd"]
    loss = ConsistencyLoss(distribution, pairs, c, weight, distill, guidance if distill else 1.0)
    student = denoiser(case)
    if distill:
        loss.make_room(denoiser(case, "teacher_weights"))
    draws = loss.draw(EDM(), case.io["images"], Replay(case.draw(0), case.draw(1)))
    close(draws[0], case.io["t"], 1e-9)
    close(draws[2], case.io["r"], 1e-9)
    with recorded_dropout(case, calls=2):
        check(case, loss, student, draws)


@pytest.mark.parametrize("case", cases("tcm_loss"), ids=repr)
def test_truncated_training(case):
    pytest.skip("truncated consistency training, a second stage for 0.2 to 0.5 FID, is not built")


@pytest.mark.parametrize("case", cases("cm_weightings"), ids=repr)
def test_distances_and_weights(case):
    """A table's name is c<constant>_sq<whether squared>_<weighting>."""
    D_t, D_r, s, r = (case.io[name] for name in ("D_t", "D_r", "t", "r"))
    for name, expected in case.json["tables"].items():
        c, squared, weight = name.split("_", 2)
        c = None if squared == "sq1" else float(c[1:])
        loss = ConsistencyLoss(LogNormal(), Stages(), c, weighting(weight))
        distance = loss.distance(D_t, D_r)
        assert_close(distance, numbers(expected["distance"]), rtol=1e-9, atol=0, msg=name)
        weighted = loss.weight(s, r) * distance
        assert_close(weighted, numbers(expected["loss"]), rtol=1e-9, atol=0, msg=name)


@pytest.mark.parametrize("case", cases("ect_schedule"), ids=repr)
def test_schedule(case):
    s = numbers(case.json["t"])
    for table in case.json["tables"]:
        options = dict(table["kwargs"])
        k = 0.0 if options.pop("adj", "sigmoid") == "const" else options.pop("k")
        r = Stages(1, k=k, max_ratio=1.0, **options)(s, table["stage"] + 1)
        assert_close(r, numbers(table["r"]), rtol=1e-9, atol=1e-12)
    for run in case.json["runs"].values():
        batches = run["double_ticks"] * run["kimg_per_tick"] * 1000 / run["batch"]
        pairs = Stages(round(batches))
        for iteration, stage, _ in run["stage_starts_after_iteration_[iteration,stage,tick]"]:
            assert pairs.stage(iteration) == stage
            assert iteration == 0 or pairs.stage(iteration - 1) == stage - 1


def shifted(sigma_data: float, m: float, both: bool):
    """The official preconditioning while sampling, D(x, m) = x: `both` as FastGen's, else as ECT's."""

    def row(process, s):
        gap = s - m
        c_out = gap * sigma_data / ((gap if both else s).square() + sigma_data**2).sqrt()
        c_in = (s.square() + sigma_data**2).rsqrt()
        return sigma_data**2 / (gap.square() + sigma_data**2), c_out, c_in, LogNoiseLevel()(process, s)

    return row


def runs():
    for case in cases("ect_sampler", "fastgen_sampler"):
        for name, run in case.json["runs"].items():
            if run.get("class", "CMModel") != "MeanFlowModel":
                yield pytest.param(case, name, case.json | run, id=f"{case}-{name}")


@pytest.mark.parametrize(("case", "name", "run"), list(runs()))
def test_sampling(case, name, run):
    if run.get("student_sample_type", "sde") != "sde":
        pytest.skip("the noise that D implies instead of new noise is Euler's method: sampler=euler")
    options = run["constructor_kwargs"]
    ours = case.json["kind"] == "ect_sampler"
    m = run.get("sigma_min_of_eval_mode", 0.0) if ours else options.get("sigma_shift", 0.0)
    row = shifted(run.get("sigma_data", options.get("sigma_data", 0.5)), m, both=not ours)
    levels = [float(t) for t in run.get("t_steps") or run["t_list"]]
    net = Official(run["weights"], options).eval()
    model = Denoiser(net, EDM(t_max=levels[0]), row)
    noises = [case.io[k] for k in sorted(case.io) if k.startswith(f"{name}_noise")]
    x = levels[0] * case.io["latents" if ours else "noise"]
    label = case.io.get(f"{name}_class_labels", case.labels)
    steps = {"num_steps": len(levels) - 1, "levels": levels[1:-1]}
    out = consistency(model, x, **steps, label=label, generator=Replay(*noises))
    close(out, case.io[f"{name}_out"], 1e-9)


@pytest.mark.parametrize("case", cases("ect_sampler"), ids=repr)
def test_preconditioning_of_training_and_of_sampling(case):
    net = Official(case.json["weights"], case.json["constructor_kwargs"]).eval()
    x, s, sigma_data = case.io["precond_x"], case.io["precond_sigma"], case.json["sigma_data"]
    with torch.no_grad():
        out = Denoiser(net, EDM(), EDMPrecondition(sigma_data))(x, s, case.labels)
        close(out, case.io["precond_D_train"], 1e-9)
        row = shifted(sigma_data, case.json["sigma_min_of_eval_mode"], both=False)
        close(Denoiser(net, EDM(), row)(x, s, case.labels), case.io["precond_D_eval"], 1e-9)


def laws():
    for case in cases("fastgen_times"):
        for name, law in case.json["sets"].items():
            if law["schedule"] == "edm":
                yield pytest.param(case, name, law["sample_t"], id=f"{case}-{name}")


@pytest.mark.parametrize(("case", "name", "law"), list(laws()))
def test_times(case, name, law):
    if law["time_dist_type"] != "lognormal":
        pytest.skip(f"times by {law['time_dist_type']}, which is not built")
    u, expected = (case.io[f"{name}_{part}"] for part in ("draw000_rand", "t"))
    draw = TruncatedLogNormal(law["train_p_mean"], law["train_p_std"], law["min_t"], law["max_t"])
    s = draw(EDM(), u, Replay(u))
    assert_close(s, expected, rtol=1e-9, atol=0)
    for key, r in case.io.items():
        if key.startswith(f"{name}_r_ratio"):
            found = at_ratio(float(key.rpartition("ratio")[2]), low=0.002)(s, 0)
            assert_close(found, r, rtol=1e-9, atol=0, msg=key)
