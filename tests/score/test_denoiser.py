import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator
from lit_gen.score.denoiser import (
    ClippedDenoiser,
    CountingDenoiser,
    Denoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    IdealDenoiser,
    ReparameterizedDenoiser,
)
from lit_gen.score.precondition import (
    EDMPrecondition,
    LevelIndex,
    LogNoiseLevel,
    PredictFlow,
    PredictImage,
    PredictNoise,
    PredictPathVelocity,
    PredictScaledScore,
    PredictScore,
    PredictVelocity,
    ScaledTime,
    StepIndex,
)
from lit_gen.score.sde import EDM, GVP, VE, VP, DiscreteVP, Flow, SubVP, linear_betas, per_image

PROCESSES = [EDM(), VE(), VP(), SubVP(), Flow(), GVP(), DiscreteVP(linear_betas())]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def randn(*shape):
    return torch.randn(shape, generator=keyed_generator("test", *shape), dtype=torch.float64)


def middle(process, n=4):
    """n times from the first to the last third of the noise levels."""
    ends = process.noise_level(torch.tensor([process.t_min, process.t_max], dtype=torch.float64)).log()
    return process.time((ends[0] + torch.linspace(0.3, 0.7, n) * (ends[1] - ends[0])).exp())


class Given(nn.Module):
    """A network that returns a given target and remembers its arguments."""

    def __init__(self, target):
        super().__init__()
        self.target, self.weight = target, nn.Parameter(torch.zeros((), dtype=torch.float32))

    def forward(self, x, noise_label, label=None, augment_label=None):
        self.seen = x, noise_label, label, augment_label
        return self.target


TARGETS = {
    PredictNoise: lambda p, t, x_0, z: z,
    PredictScaledScore: lambda p, t, x_0, z: -z,
    PredictScore: lambda p, t, x_0, z: -z / per_image(p.sigma(t), z),
    PredictImage: lambda p, t, x_0, z: x_0,
    PredictVelocity: lambda p, t, x_0, z: per_image(p.alpha(t), z) * z - per_image(p.sigma(t), z) * x_0,
    PredictFlow: lambda p, t, x_0, z: z - x_0,
    PredictPathVelocity: lambda p, t, x_0, z: (
        -sum(per_image(c, z) * v for c, v in zip(p.slopes(t), (x_0, z), strict=True))
    ),
}


@each_process
@pytest.mark.parametrize("row", TARGETS, ids=lambda row: row.__name__)
def test_a_network_that_hits_its_target_denoises_exactly(row, process):
    x_0, z, t = randn(4, 3, 4, 4), randn(4, 3, 4, 4) + 1, middle(process)
    net = Given(TARGETS[row](process, t, x_0, z))
    denoiser = Denoiser(net, process, row(ScaledTime(10.0)))
    x_t = process.marginal(x_0, t, z)
    assert_close(denoiser(x_t, t), x_0, rtol=1e-9, atol=1e-9)
    assert_close(denoiser.noise(x_t, t), z, rtol=1e-7, atol=1e-7)
    assert_close(denoiser.score(x_t, t), -z / per_image(process.sigma(t), z), rtol=1e-6, atol=1e-6)
    assert_close(net.seen[1], (10 * t).float())


@each_process
def test_edm_row_gives_the_network_unit_variance(process):
    """c_in x_t and the target (x_0 - c_skip x_t) / c_out have variance 1, and c_out is least, for data of
    deviation d.
    """
    d, t = 0.7, middle(process)
    alpha, sigma = process.alpha(t), process.sigma(t)
    c_skip, c_out, c_in, c_noise = EDMPrecondition(d)(process, t)
    assert_close(c_in.square() * (alpha.square() * d**2 + sigma.square()), torch.ones_like(t))
    target = (1 - alpha * c_skip).square() * d**2 + c_skip.square() * sigma.square()
    assert_close(target, c_out.square())
    assert_close(c_noise, process.noise_level(t).log() / 4)


def test_network_sees_its_own_dtype_and_what_is_passed_on():
    net = Given(torch.zeros(2, 6, 4, 4))  # channels beyond the image's are dropped
    denoiser = Denoiser(net, EDM(), EDMPrecondition())
    x, label, augment = randn(2, 3, 4, 4), torch.tensor([1, 2]), randn(2, 9)
    out = denoiser(x, torch.tensor(1.0), label, augment)
    assert out.dtype == torch.float64 and out.shape == x.shape
    seen_x, noise_label, seen_label, seen_augment = net.seen
    assert seen_x.dtype == noise_label.dtype == torch.float32 and noise_label.shape == (2,)
    assert seen_label is label and seen_augment is augment
    assert_close(out, 0.25 / 1.25 * x)


def test_labels():
    process = DiscreteVP(linear_betas())
    t = (torch.tensor([0.0, 7.0, 998.0], dtype=torch.float64) + 1) / 1000
    assert_close(StepIndex()(process, t), torch.tensor([0.0, 7, 998], dtype=torch.float64))
    near = process.time(process.noise_level(t) * torch.tensor([0.3, 1.0001, 0.999]))
    assert_close(StepIndex(nearest=True)(process, near), torch.tensor([-1.0, 7, 998], dtype=torch.float64))
    levels = LevelIndex(10, sigma_max=1.0, sigma_min=0.01)
    sigma = torch.tensor([2.0, 1.0, 0.12, 0.01], dtype=torch.float64)
    assert levels(EDM(), sigma).tolist() == [0, 0, 4, 9]
    assert_close(LogNoiseLevel(1.0, 2.0)(EDM(), sigma), (sigma / 2).log())
    with pytest.raises(ConfigError, match="StepIndex numbers the steps of a DiscreteVP process, not of EDM"):
        StepIndex()(EDM(), sigma)


def gaussian(process):
    root = randn(12, 12) / 4
    return GaussianDenoiser(process, 0.2 * randn(3, 2, 2), root @ root.T)


def mixture(process, n=3):
    weights = torch.arange(1.0, n + 1)
    return GaussianMixtureDenoiser(process, 0.5 * randn(n, 3, 2, 2), torch.tensor(0.04), weights)


@each_process
@pytest.mark.parametrize("make", [gaussian, mixture])
def test_score_of_exact_denoisers_is_the_gradient_of_the_density(make, process):
    denoiser, t = make(process), middle(process)
    x = process.marginal(randn(4, 3, 2, 2), t, randn(4, 3, 2, 2)).requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser.log_prob(x, t).sum(), x)
    assert_close(denoiser.score(x, t), gradient, rtol=1e-6, atol=1e-6)


def test_gaussian_is_a_mixture_of_one():
    mean, variance, t = randn(3, 2, 2), randn(3, 2, 2).square(), torch.tensor(0.4)
    one = GaussianDenoiser(VP(), mean, variance)
    other = GaussianMixtureDenoiser(VP(), mean[None], variance, torch.ones(1))
    x = randn(5, 3, 2, 2)
    assert_close(one(x, t), other(x, t))
    assert_close(one.log_prob(x, t), other.log_prob(x, t))
    assert_close(GaussianDenoiser(VP(), mean, variance.flatten().diag())(x, t), one(x, t))


@each_process
def test_ideal_denoiser_is_a_mixture_without_width_whatever_the_chunk(process):
    images, labels, t = randn(23, 3, 2, 2), torch.arange(23) % 4, middle(process)
    x = process.marginal(images[:4], t, randn(4, 3, 2, 2))
    limit = GaussianMixtureDenoiser(process, images, torch.tensor(0.0), torch.ones(23))(x, t)
    for chunk in (4, 7, 100):
        assert_close(IdealDenoiser(process, images, chunk=chunk)(x, t), limit)
    conditional = IdealDenoiser(process, images, labels, chunk=5)
    label = torch.tensor([0, 3, -1, 1])
    parts = [images if c < 0 else images[labels == c] for c in label.tolist()]
    for i, part in enumerate(parts):
        assert_close(conditional(x, t, label)[i], IdealDenoiser(process, part)(x, t)[i])
    rows = nn.functional.one_hot(label.clamp(min=0), 4).float() * (label >= 0)[:, None]
    assert_close(conditional(x, t, rows), conditional(x, t, label))


def test_ideal_denoiser_returns_the_nearest_image_without_noise():
    images = randn(9, 1, 4, 4)
    x = images[:3] + 1e-3
    assert_close(IdealDenoiser(EDM(), images, chunk=4)(x, torch.tensor(1e-4)), images[:3])


@each_process
def test_a_denoiser_on_another_process(process):
    """x_t / alpha of equal noise level is the same random variable, so the exact denoisers agree."""
    own, t = gaussian(process), middle(process)
    x = process.marginal(randn(4, 3, 2, 2), t, randn(4, 3, 2, 2))
    assert_close(ReparameterizedDenoiser(gaussian(EDM()), process)(x, t), own(x, t), rtol=1e-9, atol=1e-9)


def test_counted_and_clipped():
    denoiser = CountingDenoiser(
        ClippedDenoiser(GaussianDenoiser(EDM(), torch.full((1, 2, 2), 3.0), torch.tensor(1.0)))
    )
    for n in (1, 5):
        assert denoiser(torch.zeros(n, 1, 2, 2), torch.tensor(10.0)).max() == 1
    assert (denoiser.calls, denoiser.evaluations) == (2, 6)
