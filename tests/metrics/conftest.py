import pytest
from torch import nn

from lit_gen.metrics.extractors import Extractor, ExtractorId


class Pixels(nn.Module):
    """Features: the pixels / 100; logits: the first ten of them."""

    def forward(self, x):
        features = x.flatten(1) / 100
        return features, features[:, :10]


@pytest.fixture
def pixels() -> Extractor:
    """Images (B, 1, 4, 4) -> 16 features with a known meaning."""
    return Extractor(ExtractorId("pixels", "1", "0" * 64, "none", "pixels", 16), Pixels(), channels=1)
