"""Copies, fresh samples, and samples of something else."""

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.metrics.copying import cell_statistics, copying, projected, rank_statistic


def normal(n: int, seed: int, d: int = 3) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_line_counted_by_hand():
    training, test, generated = ([[p, 0.0] for p in row] for row in ([0], [1, 2, 4], [0, 2, 3, 5]))
    training, test, generated = map(torch.tensor, (training, test, generated))
    # Test images farther out than a generated one: 0 of 3, 1.5, 2, 3.
    expected = (6.5 - (12 / 2 - 0.5)) / (12 * 8 / 12) ** 0.5
    assert rank_statistic(training, test, generated).value == pytest.approx(expected, rel=1e-12)


def test_copies_are_negative_and_strangers_positive():
    training, test = normal(400, 0), normal(300, 1)
    assert copying(training, test, training[:200] + 0.05 * normal(200, 2)).value < -8
    assert copying(training, test, 2 * normal(200, 3)).value > 5


def test_fresh_samples_are_standard_normal_and_the_error_is_that_of_other_draws():
    training, test = normal(500, 0), normal(400, 1)
    draws = [rank_statistic(training, test, normal(200, s)) for s in range(2, 302)]
    values = torch.tensor([value for value, _ in draws])
    assert sum(se for _, se in draws) / 300 == pytest.approx(values.std().item(), rel=0.15)
    fresh = [
        rank_statistic(training, normal(400, 2 * s), normal(200, 2 * s + 1)).value for s in range(1, 301)
    ]
    assert torch.tensor(fresh).std().item() == pytest.approx(1, abs=0.15)
    assert abs(sum(fresh) / 300) < 0.25


def test_the_mean_over_cells_and_its_error():
    sets = normal(300, 0), normal(200, 1), normal(250, 2) * 1.2
    cells = tuple((x[:, 0] > 0).long() + (x[:, 0] > 2).long() for x in sets)
    within = cell_statistics(sets, cells)
    fractions = [float((cells[2] == c).double().mean()) for c in range(3)]
    tau = sorted(fractions)[0]  # strictly more than this: the smallest cell does not count
    counted = [c for c in range(3) if fractions[c] > tau]
    tests = [float((cells[1] == c).sum()) for c in counted]
    got = copying(*sets, cells, tau)
    expected = sum(t * within[c].value for t, c in zip(tests, counted, strict=True)) / sum(tests)
    assert got.value == pytest.approx(expected, rel=1e-12)
    error = sum((t * within[c].se) ** 2 for t, c in zip(tests, counted, strict=True)) ** 0.5 / sum(tests)
    assert got.se == pytest.approx(error, rel=1e-12)


def test_wide_features_are_projected_on_the_components_of_the_training_set():
    basis = torch.linalg.qr(normal(70, 5, 70)).Q
    training, test = normal(300, 0, 70), normal(200, 1, 70)
    training[:, 64:], test[:, 64:] = 0, 0
    narrow = projected((training @ basis, test @ basis, test[:9] @ basis))
    assert [x.shape for x in narrow] == [(300, 64), (200, 64), (9, 64)]
    torch.testing.assert_close(torch.cdist(*narrow[:2]), torch.cdist(training, test))
    assert projected(narrow) is narrow


def test_cells_that_lack_images():
    sets = normal(300, 0), normal(200, 1), normal(250, 2)
    cells = tuple((x[:, 0] > 0).long() for x in sets)
    without = [cells[0], torch.zeros(200).long(), cells[2]]
    assert cell_statistics(sets, tuple(without))[1] == (0, 0)
    with pytest.raises(ConfigError, match="Cell 1 has no training images"):
        cell_statistics(sets, (torch.zeros(300).long(), *cells[1:]))
