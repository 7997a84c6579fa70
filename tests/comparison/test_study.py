"""The comparison of augmentations: what arms may see, what is paired with what, and a study that is stopped,
divided, and gone on with."""

import pytest
import torch

from lit_gen.comparison import (
    Source,
    Study,
    Treatment,
    letters,
)
from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator
from lit_gen.search import Labelled

CLASSIFIER = {"steps": 4, "batch_size": 8, "width": 2}


def source(**options) -> Source:
    """Two classes of noise, bright and dark."""
    g = keyed_generator(0)
    labels = torch.arange(40) % 2
    pictures = (torch.rand(40, 1, 8, 8, generator=g) * 100 + labels[:, None, None, None] * 100).to(
        torch.uint8
    )
    pool, test = Labelled(pictures[:20], labels[:20]), Labelled(pictures[20:], labels[20:])
    return Source(
        lambda rows: pool.images[list(rows)], pool.labels, [str(i) for i in range(20)], test, **options
    )


class Spy:
    """Notes what it is given; its second candidate makes the right images."""

    needs_other = False

    def __init__(self):
        self.seen: list[tuple] = []

    def treatments(self, train, classes, seed, other):
        self.seen.append((train, other))
        yield Treatment(made=Labelled(255 - train.images, 1 - train.labels), setting="wrong")
        yield Treatment(made=train, setting="right")


def study(out, arms, settings: dict | None = None, **options) -> Study:
    named = {"arms": {name: {} for name in arms}} | (settings or {})
    options = {"classifier": CLASSIFIER, "options": named} | options
    return Study(options.pop("source", None) or source(), arms, out, **options)


def test_more_shots_keep_the_images_of_fewer_and_seeds_draw_others():
    made = source()
    two, five, again = made.task(2, 0), made.task(5, 0), made.task(2, 1)

    def content(task):
        return {image.numpy().tobytes() for image in task.train.images}

    assert content(two) < content(five) and content(two) != content(again)
    assert torch.equal(two.test.images, again.test.images)
    assert two.train.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ConfigError, match="shots=11: class 0 has 10 images"):
        made.task(11, 0)


def test_letters_are_tested_on_designs_that_are_not_labelled():
    made = letters(characters="AB", image_size=8)
    task = made.task(2, 3)
    assert task.train.labels.tolist() == [0, 0, 1, 1]
    faces = [made.names[row] for row in range(len(made.names))]
    assert len(set(faces)) * 2 == len(faces)
    # The same typefaces show every letter: those that come first by the seed.
    chosen = sorted(set(faces), key=lambda name: __import__("lit_gen.rng").rng.key(3, "shots", name))[:2]
    rows = [made.names.index(name) for name in chosen]
    assert torch.equal(task.train.images[:2], made.read(rows))
    assert task.other is not None and int(task.other.labels.max()) + 1 == len(task.other) // 2
