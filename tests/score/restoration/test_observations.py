"""Observations pixel by pixel: tangents, limits, and exact posteriors."""

import math

import pytest
import torch
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator
from lit_gen.score.denoiser import GaussianDenoiser
from lit_gen.score.restoration import (
    Denoising,
    Inpainting,
    Masked,
    NoisyPixels,
    PosteriorDenoiser,
    ddnm,
    ddrm,
    diffpir,
    dps,
    mmps,
    pigdm,
    repaint,
    replacement,
)
from lit_gen.score.samplers import geometric, heun
from lit_gen.score.sde import EDM, VP

SHAPE, D = (2, 3, 4), 0.5


def randn(*shape, seed="x"):
    return torch.randn(shape, generator=keyed_generator(seed), dtype=torch.float64)


X, Y = 0.6 * randn(3, *SHAPE), 0.6 * randn(3, *SHAPE, seed="y")
STD = 0.1 + torch.rand(SHAPE, generator=keyed_generator("std"), dtype=torch.float64)
SEEN = torch.arange(4) < 3
PRIOR = GaussianDenoiser(EDM(0.01, 40.0), 0.3 * randn(*SHAPE, seed="mean"), torch.tensor(D**2))


def posterior(observation, std=0.0, level=1.3):
    t = torch.tensor(level, dtype=torch.float64)
    return PosteriorDenoiser(PRIOR, observation, Y, std, D)(X * level, t)


@pytest.mark.parametrize("level", [0.05, 1.3, 20.0])
def test_linear_cases_are_the_operators_with_a_noise_map(level):
    for observation, operator in (
        (NoisyPixels(STD), Denoising()),
        (NoisyPixels(STD, SEEN), Inpainting(SEEN)),
    ):
        expected = posterior(operator, STD, level)
        assert_close(posterior(observation, 0.0, level), expected, rtol=1e-12, atol=1e-12)


def test_dps_weighs_as_it_does_a_noise_map():
    options = {"num_steps": 6, "grid": geometric}
    for observation, operator in (
        (NoisyPixels(STD), Denoising()),
        (NoisyPixels(STD, SEEN), Inpainting(SEEN)),
    ):
        y = operator(Y)
        made = dps(PRIOR, 40 * X, observation, y, generator=keyed_generator("z"), **options)
        expected = dps(PRIOR, 40 * X, operator, y, noise_std=STD, generator=keyed_generator("z"), **options)
        assert_close(made, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("floor", [-math.inf, -50.0])
def test_a_noise_without_power_masks_nothing(floor):
    assert_close(posterior(Masked(floor, std=0.3)), posterior(Denoising(), 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("floor", [math.inf, 50.0])
def test_a_noise_of_any_power_leaves_the_prior(floor):
    t = torch.tensor(1.3, dtype=torch.float64)
    assert_close(posterior(Masked(floor)), PRIOR(1.3 * X, t), rtol=0, atol=1e-12)


def test_slopes_are_those_of_finite_differences():
    floor = 0.5 * randn(*SHAPE, seed="floor")
    for observation in (Masked(floor, rate=3.0), Masked(floor), NoisyPixels(STD, SEEN)):
        _, slope, _ = observation.at(X)
        h = 1e-5
        difference = (observation(X + h) - observation(X - h)) / (2 * h)
        assert_close(slope.expand_as(X), difference, rtol=1e-7, atol=1e-8)


def test_powers_add():
    rate, floor = 3 * math.log(10), 0.5 * randn(*SHAPE, seed="floor")
    power = 10 ** (3 * X) + 10 ** (3 * floor)  # one unit is 30 dB
    value, slope, std = Masked(floor, rate=rate, std=0.07, floor_std=0.05).at(X)
    assert_close(value, power.log10() / 3)
    share = 10 ** (3 * X) / power
    assert_close(slope, share)
    assert_close(std, (0.07**2 + ((1 - share) * 0.05) ** 2).sqrt())


@pytest.mark.parametrize("process", [EDM(0.002, 80.0), VP()], ids=["EDM", "VP"])
def test_samples_have_the_posterior_of_a_gaussian(process):
    """Each pixel with its own deviation: mean and variance of N(m, d^2) given y."""
    n, mean = 4_000, 0.3 * randn(*SHAPE, seed="mean")
    prior = GaussianDenoiser(process, mean, torch.tensor(D**2))
    x = process.prior_std * randn(n, *SHAPE, seed="start")
    made = pigdm(
        prior,
        x,
        NoisyPixels(STD, SEEN),
        Y[:1].expand(n, -1, -1, -1),
        sigma_data=D,
        num_steps=40,
        sampler=heun,
    )
    precision = D**-2 + torch.where(SEEN, STD**-2, 0.0)
    expected = (mean * D**-2 + torch.where(SEEN, Y[0] * STD**-2, 0.0)) / precision
    assert_close(made.mean(0), expected, rtol=0, atol=0.03)
    assert_close(made.var(0), 1 / precision, rtol=0.12, atol=0)


def test_loud_noise_says_only_that_something_quieter_was_there():
    """Where y is the noise, the estimate moves down and never above the noise; where y is louder, to y."""
    y = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    t = torch.tensor(3.0, dtype=torch.float64)
    prior = GaussianDenoiser(EDM(), torch.zeros(SHAPE), torch.tensor(D**2))
    x_t = torch.full((1, *SHAPE), 1.5, dtype=torch.float64)
    x0_hat = prior(x_t, t)
    covered = PosteriorDenoiser(prior, Masked(0.5), y, sigma_data=D)(x_t, t)
    heard = PosteriorDenoiser(prior, Masked(-2.0), y, sigma_data=D)(x_t, t)
    assert bool((covered <= x0_hat + 1e-9).all()) and bool((covered > x0_hat - 0.1).all())
    assert_close(heard, y, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "method", [ddnm, ddrm, diffpir, mmps, repaint, replacement], ids=lambda f: f.__name__
)
def test_methods_for_linear_operators_say_so(method):
    with pytest.raises(ConfigError, match=r"Masked is no linear operator, .*method=pigdm or method=dps"):
        method(PRIOR, X, Masked(0.0), Y, num_steps=3)


@pytest.mark.parametrize("method", [pigdm, dps], ids=lambda f: f.__name__)
def test_an_observation_has_its_own_noise(method):
    with pytest.raises(ConfigError, match=r"noise_std=0.1: Masked says how noisy it is"):
        method(PRIOR, X, Masked(0.0), Y, noise_std=0.1, num_steps=3)


def test_what_is_no_observation_is_refused():
    with pytest.raises(ConfigError, match=r"std=0.0: deviations of observed pixels are positive"):
        NoisyPixels(0.0)
    with pytest.raises(ConfigError, match=r"floor_std=a map from -1.0 to 1.0"):
        Masked(0.0, floor_std=torch.tensor([-1.0, 1.0]))
    with pytest.raises(ConfigError, match="floor of the noise holds NaN"):
        Masked(torch.tensor([0.0, math.nan]))
    with pytest.raises(ConfigError, match="rate=0"):
        Masked(0.0, rate=0)
