"""Arms with a generator: what they see, that made images have the right labels, and what is trained once."""

import pytest
import torch

from lit_gen.augment.conditional import ConditionalAugment
from lit_gen.comparison import FUNITTraining, Restored, Sampled, ScoreTraining, Translated, translations
from lit_gen.comparison.diffusion import masks_of
from lit_gen.comparison.generators import in_turn, sheet
from lit_gen.errors import ConfigError
from lit_gen.images import to_uint8
from lit_gen.rng import keyed_generator
from lit_gen.search import Labelled

SCORE = ScoreTraining(steps=50, batch_size=16, base_channels=8)
FUNIT = FUNITTraining(steps=3, batch_size=4, width=4)
AUGMENT = ConditionalAugment(p=0.3, xflip=0, yflip=0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGEN_CACHE", str(tmp_path))
    return tmp_path / "generators"


def sides(count: int = 12, classes: int = 2, seed: int = 0) -> Labelled:
    """Noise that is bright in the columns of its class: 8 x 8 pixels."""
    labels = torch.arange(count) % classes
    columns = torch.arange(8) * classes // 8 == labels[:, None]
    noise = torch.rand(count, 1, 8, 8, generator=keyed_generator(seed)) * 60
    return Labelled((noise + 180 * columns[:, None, None]).to(torch.uint8), labels)


def recognized(made: Labelled, classes: int = 2) -> float:
    """The share of images whose brightest columns are those of their label."""
    bright = made.images.float().mean((1, 2)).unflatten(1, (classes, -1)).mean(2)
    return float((bright.argmax(1) == made.labels).float().mean())


def only(arm, train: Labelled, classes: int = 2, seed: int = 0, other: Labelled | None = None):
    (treatment,) = arm.treatments(train, classes, seed, other)
    return treatment


def test_samples_and_restorations_show_their_class():
    train = sides()
    assert recognized(train) == 1
    sampled = only(Sampled(SCORE, per_class=16, num_steps=6), train)
    restored = only(Restored(SCORE, per_class=16, erased=[0.4]), train)
    assert recognized(sampled.made) >= 0.9 and recognized(restored.made) >= 0.9
    for made in (sampled.made, restored.made):
        assert made.labels.tolist() == [0, 1] * 16
        assert made.images.dtype == torch.uint8 and made.images.shape == (32, 1, 8, 8)
        assert len(made.images.flatten(1).unique(dim=0)) == 32
    assert sampled.borrowed == 0 and restored.cost["training"] == 0
    assert restored.borrowed == pytest.approx(sampled.cost["training"], rel=1e-5)


def test_wrong_labels_make_wrong_images():
    """The score arm has the labels from the labelled images and nowhere else."""
    train = sides()
    swapped = Labelled(train.images, 1 - train.labels)
    assert recognized(only(Sampled(SCORE, per_class=16, num_steps=6), swapped).made) <= 0.1


@pytest.mark.parametrize(
    "arm",
    [
        Sampled(ScoreTraining(steps=2, base_channels=4, augment=AUGMENT), 3, [2.0], 2),
        Restored(ScoreTraining(steps=2, base_channels=4), 3, [0.5]),
        Translated(FUNIT, 3),
        Sampled(ScoreTraining(steps=2, base_channels=4, pretraining=2), 3, [1.0], 2, pretrained=True),
        Translated(FUNIT, 3, pretrained=True),
    ],
    ids=["sampled", "restored", "translated", "sampled, pretrained", "translated, pretrained"],
)
def test_the_same_images_give_the_same_bits_and_nothing_else_matters(arm, cache):
    train, other = sides(), sides(9, 3, seed=1)
    given = other if arm.needs_other else None
    before = torch.get_rng_state()
    first = only(arm, train, other=given)
    assert torch.equal(torch.get_rng_state(), before)
    kept = only(arm, train, other=given)  # from the cache
    assert kept.cost["training"] == 0 < kept.borrowed
    for file in cache.iterdir():
        file.unlink()
    torch.rand(3)
    poison = Labelled(255 - other.images, other.labels)
    again = only(arm, train, other=given or poison)
    assert again.borrowed == 0
    for made in (kept.made, again.made):
        assert torch.equal(made.images, first.made.images) and torch.equal(made.labels, first.made.labels)
    assert not torch.equal(only(arm, train, seed=1, other=given).made.images, first.made.images)
    if arm.needs_other:
        assert not torch.equal(only(arm, train, other=poison).made.images, first.made.images)
        with pytest.raises(ConfigError, match="this data has none"):
            only(arm, train)


def test_candidates_share_one_training():
    arm = Sampled(ScoreTraining(steps=2, base_channels=4), 2, [1.0, 3.0], 2)
    first, second = arm.treatments(sides(), 2, 0, None)
    assert (first.setting, second.setting) == ("guidance 1", "guidance 3")
    assert first.cost["training"] == second.cost["training"] > 0
    assert not torch.equal(first.made.images, second.made.images)


def test_what_is_not_erased_stays():
    train = sides()
    arm = Restored(ScoreTraining(steps=1, base_channels=4), 12, [0.3])
    made = only(arm, train).made
    originals = train.images[in_turn(train.labels, 2, 12)]
    changed = (made.images != originals).float().mean((1, 2, 3))
    assert changed.max() <= 0.55 and 0.2 < changed.mean() <= 0.32


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_masks_erase_the_share(share):
    erased = ~masks_of(400, (16, 24), share, keyed_generator(0))
    assert float(erased.float().mean()) == pytest.approx(share, abs=0.02)
    boxes = erased[::2, 0]
    areas = boxes.flatten(1).sum(1)
    assert torch.equal(areas, boxes.any(1).sum(1) * boxes.any(2).sum(1))  # full rectangles


def test_images_of_a_class_take_turns():
    labels = torch.tensor([1, 0, 1, 1, 0])
    assert in_turn(labels, 2, 4).tolist() == [1, 0, 4, 2, 1, 3, 4, 0]
    with pytest.raises(ConfigError, match="Class 2 has no labelled image"):
        in_turn(labels, 3, 1)


def test_translations_take_contents_of_other_classes(monkeypatch):
    train, seen = sides(12, 4), []

    def copying(generator, content, classes):
        seen.append(content)
        assert classes.shape == (len(content), 5, 1, 8, 8)
        return to_uint8(classes[:, 0])  # a generator that takes everything from the class

    monkeypatch.setattr(translations, "translate", copying)
    made = only(Translated(FUNIT, 20), train, 4).made
    assert recognized(made, 4) == 1
    contents = Labelled(to_uint8(torch.cat(seen)), made.labels)
    assert recognized(contents, 4) == 0
    assert {int(x) for x in contents.images.float().mean((1, 2)).unflatten(1, (4, 2)).mean(2).argmax(1)} == {
        0, 1, 2, 3,
    }  # fmt: skip


def test_restyled_contents_keep_their_label(monkeypatch):
    train, other = sides(12, 4), sides(9, 3, seed=1)
    monkeypatch.setattr(translations, "translate", lambda g, content, classes: to_uint8(content))
    made = only(Translated(FUNIT, 20, "content", pretrained=True), train, 4, other=other).made
    assert recognized(made, 4) == 1 and made.labels.tolist() == [0, 1, 2, 3] * 20


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"erased=\[1\.0\]"):
        Restored(SCORE, erased=[1.0])
    with pytest.raises(ConfigError, match="steps=0"):
        ScoreTraining(steps=0)
    with pytest.raises(ConfigError, match="batch_size=0"):
        FUNITTraining(batch_size=0)
    with pytest.raises(ConfigError, match="keeps=content"):
        Translated(FUNIT, keeps="content")
    with pytest.raises(ConfigError, match="keeps"):
        Translated(FUNIT, keeps="style")


def test_a_sheet_has_a_row_for_each_class():
    train, made = sides(8, 4), sides(40, 4, seed=1)
    picture = sheet(train, made, (3, 5))
    assert picture.shape == (3, 4 * 17 + 1, 9 * 17 + 1)
    cells = picture[0, 1:, 1:].unfold(0, 16, 17).unfold(1, 16, 17)[..., ::2, ::2]
    for row in range(4):
        of_class = [data.images[data.labels == row, 0] for data in (train, made)]
        assert torch.equal(cells[row, :3], of_class[0][[0, 1, 0]])
        assert torch.equal(cells[row, 4:], of_class[1][:5])
    assert torch.equal(sheet(train, made, (0, 5)), torch.cat([picture[..., :1], picture[..., 52:]], 2))
