import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.rng import PerSample, keyed_generator
from lit_gen.score.denoiser import AbstractDenoiser, Denoiser, GaussianDenoiser
from lit_gen.score.losses import (
    DenoisingLoss,
    EDMWeight,
    LogitNormal,
    LogNormal,
    MinSNR,
    SlicedScoreLoss,
    UncertaintyLoss,
    UniformStep,
    UniformTime,
    constant,
    edm_loss,
    flow,
    half_sum_of_pixels,
    likelihood,
    mean_of_pixels,
    path_velocity,
    snr,
    sum_of_pixels,
    velocity,
)
from lit_gen.score.precondition import (
    EDMPrecondition,
    PredictFlow,
    PredictImage,
    PredictNoise,
    PredictPathVelocity,
    PredictScore,
    PredictVelocity,
)
from lit_gen.score.sde import EDM, GVP, VE, VP, DiscreteVP, Flow, SubVP, cosine_betas, per_image

GENERATOR = keyed_generator


class Net(nn.Module):
    """A small smooth network in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)

    def forward(self, x, noise_label, label=None, augment_label=None):
        return (self.conv(x) + noise_label[:, None, None, None].sin()).tanh()


@pytest.fixture(scope="module")
def x_0():
    return torch.randn(6, 3, 4, 4, generator=GENERATOR("losses", 0), dtype=torch.float64)


def path_velocity_target(p, t, x_0, z):
    d_alpha, d_sigma = p.slopes(t)
    return -_c(d_alpha, z) * x_0 - _c(d_sigma, z) * z


# A weight makes the squared error of x_0 that of what the network predicts: (process, row, weight, target).
OWN_UNITS = [
    (VP(), PredictNoise(), snr, lambda p, t, x_0, z: z),
    (SubVP(), PredictNoise(), snr, lambda p, t, x_0, z: z),
    (VP(), PredictImage(), constant, lambda p, t, x_0, z: x_0),
    (VP(), PredictVelocity(), velocity, lambda p, t, x_0, z: _c(p.alpha(t), z) * z - _c(p.sigma(t), z) * x_0),
    (Flow(), PredictFlow(), flow, lambda p, t, x_0, z: z - x_0),
    *((p, PredictPathVelocity(), path_velocity, path_velocity_target) for p in (Flow(), GVP(), VP(), VE())),
    (
        VE(),
        PredictScore(),
        lambda p, t: snr(p, t) / p.sigma(t).square(),
        lambda p, t, x_0, z: -z / _c(p.sigma(t), z),
    ),
]


def _c(c, x):
    return per_image(c, x)


@pytest.mark.parametrize(
    ("process", "row", "weight", "target"), OWN_UNITS, ids=lambda v: getattr(v, "__name__", type(v).__name__)
)
def test_weights_turn_the_error_of_x_0_into_the_networks_own(process, row, weight, target, x_0):
    net = Net()
    loss = DenoisingLoss(UniformTime(), weight, sum_of_pixels)
    t, z = loss.draw(process, x_0, GENERATOR("draw"))
    t = t.clamp(process.t_min)
    x_t, label = process.marginal(x_0, t, z), row(process, t)[3]
    own = (net(x_t, label) - target(process, t, x_0, z)).square().flatten(1).sum(1)
    assert_close(loss(Denoiser(net, process, row), x_0, t, z), own, rtol=1e-8, atol=1e-8)


def test_edm_loss_has_the_networks_output_in_unit_weight(x_0):
    """w ||x0_hat - x_0||^2 = ||net - (x_0 - c_skip x_t) / c_out||^2, Equation 8."""
    net, process, row = Net(), EDM(), EDMPrecondition()
    t, z = edm_loss().draw(process, x_0, GENERATOR("draw"))
    c_skip, c_out, c_in, c_noise = (_c(c, x_0) for c in row(process, t))
    x_t = x_0 + _c(t, x_0) * z
    own = (net(c_in * x_t, c_noise.flatten()) - (x_0 - c_skip * x_t) / c_out).square().flatten(1).mean(1)
    assert_close(edm_loss()(Denoiser(net, process, row), x_0, t, z), own)


@pytest.mark.parametrize("process", [VE(), VP(), SubVP()], ids=lambda p: type(p).__name__)
def test_likelihood_weight_is_g_squared_on_the_score(process, x_0):
    denoiser = Denoiser(Net(), process, PredictNoise())
    loss = DenoisingLoss(UniformTime(), likelihood, half_sum_of_pixels)
    t, z = loss.draw(process, x_0, GENERATOR("draw"))
    error = denoiser.score(process.marginal(x_0, t, z), t) + z / _c(process.sigma(t), z)
    own = process.diffusion(t).square() * error.square().flatten(1).sum(1) / 2
    assert_close(loss(denoiser, x_0, t, z), own, rtol=1e-8, atol=0)


def test_min_snr_is_the_lesser_of_two_weights():
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    weight = MinSNR(5.0)(VP(), t)
    assert_close(weight, torch.minimum(snr(VP(), t), torch.tensor(5.0).double()))
    assert weight.max() == 5 and weight.min() < 1e-4


@pytest.mark.parametrize("reduce", [mean_of_pixels, sum_of_pixels, half_sum_of_pixels])
def test_reductions(reduce, x_0):
    factor = {mean_of_pixels: 1, sum_of_pixels: 48, half_sum_of_pixels: 24}[reduce]
    assert_close(reduce(x_0), factor * x_0.mean((1, 2, 3)))


def test_draws_depend_on_the_generator_alone_and_not_on_the_batch(x_0):
    for loss in (edm_loss(), DenoisingLoss(UniformTime(), snr), SlicedScoreLoss(LogNormal())):
        again = [loss.draw(EDM(), x_0, GENERATOR("draw", 1)) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
        part = loss.draw(EDM(), x_0[2:4], PerSample.keyed(0, [2, 3]))
        whole = loss.draw(EDM(), x_0, PerSample.keyed(0, range(6)))
        assert all(torch.equal(a, b[2:4]) for a, b in zip(part, whole, strict=True))


def test_how_times_are_drawn():
    like = torch.empty(20_000, 1)
    log_s = LogNormal(-1.2, 1.2)(EDM(), like, GENERATOR("t")).log()
    assert log_s.mean().item() == pytest.approx(-1.2, abs=0.03)
    assert log_s.std().item() == pytest.approx(1.2, abs=0.02)
    assert_close(VP().noise_level(LogNormal()(VP(), like, GENERATOR("t"))).log(), log_s)
    t = UniformTime()(VP(), like, GENERATOR("t"))
    assert 1e-5 <= t.min() < 1e-3 and t.max() <= 1 and t.mean().item() == pytest.approx(0.5, abs=0.01)
    process = DiscreteVP(cosine_betas(10))
    steps = UniformStep(10)(process, like, GENERATOR("t"))
    assert_close(process.index(steps.unique()), torch.arange(10, dtype=torch.float64))
    levels = VE(t_min=0.0).sigma(UniformStep(4)(VE(t_min=0.0), like, GENERATOR("t"))).unique()
    assert_close(levels, 0.02 * 5000 ** (torch.arange(4, dtype=torch.float64) / 3))
    t = LogitNormal()(Flow(), like, GENERATOR("t"))
    assert t.median().item() == pytest.approx(0.5, abs=0.01)
    assert t.quantile(0.8413).item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)


@pytest.mark.parametrize("process", [VP(), SubVP(), Flow()], ids=lambda p: type(p).__name__)
def test_denoising_loss_is_exact_at_the_smallest_times(process):
    """A network that says the noise has no loss, one that errs by 1 has loss 1, however small sigma is."""

    class Off(nn.Module):
        def forward(self, x, noise_label, label=None, augment_label=None):
            return self.z + self.off

    x_0, z = (
        torch.rand(4, 3, 4, 4, generator=GENERATOR("x")),
        torch.randn(4, 3, 4, 4, generator=GENERATOR("z")),
    )
    net, t = Off(), torch.full((4,), 1e-5, dtype=torch.float64)
    net.z = z
    for net.off in (0.0, 1.0):
        losses = DenoisingLoss(UniformTime(), snr)(Denoiser(net, process, PredictNoise()), x_0, t, z)
        assert_close(losses, torch.full((4,), net.off, dtype=torch.float64), atol=1e-6, rtol=0)


def test_uncertainty(x_0):
    """Without training u is 0; its best value at a noise level is the log of the mean loss there, which makes
    the loss 1 + u.
    """
    base = edm_loss()
    loss, denoiser = UncertaintyLoss(base, features=16), Denoiser(Net(), EDM(), EDMPrecondition())
    t, z = loss.draw(EDM(), x_0, GENERATOR("draw"))
    t = t * 0 + 0.5
    plain = base(denoiser, x_0, t, z).detach()
    assert_close(loss(denoiser, x_0, t, z), plain)
    assert loss.uncertainty(EDM(), torch.tensor(0.3)).shape == ()
    optimizer = torch.optim.Adam(loss.parameters(), 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss(denoiser, x_0, t, z).mean().backward()
        optimizer.step()
    u = loss.uncertainty(EDM(), t)
    assert_close(u[0].detach(), plain.mean().log(), atol=1e-3, rtol=0)
    assert_close(loss(denoiser, x_0, t, z).mean().detach(), 1 + plain.mean().log(), atol=1e-3, rtol=0)
    summed = UncertaintyLoss(DenoisingLoss(base.noise_distribution, base.weight, sum_of_pixels), features=16)
    summed.load_state_dict(loss.state_dict())
    assert_close(summed(denoiser, x_0, t, z), 48 * loss(denoiser, x_0, t, z))


class Linear(AbstractDenoiser):
    """A denoiser whose score is -k x_t."""

    def __init__(self, process, k):
        super().__init__()
        self.process, self.k = process, nn.Parameter(torch.tensor(k, dtype=torch.float64))

    def forward(self, x_t, t, label=None):
        alpha, sigma = (_c(c, x_t) for c in (self.process.alpha(t), self.process.sigma(t)))
        return x_t * (1 - self.k * sigma.square()) / alpha


@pytest.mark.parametrize("variance_reduced", [True, False])
def test_sliced_score_matching_in_closed_form(variance_reduced, x_0):
    """For the score -k x: v^T grad(s) v = -k ||v||^2 and v^T s = -k v^T x."""
    loss = SlicedScoreLoss(LogNormal(), variance_reduced=variance_reduced)
    t, z, v = loss.draw(EDM(), x_0, GENERATOR("draw"))
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    x_t = x_0 + _c(t, x_0) * z
    norm = x_t.square().flatten(1).sum(1) if variance_reduced else (v * x_t).flatten(1).sum(1).square()
    expected = t.square() * (-0.7 * 48 + 0.49 * norm / 2)
    assert_close(loss(Linear(EDM(), 0.7), x_0, t, z, v), expected)


def test_sliced_score_matching_finds_the_score_of_a_gaussian():
    """For x_t ~ N(0, v I) its minimum over scores -k x is k = 1 / v, by a gradient through the second
    derivative.
    """
    x_0 = torch.randn(4096, 1, 2, 2, generator=GENERATOR("ssm"), dtype=torch.float64) * 0.5
    denoiser, loss = Linear(EDM(), 2.0), SlicedScoreLoss(LogNormal())
    t, z, v = loss.draw(EDM(), x_0, GENERATOR("draw"))
    t = t * 0 + 0.5
    loss(denoiser, x_0, t, z, v).mean().backward()
    assert denoiser.k.grad.abs() < 0.02  # 1 / (0.25 + 0.25) = 2, where the gradient vanishes
    with pytest.raises(ConfigError, match="augment_label"):
        loss(denoiser, x_0, t, z, v, augment_label=torch.zeros(4096, 9))


def test_the_exact_denoiser_has_the_least_loss():
    """The expected loss of E[x_0 | x_t] is the posterior variance, and every other denoiser's is larger."""
    x_0 = 0.5 * torch.randn(4000, 1, 2, 2, generator=GENERATOR("data"), dtype=torch.float64)
    exact = GaussianDenoiser(VP(), torch.zeros(1, 2, 2), torch.tensor(0.25))
    loss = DenoisingLoss(UniformTime(), constant)
    t, z = loss.draw(VP(), x_0, GENERATOR("draw"))
    t = t * 0 + 0.3
    variance = 0.25 / (1 + 0.25 / VP().noise_level(t[0]).square())
    least = loss(exact, x_0, t, z).mean()
    assert least.item() == pytest.approx(variance.item(), rel=0.03)
    for k in (0.9, 1.1):
        wrong = GaussianDenoiser(VP(), torch.zeros(1, 2, 2), torch.tensor(0.25 * k**2))
        assert loss(wrong, x_0, t, z).mean() > least
    assert EDMWeight()(VP(), t[0]) > 0


def test_noise_is_at_least_float32():
    """Of images in half precision too: bfloat16 has a few thousand different normal numbers."""
    images = torch.zeros(4, 3, 32, 32, dtype=torch.bfloat16)
    for loss in (edm_loss(), SlicedScoreLoss(UniformTime())):
        _, z, *rest = loss.draw(EDM(), images, GENERATOR(0))
        assert z.dtype == torch.float32 and len(z.unique()) > 12_000
        assert all(v.dtype == torch.float32 for v in rest)


def test_the_uncertainty_is_exact_under_autocast():
    loss = UncertaintyLoss(edm_loss())
    torch.nn.init.normal_(loss.out, generator=GENERATOR(1))
    t = torch.logspace(-2, 2, 16)
    exact = loss.uncertainty(EDM(), t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.uncertainty(EDM(), t), exact)
