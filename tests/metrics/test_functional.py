"""The Frechet distance against closed forms of Gaussians; standard errors against other draws."""

import math

import numpy as np
import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.metrics.functional import (
    Moments,
    frechet_distance,
    frechet_estimate,
    frechet_infinity,
    inception_score,
    moments,
    moments_of_sums,
)


def gaussian(d: int, seed: int, rank: int | None = None) -> Moments:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(d, rank or d, generator=g, dtype=torch.float64)
    return Moments(1000, torch.randn(d, generator=g, dtype=torch.float64), A @ A.T / d)


def test_commuting_covariances_have_the_closed_form():
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(24, 24, generator=g, dtype=torch.float64)).Q
    a, b = torch.rand(2, 24, generator=g, dtype=torch.float64) * 3
    m1, m2 = torch.randn(2, 24, generator=g, dtype=torch.float64)
    expected = (m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    got = frechet_distance(Moments(99, m1, Q * a @ Q.T), Moments(99, m2, Q * b @ Q.T))
    assert got == pytest.approx(float(expected), abs=1e-12)


def test_two_by_two_covariances_have_the_closed_form():
    # For 2x2 matrices tr (S1 S2)^(1/2) = sqrt(tr S1 S2 + 2 sqrt(det S1 det S2)).
    x, y = gaussian(2, 1), gaussian(2, 2)
    root = math.sqrt((x.cov @ y.cov).trace() + 2 * math.sqrt(x.cov.det() * y.cov.det()))
    expected = (x.mean - y.mean).square().sum() + x.cov.trace() + y.cov.trace() - 2 * root
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("rank", [8, 3])
def test_it_is_the_squared_cost_of_the_optimal_linear_map(rank):
    # T = S1^(-1/2) (S1^(1/2) S2 S1^(1/2))^(1/2) S1^(-1/2) is optimal from N(m1, S1) to N(m2, S2); then
    # E|x - Tx|^2 = tr(S1 + S2 - 2 T S1). For a singular S2 the map is still defined.
    x, y = gaussian(8, 3), gaussian(8, 4, rank)

    def power(S, p):
        values, vectors = torch.linalg.eigh(S)
        return vectors * values.clamp(min=0) ** p @ vectors.T

    half = power(x.cov, 0.5)
    T = power(x.cov, -0.5) @ power(half @ y.cov @ half, 0.5) @ power(x.cov, -0.5)
    expected = (x.mean - y.mean).square().sum() + (x.cov + y.cov - 2 * T @ x.cov).trace()
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize(("n", "m"), [(200, 300), (20, 24), (200, 24)])
def test_the_nuclear_norm_form_agrees_also_with_fewer_images_than_features(n, m):
    """With S1 = F1^T F1 and S2 = F2^T F2, tr (S1 S2)^(1/2) is the nuclear norm of F1 F2^T."""
    g = torch.Generator().manual_seed(n)
    x, y = torch.randn(n, 32, generator=g), 0.7 * torch.randn(m, 32, generator=g) + 0.1
    a, b = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    a, b = a / (n - 1) ** 0.5, b / (m - 1) ** 0.5
    shift = (x.double().mean(0) - y.double().mean(0)).square().sum()
    expected = float(shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, abs=1e-10)
    assert frechet_distance(moments(y), moments(x)) == pytest.approx(expected, abs=1e-10)


def test_shift_and_scale():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(500, 16, generator=g, dtype=torch.float64)
    shift = torch.arange(16) / 10
    trace = float(moments(x).cov.trace())
    assert frechet_distance(moments(x), moments(x + shift)) == pytest.approx(float(shift.square().sum()))
    centred = x - x.mean(0)
    assert frechet_distance(moments(centred), moments(3 * centred)) == pytest.approx(4 * trace)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-12)


def test_moments_of_sums_are_the_moments():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + 2
    a, b = moments(x), moments_of_sums(50, x.sum(0), x.T @ x)
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.cov, b.cov)
    torch.testing.assert_close(a.factor @ a.factor.T, a.cov)


def test_the_factor_has_the_covariance_s_rank():
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(7))
    assert moments(x).factor.shape == (32, 9)
    assert moments(x[:1].expand(10, -1)).factor.shape == (32, 0)


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match=r"\(1, 4\)"):
        moments(torch.zeros(1, 4))
    with pytest.raises(ConfigError, match="at least 2 images, got 1"):
        moments_of_sums(1, torch.zeros(4), torch.zeros(4, 4))
    with pytest.raises(ConfigError, match="3 features per image, the generated set 4"):
        frechet_distance(gaussian(3, 0), gaussian(4, 0))
    with pytest.raises(ConfigError, match=r"\(3, 4\)"):
        Moments(5, torch.zeros(3), torch.zeros(3, 4))


def draws(n: int, seed: int, d: int = 6) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x * torch.linspace(0.5, 1.5, d) + 0.1 * x.square()


REFERENCE = moments(1.2 * draws(4000, 10_000) + 0.1)


def replicates(estimate, runs: int = 150) -> tuple[float, float]:
    """The standard deviation of the value over independent sets, and the root of the mean of the squared
    errors claimed.
    """
    values, errors = zip(*(estimate(seed) for seed in range(runs)), strict=True)
    return float(np.std(values)), float(np.sqrt(np.mean(np.square(errors))))


def test_standard_error_of_the_frechet_distance_is_the_spread_of_other_draws():
    def estimate(seed):
        x = draws(400, seed)
        return frechet_estimate(REFERENCE, moments(x), x)

    spread, claimed = replicates(estimate)
    assert claimed == pytest.approx(spread, rel=0.2)  # 150 runs know the spread to 6 %
    # A part of the features is enough to estimate it.
    x = draws(400, 1)
    part = frechet_estimate(REFERENCE, moments(x), x[:200]).se
    assert part == pytest.approx(estimate(1).se, rel=0.2)


def test_it_is_the_delete_one_jackknife():
    n, x = 400, draws(400, 3)
    left_out = [frechet_distance(REFERENCE, moments(torch.cat([x[:i], x[i + 1 :]]))) for i in range(n)]
    jackknife = math.sqrt((n - 1) / n * np.sum((left_out - np.mean(left_out)) ** 2))
    assert frechet_estimate(REFERENCE, moments(x), x).se == pytest.approx(jackknife, rel=0.05)


def test_no_standard_error_without_a_derivative():
    x = draws(6, 0)
    assert frechet_estimate(REFERENCE, moments(x), x).se is None


def test_infinity_removes_the_bias_of_few_images():
    other = moments(draws(200_000, 77_777))
    truth = frechet_distance(REFERENCE, other)
    runs = [frechet_infinity(REFERENCE, draws(200, seed)) for seed in range(250)]
    plain = np.mean([frechet_distance(REFERENCE, moments(draws(200, seed))) for seed in range(250)])
    values, errors = zip(*runs, strict=True)
    assert abs(np.mean(values) - truth) < 0.35 * abs(plain - truth)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.25)
    with pytest.raises(ConfigError, match="needs at least 24 images, got 20"):
        frechet_infinity(REFERENCE, draws(20, 0))


def test_inception_score_between_its_bounds():
    certain = 50 * torch.eye(10).repeat(20, 1)
    assert inception_score(certain).value == pytest.approx(10)
    assert inception_score(torch.zeros(50, 10)) == pytest.approx((1, 0))
    spread, claimed = replicates(lambda seed: inception_score(2 * draws(500, seed)), runs=100)
    assert claimed == pytest.approx(spread, rel=0.25)
