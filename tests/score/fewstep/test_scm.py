"""Continuous-time consistency models: FastGen's numbers (goldens/fewstep), the tangent against differences,
and a Gaussian whose consistency function is known."""

import math

import pytest
import torch
from fewstep_goldens import (
    Case,
    Official,
    Replay,
    cases,
    close,
    gradients_match,
    load,
    recorded_dropout,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from lit_gen import checkpoints
from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator
from lit_gen.score.denoiser import AbstractDenoiser, Denoiser, GaussianDenoiser
from lit_gen.score.fewstep.scm import ContinuousConsistencyLoss, inverse_level, trig_flow
from lit_gen.score.losses import TruncatedLogNormal, constant, mean_of_pixels, sum_of_pixels
from lit_gen.score.networks.embeddings import FourierEmbedding, PositionalEmbedding
from lit_gen.score.networks.ncsnpp import NCSNpp
from lit_gen.score.precondition import EDMPrecondition, PredictFlow, PredictNoise
from lit_gen.score.sde import EDM, VP, Flow, Process, per_image

SCM = cases("scm_loss")


class ReadOut(nn.Module):
    """FastGen's u: linear in the noise embedding of the network, cosines first."""

    def __init__(self, case: Case):
        super().__init__()
        state = load(case.json["weights"])
        self.weight, self.bias = (
            nn.Parameter(state[f"model.logvar_linear.{name}"].double()) for name in ("weight", "bias")
        )
        width = self.weight.shape[1]
        if "model.map_noise.freqs" in state:
            self.embedding = FourierEmbedding(width, radians=True).double()
            self.embedding.frequencies = state["model.map_noise.freqs"].double()
        else:
            self.embedding = PositionalEmbedding(width).double()

    def uncertainty(self, process: Process, t: Tensor) -> Tensor:
        sines, cosines = self.embedding(process.noise_level(t).log() / 4).double().chunk(2, 1)
        return (torch.cat([cosines, sines], 1) @ self.weight.T + self.bias)[:, 0]


def has_our_law(case: Case) -> bool:
    """FastGen's other laws of t, and times on a grid, are not built: their times are taken as recorded."""
    law = case.json["sample_t"]
    return law["time_dist_type"] == "lognormal" and not law["quantize"]


def official_loss(case: Case) -> ContinuousConsistencyLoss:
    law, options = case.json["sample_t"], case.json["loss_config"]
    if options["use_jvp_finite_diff"]:
        pytest.skip("the derivative is never taken by finite differences here")
    pixels = case.io["images"][0].numel()

    def mean_over_number(squares: Tensor) -> Tensor:
        return mean_of_pixels(squares) / pixels

    levels = TruncatedLogNormal(law["train_p_mean"], law["train_p_std"], law["min_t"], law["max_t"])
    loss = ContinuousConsistencyLoss(
        levels if has_our_law(case) else lambda *_: case.io["t"],
        law["sigma_data"],
        warmup=options["tangent_warmup_steps"],
        c=options["tangent_warmup_const"],
        weight=inverse_level if options["prior_weighting_enabled"] else constant,
        norm=mean_of_pixels if options["g_norm_spatial_invariance"] else sum_of_pixels,
        reduction=mean_over_number if options["divide_x_0_spatial_dim"] else mean_of_pixels,
        distill=options["use_cd"],
        guidance=case.json["guidance_scale"] or 1.0,
    )
    loss.u = ReadOut(case)
    return loss


def denoiser_of(case: Case, weights: str) -> Denoiser:
    kwargs = case.json["constructor_kwargs"]
    net = Official(case.json[weights], kwargs)
    law = case.json["sample_t"]
    return Denoiser(net, EDM(law["min_t"], law["max_t"]), EDMPrecondition(kwargs["sigma_data"]))


@pytest.mark.parity
@pytest.mark.parametrize("case", SCM, ids=repr)
def test_official_losses_tangents_and_gradients(case):
    io, loss, denoiser = case.io, official_loss(case), denoiser_of(case, "weights")
    if loss.distill:
        loss.teacher = denoiser_of(case, "teacher_weights").requires_grad_(False).eval()
    denoiser.train(case.json["mode"] == "train")
    draws = Replay(*([case.draw(0)] if has_our_law(case) else []), case.draw(1))
    t, z, ramp = loss.draw(denoiser.process, io["images"], draws, case.json["iteration"])
    close(t, io["t"], 1e-9)
    close(loss.sigma_data * z, io["z"], 1e-9)
    assert_close(ramp, torch.full_like(t, case.json["warmup_r"]))
    told = {} if case.labels is None else {"label": case.labels}
    with recorded_dropout(case, 2):
        f, g = loss.tangent(denoiser, io["images"], t, z, ramp, **told)
    close(f, io["F"], 1e-9)
    close(g, io["g"], 1e-9)
    with recorded_dropout(case, 2):
        losses = loss(denoiser, io["images"], t, z, ramp, **told)
    close(losses, io["loss"], 1e-9)
    losses.mean().backward()
    own = {f"model.logvar_linear.{name}": p.grad for name, p in loss.u.named_parameters()}
    gradients_match(case, denoiser.net, 1e-7, **own)


class GaussianConsistency(AbstractDenoiser):
    """The exact consistency function of x_0 ~ N(0, variance): a path of the flow keeps its quantile."""

    def __init__(self, process: Process, variance: float):
        super().__init__()
        self.process, self.variance = process, variance

    def forward(self, x_t, t, label=None, augment_label=None):
        s = self.process.noise_level(t)
        shrink = (self.variance / (self.variance + s.square())).sqrt() / self.process.alpha(t)
        return per_image(shrink, x_t) * x_t


def scm(**options) -> ContinuousConsistencyLoss:
    return ContinuousConsistencyLoss(TruncatedLogNormal(-1.0, 1.4, 0.01, 30.0), **options)


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=keyed_generator("images"), dtype=torch.float64)


PROCESSES = [EDM(), VP(), Flow()]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_tangent_of_the_exact_consistency_function_is_zero(process, monkeypatch):
    """sCD whose teacher is exact: the function is constant along the teacher's paths, on every process."""
    model, loss = GaussianConsistency(process, 0.5), scm(distill=True)
    x_0 = math.sqrt(0.5) * images()
    exact = GaussianDenoiser(process, torch.zeros(3, 8, 8), torch.tensor(0.5))
    monkeypatch.setattr(loss, "taught", exact.forward)
    t, z, ramp = loss.draw(process, x_0, keyed_generator("draw"), step=20_000)
    f, g = loss.tangent(model, x_0, t, z, ramp)
    assert g.abs().max() < 1e-8 < f.abs().max()
    model.variance = 0.6
    assert loss.tangent(model, x_0, t, z, ramp)[1].abs().max() > 1e-3


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_units_of_trigflow_are_those_of_every_process(process):
    """F and D of a denoiser are two faces of one function: the exact F of a Gaussian."""
    variance, sigma_data = 0.3, 0.5
    angle = torch.linspace(0.01, 1.5, 6, dtype=torch.float64)
    denoiser = GaussianDenoiser(process, torch.zeros(3, 8, 8), torch.tensor(variance))
    f = trig_flow(denoiser, process, sigma_data, images(), angle)
    cos, sin = angle.cos(), angle.sin()
    # E[cos sigma_data z - sin x_0 | x] of jointly Gaussian numbers.
    total = cos.square() * variance + sin.square() * sigma_data**2
    slope = sin * cos * (sigma_data**2 - variance) / total
    assert_close(sigma_data * f, per_image(slope, f) * images())


def test_edms_network_is_f_negated():
    net = small_net()
    angle = torch.linspace(0.01, 1.5, 6, dtype=torch.float64)
    f = trig_flow(Denoiser(net, EDM(), EDMPrecondition()), EDM(), 0.5, images(), angle)
    assert_close(f, -net(images() / 0.5, (0.5 * angle.tan()).log() / 4), rtol=0, atol=1e-9)


def small_net(dropout: float = 0.0, num_classes: int = 0) -> NCSNpp:
    torch.manual_seed(0)
    net = NCSNpp(8, 3, 8, (1, 2), 1, (4,), dropout=dropout, num_classes=num_classes)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net.double()


ROWS = [(EDM(), EDMPrecondition()), (VP(), PredictNoise()), (Flow(), PredictFlow())]


@pytest.mark.parametrize(("process", "row"), ROWS, ids=lambda v: type(v).__name__)
def test_the_tangent_is_the_difference_along_the_path(process, row):
    """g from two points of the path, both with sin and cos of their own, and no derivative."""
    denoiser, loss, x_0 = Denoiser(small_net(), process, row), scm(c=1e-3, warmup=4), images()
    t, z, ramp = loss.draw(process, x_0, keyed_generator("draw"), step=1)
    assert ramp.tolist() == [0.25] * 6
    z, sd = z.double(), loss.sigma_data
    angle = (process.noise_level(t) / sd).atan()

    def at(angle):
        cos, sin = (per_image(c, x_0) for c in (angle.cos(), angle.sin()))
        x = cos * x_0 + sin * sd * z
        return x, trig_flow(denoiser, process, sd, x, angle), cos, sin

    with torch.no_grad():
        x, f, cos, sin = at(angle)
        h = 3e-6 * angle.minimum(math.pi / 2 - angle)
        ahead, behind = (at(angle + sign * h)[1] for sign in (1, -1))
        along = (ahead - behind) / per_image(2 * h, f)
        velocity = cos * sd * z - sin * x_0
        raw = -cos.square() * (sd * f - velocity) - 0.25 * cos * sin * (x + sd * along)
        expected = raw / (raw.square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1) + 1e-3)
    value, g = loss.tangent(denoiser, x_0, t, z, ramp)
    assert_close(value, f, rtol=0, atol=1e-12)
    assert_close(g, expected, rtol=0, atol=1e-6)
    assert value.requires_grad and not g.requires_grad


def test_at_first_the_tangent_leads_to_the_velocity_and_then_along_the_path():
    loss, process = scm(warmup=100), EDM()
    ramps = [
        loss.draw(process, images(), keyed_generator(0), step)[2][0].item() for step in (0, 50, 100, 101)
    ]
    assert ramps == [0, 0.5, 1, 1]
    assert scm(warmup=0).draw(process, images(), keyed_generator(0))[2].tolist() == [1] * 6
    student = Denoiser(small_net(), process, EDMPrecondition())
    distilled = scm(distill=True)
    distilled.make_room(student)
    draws = distilled.draw(process, images(), keyed_generator("draw"))
    # With R = 0 a student that is its teacher is where it shall be.
    distilled.start_from(student.net)
    assert distilled.tangent(student, images(), *draws)[1].abs().max() < 1e-9


def test_the_network_and_its_derivative_see_one_dropout_mask():
    """`jvp` is tested for it; here, that nothing is drawn before it and no call is left outside of it."""
    denoiser, loss = Denoiser(small_net(dropout=0.5).train(), EDM(), EDMPrecondition()), scm()
    t, z, ramp = loss.draw(EDM(), images(), keyed_generator("draw"), 20_000)
    angle = (t / 0.5).atan()
    x = per_image(angle.cos(), z) * images() + per_image(angle.sin(), z) * 0.5 * z
    torch.manual_seed(1)
    f, _ = loss.tangent(denoiser, images(), t, z, ramp)
    torch.manual_seed(1)
    assert torch.equal(f, trig_flow(denoiser, EDM(), 0.5, x, angle))


def test_autocast_changes_nothing():
    denoiser, loss = Denoiser(small_net().float(), EDM(), EDMPrecondition()), scm()
    draws = loss.draw(EDM(), images(), keyed_generator("draw"), 20_000)
    plain = loss(denoiser, images(), *draws)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(denoiser, images(), *draws), plain)


def test_the_uncertainty_settles_at_the_logarithm_of_the_loss():
    denoiser, loss = Denoiser(small_net(), EDM(), EDMPrecondition()), scm()
    draws = loss.draw(EDM(), images(), keyed_generator("draw"), 20_000)
    first = loss(denoiser, images(), *draws)
    constant_u = nn.Module()
    constant_u.uncertainty = lambda process, t: first.detach().log()
    loss.u = constant_u
    assert_close(loss(denoiser, images(), *draws), 1 + first.log())


@pytest.mark.parametrize("option", [{"sigma_data": 0.0}, {"c": 0.0}, {"warmup": -1}, {"guidance": 2.0}])
def test_bad_options_are_named(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        scm(**option)


def test_a_resumed_run_ends_with_the_same_bits(fit, tmp_path):
    """The ramp goes on where it was, and the learned uncertainty is in the checkpoint."""
    options = [
        "experiment=digits_edm",
        "model/loss=scm",
        "model.loss.warmup=4",
        "trainer.max_steps=4",
        "callbacks.checkpoint.every=2",
    ]
    options += ["~callbacks.quality", "~callbacks.grid", "~callbacks.validation"]
    fit(tmp_path / "whole", *options)
    where = checkpoints.folder(tmp_path / "whole")
    fit(tmp_path / "again", *options, checkpoint=where / "previous.ckpt")
    whole, again = (
        checkpoints.read(checkpoints.folder(tmp_path / name) / "last.ckpt") for name in ("whole", "again")
    )
    assert checkpoints.read(where / "previous.ckpt")["batches_seen"] == 2 and whole["batches_seen"] == 4
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(again["state_dict"][name], tensor), name
    assert whole["state_dict"]["loss.u.out"].abs().max() > 0


class Step(nn.Module):
    """A training step as Lightning hands it to DistributedDataParallel: all of it in its forward."""

    def __init__(self, loss, denoiser):
        super().__init__()
        self.loss, self.denoiser = loss, denoiser

    def forward(self, *args, **told):
        return self.loss(self.denoiser, *args, **told).mean()


def gradients(distill: bool, rank: int | None = None) -> dict[str, Tensor]:
    loss = scm(distill=distill).double()
    denoiser = Denoiser(small_net(num_classes=3), EDM(), EDMPrecondition())
    loss.make_room(denoiser)
    loss.start_from(denoiser.net)
    with torch.no_grad():
        denoiser.net.stem.weight.mul_(1.1)
    rows = (
        images(),
        *loss.draw(EDM(), images(), keyed_generator("draw"), 5_000),
        torch.eye(3)[[0, 1, 2] * 2],
    )
    step = Step(loss, denoiser)
    run = step if rank is None else DistributedDataParallel(step)
    *rows, label = rows if rank is None else (part.chunk(2)[rank] for part in rows)
    run(*rows, label=label).backward()
    return {name: p.grad for name, p in step.named_parameters() if p.grad is not None}


def on_rank(distill: bool) -> dict[str, Tensor]:
    return gradients(distill, torch.distributed.get_rank())


@pytest.mark.parametrize("distill", [False, True])
def test_two_processes_have_the_gradient_of_one(on_ranks, distill):
    expected = gradients(distill)
    assert {"loss.u.out", "denoiser.net.stem.weight"} <= expected.keys()
    assert not any("teacher" in name for name in expected)
    for found in on_ranks(2, on_rank, distill):
        assert_close(found, expected, rtol=1e-9, atol=1e-12)
