import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.score.phema import exponent, post_hoc_average, post_hoc_coefficients, power_beta


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.25])
def test_exponent_gives_the_profile_its_deviation(std):
    """The standard deviation of t under the density (gamma + 1) t^gamma on [0, 1]."""
    gamma = exponent(std)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert np.sqrt(square - mean**2) == pytest.approx(std, rel=1e-9)


def test_exponent_names_its_range():
    with pytest.raises(ConfigError, match=r"between 0 and 0.2886, got 0.3"):
        exponent(0.3)


def track(std: float, values: np.ndarray, times: list[int]) -> list[float]:
    """The running average of values[1], values[2], ... with unit steps, at the given times."""
    average, kept = 0.0, []
    for t in range(1, max(times) + 1):
        beta = power_beta(std, t, 1)
        average = beta * average + (1 - beta) * values[t]
        kept += [average] * (t in times)
    return kept


def test_updates_make_the_power_profile():
    """The average of the signal t is the mean of the profile, (gamma + 1) / (gamma + 2) T."""
    n, gamma = 20_000, exponent(0.1)
    (average,) = track(0.1, np.arange(n + 1, dtype=float), [n])
    assert average / n == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_post_hoc_average_of_what_was_stored_is_itself():
    times, stds = [256, 256, 512, 512], [0.05, 0.1, 0.05, 0.1]
    for k in range(4):
        expected = np.eye(4)[k]
        found = post_hoc_coefficients(times, stds, times[k], stds[k])
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_post_hoc_reconstruction_of_an_average_that_was_not_kept():
    """From two tracks stored 16 times, the average of another length to within some thousandths (EDM2, Figure
    4).
    """
    n = 4096
    signal = np.cumsum(np.random.default_rng(0).normal(size=n + 1)) / 30
    times = list(range(n // 16, n + 1, n // 16))
    stored = track(0.05, signal, times) + track(0.10, signal, times)
    for std in (0.06, 0.075, 0.15):
        coefficients = post_hoc_coefficients(times * 2, [0.05] * 16 + [0.10] * 16, n, std)
        (direct,) = track(std, signal, [n])
        assert coefficients @ stored == pytest.approx(direct, abs=5e-3)


def test_post_hoc_average_of_state_dicts():
    first = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(3)}
    second = {"w": torch.tensor([3.0, 6.0]), "steps": torch.tensor(7)}
    average = post_hoc_average([first, second], [0.25, 0.75])
    assert_close(average["w"], torch.tensor([2.5, 5.0]))
    assert average["w"].dtype == torch.float32 and average["steps"] == 7
