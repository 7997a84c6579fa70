"""What a policy search can be about: the rewards of conf/reward.

Each function makes a `Task` of (space, data, seed): what the search maximizes, and what its result is worth
on images that the search has not seen. Data sets, child models, and rewards meet here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_gen.augment import Policy, RandAugment
from lit_gen.augment.conditional import ConditionalAugment
from lit_gen.errors import ConfigError
from lit_gen.metrics import Extractor
from lit_gen.rng import keyed_generator
from lit_gen.search.density import density_folds
from lit_gen.search.detector import DetectorReward, boxed
from lit_gen.search.generative import GenerativeReward
from lit_gen.search.loop import Reward
from lit_gen.search.rewards import ChildReward, ClassifierReward, Labelled, SyntheticReward
from lit_gen.search.space import PolicySpace, Searched, Space


@dataclass
class Task:
    """What a search is about.

    `rewards`: one search each, whose best policies are merged. `test(augmentation or None, k)`: the score, in
    `unit`, of child model k of a result on images that no search has seen. `example`: an image uint8
    (C, H, W) and perhaps boxes (N, 4), for pictures. `compared`: what else is put beside the results.
    """

    rewards: Sequence[Reward]
    test: Callable[[Searched, int], float]
    unit: str
    example: tuple[Tensor, Tensor | None] | None = None
    compared: Mapping[str, Searched] = field(default_factory=dict)


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
    """Accuracy of small CNNs; `child` goes to `train_classifier`. `scale` enlarges the images."""
    _needs(data, "label", "digits")
    if scale < 1:
        raise ConfigError(f"reward.scale={scale}: must be at least 1.")
    test = torch.randperm(len(data.test), generator=keyed_generator(seed, "search", "test"))[:test_size]
    parts = _split(len(data.train), seed, train_size, validation_size)
    train, validation = (_labelled(data.train, rows, scale) for rows in parts)
    reward = ClassifierReward(train, validation, len(data.train.classes), **child or {})
    test_data = _labelled(data.test, test.tolist(), scale)
    compared = {"RandAugment (2, 9)": RandAugment(2, 9, **space.options)}
    return Task([reward], _test(reward, test_data), "accuracy", (train.images[0], None), compared)


def density(
    space: Space,
    data: Any,
    seed: int,
    *,
    folds: int = 5,
    held_out: float = 0.4,
    passes: int = 2,
    strength: float = 0.5,
    **settings: Any,
) -> Task:
    """Fast AutoAugment's density matching (see `density_folds`) on the images that `classifier`, with these
    `settings`, trains and validates on; its result is tested as there."""
    task = classifier(space, data, seed, **settings)
    (reward,) = task.rewards
    assert isinstance(reward, ClassifierReward)
    parts = reward.train, reward.validation
    both = Labelled(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
    folding = {"folds": folds, "held_out": held_out, "passes": passes, "strength": strength}
    rewards = density_folds(both, reward.classes, seed=seed, **folding, **reward.training)
    return replace(task, rewards=rewards)


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
    parts = _split(len(data.train), seed, train_size, validation_size)
    train, validation = (boxed(data.train, rows) for rows in parts)
    test_data = boxed(data.test, range(min(test_size, len(data.test))))
    reward = DetectorReward(train, validation, len(data.train.classes), **child or {})
    compared = {"detection_v1": Policy.load("detection_v1"), "RandAugment (2, 9)": RandAugment(2, 9)}
    return Task([reward], _test(reward, test_data), "mAP50", (train.images[0], train.boxes[0]), compared)


def generative(
    space: Space,
    data: Any,
    seed: int,
    *,
    extractor: Extractor,
    train_size: int = 100,
    validation_size: int = 400,
    test_size: int = 1000,
    num_steps: int = 12,
    child: dict[str, Any] | None = None,
) -> Task:
    """The negative Fréchet distance, by the features of `extractor`, of the samples of small score models;
    `child` goes to `train_score_model`."""
    _needs(data, "label", "digits")
    parts = _split(len(data.train), seed, train_size, validation_size)
    train, validation = (_labelled(data.train, rows, 1) for rows in parts)
    test_data = _labelled(data.test, range(min(test_size, len(data.test))), 1)
    options = {"extractor": extractor, "num_steps": num_steps, **(child or {})}
    reward = GenerativeReward(train, validation, len(data.train.classes), **options)
    return Task([reward], _test(reward, test_data), "negative FD", None, {"EDM's": ConditionalAugment()})


def _test(reward: ChildReward, data: Any) -> Callable[[Searched, int], float]:
    return lambda augmentation, k: reward.score(reward.child(augmentation, 1000 + k), data)


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


def _labelled(dataset: Any, rows: Iterable[int], scale: int) -> Labelled:
    items = [dataset[i] for i in rows]
    images = torch.stack([item["image"] for item in items])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return Labelled(images, torch.tensor([int(item["label"]) for item in items]))
