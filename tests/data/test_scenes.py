"""Synthetic scenes: keyed, tight boxes, digits that can be seen, nothing shared between the splits."""

import numpy as np
import pytest
import torch

from lit_gen.data.digits import digits
from lit_gen.data.scenes import Scenes, _paint, _scaled
from lit_gen.errors import ConfigError


def test_a_scene_depends_on_its_number_alone():
    a, b = Scenes(size=10), Scenes(size=2000)
    for i in (9, 0, 4):
        assert all(torch.equal(a[i][k], b[i][k]) for k in ("image", "boxes", "labels"))
    assert not torch.equal(a[0]["image"], a[1]["image"])
    assert not torch.equal(a[0]["image"], Scenes(seed=1)[0]["image"])
    assert not torch.equal(a[0]["image"], Scenes("test")[0]["image"])
    with pytest.raises(IndexError):
        a[10]


def test_boxes_lie_inside_and_hardly_overlap():
    scenes = Scenes(size=200)
    counts = torch.zeros(5, dtype=torch.int64)
    for i in range(200):
        item = scenes[i]
        boxes = item["boxes"]
        counts[len(boxes)] += 1
        assert item["labels"].shape == (len(boxes),)
        assert boxes.min() >= 0
        assert boxes.max() <= 64
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= 2
        low, high = (
            torch.maximum(boxes[:, None, :2], boxes[:, :2]),
            torch.minimum(boxes[:, None, 2:], boxes[:, 2:]),
        )
        shared = (high - low).clamp(min=0).prod(-1).fill_diagonal_(0)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        assert (shared <= 0.15 * torch.minimum(area[:, None], area) + 1e-4).all()
    assert counts[0] == 0
    assert counts[1:].min() > 20


def test_boxes_are_tight_and_the_digits_seen():
    """Painted on a flat canvas, a digit changes every side of its box, and by a contrast that can be seen."""
    rng = np.random.default_rng(0)
    pictures = digits("train").images[:, 0].numpy()
    for level in (0, 60, 127, 128, 200, 255):
        for _ in range(50):
            canvas = np.full((64, 64, 3), level, np.float32)
            ink = _scaled(rng, pictures[rng.integers(len(pictures))], 64)
            h, w = ink.shape
            _paint(rng, canvas, ink, (5, 7, 5 + w, 7 + h))
            changed = np.abs(canvas - level).max(-1)
            assert changed.max() > 35
            rows, columns = np.flatnonzero((changed > 10).any(1)), np.flatnonzero((changed > 10).any(0))
            assert (rows[0], rows[-1], columns[0], columns[-1]) == (7, 6 + h, 5, 4 + w)


def test_all_digits_occur_evenly():
    scenes = Scenes(size=400)
    labels = torch.cat([scenes[i]["labels"] for i in range(400)])
    share = labels.bincount(minlength=10) / len(labels)
    assert share.min() > 0.06
    assert share.max() < 0.14


def test_fingerprints_and_bad_options():
    assert Scenes(size=5).fingerprint() == Scenes(size=5).fingerprint()
    assert len({Scenes(s, size=5, seed=k).fingerprint() for s in ("train", "test") for k in (0, 1)}) == 4
    with pytest.raises(ConfigError, match="image_size=16"):
        Scenes(image_size=16)
    with pytest.raises(ConfigError, match="size=0"):
        Scenes(size=0)
    with pytest.raises(ConfigError, match="split='val'"):
        Scenes("val")
