"""scripts/silence_or_blot.py: the level of a blot is told from the picture alone, and paper is none."""

import math
import runpy
from pathlib import Path

import pytest
import torch

from lit_gen.data import digits
from lit_gen.images import to_float

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "silence_or_blot.py"))


@pytest.fixture(scope="module")
def seen():
    x = to_float(torch.stack([torch.as_tensor(digits("test")[i]["image"]) for i in range(64)]))
    return SCRIPT["conditions"](x), x


GAP = torch.nn.functional.pad(torch.ones(4, 4, dtype=torch.bool), (2,) * 4)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_the_level_of_a_blot_is_heard_in_the_picture(seen, level):
    y, belief = seen[0][f"blot {level:+}"]
    error = belief.floor[..., GAP] - level
    # The least of 16 normal numbers has a deviation of 0.55 of theirs. Ink that shows through raises it.
    assert abs(float(error.median())) < 0.1 and float(error.min()) > -4 * 0.55 * SCRIPT["BLOT_STD"]
    assert bool((y[..., ~GAP] == seen[1][..., ~GAP]).all())


def test_paper_is_no_blot(seen):
    _, belief = seen[0]["silence"]
    floor = belief.floor[..., GAP]
    assert bool((floor == -math.inf).all())
    value, slope, std = belief.at(seen[1])
    assert torch.equal(value[..., GAP], seen[1][..., GAP]) and bool((slope[..., GAP] == 1).all())
    assert std[..., GAP].unique().tolist() == pytest.approx([SCRIPT["STD"]])


def test_a_black_blot_says_nothing_of_what_it_covers(seen):
    y, belief = seen[0]["blot +1.0"]
    variance = torch.tensor(0.09)
    white = belief.pull(y, torch.full_like(y, -1.0), variance)
    assert float(white[..., GAP].abs().max()) < 1e-4
    assert not bool(seen[0]["gap told"][1].pull(y, seen[1], variance)[..., GAP].any())
    known = (belief.floor == -math.inf) & ~GAP
    assert float(belief.pull(y, seen[1], variance)[known].abs().max()) == 0  # what is seen is believed
