"""Noise levels of a data set: NCSNv2's published schedules, and distances by brute force."""

import math

import pytest
import torch

from lit_gen.commands import suggest_noise as suggesting
from lit_gen.commands.suggest_noise import (
    largest_distance,
    level_overlap,
    level_ratio,
    step_factor,
    variance_ratio,
)
from lit_gen.errors import ConfigError

# side, sigma_1 on [0, 1] (down to 0.01), L, step size, T, ratio; Technique 4's value
PUBLISHED = {
    "CIFAR-10": (32, 50, 232, 6.2e-6, 5, 1.03756, 1.056),
    "CelebA": (64, 90, 500, 3.3e-6, 5, 1.01841, 1.031),
    "bedroom": (128, 190, 1086, 1.8e-6, 3, 1.00912, 1.017),
    "FFHQ": (256, 348, 2311, 9e-7, 3, 1.00454, 1.009),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules(name):
    size, sigma, levels, step, steps, ratio, variance = PUBLISHED[name]
    found = (sigma / 0.01) ** (1 / (levels - 1))
    dimensions = 3 * size**2
    assert found == pytest.approx(ratio, abs=1e-5)
    assert level_overlap(found, dimensions) == pytest.approx(0.567, abs=2e-3)
    assert level_ratio(dimensions, level_overlap(found, dimensions)) == pytest.approx(found, rel=1e-9)
    assert variance_ratio(found, step / 0.01**2, steps) == pytest.approx(variance, abs=1e-3)
    best = step_factor(found, steps)
    assert (
        abs(variance_ratio(found, best, steps) - 1)
        <= abs(variance_ratio(found, step / 1e-4, steps) - 1) + 1e-9
    )


def test_variance_ratio_is_that_of_langevin_steps():
    step, ratio, variance = 0.06, 1.04, 1.04**2
    for _ in range(5):
        variance = (1 - step) ** 2 * variance + 2 * step
    assert variance_ratio(ratio, step, 5) == pytest.approx(variance, rel=1e-12)


def test_largest_distance_by_brute_force():
    images = torch.randint(
        0, 256, (37, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    x = images.double().flatten(1) / 127.5 - 1
    assert largest_distance(images, chunk=8) == pytest.approx(float(torch.cdist(x, x).max()), rel=1e-12)


def test_overlap_of_one_dimension():
    assert level_overlap(1.0, 3072) == pytest.approx(math.erf(3 / math.sqrt(2)))


def test_the_digits(compose, tmp_path):
    record = suggesting.suggest(compose("data=digits", f"out={tmp_path}/a.json", config_name="suggest_noise"))
    assert record["compared"] == record["images"] == 1437
    assert record["sigma_data"] == pytest.approx(0.75, abs=0.01)
    assert (tmp_path / "a.json").is_file()
    with pytest.raises(ConfigError, match="another out"):
        suggesting.suggest(compose("data=digits", f"out={tmp_path}/a.json", config_name="suggest_noise"))
    with pytest.raises(ConfigError, match="num=1"):
        suggesting.suggest(compose("data=digits", "num=1", config_name="suggest_noise"))
