"""Metrics of features on a GPU: no metric mixes devices, and its number is the CPU's."""

import pytest
import torch
from torch.testing import assert_close

from lit_gen.metrics import FeatureStatistics, digits64, digits_classifier, moments
from lit_gen.metrics.functional import (
    frechet_distance,
    frechet_estimate,
    frechet_infinity,
    inception_score,
)
from lit_gen.metrics.inception import resize_pil_bicubic, resize_tf1
from lit_gen.metrics.kernels import cmmd, kernel_distance
from lit_gen.metrics.neighbours import authenticity, nearest, precision_recall_density_coverage
from lit_gen.rng import keyed_generator

N, D = 24, 6


def features(name: str) -> torch.Tensor:
    return torch.randn(N, D, generator=keyed_generator(name))


METRICS = {
    "Frechet distance": lambda x, y: frechet_distance(moments(x), moments(y)),
    "Frechet estimate": lambda x, y: frechet_estimate(moments(x), moments(y), y),
    "Frechet distance at infinity": lambda x, y: frechet_infinity(moments(x), y),
    "kernel distance": kernel_distance,
    "CMMD": cmmd,
    "precision, recall, density, coverage": precision_recall_density_coverage,
    "AuthPct": authenticity,
    "nearest": nearest,
    "inception score": lambda x, y: inception_score(x),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(cuda, name):
    x, y = features("reference"), features("generated") + 0.5
    expected = METRICS[name](x, y)
    found = METRICS[name](cuda.put(x), cuda.put(y))
    if cuda.real:
        host = torch.utils._pytree.tree_map(lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, found)
        assert_close(host, expected, rtol=1e-8, atol=1e-8)


def test_sums_are_added_without_a_wait(cuda):
    statistics = FeatureStatistics(D).to(cuda.device)
    rows = cuda.put(features("generated"))
    statistics.update(rows)
    with cuda.counting() as waits:
        statistics.update(rows)
    assert waits == []


@pytest.mark.parametrize("resize", [resize_tf1, resize_pil_bicubic], ids=["tf1", "PIL"])
def test_resizing(cuda, resize):
    x = torch.randint(256, (2, 3, 12, 12), generator=keyed_generator("x"), dtype=torch.uint8)
    found = resize(cuda.put(x))
    assert found.device == cuda.device
    if cuda.real:
        assert_close(found.cpu(), resize(x))


def test_extracting(cuda, monkeypatch):
    images = torch.randint(256, (4, 1, 8, 8), generator=keyed_generator("x"), dtype=torch.uint8)
    for extractor in (digits64(), digits_classifier()):
        expected = extractor(images)
        if not cuda.real:
            network = cuda.put(extractor.network)
            monkeypatch.setattr(network, "to", lambda device, network=network: network)
        with cuda.autocast():
            found = extractor(cuda.put(images))
        assert found.device == cuda.device and found.dtype == expected.dtype
        assert not cuda.real or (found.cpu() - expected).abs().max() < 1e-4
