"""MeanFlow: the identity and the jumps on an exact average velocity, the start from a diffusion model."""

import copy
import math
import shutil

import pytest
import torch
from hydra.errors import InstantiationException
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from lit_gen import checkpoints, models
from lit_gen.commands import train as training
from lit_gen.errors import ConfigError
from lit_gen.rng import PerSample
from lit_gen.score.condition import Condition
from lit_gen.score.denoiser import (
    ConditionedDenoiser,
    CountingDenoiser,
    Denoiser,
    GaussianDenoiser,
    ReparameterizedDenoiser,
)
from lit_gen.score.fewstep.meanflow import MeanFlowDenoiser, MeanFlowLoss, TwoLogitNormals, heading
from lit_gen.score.guidance import Guidance, classifier_free_guidance
from lit_gen.score.networks import NCSNpp
from lit_gen.score.precondition import EDMPrecondition, PredictFlow, ScaledTime
from lit_gen.score.samplers import euler, meanflow, uniform_time
from lit_gen.score.sde import EDM, Flow, per_image

STD = 0.6  # of the data


class Exact(nn.Module):
    """The average velocity of data N(0, STD^2), whose flow stretches x as the deviation of x_t."""

    second_time = "added"
    factor = 1.0

    def forward(self, x, noise_label, label=None, augment_label=None, second_time=None):
        t, r = noise_label, noise_label - second_time

        def deviation(t):
            return ((1 - t).square() * STD**2 + t.square()).sqrt()

        apart = second_time.abs() > 1e-12
        h = second_time.where(apart, 1.0)
        slope = ((t - 1) * STD**2 + t) / deviation(t).square()
        rate = ((1 - deviation(r) / deviation(t)) / h).where(apart, slope)
        if label is not None:
            rate = rate * (1 + label)
        return self.factor * rate[:, None, None, None] * x


def exact(**options):
    return MeanFlowDenoiser(Exact(), Flow(**options), PredictFlow(ScaledTime(1.0)))


def wide_randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(second_time="added", **options):
    torch.manual_seed(0)
    net = NCSNpp(8, 1, 16, (1, 2), 1, (4,), second_time=second_time, **options).eval()
    for name, p in net.named_parameters():
        if not name.endswith("second.weight"):
            nn.init.normal_(p, 1.0 if p.ndim < 2 else 0.0, 0.2)
    return net


def test_exact_model_is_the_denoiser_and_jumps_along_the_flow():
    denoiser, x = exact(), wide_randn(3, 1, 2, 2)
    gaussian = GaussianDenoiser(denoiser.process, torch.zeros(1, 2, 2), torch.tensor(STD**2).double())
    t, r = torch.tensor([0.9, 0.5, 0.01]).double(), torch.tensor([0.2, 0.5, 0.0]).double()
    assert_close(denoiser(x, t), gaussian(x, t))
    ratio = (((1 - r) * STD) ** 2 + r**2).sqrt() / (((1 - t) * STD) ** 2 + t**2).sqrt()
    assert_close(denoiser.jump(x, t, r), per_image(ratio, x) * x)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("times", [False, True])
def test_jumps_of_any_number_end_where_the_flow_ends(num_steps, times):
    denoiser, x = exact(), wide_randn(3, 1, 2, 2)
    told = [1.0, 0.7, 0.3, 0.2, 0.05][:num_steps] if times else None
    t_max = denoiser.process.t_max
    out = meanflow(denoiser, t_max * x, num_steps=num_steps, times=told)
    start = math.hypot((1 - t_max) * STD, t_max) / t_max if told is None else 1.0
    assert_close(out, STD * x / start)
    counting = CountingDenoiser(denoiser)
    meanflow(counting, t_max * x, num_steps=num_steps, times=told)
    assert counting.calls == num_steps


def test_renoised_images_have_the_deviation_of_the_data_and_rows_of_their_own():
    denoiser = exact()

    def sample(indices):
        generator = PerSample.keyed(0, indices)
        x = denoiser.process.prior_sample((len(indices), 1, 8, 8), generator)
        return meanflow(denoiser, x, num_steps=3, renoise=True, generator=generator)

    images = sample(range(60))
    assert images.std() == pytest.approx(STD, rel=0.03)
    assert_close(sample([7, 3]), images[[7, 3]])


def test_without_a_second_time_the_steps_are_those_of_euler():
    process = Flow()
    denoiser = GaussianDenoiser(process, torch.zeros(1, 2, 2), torch.tensor(STD**2).double())
    x = wide_randn(2, 1, 2, 2)
    times = uniform_time(process, 4)[:-1].tolist()
    expected = euler(denoiser, x, num_steps=4, grid=uniform_time)
    assert_close(meanflow(denoiser, x, num_steps=4, times=times), expected)


def test_the_identity_makes_the_loss_zero():
    """Where the conditional velocity happens to be that of the flow, nothing is left of the loss."""
    loss = MeanFlowLoss(norm_p=0.0)
    denoiser, x_t = exact(), wide_randn(4, 1, 2, 2)
    t, r = torch.tensor([0.9, 0.5, 0.4, 1e-3]).double(), torch.tensor([0.2, 0.5, 0.1, 1e-4]).double()
    v = denoiser.average_velocity(x_t, t, t)
    x_0, z = x_t - per_image(t, x_t) * v, x_t + per_image(1 - t, x_t) * v
    assert_close(loss(denoiser, x_0, t, z, r), torch.zeros(4).double(), rtol=0, atol=1e-20)
    denoiser.net.factor = 1.1
    assert loss(denoiser, x_0, t, z, r).min() > 1e-6


def test_rows_in_which_r_is_t_are_flow_matching_whatever_the_derivative():
    class Infinite(Exact):
        def forward(self, x, noise_label, label=None, augment_label=None, second_time=None):
            return x * second_time.sqrt()[:, None, None, None]  # of infinite slope at 0

    denoiser = MeanFlowDenoiser(Infinite(), Flow(), PredictFlow(ScaledTime(1.0)))
    x_0, z, t = wide_randn(2, 1, 2, 2), wide_randn(2, 1, 2, 2, seed=1), torch.tensor([0.5, 0.7]).double()
    found = MeanFlowLoss(norm_p=0.0)(denoiser, x_0, t, z, t.clone())
    assert_close(found, (z - x_0).square().flatten(1).sum(1))


@pytest.mark.parametrize("row", [EDMPrecondition(0.7), PredictFlow()])
@pytest.mark.parametrize("conditions", [{}, {"num_classes": 3, "augment_dim": 9, "vector_dim": 2}])
def test_a_diffusion_model_with_an_added_second_time_is_the_same_function(row, conditions):
    net, plain = network(**conditions), network("none", **conditions)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != "noise.second.weight"})
    before = Denoiser(plain, Flow(), row)
    after = MeanFlowDenoiser(net, Flow(), row)
    x, t = wide_randn(4, 1, 8, 8), torch.tensor([0.99, 0.5, 0.1, 1e-3]).double()
    told = {}
    if conditions:
        label = Condition(torch.tensor([0, 2, 1, -1]), torch.randn(4, 2))
        told = {"label": label, "augment_label": torch.randn(4, 9)}
    expected = before(x, t, **told)
    assert torch.equal(after(x, t, **told), expected)
    with heading(after, torch.tensor(0.05)):
        assert torch.equal(after(x, t, **told), expected)
    velocity = (x - expected) / per_image(t, x)
    assert_close(after.average_velocity(x, t, t / 2, **told), velocity, rtol=0, atol=1e-9)
    nn.init.normal_(net.noise.second.weight)
    assert torch.equal(after(x, t, **told), before(x, t, **told)) is False  # cos 0 = 1 enters then
    on_edm = ReparameterizedDenoiser(after, EDM())
    s = Flow().noise_level(t)
    assert_close(on_edm(x / per_image(1 - t, x), s, told.get("label")), after(x, t, told.get("label")))


def test_the_second_time_has_a_gradient_from_the_first_step_on():
    denoiser = MeanFlowDenoiser(network().double(), Flow(), EDMPrecondition(0.7))
    loss, x_0 = MeanFlowLoss(), wide_randn(8, 1, 8, 8)
    draws = loss.draw(denoiser.process, x_0, torch.Generator().manual_seed(0))
    loss(denoiser, x_0, *draws).mean().backward()
    second = denoiser.net.noise.second
    assert second.weight.grad.abs().max() > 1e-6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())


def test_heading_reaches_the_models_inside_guidance_and_conditions():
    denoiser, x, t = exact(), wide_randn(3, 1, 2, 2), torch.tensor(0.8).double()
    r, labels = torch.tensor(0.3).double(), torch.tensor([0, 1, 2])
    level = denoiser.process.noise_level(r)
    guided = ConditionedDenoiser(classifier_free_guidance(denoiser, 3.0), Condition(labels))
    auto = Guidance(denoiser, exact(), 2.0)
    plain, told = (denoiser.average_velocity(x, t, r, label) for label in (None, labels))
    with heading(guided, level), heading(auto, level):
        assert_close((x - guided(x, t)) / t, plain + 3 * (told - plain))
        assert_close((x - auto(x, t, labels)) / t, told)
    assert denoiser.destination is None


@pytest.mark.parametrize("ordered", [False, True])
def test_times(ordered):
    law = TwoLogitNormals(different=0.6, ordered=ordered, largest=0.9)
    t, r = law(torch.empty(20000, 1), torch.Generator().manual_seed(0))
    assert t.dtype == torch.float64 and bool((r <= t).all()) and 0.8 < t.max() < 0.9
    equal = float((r == t).double().mean())
    assert equal == pytest.approx(0.4, abs=0.02) if ordered else 0.4 < equal < 0.5
    rows = [law(torch.empty(len(i), 1), PerSample.keyed(0, i)) for i in ([4, 9], [9])]
    assert torch.equal(rows[0][1][1:], rows[1][1])


def test_a_value_under_autocast_keeps_its_tangent():
    """Only the value is in half precision: its loss is near that of float32."""
    denoiser = MeanFlowDenoiser(network(), Flow(), EDMPrecondition(0.7))
    loss, x_0 = MeanFlowLoss(norm_p=0.0), wide_randn(8, 1, 8, 8)
    draws = loss.draw(denoiser.process, x_0, torch.Generator().manual_seed(0))
    expected = loss(denoiser, x_0, *draws)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(denoiser, x_0, *draws)
    assert_close(found, expected, rtol=0.05, atol=0)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize(
    ("times", "num_steps"), [([0.5], 2), ([0.5, 0.5], 2), ([1.1], 1), ([0.5, 0.0], 2), (None, 0)]
)
def test_other_times_are_refused(times, num_steps):
    with pytest.raises(ConfigError, match=r"times|num_steps"):
        meanflow(exact(), torch.zeros(1, 1, 2, 2), num_steps=num_steps, times=times)


def test_models_that_cannot_be_are_refused(compose, tmp_path):
    from lit_gen.config.experiment import build

    with pytest.raises(ConfigError, match="flow"):
        MeanFlowDenoiser(Exact(), EDM(), EDMPrecondition())
    with pytest.raises(ConfigError, match="different=2"):
        TwoLogitNormals(different=2)
    with pytest.raises(ConfigError, match="second_time"):
        network("both")
    with pytest.raises(ConfigError, match="second_time"):
        network("none")(torch.zeros(1, 1, 8, 8), torch.ones(1), second_time=torch.ones(1))
    with pytest.raises(ConfigError, match="MeanFlowDenoiser"):
        x, t = torch.zeros(1, 1, 2, 2), torch.ones(1)
        MeanFlowLoss()(GaussianDenoiser(Flow(), x[0], torch.tensor(1.0)), x, t, x, t)
    base = (
        f"logger.csv.save_dir={tmp_path}",
        "experiment=digits_edm",
        "model=meanflow",
        "trainer=cpu",
        "logger=csv",
    )
    for override, words in {
        "model.net.second_time=none": "second_time=added",
        "model.compile=true": "forward derivative",
        "log_every=1": "trainer=fsdp: MeanFlow takes a forward derivative",
        "model/process=edm": "model/process=flow",
    }.items():
        cfg = compose(*(o for o in base if o.split("=")[0] != override.split("=")[0]), override)
        with pytest.raises((ConfigError, InstantiationException), match=words):
            build(cfg, tmp_path).module.sharded_networks()


def test_networks_with_a_second_time_can_be_copied_and_read():
    net = network("concatenated")
    x, c, h = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([0.1, 0.5])
    again = copy.deepcopy(net)
    assert torch.equal(again(x, c, second_time=h), net(x, c, second_time=h))
    assert torch.equal(net(x, c), net(x, c, second_time=torch.zeros(2)))
    assert not torch.equal(net(x, c), net(x, c, second_time=h))


# Training

FEW = ["callbacks.quality.every=100", "callbacks.grid.every=100", "callbacks.validation.every=3"]
FEW += ["trainer.max_steps=4", "callbacks.checkpoint.every=2", "callbacks.quality.final_images=32"]


def test_a_training_starts_from_a_diffusion_model_and_resumes_to_the_same_bits(compose, tiny, tmp_path):
    small = [o for o in tiny if "callbacks" not in o and "max_steps" not in o]

    def trained(folder, *options):
        logger = ["trainer=cpu", "logger=csv", f"logger.csv.save_dir={folder}"]
        training.train(compose(*small, *FEW, *options, *logger), folder, [])
        return checkpoints.read(checkpoints.folder(folder) / "last.ckpt")

    start = trained(tmp_path / "start", "trainer.max_steps=2")
    averages = next(state for name, state in start["callbacks"].items() if name.startswith("EMA"))["shadow"]
    folder = tmp_path / "whole"
    options = ["experiment=digits_meanflow", "sampler.num_steps=2", f"weights={tmp_path / 'start'}"]
    whole = trained(folder, *options)["state_dict"]
    assert whole["denoiser.net.noise.second.weight"].abs().max() > 0
    assert not torch.equal(whole["denoiser.net.stem.weight"], averages["stem.weight"])
    again = checkpoints.folder(tmp_path / "again")
    again.mkdir(parents=True)
    shutil.copy(folder / "config.yaml", again.parent)
    shutil.copy(checkpoints.folder(folder) / "previous.ckpt", again / "last.ckpt")
    assert checkpoints.read(again / "last.ckpt")["batches_seen"] == 2
    training.train(compose(f"resume={again.parent}"), again.parent, [])
    resumed = checkpoints.read(again / "last.ckpt")["state_dict"]
    for name, w in whole.items():
        assert torch.equal(resumed[name], w), name
    module, _, _ = models.load(folder, "last", device="cpu")
    assert isinstance(module.denoiser, MeanFlowDenoiser) and module.sample([0, 1]).shape == (2, 1, 8, 8)


class Step(nn.Module):
    """A training step as Lightning hands it to DistributedDataParallel."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *args):
        return MeanFlowLoss()(self.denoiser, *args).mean()


def gradients(rank: int | None = None):
    denoiser = MeanFlowDenoiser(network().double().train(), Flow(), EDMPrecondition(0.7))
    x_0 = wide_randn(6, 1, 8, 8)
    draws = (x_0, *MeanFlowLoss().draw(Flow(), x_0, torch.Generator().manual_seed(0)))
    step = Step(denoiser)
    for module in denoiser.modules():
        if "dropout" in vars(module):
            module.dropout = 0.0  # each process draws its own
    if rank is None:
        step(*draws).backward()
    else:
        parallel = DistributedDataParallel(step)  # must outlive the backward pass
        parallel(*(rows.chunk(2)[rank] for rows in draws)).backward()
    return [p.grad for p in denoiser.parameters()]


def on_rank():
    return gradients(torch.distributed.get_rank())


def test_two_processes_have_the_gradient_of_one(on_ranks):
    expected = gradients()
    for found in on_ranks(2, on_rank):
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, rtol=1e-9, atol=1e-12)
