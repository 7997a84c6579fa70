"""What proposes policies: random, grid, TPE. (PPO, the paper's method, is in ppo.py.)

A method is deterministic given its seed and what it is told: `ask()` gives the next rows of choices, `tell`
their rewards, in that order. A search is resumed by telling a new method the rewards of the trial log again.
"""

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Protocol

from lit_gen import rng
from lit_gen.search.space import Choices, Space, random_choices
from lit_gen.sweeps.storage import optuna_or_error

__all__ = ["TPE", "Grid", "Method", "Random"]

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.samplers import BaseSampler


def tpe_sampler(seed: int, several: bool) -> "BaseSampler":
    """Optuna's tree-structured Parzen estimator. `several` trials at once count as bad while they run, so
    that they are different."""
    return optuna_or_error().samplers.TPESampler(seed=seed % 2**32, constant_liar=several)


def suggest(trial: "Trial", space: Space) -> Choices:
    """The row of choices that the trial's sampler suggests."""
    return tuple(trial.suggest_categorical(f"{i:03d}", range(size)) for i, size in enumerate(space.sizes))


class Method(Protocol):
    """`ask` gives rows of choices to try at once (none: the method is done), `tell` takes their
    rewards."""

    def ask(self) -> list[Choices]: ...

    def tell(self, rows: Sequence[Choices], rewards: Sequence[float]) -> None: ...


class Random:
    """Uniform choices: the random baseline, which any search has to beat at an equal budget."""

    def __init__(self, space: Space, seed: int = 0, batch: int = 8):
        self.space, self.batch = space, batch
        self.generator = rng.keyed_generator(seed, "search", "random")

    def ask(self) -> list[Choices]:
        return [random_choices(self.space, self.generator) for _ in range(self.batch)]

    def tell(self, rows: Sequence[Choices], rewards: Sequence[float]) -> None:
        """Learns nothing."""


class Grid:
    """Every row of choices once, the last choice running fastest: for small spaces (RandAugment's). No seed
    changes the order."""

    def __init__(self, space: Space, seed: int = 0, batch: int = 8):
        self.rows, self.batch = product(*(range(size) for size in space.sizes)), batch

    def ask(self) -> list[Choices]:
        return [row for _, row in zip(range(self.batch), self.rows, strict=False)]

    def tell(self, rows: Sequence[Choices], rewards: Sequence[float]) -> None:
        """Learns nothing."""


class TPE:
    """Optuna's tree-structured Parzen estimator, the optimizer of Fast AutoAugment
    (https://arxiv.org/abs/1905.00397)."""

    def __init__(self, space: Space, seed: int = 0, batch: int = 1):
        self.space, self.batch = space, batch
        sampler = tpe_sampler(rng.key(seed, "search", "tpe"), several=batch > 1)
        self.study = optuna_or_error().create_study(direction="maximize", sampler=sampler)
        self.trials: list[Trial] = []

    def ask(self) -> list[Choices]:
        self.trials = [self.study.ask() for _ in range(self.batch)]
        return [suggest(trial, self.space) for trial in self.trials]

    def tell(self, rows: Sequence[Choices], rewards: Sequence[float]) -> None:
        """Rewards of the last `ask`."""
        for trial, reward in zip(self.trials, rewards, strict=True):
            self.study.tell(trial, reward)
