"""The cache of reference statistics: computed once, under a key of all they depend on."""

import pytest
import torch

from lit_gen.metrics import Evaluation, compare, digits64, moments, reference_summary
from lit_gen.metrics.reference import cache_folder

IMAGES = torch.randint(0, 256, (90, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batches_of(images, labels=None):
    parts = torch.arange(len(images)).split(40)
    return [(rows, images[rows], None if labels is None else labels[rows]) for rows in parts]


class Counted:
    def __init__(self, images=IMAGES):
        self.images, self.calls = images, 0

    def __call__(self):
        self.calls += 1
        return batches_of(self.images)


def compute(batches, folder, **changes):
    options = {"data": "random", "n": 90} | changes
    return reference_summary(batches, Evaluation(digits64()), folder=folder, **options).moments


def assert_same(a, b):
    assert a.n == b.n and torch.equal(a.mean, b.mean) and torch.equal(a.cov, b.cov)
    assert torch.equal(a.factor, b.factor)


def test_the_second_time_is_read_and_equal(tmp_path):
    batches = Counted()
    first, second = compute(batches, tmp_path), compute(batches, tmp_path)
    assert batches.calls == 1
    assert_same(first, second)
    torch.testing.assert_close(first.cov, moments(digits64()(IMAGES)).cov, rtol=1e-10, atol=1e-12)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("changes", [{"max_stored_features": 50}, {"num_classes": 2}, {"seed": 1}])
def test_what_it_depends_on_is_in_the_key(tmp_path, changes):
    calls, labels = [], torch.arange(90) % 2

    def batches():
        calls.append(1)
        return batches_of(IMAGES, labels)

    for data, options in (("a", {}), ("a", changes), ("b", {}), ("a", changes)):
        reference_summary(batches, Evaluation(digits64(), **options), data=data, n=90, folder=tmp_path)
    assert len(calls) == 3


def test_n_is_in_the_key_and_is_checked(tmp_path):
    compute(Counted(), tmp_path)
    half = Counted(IMAGES[:50])
    assert compute(half, tmp_path, n=50).n == 50 and half.calls == 1
    with pytest.raises(ValueError, match="said to have 60 images, its batches gave 90"):
        compute(Counted(), tmp_path, n=60)


@pytest.mark.parametrize("damage", ["cut", "noise", "nan", "key", "empty"])
def test_a_damaged_file_is_computed_again(tmp_path, damage, caplog):
    batches = Counted()
    first = compute(batches, tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "noise":
        content[:64] = bytes(64)
    elif damage == "nan":
        content[-8:] = b"\xff" * 8
    elif damage == "key":
        content = content.replace(b"random", b"modnar")
    path.write_bytes(content if damage != "empty" else b"")
    assert_same(compute(batches, tmp_path), first)
    assert batches.calls == 2 and "cannot be used" in caplog.text
    assert_same(compute(batches, tmp_path), first)
    assert batches.calls == 2


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert compute(Counted(), tmp_path / "file" / "cache").n == 90
    assert "could not be kept" in caplog.text


def test_a_stored_summary_gives_the_same_results(tmp_path):
    calls, labels = [], torch.arange(90) % 3

    def batches():
        calls.append(1)
        return batches_of(IMAGES, labels)

    def summary(batches, data):
        return reference_summary(
            batches, Evaluation(digits64(), num_classes=4), data=data, n=90, folder=tmp_path
        )

    first, second = (summary(batches, "random") for _ in range(2))
    assert len(calls) == 1
    for name in ("index", "features", "logits", "label"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert [c and c.n for c in second.classes] == [30, 30, 30, None]  # no image is of the fourth class
    others = IMAGES.flip(-1)
    fake = summary(lambda: batches_of(others, labels), "flipped")
    a, b = compare(first, fake, training=first), compare(second, fake, training=second)
    assert repr(a) == repr(b) and len(a) == 16


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LITGEN_CACHE", raising=False)
    assert cache_folder() == tmp_path / "lit_gen"
    monkeypatch.setenv("LITGEN_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
