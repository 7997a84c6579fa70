import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.evaluation.likelihood import _density
from lit_gen.images import Pixels
from lit_gen.rng import PerSample, keyed_generator
from lit_gen.score.denoiser import CountingDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from lit_gen.score.likelihood import (
    bits_per_dim,
    dequantize,
    exact_probes,
    kl_term,
    log_likelihood,
    random_probes,
    variational_bound,
)
from lit_gen.score.sde import EDM, VE, VP, DiscreteVP, Flow, SubVP, linear_betas

PROCESSES = [
    EDM(0.01),
    VE(0.01, 100.0),
    VP(),
    SubVP(t_min=0.01),
    Flow(t_min=0.01),
    DiscreteVP(linear_betas(100)),
]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
MEANS = torch.tensor([[0.6, -0.4, 0.1, 0.5], [-0.5, 0.3, 0.4, -0.6]]).reshape(2, 1, 2, 2)


def mixture(process):
    return GaussianMixtureDenoiser(process, MEANS, torch.tensor(0.15**2), torch.tensor([0.3, 0.7]))


def gaussian(process):
    root = torch.tensor([[0.5, 0.2, 0, 0.1], [0, 0.3, 0.1, 0], [0, 0, 0.6, 0.2], [0, 0, 0, 0.4]]).double()
    return GaussianDenoiser(process, MEANS[0], root @ root.T)


def draw_from(make, n):
    g = keyed_generator("data")
    z = torch.randn(n, 1, 2, 2, generator=g, dtype=torch.float64)
    if make is gaussian:
        model = gaussian(VP())
        return model.mean + (z.flatten(1) * model.variances.sqrt() @ model.basis.T).view(z.shape)
    return MEANS[torch.multinomial(torch.tensor([0.3, 0.7]), n, replacement=True, generator=g)] + 0.15 * z


@each_process
@pytest.mark.parametrize("make", [gaussian, mixture])
def test_log_likelihood_is_exact_to_a_thousandth_of_a_bit(make, process):
    """Against the closed-form density at t_min, where the flow starts.

    The prior has forgotten the mean of the data, alpha m / sigma at t_max; with the true density there in its
    place every image agrees.
    """
    denoiser, x = CountingDenoiser(make(process)), draw_from(make, 8)
    result = log_likelihood(denoiser, x, probes=exact_probes(x))
    start, end = (torch.tensor(t, dtype=torch.float64) for t in (process.t_min, process.t_max))
    gap = result.log_prob - denoiser.denoiser.log_prob(x, start)
    forgotten = process.prior_log_prob(result.latent) - denoiser.denoiser.log_prob(result.latent, end)
    to_bits = partial(bits_per_dim, num_dims=4, low=0.0, high=256.0)
    assert to_bits(gap - forgotten).abs().max() < 1e-3
    assert to_bits(gap).abs().max() < 0.01
    # One network call for the state and its divergence, whatever the number of probes.
    assert denoiser.evaluations == result.evaluations.sum()


def test_random_probes_are_unbiased_and_exact_ones_have_no_variance():
    denoiser = gaussian(VP(t_min=1e-3))
    x = MEANS.double().repeat(60, 1, 1, 1)
    truth = log_likelihood(denoiser, x[:2], probes=exact_probes(x[:2])).log_prob
    estimates = log_likelihood(
        denoiser, x, generator=keyed_generator("probes"), rtol=1e-3, atol=1e-3
    ).log_prob
    estimates = estimates.view(60, 2)
    assert ((estimates.mean(0) - truth).abs() < 4 * estimates.std(0) / 60**0.5 + 5e-3).all()
    assert set(random_probes(x, 2, keyed_generator("signs")).unique().tolist()) == {-1.0, 1.0}
    # Covariance of the unit vectors' scaled basis: v v^T averages to the identity.
    v = exact_probes(x[:1])[:, 0].flatten(1)
    assert_close(v.T @ v / len(v), torch.eye(4).double())


def test_an_images_likelihood_does_not_depend_on_its_batch():
    denoiser, x = mixture(EDM()), MEANS.double()
    x = torch.cat([x, 30 * x])  # far from the data: more steps for these
    both = log_likelihood(denoiser, x, generator=PerSample.keyed(0, range(4)))
    alone = log_likelihood(denoiser, x[1:2], generator=PerSample.keyed(0, [1]))
    assert_close(alone.log_prob[0], both.log_prob[1], rtol=0, atol=1e-9)
    assert alone.evaluations[0] == both.evaluations[1]
    assert both.evaluations.unique().numel() > 1


def test_bits_per_dim_offsets():
    """A uniform density over the range costs the 8 bits of its levels, whatever the range."""
    for low, high in ((-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)):
        log_prob = torch.tensor([-10 * math.log(high - low)], dtype=torch.float64)
        assert bits_per_dim(log_prob, 10, low, high).item() == pytest.approx(8)
    assert bits_per_dim(torch.zeros(1), 5).item() == 7  # the 7 of the official code
    assert bits_per_dim(torch.zeros(1), 5, 0.0, 1.0).item() == 8
    assert bits_per_dim(torch.zeros(1), 5, num_levels=32).item() == 4


def test_dequantisation_fills_each_level_evenly():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(50, 1, 16, 16)
    x = dequantize(images, keyed_generator("u"))
    assert x.min() >= -1 and x.max() < 1
    level = (x + 1) * 128
    assert torch.equal(level.floor().to(torch.uint8), images)
    assert (level - level.floor()).mean().item() == pytest.approx(0.5, abs=0.01)
    one = dequantize(images[:1], PerSample.keyed(3, [5]), 0.0, 1.0)
    both = dequantize(images[:2], PerSample.keyed(3, [4, 5]), 0.0, 1.0)
    assert torch.equal(one[0], both[1])


def test_density_counts_all_pixels_in_the_units_of_the_data():
    """Of oblong images with 3 channels under N(0, s^2 I) in the model's units: of float32 the density in the
    data's own unit, of uint16 the mass of one level."""
    process, shape, s = EDM(0.01), (3, 2, 4), 0.5
    denoiser = GaussianDenoiser(process, torch.zeros(shape), torch.tensor(s**2))
    variance = s**2 + process.t_min**2
    generator = torch.Generator().manual_seed(0)

    def bits(x: torch.Tensor) -> torch.Tensor:
        nats = 0.5 * (x.square() / variance + math.log(2 * math.pi * variance))
        return nats.flatten(1).mean(1) / math.log(2)

    floats = Pixels("float32", [10, 30])
    images = 10 + 20 * torch.rand(4, *shape, generator=generator)
    module = SimpleNamespace(pixels=floats, denoiser=denoiser)
    found = _density(module, images, None, PerSample.keyed(0, range(4)), None)
    expected = bits(floats.to_model(images).double()) + math.log2(20 / 2)
    assert_close(found, expected, rtol=0, atol=2e-3)

    words = Pixels("uint16", [0, 4095])
    images = torch.randint(0, 4096, (4, *shape), generator=generator).to(torch.uint16)
    module = SimpleNamespace(pixels=words, denoiser=denoiser)
    found = _density(module, images, None, PerSample.keyed(0, range(4)), None)
    x_0 = dequantize(images, PerSample.keyed(0, range(4)), num_levels=4096)
    assert x_0.min() >= -1 and x_0.max() < 1
    assert_close(found, bits(x_0) + math.log2(4096 / 2), rtol=0, atol=2e-3)


@pytest.mark.parametrize("process", [VP(), EDM(), DiscreteVP(linear_betas())], ids=lambda p: type(p).__name__)
def test_kl_term_is_that_of_the_posteriors(process):
    """KL of N(m(x_0), v I) and N(m(x0_hat), v I), whose means differ by the posterior's factor of x_0."""
    s, t = process.t_max * torch.tensor([[0.3], [0.4]], dtype=torch.float64)
    x_0, x0_hat = torch.randn(2, 5, 1, 2, 2, generator=keyed_generator("kl"), dtype=torch.float64)
    ratio, variance = process.transition(s, t)
    factor = process.alpha(s) * variance / process.sigma(t).square()
    spread = variance * (process.sigma(s) / process.sigma(t)).square()
    expected = (factor * (x_0 - x0_hat).flatten(1)).square().sum(1) / (2 * spread)
    assert_close(kl_term(process, x_0, x0_hat, s, t), expected)
    assert ratio.shape == (1,)


def test_variational_bound_is_a_bound_and_nearly_tight_for_the_exact_denoiser():
    """On levels drawn from a discretised Gaussian the bound is at least the entropy, and little more."""
    g = keyed_generator("levels")
    process, n, levels = DiscreteVP(linear_betas(1000)), 100, 16
    grid = torch.linspace(-1, 1, levels, dtype=torch.float64)
    half = 1 / (levels - 1)
    edges = torch.distributions.Normal(0.0, 0.3).cdf(torch.cat([grid - half, grid[-1:] + half]))
    p = edges.diff() / edges.diff().sum()
    x_0 = grid[torch.multinomial(p.expand(n, -1), 4, replacement=True, generator=g)].view(n, 1, 2, 2)
    means = grid.reshape(-1, 1, 1, 1)
    exact = PerPixel(process, means, p)
    bound = variational_bound(exact, x_0, num_levels=levels, generator=g)
    entropy = -(p * p.log2()).sum().item()
    assert bound.prior.mean() < 1e-3 and bound.decoder.mean() < 0.3
    assert entropy - 0.15 < bound.total.mean().item() < 1.15 * entropy
    with pytest.raises(ConfigError, match="num_steps of at least 2 on VP"):
        variational_bound(mixture(VP()), x_0)


class PerPixel(GaussianMixtureDenoiser):
    """Independent pixels of one discrete distribution."""

    def __init__(self, process, means, weights):
        super().__init__(process, means, torch.tensor(1e-12), weights)

    def forward(self, x_t, t, label=None):
        return super().forward(x_t.reshape(-1, 1, 1, 1), t, label).view(x_t.shape)


def test_no_images_have_no_likelihoods():
    x = torch.zeros(0, 1, 2, 2)
    for make in (gaussian, mixture):
        process = DiscreteVP(linear_betas(40))
        found = log_likelihood(make(process), x, generator=PerSample([]))
        assert found.log_prob.shape == found.evaluations.shape == (0,) and found.latent.shape == x.shape
        assert variational_bound(make(process), x, generator=PerSample([])).total.shape == (0,)
