"""torchmetrics and torch-fidelity, as installed, on the same images and features."""

import pytest
import torch
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from lit_gen.metrics import FeatureStatistics, frechet_distance, moments


class Flat(nn.Module):
    num_features = 16

    def forward(self, x):
        return x.to(torch.float32).flatten(1) / 100


def images(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 1, 4, 4, generator=g) * 40 + 120 + 5 * seed).clamp(0, 255).to(torch.uint8)


@pytest.mark.parity
def test_the_same_distance(pixels):
    real, fake = images(150, 0), images(130, 1)
    ours = FeatureStatistics(16)
    theirs = FrechetInceptionDistance(feature=Flat(), antialias=False)
    theirs.update(real, real=True)
    for batch in fake.split(50):
        ours.update(pixels(batch))
        theirs.update(batch, real=False)
    distance = frechet_distance(moments(pixels(real)), ours.compute())
    assert distance == pytest.approx(float(theirs.compute()), rel=1e-6)  # they return float32
    statistics = [fid_features_to_statistics(pixels(x)) for x in (fake, real)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(moments(pixels(real)), moments(pixels(fake))) == pytest.approx(fid, abs=5e-7)
