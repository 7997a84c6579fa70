"""What a consistency loss is zero for, what its parts are, and that its teacher comes and stays."""

import math
import shutil
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from lit_gen import checkpoints
from lit_gen.commands import train as training
from lit_gen.errors import ConfigError
from lit_gen.evaluation.likelihood import measure_likelihoods
from lit_gen.models import restore_images
from lit_gen.rng import PerSample, keyed_generator
from lit_gen.score.denoiser import (
    AbstractDenoiser,
    CountingDenoiser,
    Denoiser,
    GaussianDenoiser,
    ReparameterizedDenoiser,
)
from lit_gen.score.fewstep.consistency import ConsistencyLoss, Stages
from lit_gen.score.guidance import classifier_free_guidance
from lit_gen.score.losses import LogNormal, TruncatedLogNormal
from lit_gen.score.module import ScoreModule
from lit_gen.score.precondition import EDMPrecondition
from lit_gen.score.restoration import Inpainting, ddnm, dps
from lit_gen.score.samplers import consistency, karras
from lit_gen.score.sde import EDM, VE, VP, DiscreteVP, Flow, SubVP, linear_betas, per_image

PROCESSES = [EDM(), VE(), VP(), SubVP(), Flow(), DiscreteVP(linear_betas())]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
VARIANCE = torch.tensor([0.04, 0.25, 0.5, 1.0], dtype=torch.float64).reshape(1, 2, 2)
LEVELS = LogNormal(-0.5, 1.0)


class GaussianConsistency(AbstractDenoiser):
    """The consistency function of N(0, VARIANCE): along the probability flow x_t / alpha grows as
    sqrt(variance + s^2)."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x_t, t, label=None):
        s = per_image(self.process.noise_level(t), x_t)
        y = x_t / per_image(self.process.alpha(t), x_t)
        return y * VARIANCE.sqrt() / (VARIANCE + s.square()).sqrt()


class Net(nn.Module):
    """A small smooth network with dropout and classes, in float64."""

    def __init__(self, dropout=0.0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.classes = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(3, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.to(dtype)

    def forward(self, x, noise_label, label=None, augment_label=None):
        assert x.isfinite().all() and noise_label.isfinite().all()
        h = self.conv(x) + noise_label[:, None, None, None].sin()
        if label is not None:
            h = h + self.classes(label.to(x))[:, :, None, None]
        return self.dropout(h).tanh()


def model(**options):
    return Denoiser(Net(**options), EDM(), EDMPrecondition())


def images(n=6, seed="images"):
    return torch.randn(n, 1, 2, 2, generator=keyed_generator(seed), dtype=torch.float64) * VARIANCE.sqrt()


def one_stage(ratio, **options):
    return Stages(None, 1 / (1 - ratio), k=0.0, max_ratio=1.0, **options)


@each_process
def test_distillation_has_the_consistency_function_for_its_solution(process):
    """By an exact teacher: an Euler step of length h errs by h^2, and the loss, that over h, falls as h."""
    x_0, values = images(64), []
    for gap in (0.02, 0.01):
        loss = ConsistencyLoss(LEVELS, one_stage(1 - gap), c=0.0, distill=True)
        loss.teacher = GaussianDenoiser(process, torch.zeros(1, 2, 2), VARIANCE[0].reshape(1, 2, 2))
        loss.taught = lambda x, t, label=None, teacher=loss.teacher: teacher(x, t, label)
        draws = loss.draw(process, x_0, keyed_generator("draw"))
        values.append(loss(GaussianConsistency(process), x_0, *draws).mean().item())
    assert math.log2(values[0] / values[1]) == pytest.approx(1, abs=0.05)
    other = ConsistencyLoss(LEVELS, one_stage(0.99), c=0.0)  # the denoiser itself is not consistent
    exact = GaussianDenoiser(process, torch.zeros(1, 2, 2), VARIANCE)
    assert other(exact, x_0, *draws).mean() > 10 * values[1]


@each_process
def test_a_pair_is_one_image_with_one_noise(process):
    """The loss of a process is that of EDM's at the same noise levels."""
    x_0, loss = images(), ConsistencyLoss(LEVELS, Stages(None, q=4.0))
    t, z, r = loss.draw(process, x_0, keyed_generator("draw"))
    assert (process.noise_level(r) == 0).any() and (r < t).all()
    edm = model()
    there = ReparameterizedDenoiser(edm, process)
    times = (EDM().time(process.noise_level(u)) for u in (t, r))
    s, s_r = times
    assert_close(loss(there, x_0, t, z, r), loss(edm, x_0, s, z, s_r), rtol=1e-6, atol=1e-9)


def test_without_an_earlier_level_the_target_is_the_image():
    """The network is not asked at noise level 0, and its gradient is finite."""
    x_0, denoiser = images(), model()
    loss = ConsistencyLoss(LEVELS, Stages(None, k=1000.0), c=None)
    t, z, r = loss.draw(EDM(), x_0, keyed_generator("draw"))
    assert (r == 0).all()
    losses = loss(denoiser, x_0, t, z, r)
    error = (denoiser(x_0 + per_image(t, x_0) * z, t) - x_0).square().flatten(1).sum(1)
    assert_close(losses, error / t)
    losses.mean().backward()
    assert all(p.grad.isfinite().all() for p in denoiser.net.conv.parameters())


@pytest.mark.parametrize("c", [0.0, 1e-8, 0.03, None])
def test_equal_images_have_no_gradient(c):
    image = torch.ones(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    distance = ConsistencyLoss(LEVELS, Stages(), c).distance(image, image.detach().clone())
    distance.sum().backward()
    assert distance.abs().max() < 1e-14 and torch.equal(image.grad, torch.zeros_like(image))


class Masked(nn.Module):
    """Ones of which dropout leaves a few, whatever the image."""

    def forward(self, x, noise_label, label=None, augment_label=None):
        return nn.functional.dropout(torch.ones_like(x), 0.5, self.training)


def test_both_calls_have_one_dropout_mask():
    x_0 = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    denoiser = Denoiser(Masked(), EDM(), lambda process, t: (t * 0, t * 0 + 1, t * 0, t))
    loss = ConsistencyLoss(LEVELS, one_stage(0.9), c=None)
    draws = loss.draw(EDM(), x_0, keyed_generator("draw"))
    assert torch.equal(loss(denoiser.train(), x_0, *draws), torch.zeros(2, dtype=torch.float64))


def test_half_precision_does_not_reach_the_network():
    x_0, loss = images(), ConsistencyLoss(LEVELS, one_stage(0.996))
    denoiser = model(dtype=torch.float32)
    draws = loss.draw(EDM(), x_0, keyed_generator("draw"))
    expected = loss(denoiser, x_0, *draws)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(denoiser, x_0, *draws), expected)


def test_draws_are_keyed_by_image_and_stage():
    x_0, loss = images(), ConsistencyLoss(TruncatedLogNormal(high=5.0), Stages(batches=10))
    whole = loss.draw(EDM(), x_0, PerSample.keyed(0, range(6)), 11)
    part = loss.draw(EDM(), x_0[2:4], PerSample.keyed(0, [2, 3]), 11)
    assert all(torch.equal(a, b[2:4]) for a, b in zip(part, whole, strict=True))
    stages = [loss.pairs.stage(step) for step in (0, 10, 11, 20, 21)]
    assert stages == [0, 0, 1, 1, 2] and Stages(None).stage(10**6) == 0
    later = loss.draw(EDM(), x_0, PerSample.keyed(0, range(6)), 21)
    assert torch.equal(whole[0], later[0]) and (later[2] > whole[2]).all()
    s = torch.logspace(-2, 1.5, 8, dtype=torch.float64)
    assert_close(Stages(1, k=0.0, max_ratio=0.9)(s, 10**6), 0.9 * s)


def test_truncated_levels():
    law, like = TruncatedLogNormal(-1.0, 1.4, 0.3, 5.0), torch.empty(20_000, 1)
    log_s = law(VP(), like, keyed_generator("levels"))
    log_s = VP().noise_level(log_s).log()
    assert math.log(0.3) <= log_s.min() and log_s.max() <= math.log(5.0)
    plain = LogNormal(-1.0, 1.4)(EDM(), torch.empty(200_000, 1), keyed_generator("plain"))
    inside = plain[(plain > 0.3) & (plain < 5.0)].log()
    for q in (0.1, 0.5, 0.9):
        assert log_s.quantile(q).item() == pytest.approx(inside.quantile(q).item(), abs=0.03)


# --- sampling ---


@each_process
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_samples_of_the_exact_function(process, num_steps):
    """Each step, whatever its noise level, gives the data's distribution."""
    g = keyed_generator("samples")
    x = process.prior_sample((20_000, 1, 2, 2), g)
    out = consistency(GaussianConsistency(process), x, num_steps=num_steps, generator=g)
    wide_prior = (process.prior_std / process.alpha(torch.tensor(process.t_max))).square()
    first = VARIANCE * wide_prior / (VARIANCE + process.noise_level(torch.tensor(process.t_max)).square())
    s = process.noise_level(karras(process, num_steps, rho=20, denoise=False))[1:num_steps]
    expected = first
    for level in s:
        expected = VARIANCE * (expected + level.square()) / (VARIANCE + level.square())
    assert_close(out.var(0), expected, rtol=0.05, atol=0)
    assert out.dtype == torch.float64


def test_levels():
    counted = CountingDenoiser(GaussianConsistency(EDM()))
    x = EDM().prior_sample((3, 1, 2, 2), keyed_generator("x"))
    seen = []
    run = partial(consistency, counted, x, generator=keyed_generator("levels"))
    out = run(
        num_steps=3,
        levels=[5.0, 0.8],
        trace=lambda step, x_t, x0_hat: seen.append((step, x0_hat)),
    )
    assert counted.calls == 3 and [step for step, _ in seen] == [0, 1, 2] and torch.equal(seen[-1][1], out)
    grid = partial(karras, rho=20, denoise=False)(EDM(), 2)
    assert 0.75 < grid[1] < 0.85
    for levels in ([0.8], [0.8, 5.0], [80.0, 1.0], [1.0, 0.0], [5.0, 2.0, 1.0]):
        with pytest.raises(ConfigError, match=r"give 2 noise levels below 80 and above 0"):
            run(num_steps=3, levels=levels)


# --- restoration ---


def test_ddnm_with_fresh_noise_is_the_papers_way_to_restore():
    """Algorithm 4 of Song et al. 2023: what was measured is put in after every evaluation. The pixels here
    are independent, so that the others have the data's distribution."""
    process, g = EDM(), keyed_generator("restore")
    operator, y = Inpainting(torch.tensor([[[1, 0], [0, 1]]])), images(4000)
    counted = CountingDenoiser(GaussianConsistency(process))
    x = process.prior_sample((4000, 1, 2, 2), g)
    grid = partial(karras, rho=20)
    out = ddnm(counted, x, operator, operator(y), num_steps=3, eta=1.0, grid=grid, generator=g)
    assert counted.calls == 3
    assert_close(operator(out), operator(y), rtol=0, atol=1e-12)
    assert_close(out.var(0), VARIANCE, rtol=0.1, atol=0)


def test_what_needs_a_posterior_mean_is_refused():
    loss = ConsistencyLoss(LEVELS, Stages())
    parts = (Net(dtype=torch.float32), EDM(), EDMPrecondition(), loss)
    module = ScoreModule(*parts, partial(torch.optim.Adam, lr=1e-3), consistency, (1, 2, 2))
    operator, y = Inpainting(torch.tensor([[[1, 0], [0, 1]]])), images(2).float()
    for method in (partial(dps, num_steps=2), partial(ddnm, num_steps=2)):
        with pytest.raises(ConfigError, match=r"take method=ddnm method\.eta=1"):
            restore_images(module, operator, operator(y), method, 1)
    assert restore_images(module, operator, operator(y), partial(ddnm, num_steps=2, eta=1), 1) is not None
    with pytest.raises(ConfigError, match="measure the model that it was tuned from"):
        cfg = OmegaConf.create({"nll_images": 2, "elbo_images": 0, "batch_size": 2, "t_min": None})
        measure_likelihoods(module, [0, 1], cfg)


# --- the teacher ---


def test_a_guided_teacher():
    loss, denoiser = ConsistencyLoss(LEVELS, Stages(), distill=True, guidance=2.5), model(dropout=0.5)
    loss.make_room(denoiser)
    loss.start_from(denoiser.net)
    x, t, label = (
        images(),
        torch.rand(6, generator=keyed_generator("t")).double(),
        torch.eye(3)[[0, 1, 2] * 2],
    )
    expected = classifier_free_guidance(denoiser.eval(), 2.5)(x, t, label)
    assert_close(loss.train().taught(x, t, label), expected.detach())
    assert not [p for p in loss.parameters() if p.requires_grad]
    loss.check_start(conditional=True)
    with pytest.raises(ConfigError, match=r"this model has none: set model\.loss\.guidance=1"):
        loss.check_start(conditional=False)
    with pytest.raises(ConfigError, match=r"set model\.loss\.distill=true"):
        ConsistencyLoss(LEVELS, Stages(), guidance=2.0)


DISTILLED = ["experiment=digits_ect", "model.loss.distill=true", "model.loss.pairs.batches=2"]
FEW = ["trainer.max_steps=4", "callbacks.checkpoint.every=2", "callbacks.validation.every=2"]
FEW += ["~callbacks.quality", "~callbacks.grid"]


def test_the_teacher_is_the_start_and_resumes(compose, tiny, tmp_path):
    """It stays what the training began with, in the checkpoint, and a resumed run ends with the same bits."""
    small = [o for o in tiny if not any(part in o for part in ("quality", "grid", "sampler"))]

    def trained(folder, *options):
        logger = ["trainer=cpu", "logger=csv", f"logger.csv.save_dir={folder}"]
        training.train(compose(*options, *logger), folder, [])
        return checkpoints.read(checkpoints.folder(folder) / "last.ckpt")

    for option, others in (("distill", DISTILLED), ("tune", DISTILLED[:1])):
        with pytest.raises(ConfigError, match=rf"model\.loss\.{option}=true starts from a trained model"):
            trained(tmp_path / option, *small, *others, *FEW)
    start = trained(tmp_path / "start", *small, *FEW)
    averages = next(state for name, state in start["callbacks"].items() if name.startswith("EMA"))["shadow"]
    weights = f"weights={tmp_path / 'start'}"
    whole = trained(tmp_path / "whole", *small, *DISTILLED, *FEW, weights)["state_dict"]
    assert whole["loss.started"]
    for name, w in averages.items():
        assert torch.equal(whole[f"loss.teacher.net.{name}"], w), name
    assert not torch.equal(whole["denoiser.net.stem.weight"], averages["stem.weight"])
    again = checkpoints.folder(tmp_path / "again")
    again.mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "config.yaml", again.parent)
    shutil.copy(checkpoints.folder(tmp_path / "whole") / "previous.ckpt", again / "last.ckpt")
    assert checkpoints.read(again / "last.ckpt")["batches_seen"] == 2
    training.train(compose(f"resume={again.parent}"), again.parent, [])
    resumed = checkpoints.read(again / "last.ckpt")
    assert resumed["batches_seen"] == 4
    for name, w in whole.items():
        assert torch.equal(resumed["state_dict"][name], w), name


# --- two processes ---


class Step(nn.Module):
    """A training step as Lightning hands it to DistributedDataParallel."""

    def __init__(self, loss, denoiser):
        super().__init__()
        self.loss, self.denoiser = loss, denoiser

    def forward(self, *args):
        return self.loss(self.denoiser, *args).mean()


def gradients(distill: bool, rank: int | None = None):
    loss, denoiser = ConsistencyLoss(LEVELS, Stages(None, q=4.0), distill=distill), model()
    loss.make_room(denoiser)
    loss.start_from(denoiser.net)
    with torch.no_grad():
        denoiser.net.conv.weight.mul_(1.1)
    step = Step(loss, denoiser)
    draws = (images(), *loss.draw(EDM(), images(), keyed_generator("draw")))
    denoiser.net.classes.requires_grad_(False)
    if rank is None:
        step(*draws).backward()
    else:
        parallel = DistributedDataParallel(step)  # must outlive the backward pass
        parallel(*(rows.chunk(2)[rank] for rows in draws)).backward()
    return [p.grad for p in denoiser.net.conv.parameters()]


def on_rank(distill):
    return gradients(distill, torch.distributed.get_rank())


@pytest.mark.parametrize("distill", [False, True])
def test_two_processes_have_the_gradient_of_one(on_ranks, distill):
    expected = gradients(distill)
    for found in on_ranks(2, on_rank, distill):
        assert_close(found, expected, rtol=1e-12, atol=1e-14)
