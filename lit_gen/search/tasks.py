"""What a policy search can be about: the rewards of conf/reward.

Each function makes a `Task` of (space, data, seed): what the search maximises, and what its result is worth
on images that the search has not seen. Data sets, child models, and rewards meet here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gen.augment import Augmentation, Policy, RandAugment
from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator
from lit_gen.search import (
    ClassifierReward,
    Grid,
    Labelled,
    PolicySpace,
    RandAugmentSpace,
    Reward,
    Space,
    SyntheticReward,
    density_folds,
)
from lit_gen.search.detector import DetectorReward, boxed, detection_scores
from lit_gen.search.rewards import accuracy

__all__ = ["Task", "classifier", "density", "detector", "grid", "randaugment_grid", "synthetic"]


@dataclass
class Task:
    """What a search is about.

    `rewards`: one search each, whose best policies are merged. `test(augmentation or None, k)`: the score, in
    `unit`, of child model k of a result on images that no search has seen. `example`: an image uint8
    (C, H, W) and perhaps boxes (N, 4), for pictures. `compared`: what else is put beside the results.
    """

    rewards: Sequence[Reward]
    test: Callable[[Augmentation | None, int], float]
    unit: str
    example: tuple[Tensor, Tensor | None] | None = None
    compared: dict[str, Augmentation] | None = None


def synthetic(space: Space, data: Any, seed: int, *, noise: float = 0.02) -> Task:
    """A landscape with a known optimum of 1; see `SyntheticReward`."""
    if not isinstance(space, PolicySpace):
        raise ConfigError("reward=synthetic needs a space of policies: detection, classification or small.")
    reward = SyntheticReward(space, seed, noise)
    return Task([reward], lambda policy, k: 0.0 if policy is None else reward.exact(policy), "reward")


def classifier(
    space: Space,
    data: Any,
    seed: int,
    *,
    train_size: int = 300,
    validation_size: int = 400,
    test_size: int = 1000,
    scale: int = 1,
    child: dict[str, Any] | None = None,
) -> Task:
    """Accuracy of small CNNs; `child` goes to `train_classifier`."""
    train, validation, test = _labelled(data, seed, train_size, validation_size, test_size, scale)
    reward = ClassifierReward(train, validation, len(data.train.classes), **child or {})
    return _classification([reward], reward, test, space)


def density(
    space: Space,
    data: Any,
    seed: int,
    *,
    train_size: int = 300,
    validation_size: int = 400,
    test_size: int = 1000,
    scale: int = 1,
    child: dict[str, Any] | None = None,
    **folding: Any,
) -> Task:
    """Fast AutoAugment's density matching on the images that `classifier` trains and validates on; its
    result is tested as there. `folding` goes to `density_folds`."""
    train, validation, test = _labelled(data, seed, train_size, validation_size, test_size, scale)
    classes = len(data.train.classes)
    both = Labelled(
        torch.cat([train.images, validation.images]), torch.cat([train.labels, validation.labels])
    )
    rewards = density_folds(both, classes, seed=seed, **folding, **child or {})
    return _classification(rewards, ClassifierReward(train, validation, classes, **child or {}), test, space)


def _classification(
    rewards: Sequence[Reward], tested: ClassifierReward, test: Labelled, space: Space
) -> Task:
    """The task whose result is tested by the accuracy of the child models of `tested`."""
    return Task(
        rewards,
        lambda augmentation, k: accuracy(tested.child(augmentation, 1000 + k), test),
        "accuracy",
        (tested.train.images[0], None),
        {"RandAugment (2, 9)": RandAugment(2, 9, **_options(space))},
    )


def detector(
    space: Space,
    data: Any,
    seed: int,
    *,
    train_size: int = 200,
    validation_size: int = 100,
    test_size: int = 300,
    child: dict[str, Any] | None = None,
) -> Task:
    """mAP50 of small detectors; `child` goes to `train_detector`."""
    _needs(data, "boxes", "scenes")
    rows = _split(len(data.train), seed, train_size, validation_size)
    train, validation = (boxed(data.train, part) for part in rows)
    test = boxed(data.test, range(min(test_size, len(data.test))))
    reward = DetectorReward(train, validation, len(data.train.classes), **child or {})
    return Task(
        [reward],
        lambda augmentation, k: detection_scores(reward.child(augmentation, 1000 + k), test)["map50"],
        "mAP50",
        (train.images[0], train.boxes[0]),
        {"detection_v1": Policy.load("detection_v1"), "RandAugment (2, 9)": RandAugment(2, 9)},
    )


def grid(space: Space, seed: int, *, batch: int = 8) -> Grid:
    """Every cell of the space once, in an order that needs no seed."""
    return Grid(space, batch)


def randaugment_grid(space: Space, budget: int) -> RandAugmentSpace:
    """At most `budget` cells of one, two or three ops at evenly spread magnitudes, with the options of
    `space`."""
    ops = (1, 2, 3)[: max(1, budget // 2)]
    magnitudes = torch.linspace(3, 30, max(1, budget // len(ops))).round().int().tolist()
    return RandAugmentSpace(ops, tuple(dict.fromkeys(magnitudes)), options=_options(space))


def _options(space: Space) -> dict[str, Any]:
    return dict(getattr(space, "options", {}))


def _needs(data: Any, field: str, example: str) -> None:
    if data is None:
        raise ConfigError(f"This reward trains child models: give data=<a data set>, {example} for instance.")
    if field not in data.train[0]:
        raise ConfigError(
            f"The images of data= have no {field}: choose another, data={example} for instance."
        )


def _split(size: int, seed: int, *sizes: int) -> list[list[int]]:
    """Disjoint rows, drawn by the seed."""
    if min(sizes) < 1 or sum(sizes) > size:
        raise ConfigError(
            f"reward.train_size={sizes[0]} and validation_size={sizes[1]} must be at least 1 and together at "
            f"most {size}, the images of the training split."
        )
    order = torch.randperm(size, generator=keyed_generator(seed, "search", "split"))
    return [part.tolist() for part in order[: sum(sizes)].split(list(sizes))]


def _labelled(
    data: Any, seed: int, train_size: int, validation_size: int, test_size: int, scale: int
) -> list[Labelled]:
    """Training and validation images, disjoint, of the training split; test images of the test split."""
    _needs(data, "label", "digits")
    if scale < 1:
        raise ConfigError(f"reward.scale={scale}: must be at least 1.")
    test = torch.randperm(len(data.test), generator=keyed_generator(seed, "search", "test"))[:test_size]
    parts = [(data.train, rows) for rows in _split(len(data.train), seed, train_size, validation_size)]
    return [_rows(dataset, rows, scale) for dataset, rows in [*parts, (data.test, test.tolist())]]


def _rows(dataset: Any, rows: Iterable[int], scale: int) -> Labelled:
    items = [dataset[i] for i in rows]
    images = torch.stack([item["image"] for item in items])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return Labelled(images, torch.tensor([int(item["label"]) for item in items]))
