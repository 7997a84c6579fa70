"""Search spaces: a policy is a row of choices.

AutoAugment's spaces of K sub-policies of N ops, each an (op, probability, level) triple: (22 x 6 x 6)^10
policies for detection (https://arxiv.org/abs/1906.11172), (16 x 11 x 10)^10 for classification
(https://arxiv.org/abs/1805.09501).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lit_gen.augment.families import RandAugment
from lit_gen.augment.policy import Policy
from lit_gen.augment.tables import CLASSIFICATION, DETECTION, TABLES
from lit_gen.errors import ConfigError

__all__ = ["PolicySpace", "RandAugmentSpace", "Space", "classification_space", "detection_space", "merge"]

Choices = tuple[int, ...]
Searched = Any  # an `Augmentation`, or what a space of another kind decodes, which its reward takes


class Space(Protocol):
    """`sizes[i]` is the number of values of choice i; `decode` makes the augmentation of a row of choices,
    with `options` such as fill."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def options(self) -> dict[str, Any]: ...

    def decode(self, choices: Sequence[int]) -> Searched: ...


@dataclass(frozen=True)
class PolicySpace:
    """`num_sub_policies` (K) of `num_ops` (N) triples; a row of choices is op, probability, level, op,
    probability, ...

    `options` go to the policies (fill, min_visibility). Raises ConfigError for ops that `table` does not
    have.
    """

    table: str
    ops: tuple[str, ...]
    probabilities: tuple[float, ...]
    levels: tuple[float, ...]
    num_sub_policies: int = 5
    num_ops: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.table not in TABLES:
            raise ConfigError(f"PolicySpace: table = {self.table!r}; choose {' or '.join(TABLES)}.")
        unknown = [name for name in self.ops if name not in TABLES[self.table]]
        if unknown or not self.ops:
            raise ConfigError(
                f"PolicySpace: {unknown or 'no'} ops of {self.table}; it has {', '.join(TABLES[self.table])}."
            )
        if min(self.num_sub_policies, self.num_ops, len(self.probabilities), len(self.levels)) < 1:
            raise ConfigError(
                "PolicySpace: sub-policies, ops, probabilities and levels must be one at least."
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        triple = (len(self.ops), len(self.probabilities), len(self.levels))
        return triple * (self.num_sub_policies * self.num_ops)

    def decode(self, choices: Sequence[int]) -> Policy:
        """The policy of a row of choices."""
        triples = [
            (self.ops[op], self.probabilities[p], self.levels[level])
            for op, p, level in zip(choices[::3], choices[1::3], choices[2::3], strict=True)
        ]
        n = self.num_ops
        subs = [triples[i : i + n] for i in range(0, len(triples), n)]
        return Policy(subs, self.table, name="searched", **self.options)

    def encode(self, policy: Policy) -> Choices:
        """The inverse of `decode`; ValueError where the policy is not of this space."""
        row: list[int] = []
        for sub in policy.sub_policies:
            for op in sub:
                row += self.encode_op(op)
        if len(row) != len(self.sizes):
            raise ValueError(f"{len(row)} choices in the policy, {len(self.sizes)} in the space.")
        return tuple(row)

    def encode_op(self, op: tuple[str, float, float | None]) -> tuple[int, int, int]:
        """The three choices that make (name, probability, level)."""
        name, p, level = op
        if level is None:
            raise ValueError(f"{name} has no level; the policies of a space have one for every op.")
        return self.ops.index(name), self.probabilities.index(p), self.levels.index(level)

    def op_frequencies(self, rows: Sequence[Sequence[int]]) -> dict[str, float]:
        """The share of each op in rows of choices; chance is 1 / len(ops)."""
        counts = Counter(self.ops[op] for row in rows for op in row[::3])
        return {name: counts[name] / max(1, counts.total()) for name in self.ops}


def detection_space(**changes: Any) -> PolicySpace:
    """The paper's space: 22 ops x 6 probabilities x 6 levels, K = 5, N = 2.

    The 22 are the ops that the published policies use; of the official code's 25, Rotate, TranslateX and
    Solarize on boxes alone occur in none.
    """
    unused = ("Rotate_Only_BBoxes", "TranslateX_Only_BBoxes", "Solarize_Only_BBoxes")
    settings: dict[str, Any] = {
        "table": "detection",
        "ops": tuple(name for name in DETECTION if name not in unused),
        "probabilities": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        "levels": (0, 2, 4, 6, 8, 10),
    }
    return PolicySpace(**settings | changes)


def classification_space(**changes: Any) -> PolicySpace:
    """The paper's space: 16 ops x 11 probabilities x 10 levels, K = 5, N = 2; SamplePairing needs batches."""
    settings: dict[str, Any] = {
        "table": "classification",
        "ops": tuple(name for name in CLASSIFICATION if name != "Identity"),
        "probabilities": tuple(i / 10 for i in range(11)),
        "levels": tuple(range(10)),
    }
    return PolicySpace(**settings | changes)


@dataclass(frozen=True)
class RandAugmentSpace:
    """RandAugment's two numbers (https://arxiv.org/abs/1909.13719)."""

    num_ops: tuple[int, ...] = (1, 2, 3)
    magnitudes: tuple[int, ...] = (3, 6, 9, 12, 15, 18, 21, 24, 27, 30)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, ...]:
        return len(self.num_ops), len(self.magnitudes)

    def decode(self, choices: Sequence[int]) -> RandAugment:
        """RandAugment(N, M)."""
        return RandAugment(self.num_ops[choices[0]], self.magnitudes[choices[1]], **self.options)


def randaugment_grid(space: Space, budget: int) -> RandAugmentSpace:
    """At most `budget` cells of one, two or three ops at evenly spread magnitudes, with the options of
    `space`."""
    ops = (1, 2, 3)[: max(1, budget // 2)]
    magnitudes = torch.linspace(3, 30, max(1, budget // len(ops))).round().int().tolist()
    return RandAugmentSpace(ops, tuple(dict.fromkeys(magnitudes)), options=space.options)


def random_choices(space: Space, generator: torch.Generator) -> Choices:
    """Every choice uniform."""
    return tuple(int(torch.randint(size, (), generator=generator)) for size in space.sizes)


def merge(policies: Sequence[Policy]) -> Policy:
    """All sub-policies in one policy, as the papers do with the best of a search; options are those of the
    first."""
    first = policies[0]
    subs = [sub for policy in policies for sub in policy.sub_policies]
    options = {"fill": first.fill, "min_visibility": first.min_visibility, "box_format": first.box_format}
    return Policy(subs, first.ops, name="merged", official=first.official, **options)
