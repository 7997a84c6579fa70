"""Augmented strokes: what each number does to known ink."""

import pytest
import torch

from lit_gen.data.glyphs import Glyphs
from lit_gen.data.strokes import StrokeAugment
from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator

NEUTRAL = {"width": 1.0, "height": 1.0, "slant": 0.0, "weight": 0.0}


def bar(top=8, bottom=24, left=12, right=20, size=32):
    """Black on white, uint8 (1, size, size)."""
    image = torch.full((1, size, size), 255, dtype=torch.uint8)
    image[:, top:bottom, left:right] = 0
    return image


def ink(image):
    return (255 - image.double())[0] / 255


def moments(image):
    """Width and height (by their second moments), and the shift of columns per row upwards."""
    mass = ink(image)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in mass.shape), indexing="ij")
    total = mass.sum()
    dx, dy = x - (mass * x).sum() / total, y - (mass * y).sum() / total
    xx, yy, xy = ((mass * p).sum() / total for p in (dx * dx, dy * dy, dx * dy))
    return (12 * (xx - xy * xy / yy)).sqrt().item(), (12 * yy).sqrt().item(), (-xy / yy).item()


def test_neutral_numbers_change_nothing():
    image = Glyphs(32, 1)[7]["image"]
    assert torch.equal(StrokeAugment().apply(image, **NEUTRAL), image)


@pytest.mark.parametrize(
    "change", [{"width": 1.5}, {"width": 0.7}, {"height": 1.2}, {"slant": 0.3}, {"slant": -0.3}]
)
def test_lengths_and_slant_are_what_was_asked_for(change):
    before, after = moments(bar()), moments(StrokeAugment().apply(bar(), **NEUTRAL | change))
    width, height, slant = change.get("width", 1.0), change.get("height", 1.0), change.get("slant", 0.0)
    assert after[0] == pytest.approx(before[0] * width, rel=0.06)  # bilinear edges
    assert after[1] == pytest.approx(before[1] * height, rel=0.06)
    assert after[2] == pytest.approx(slant, abs=0.02)


def test_weight_grows_and_shrinks_strokes():
    grown = StrokeAugment().apply(bar(), **NEUTRAL | {"weight": 1.0})
    assert torch.equal(grown, bar(7, 25, 11, 21))
    thin = StrokeAugment().apply(bar(left=15, right=16), **NEUTRAL | {"weight": -0.5})
    assert 0.4 < ink(thin)[10, 15] < 0.6  # fainter, not gone


def test_nothing_leaves_the_image():
    """A letter that is as wide as the image stays whole, however much it is to be stretched or slanted."""
    wide = bar(left=2, right=30)
    for slant in (0.0, 0.35):
        seen = ink(StrokeAugment().apply(wide, width=1.5, height=1.2, slant=slant, weight=0.0))
        assert seen[:, [0, -1]].max() < 0.5 and seen[[0, -1]].max() == 0  # not a whole pixel at the edge


def test_draws_are_the_generators():
    image, augment = Glyphs(32, 3)[1000]["image"], StrokeAugment()
    first = augment(image, keyed_generator(0, "a"))
    assert torch.equal(first, augment(image, keyed_generator(0, "a")))
    assert not torch.equal(first, augment(image, keyed_generator(0, "b")))
    blank = torch.full((1, 16, 16), 255, dtype=torch.uint8)
    assert torch.equal(augment(blank, keyed_generator(0)), blank)


@pytest.mark.parametrize("options", [{"width": 0.5}, {"slant": -1}, {"weight": 2}])
def test_mistakes_are_named(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        StrokeAugment(**options)
