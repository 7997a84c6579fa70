"""Sets whose neighbourhoods are known."""

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.metrics import neighbours
from lit_gen.metrics.neighbours import authenticity, nearest, precision_recall_density_coverage


def line(*positions: float) -> torch.Tensor:
    return torch.tensor([[p, 0.0] for p in positions])


def values(estimates):
    return {name: value for name, (value, _) in estimates.items()}


def test_a_line_counted_by_hand():
    real, fake = line(0, 1, 2, 3, 10), line(0.5, 20, 21, 22)
    # k=1: real balls have radius 1 (7 at 10); 0.5 lies in those of 0 and 1; 20 and more in none.
    # Fake balls: 19.5 around 0.5, 1 around the others: all real points lie in the first.
    got = values(precision_recall_density_coverage(real, fake, k=1))
    assert got == pytest.approx({"precision": 1 / 4, "recall": 1, "density": 2 / 4, "coverage": 2 / 5})


def test_the_blocks_do_not_matter(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=g), torch.randn(40, 4, generator=g)
    whole = precision_recall_density_coverage(x, y, 3), authenticity(x, y), nearest(x, y, 3)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    assert precision_recall_density_coverage(x, y, 3) == whole[0]
    assert authenticity(x, y) == whole[1]
    assert torch.equal(nearest(x, y, 3)[1], whole[2][1])


def test_roles_of_the_sets():
    # Swapping the sets swaps precision and recall.
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(80, 3, generator=g), 0.4 * torch.randn(90, 3, generator=g)
    there = values(precision_recall_density_coverage(x, y, 4))
    back = values(precision_recall_density_coverage(y, x, 4))
    assert there["precision"] == back["recall"] and there["recall"] == back["precision"]
    assert there["precision"] > there["recall"]  # fewer modes, all of them real


def test_copies_are_not_authentic():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(300, 3, generator=g)
    near = x + 1e-4 * torch.randn(300, 3, generator=g)
    assert authenticity(x, near).value < 1
    assert authenticity(x, x.roll(7, 0)).value == 0
    fresh, se = authenticity(x, torch.randn(300, 3, generator=g))
    assert fresh > 30
    assert se == pytest.approx((fresh * (100 - fresh) / 299) ** 0.5)


def test_nearest_names_the_copied_images():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(3)) + 100
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    distances, index = nearest(x, x[order], 2)
    assert torch.equal(index[:, 0], order)
    assert torch.equal(distances[:, 0], torch.zeros(50, dtype=torch.float64))
    torch.testing.assert_close(
        distances[:, 1], (x[index[:, 1]] - x[order]).double().norm(dim=1), rtol=1e-5, atol=0
    )


def test_bad_input():
    with pytest.raises(ConfigError, match="k=5 needs more than 5 images in both sets, got 9 and 5"):
        precision_recall_density_coverage(torch.randn(9, 2), torch.randn(5, 2))
    with pytest.raises(ConfigError, match=r"\(9, 2\) and \(9, 3\)"):
        authenticity(torch.randn(9, 2), torch.randn(9, 3))
    with pytest.raises(ConfigError, match="k=10 needs at least as many training images, got 9"):
        nearest(torch.randn(9, 2), torch.randn(4, 2), 10)
