"""The task of the comparison: few labelled images to learn from, and what an arm is.

A `Source` (`images` of a data module, or `letters` in unseen typefaces) gives the `Task` of so many shots and
a seed; an `Arm` sees its labelled images alone and gives `Treatment`s, one of which the classifier is trained
with. Images are uint8 (N, C, H, W), all of one size, labels int64 (N,).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as official

from lit_gen.augment import Augmentation
from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.data.glyphs import Glyphs, embedded_faces
from lit_gen.data.images import part_of, pixels_of, rows_of
from lit_gen.data.transforms import stacked
from lit_gen.errors import ConfigError, check_choice
from lit_gen.rng import key, keyed_generator
from lit_gen.search import Labelled

__all__ = ["Arm", "Source", "Task", "Treatment", "images", "letters", "seconds"]

CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LABELS = ("correct", "shuffled")


@dataclass(frozen=True)
class Task:
    """`train`: the labelled images, `shots` of each class; those of n shots are among those of n + 1. `test`
    is the same for all arms, shots, and seeds. `other`: images of other classes or typefaces, for arms that
    say so by their name and for no other."""

    train: Labelled
    test: Labelled
    classes: int
    other: Labelled | None = None


@dataclass(frozen=True)
class Treatment:
    """What an arm gives to the classifier: an augmentation, drawn anew each time that an image is seen, and
    images that are added to the labelled ones. `setting` says which candidate of the arm it is; `cost` may
    divide what it took into phases, in `seconds`. `borrowed`: the seconds, the same for all candidates, that
    an arm before this one has spent on what both use; they count here too."""

    augmentation: Augmentation | None = None
    made: Labelled | None = None
    setting: str = ""
    cost: dict[str, float] = field(default_factory=dict)
    borrowed: float = 0.0


class Arm(Protocol):
    """A way to make more of few labelled images. `needs_other` says that it learns from `Task.other` too."""

    needs_other: bool

    def treatments(
        self, train: Labelled, classes: int, seed: int, other: Labelled | None
    ) -> Iterator[Treatment]:
        """The candidates of the arm, each made from `train` alone when it is asked for; the first is the
        arm's default. Deterministic in (train, seed)."""
        ...


def seconds(device: torch.device) -> float:
    """A clock: CPU seconds of this process, or, of a GPU, seconds when all of its work so far is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def split(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (int64) of two parts of labelled images, the second with `share` of every class, rounded, but one
    at least and not all. The k-th images of all classes are in the same part: of letters, those of one
    typeface, because a typeface that showed some letters in one part and others in the other would tell
    letters by their typeface. Raises ConfigError where a class has one image."""
    count = int(labels.bincount().min())
    if count < 2:
        raise ConfigError("A class has one image: a split needs two of every class.")
    held = torch.zeros(int(labels.bincount().max()), dtype=torch.bool)
    held[torch.randperm(count, generator=generator)[: min(max(1, round(share * count)), count - 1)]] = True
    place = torch.empty(len(labels), dtype=torch.int64)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0].cpu()
        place[rows] = torch.arange(len(rows))
    return (~held[place]).nonzero()[:, 0], held[place].nonzero()[:, 0]


class Source:
    """Where tasks are drawn from. `read(rows)` gives the images of the pool, uint8 (N, C, H, W); of each
    class the `shots` first by `key(seed, name)` are labelled, so that images of one name go together.
    `labels="shuffled"` exchanges the labels of the labelled images at random: a control, under which no arm
    can help."""

    def __init__(
        self,
        read: Callable[[Sequence[int]], Tensor],
        pool_labels: Tensor,
        names: Sequence[str],
        test: Labelled,
        other: Labelled | None = None,
        labels: str = "correct",
    ):
        check_choice("labels", labels, LABELS)
        self.read, self.pool_labels, self.names = read, pool_labels, names
        self.test, self.other, self.labels = test, other, labels
        self.classes = int(pool_labels.max()) + 1

    def task(self, shots: int, seed: int, device: torch.device | None = None) -> Task:
        """Raises ConfigError where a class has fewer than `shots` images."""
        rows: list[int] = []
        for label in range(self.classes):
            members: list[int] = (self.pool_labels == label).nonzero()[:, 0].tolist()
            if not 1 <= shots <= len(members):
                raise ConfigError(f"shots={shots}: class {label} has {len(members)} images to draw from.")
            rows += sorted(members, key=lambda row: key(seed, "shots", self.names[row]))[:shots]
        labels = self.pool_labels[rows]
        if self.labels == "shuffled":
            generator = keyed_generator(seed, "shuffled labels")
            orders = [torch.randperm(self.classes, generator=generator) for _ in range(shots)]
            labels = torch.stack(orders, 1).flatten()  # of the k-th images of all classes
        parts = [Labelled(self.read(rows), labels), self.test, *([self.other] if self.other else [])]
        train, test, *other = (Labelled(p.images.to(device), p.labels.to(device)) for p in parts)
        return Task(train, test, self.classes, *other)


def images(
    data: Any,
    *,
    image_size: int | None = None,
    test_size: int | None = None,
    labels: str = "correct",
    rotate: float = 0.0,
    fill: int = 0,
) -> Source:
    """Classes of a data module: of an `ImageDataModule`, its training and its test images; of a
    `FewShotDataModule`, its target classes, of which half the images, drawn once, are for testing, while the
    source classes are `other`.

    `image_size` is what the images are resized to. `rotate` turns every image, labelled or not, by an angle
    of its own within so many degrees: a control, because turning is then an invariance that can be found.
    Raises ConfigError for data without labels.
    """
    if data.train.labels is None or data.test.labels is None or not pixels_of(data.train).are_bytes:
        raise ConfigError("The comparison takes data of bytes with labels: data=digits, for instance.")
    few = isinstance(data, FewShotDataModule)
    pool, test = (data.test, data.test) if few else (data.train, data.test)
    names = [f"{label}/{row}" for row, label in enumerate(pool.labels.tolist())]
    test_rows: Sequence[int] = range(len(test))
    if few:
        test_rows = part_of(names, pool.labels.tolist(), "test", 0.5, 0)
    if test_size is not None and test_size < len(test_rows):
        order = torch.randperm(len(test_rows), generator=keyed_generator(0, "comparison", "test"))
        test_rows = sorted(test_rows[i] for i in order[:test_size].tolist())
    pool_rows = sorted(set(range(len(pool))) - set(test_rows)) if few else range(len(pool))

    def read(dataset: Any, rows: Sequence[int]) -> Tensor:
        found = stacked(rows_of(dataset, list(rows))["image"])
        if image_size is not None:
            found = official.resize(found, [image_size, image_size], antialias=True)
        if not rotate:
            return found
        # Angles by the row and the set, so that an image is turned alike whatever it is drawn with.
        place = "test" if dataset is test else "pool"
        return torch.stack(
            [_turned(image, rotate, fill, key(place, row)) for image, row in zip(found, rows, strict=True)]
        )

    return Source(
        lambda rows: read(pool, [pool_rows[row] for row in rows]),
        pool.labels[list(pool_rows)],
        [names[row] for row in pool_rows],
        Labelled(read(test, test_rows), test.labels[list(test_rows)]),
        Labelled(read(data.train, range(len(data.train))), data.train.labels) if few else None,
        labels,
    )


def _turned(image: Tensor, degrees: float, fill: int, seed: int) -> Tensor:
    angle = float(torch.rand((), generator=keyed_generator(seed, "rotate")) * 2 - 1) * degrees
    return official.rotate(image, angle, InterpolationMode.BILINEAR, fill=[float(fill)])


def letters(
    *,
    image_size: int = 16,
    characters: str = CAPITALS,
    test_designs: int = 8,
    other_designs: int = 12,
    split_seed: int = 0,
    labels: str = "correct",
    rotate: float = 0.0,
) -> Source:
    """Letters, whose class is the letter: `shots` typefaces, drawn by the seed, are labelled, the same for
    all letters; the test is on other typefaces; `other` are further ones, labelled by their typeface.

    The 30 designs of `lit_gen.data.glyphs` are divided with all that is made of them (condensed, slanted,
    in outline ...), so that no variant of a labelled design is tested on. `rotate` as in `images`. Raises
    ConfigError where fewer designs remain than are asked for.
    """
    faces = embedded_faces()
    designs = sorted(
        {(f.file, f.alphabet) for f in faces}, key=lambda d: key(split_seed, Path(d[0]).name, d[1])
    )
    if test_designs < 1 or other_designs < 0 or test_designs + other_designs >= len(designs):
        raise ConfigError(
            f"test_designs={test_designs} and other_designs={other_designs}: together fewer than "
            f"{len(designs)}, the designs there are, and one to test on at least."
        )
    cuts = (0, test_designs, test_designs + other_designs, len(designs))
    sets = []
    for start, end in pairwise(cuts):
        names = [f.name for f in faces if (f.file, f.alphabet) in designs[start:end]]
        sets.append(Glyphs(image_size, 1, characters, names) if names else None)
    test, other, pool = sets
    assert test is not None and pool is not None

    def shown(glyphs: Glyphs, rows: Sequence[int]) -> Tensor:
        some = glyphs.images[list(rows)]
        names = (f"{glyphs.classes[row // len(characters)]}/{row % len(characters)}" for row in rows)
        turned = (_turned(i, rotate, 255, key(n)) for i, n in zip(some, names, strict=True))
        return torch.stack(list(turned)) if rotate else some

    def letter(glyphs: Glyphs) -> Tensor:
        return torch.arange(len(glyphs)) % len(characters)

    return Source(
        lambda rows: shown(pool, rows),
        letter(pool),
        [pool.classes[row // len(characters)] for row in range(len(pool))],
        Labelled(shown(test, range(len(test))), letter(test)),
        None
        if other is None or other.labels is None
        else Labelled(shown(other, range(len(other))), other.labels),
        labels,
    )
