"""Sets whose diversity is known."""

import math

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.metrics import vendi
from lit_gen.metrics.vendi import vendi_of_similarities, vendi_score

ORDERS = [0.0, 0.1, 0.5, 1.0, 2.0, math.inf]


@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("n", [6, 40])
def test_k_kinds_of_images_alike_count_k(q, n):
    kinds = torch.eye(8)[torch.arange(n) % 4] * torch.arange(1, n + 1)[:, None]  # lengths do not matter
    even = torch.tensor([1 / (n // 4 + (c < n % 4)) for c in range(4)])[torch.arange(n) % 4]
    assert vendi_score(kinds, q, even).value == pytest.approx(4, rel=1e-9)
    assert vendi_score(kinds[:1].expand(n, -1), q).value == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("q", ORDERS)
def test_images_against_features(q):
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    p = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = x / x.norm(dim=1, keepdim=True)
    assert vendi_score(x, q, p).value == pytest.approx(vendi_of_similarities(z @ z.T, q, p), rel=1e-9)


def test_the_blocks_do_not_matter(monkeypatch):
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    whole = vendi_score(x)
    monkeypatch.setattr(vendi, "BLOCK", 7)
    assert vendi_score(x) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0, math.inf])
def test_the_standard_error_is_that_of_other_draws(q):
    scale = torch.tensor([3.0, 2, 1, 1, 0.5, 0.3])
    draws = [
        vendi_score(torch.randn(400, 6, generator=torch.Generator().manual_seed(s)) * scale + 1, q)
        for s in range(300)
    ]
    spread = torch.tensor([value for value, _ in draws]).std().item()
    mean = sum(se for _, se in draws) / len(draws)
    assert mean == pytest.approx(spread, rel=0.15)  # the spread itself has an error of 4 %


def test_bad_input():
    with pytest.raises(ConfigError, match="q=-1"):
        vendi_score(torch.randn(9, 2), -1)
    with pytest.raises(ConfigError, match="9 images need as many weights"):
        vendi_score(torch.randn(9, 2), weights=torch.ones(3))
