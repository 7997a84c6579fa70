"""Unbiased, and against the direct sums over pairs."""

import numpy as np
import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.metrics import kernels
from lit_gen.metrics.kernels import (
    cmmd,
    kernel_distance,
    polynomial_kernel,
    rbf_kernel,
)


def draws(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


@pytest.mark.parametrize("kernel", [polynomial_kernel, rbf_kernel])
def test_it_is_the_sum_over_pairs_for_any_block(kernel, monkeypatch):
    x, y = draws(23, 0), draws(31, 1, 0.3)
    k = {
        "poly": lambda a, b: (a @ b / 5 + 1) ** 3,
        "rbf": lambda a, b: torch.exp(-(a - b).square().sum() / 200),
    }
    k = k["poly" if kernel is polynomial_kernel else "rbf"]
    xx = np.mean([float(k(a, b)) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([float(k(a, b)) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([float(k(a, b)) for a in x for b in y])
    for block in (1000, 7):
        monkeypatch.setattr(kernels, "BLOCK", block)
        assert kernel_distance(x, y, kernel).value == pytest.approx(xx + yy - 2 * xy, abs=1e-12)
    if kernel is rbf_kernel:
        within = [float(np.mean([[float(k(a, b)) for a in z] for b in z])) for z in (x, y)]
        assert cmmd(x, y).value == pytest.approx(1000 * (sum(within) - 2 * xy), abs=1e-9)


def test_unbiased_and_its_error_is_the_spread_of_other_draws():
    x = draws(300, 9)
    same = [kernel_distance(draws(60, s), draws(60, s + 500)).value for s in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200)
    values, errors = zip(*(kernel_distance(x, draws(150, s, 0.4)) for s in range(150)), strict=True)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.25)


def test_a_set_of_one_image_is_refused():
    x, y = draws(200, 1), draws(200, 2, 0.5)
    with pytest.raises(ConfigError, match=r"\(200, 5\) and \(1, 5\)"):
        kernel_distance(x, y[:1])
