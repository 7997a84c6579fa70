"""Streaming sums: any division into batches and ranks gives the two-pass moments of all images."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lit_gen.errors import ConfigError
from lit_gen.metrics import FeatureStatistics, digits64, frechet, moments


def images(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 1, 4, 4, generator=g) * 40 + 120).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("sizes", [[103], [50, 53], [1, 0, 99, 3], [0] * 2 + [13] * 7 + [12]])
def test_any_batching_gives_the_two_pass_moments(pixels, sizes):
    x = images(103, 0)
    statistics = FeatureStatistics(16)
    for batch in x.split(sizes):
        statistics.update(pixels(batch))
    got, expected = statistics.compute(), moments(pixels(x))
    assert got.n == 103
    torch.testing.assert_close(got.mean, expected.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(got.cov, expected.cov, rtol=1e-12, atol=1e-14)


def test_a_module_that_holds_one_is_not_changed_by_it(pixels):
    module = nn.Module()
    module.statistics = FeatureStatistics(16)
    assert module.state_dict() == {}
    assert list(module.parameters()) == list(module.buffers()) == []
    module.statistics.update(pixels(images(70, 3)))
    before = module.statistics.compute()
    module.to(torch.bfloat16)
    assert module.statistics.outer.dtype == torch.float64
    assert torch.equal(copy.deepcopy(module.statistics).compute().cov, before.cov)
    assert module.state_dict() == {}


def test_autocast_has_no_effect():
    plain, cast = FeatureStatistics(64), FeatureStatistics(64)
    plain.update(digits64()(images(80, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.update(digits64()(images(80, 4)))
        assert torch.equal(cast.compute().cov, plain.compute().cov)


def test_nan_features_are_an_error_with_the_batch_s_number():
    statistics = FeatureStatistics(3)
    statistics.update(torch.randn(5, 3))
    with pytest.raises(ValueError, match="1 of 9 feature vectors are NaN or infinite, the first in batch 2"):
        statistics.update(torch.tensor([[0, 0, 0.0], [1, 2, torch.inf], [1, 1, 1], [0, 0, 0]]))
    statistics.reset()
    statistics.update(torch.randn(5, 3))
    assert statistics.compute().n == 5


def test_bad_shapes_are_refused():
    with pytest.raises(ConfigError, match=r"\(B, 3\), got \(3,\)"):
        FeatureStatistics(3).update(torch.zeros(3))
    with pytest.raises(ConfigError, match="at least 2 images, got 1"):
        one = FeatureStatistics(3)
        one.update(torch.zeros(1, 3))
        one.compute()


def test_sums_on_a_gpu_are_not_waited_for():
    """A fake device's numbers are not there: whoever asks for one raises."""
    with FakeTensorMode(), torch.device("cuda"):
        statistics = FeatureStatistics(3)
        for _ in range(2):
            statistics.update(torch.randn(5, 3))
        assert statistics.outer.device.type == statistics.first_bad.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            statistics.compute()


def test_on_a_gpu_nan_features_are_an_error_in_the_end(monkeypatch):
    statistics = FeatureStatistics(3)
    monkeypatch.setattr(frechet, "world_size", lambda: 2)  # several ranks wait for the end as a GPU does
    for value in (0.0, torch.nan, 1.0, torch.inf):
        statistics.update(torch.full((2, 3), value))
    with pytest.raises(ValueError, match="4 of 8 feature vectors are NaN or infinite, the first in batch 2"):
        statistics.compute()
