"""Rewards: what a policy is worth. `reward(augmentation) -> float`, the higher the better, the same for the
same policy.

`ClassifierReward` trains a small child model on augmented images (AutoAugment); `DensityReward` trains one
without augmentation and scores how well it recognizes augmented images (Fast AutoAugment); `SyntheticReward`
has a known optimum, to test a search. Images are uint8 (N, C, H, W), labels int64 (N,).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gen import rng
from lit_gen.augment.families import augmix_loss
from lit_gen.augment.policy import Augmentation, Policy
from lit_gen.errors import ConfigError
from lit_gen.images import to_float
from lit_gen.schedules import train_one_cycle
from lit_gen.search.space import PolicySpace

__all__ = ["ClassifierReward", "DensityReward", "Labelled", "SyntheticReward"]


@dataclass(frozen=True)
class Labelled:
    """uint8 images (N, C, H, W) and int64 labels (N,)."""

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or len(self.images) != len(self.labels):
            raise ConfigError(
                f"Labelled data are uint8 (N, C, H, W) and N labels, got {self.images.dtype} "
                f"{tuple(self.images.shape)} and {len(self.labels)}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> "Labelled":
        return Labelled(self.images[rows], self.labels[rows])


def small_cnn(channels: int, classes: int, width: int = 16) -> nn.Module:
    """Three convolutions with batch normalization, pooling after each, one linear layer; any size from 8
    pixels on."""
    layers: list[nn.Module] = []
    for i in range(3):
        inputs, outputs = (channels if i == 0 else width << (i - 1)), width << i
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(width * 16, classes))


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=generator).split(size)
    return (rows for rows in order if len(rows) > 1 or count == 1)  # batch normalization needs two


def _endless(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of `size` rows without end, permutation after permutation, so that a batch may hold a row more
    than once."""
    rows = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rows) < size:
            rows = torch.cat([rows, torch.randperm(count, generator=generator)])
        yield rows[:size]
        rows = rows[size:]


def _epochs(data: Labelled, epochs: int, size: int, seed: int) -> Iterator[tuple[Labelled, torch.Generator]]:
    """Batches, and the generators that their augmentation is drawn by."""
    for epoch in range(epochs):
        generator = rng.keyed_generator(seed, "child", epoch)
        for rows in _batches(len(data), size, generator):
            yield data[rows], generator


def _steps(
    data: Labelled, made: Labelled | None, steps: int, size: int, seed: int
) -> Iterator[tuple[Labelled, torch.Generator]]:
    """As `_epochs`; with made images half of each batch is of them."""
    generator = rng.keyed_generator(seed, "child", "augment")
    real = _endless(
        len(data), size if made is None else size - size // 2, rng.keyed_generator(seed, "child", "real")
    )
    if made is None:
        yield from ((data[next(real)], generator) for _ in range(steps))
        return
    more = _endless(len(made), size // 2, rng.keyed_generator(seed, "child", "made"))
    for _ in range(steps):
        first, second = data[next(real)], made[next(more)]
        both = zip((first.images, first.labels), (second.images, second.labels), strict=True)
        yield Labelled(*(torch.cat(pair) for pair in both)), generator


def train_classifier(
    data: Labelled,
    augmentation: Augmentation | None,
    *,
    classes: int,
    made: Labelled | None = None,
    epochs: int = 8,
    steps: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    width: int = 16,
    consistency: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """A small CNN trained with Adam and a one-cycle schedule; with an augmentation, drawn anew for each image
    and epoch.

    `consistency` puts AugMix's loss in the place of the cross-entropy (https://arxiv.org/abs/1912.02781,
    Eq. 3; the paper's weight is 12): that of the clean images, plus as many times the Jensen-Shannon
    divergence of what is said of an image and of two augmentations of it.

    `steps` in the place of `epochs` trains with so many batches of exactly `batch_size` images, however few
    there are; half of each are then from `made`, if there are any. Raises ConfigError for `made` without
    `steps`.
    """
    if made is not None and steps is None:
        raise ConfigError("Made images are mixed into the batches of a training of steps=, not of epochs.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(seed, "child") % 2**63)
        net = small_cnn(data.images.shape[1], classes, width).to(data.images.device)
    if steps is None:
        count = epochs * sum(1 for _ in _batches(len(data), batch_size, torch.Generator()))
        batches = _epochs(data, epochs, batch_size, seed)
    else:
        count, batches = steps, _steps(data, made, steps, batch_size, seed)

    def losses() -> Iterator[Tensor]:
        for batch, generator in batches:
            views = [batch.images]
            if augmentation is not None:
                draws = [
                    augmentation.sample_batch(len(batch), generator) for _ in range(2 if consistency else 1)
                ]
                views += [augmentation.apply_batch(batch.images, None, each)[0] for each in draws]
            if len(views) == 3:
                yield augmix_loss(net(to_float(torch.cat(views))).chunk(3), batch.labels, consistency)
            else:
                yield F.cross_entropy(net(to_float(views[-1])), batch.labels)

    train_one_cycle(net, torch.optim.Adam(net.parameters(), lr=learning_rate), losses(), count)
    return net


@torch.no_grad()
def accuracy(net: nn.Module, data: Labelled, batch_size: int = 500) -> float:
    """The fraction of images that are classified correctly."""
    hits = [
        (net(to_float(images)).argmax(1) == labels).sum()
        for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True)
    ]
    return float(torch.stack(hits).sum()) / len(data)


class ChildReward:
    """The validation score of child models trained with the policy; the mean over `seeds`. `training` goes to
    `fit`, the function that trains one; `score` is what it is worth on the data, the higher the better."""

    fit: Callable[..., nn.Module]
    score: Callable[..., float]
    images: int  # that the child models of one policy see in training

    def __init__(
        self, train: Any, validation: Any, classes: int, *, seeds: Sequence[int] = (0,), **training: Any
    ):
        self.train, self.validation, self.classes = train, validation, classes
        self.seeds, self.training = seeds, training

    def __call__(self, augmentation: Augmentation | None) -> float:
        scores = [self.score(self.child(augmentation, seed), self.validation) for seed in self.seeds]
        return sum(scores) / len(scores)

    def child(self, augmentation: Augmentation | None, seed: int) -> nn.Module:
        """The child model of this seed; None trains without augmentation."""
        return self.fit(self.train, augmentation, classes=self.classes, seed=seed, **self.training)


class ClassifierReward(ChildReward):
    """Validation accuracy of a small CNN; `training`: see `train_classifier`. Raises ConfigError for a
    negative `consistency`."""

    fit, score = staticmethod(train_classifier), staticmethod(accuracy)

    def __init__(self, *data: Any, **options: Any):
        super().__init__(*data, **options)
        consistency = self.training.get("consistency", 0.0)
        if consistency < 0:
            raise ConfigError(f"consistency={consistency}: must be 0 (cross-entropy) or more (AugMix: 12).")
        views = 3 if consistency else 1
        seen = len(self.train) * self.training.get("epochs", 8)
        if (steps := self.training.get("steps")) is not None:
            seen = steps * self.training.get("batch_size", 64)
        self.images = seen * len(self.seeds) * views


class DensityReward:
    """Fast AutoAugment's density matching: the accuracy, on augmented held-out images, of a net trained
    without augmentation.

    The mean over `passes` draws (the published code takes, image by image, the best of its passes, which
    favors policies that do nothing). Doing nothing would still be best, so a policy that changes less than
    `strength` of the images loses what is missing.
    """

    def __init__(
        self, net: nn.Module, held_out: Labelled, *, passes: int = 2, strength: float = 0.5, seed: int = 0
    ):
        self.net, self.held_out, self.passes, self.strength, self.seed = net, held_out, passes, strength, seed
        self.images = passes * len(held_out)

    def __call__(self, augmentation: Augmentation) -> float:
        scores, changed = [], []
        for k in range(self.passes):
            generator = rng.keyed_generator(self.seed, "density", k)
            draws = augmentation.sample_batch(len(self.held_out), generator)
            images, _, _ = augmentation.apply_batch(self.held_out.images, None, draws)
            changed.append((images != self.held_out.images).flatten(1).any(1).float().mean())
            scores.append(accuracy(self.net, Labelled(images, self.held_out.labels)))
        missing = max(0.0, self.strength - float(sum(changed)) / self.passes)
        return sum(scores) / self.passes - missing


class SyntheticReward:
    """A landscape with a known optimum of 1: each op of the policy earns 1/(K N) if it is one of `good` ops
    (a third of all, drawn by `seed`), times how close its probability and its level are to the op's own best
    values. `noise` is added, the same for the same policy."""

    images = 0

    def __init__(self, space: PolicySpace, seed: int = 0, noise: float = 0.02):
        g = rng.keyed_generator(seed, "planted")  # the key by which docs/augment.md's landscapes are drawn
        n = len(space.ops)
        self.space, self.seed, self.noise = space, seed, noise
        self.good = set(torch.randperm(n, generator=g)[: max(1, n // 3)].tolist())
        self.best_p = torch.randint(len(space.probabilities), (n,), generator=g).tolist()
        self.best_level = torch.randint(len(space.levels), (n,), generator=g).tolist()

    def exact(self, policy: Augmentation) -> float:
        """The reward without noise, of any policy of the space's ops, probabilities and levels."""
        assert isinstance(policy, Policy)
        ops = [op for sub in policy.sub_policies for op in sub]
        return sum(self._op(*self.space.encode_op(op)) for op in ops) / len(ops)

    def _op(self, op: int, p: int, level: int) -> float:
        if op not in self.good:
            return 0.0
        far_p = abs(p - self.best_p[op]) / max(1, len(self.space.probabilities) - 1)
        far_level = abs(level - self.best_level[op]) / max(1, len(self.space.levels) - 1)
        return (1 - far_p) * (1 - far_level)

    def __call__(self, policy: Augmentation) -> float:
        assert isinstance(policy, Policy)
        g = rng.keyed_generator(self.seed, "planted", *self.space.encode(policy))
        return self.exact(policy) + self.noise * float(torch.randn((), generator=g))
