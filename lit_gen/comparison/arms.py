"""Arms without a generator: nothing, copies, flips and shifts, known policies, searched policies, and what
unites two arms."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_gen.augment import Augmentation, Draws, Policy
from lit_gen.augment import pixels as pixel_ops
from lit_gen.augment.ops import PixelOp, WarpOp
from lit_gen.augment.policy import uniform
from lit_gen.augment.warps import translation_x, translation_y
from lit_gen.comparison.task import Treatment, seconds, split
from lit_gen.errors import ConfigError
from lit_gen.rng import key, keyed_generator
from lit_gen.search import ClassifierReward, Labelled, Method, Reward, Space, density_folds, merge, run

__all__ = ["Augmented", "Copies", "FlipsAndShifts", "Nothing", "OneOf", "Searched", "united"]


class Nothing:
    """The labelled images as they are: what every arm is compared with."""

    needs_other = False

    def treatments(
        self, train: Labelled, classes: int, seed: int, other: Labelled | None
    ) -> Iterator[Treatment]:
        yield Treatment()


class Copies:
    """Exact copies of the labelled images in the place of made ones: a control, which must not help."""

    needs_other = False

    def treatments(
        self, train: Labelled, classes: int, seed: int, other: Labelled | None
    ) -> Iterator[Treatment]:
        yield Treatment(made=train)


class Augmented:
    """Augmentations that are known before any image is: `candidates`, name -> augmentation."""

    needs_other = False

    def __init__(self, candidates: dict[str, Augmentation]):
        if not candidates:
            raise ConfigError("candidates={}: an arm needs one augmentation at least.")
        self.candidates = candidates

    def treatments(
        self, train: Labelled, classes: int, seed: int, other: Labelled | None
    ) -> Iterator[Treatment]:
        for name, augmentation in self.candidates.items():
            yield Treatment(augmentation, setting=name)


def _rounded(m: float, side: int, longer: int) -> int:
    return round(m * side)


class FlipsAndShifts(Augmentation):
    """What nearly every training on natural images does: left and right exchanged with probability `flip`,
    and a shift along either axis by up to `shift` of the side, in whole pixels."""

    def __init__(self, flip: float = 0.5, shift: float = 0.125, **options: Any):
        if not 0 <= flip <= 1 or not 0 <= shift < 1:
            raise ConfigError(f"flip={flip} must lie in [0, 1], shift={shift} in [0, 1).")
        ops = [
            PixelOp("Flip", apply=pixel_ops.flip),
            WarpOp("TranslateX", maps=translation_x, length=_rounded),
            WarpOp("TranslateY", maps=translation_y, length=_rounded, axis=-2),
        ]
        super().__init__({op.name: op for op in ops}, **options)
        self.flip, self.shift = flip, shift

    def sample(self, num_boxes: int = 0, generator: torch.Generator | None = None) -> Draws:
        u = uniform(3, generator)
        flips = [{"op": "Flip"}] if next(u) < self.flip else []
        shifts = [{"op": f"Translate{axis}", "magnitude": (2 * next(u) - 1) * self.shift} for axis in "XY"]
        return {"ops": [*flips, *(shifts if self.shift else [])]}


class OneOf(Augmentation):
    """For each image one of several augmentations, uniformly drawn."""

    def __init__(self, parts: Sequence[Augmentation]):
        super().__init__(parts[0].table, fill=parts[0].fill)
        self.parts = list(parts)

    def sample(self, num_boxes: int = 0, generator: torch.Generator | None = None) -> Draws:
        part = int(next(uniform(1, generator)) * len(self.parts))
        return {"part": part, "draws": self.parts[part].sample(num_boxes, generator)}

    def apply_batch(
        self, images: Tensor, boxes: Any, draws: Sequence[Draws], *options: Any, **named: Any
    ) -> tuple[Any, ...]:
        """Images alone; otherwise as `Augmentation.apply_batch`."""
        out = images.clone()
        for number, part in enumerate(self.parts):
            rows = [i for i, draw in enumerate(draws) if draw["part"] == number]
            if rows:
                out[rows] = part.apply_batch(images[rows], None, [draws[i]["draws"] for i in rows])[0]
        return out, None, None


class Searched:
    """A policy that is searched on the labelled images alone: child classifiers are trained on a part of them
    and validated on the rest, `held_out` of every class; the `top` best policies are merged.

    `method(space=, seed=)` proposes policies (`lit_gen.search`), `budget` of them; `child` goes to
    `train_classifier`. With `folds` the reward is density matching, on so many splits with `budget` policies
    each: no child is trained for a policy. Where a class has one image there is nothing to validate on, and
    the arm leaves the images as they are.
    """

    needs_other = False

    def __init__(
        self,
        space: Space,
        method: Callable[..., Method],
        budget: int,
        child: dict[str, Any],
        top: int = 3,
        held_out: float = 0.4,
        folds: int = 0,
    ):
        if budget < 1 or top < 1 or not 0 < held_out < 1 or folds < 0:
            raise ConfigError(
                f"budget={budget} and top={top} must be at least 1, held_out={held_out} within (0, 1), "
                f"folds={folds} not negative."
            )
        self.space, self.method, self.budget, self.child = space, method, budget, child
        self.top, self.held_out, self.folds = top, held_out, folds

    def treatments(
        self, train: Labelled, classes: int, seed: int, other: Labelled | None
    ) -> Iterator[Treatment]:
        if int(train.labels.bincount(minlength=classes).min()) < 2:
            yield Treatment(setting="one image a class: no search")
            return
        start = seconds(train.images.device)
        best: list[Any] = []
        for part, reward in enumerate(self._rewards(train, classes, seed)):
            method = self.method(space=self.space, seed=key(seed, "comparison", part))
            best += run(self.space, reward, method, self.budget).top(self.top)
        policy = merge(best) if isinstance(best[0], Policy) else OneOf(best)
        ops = [op for sub in policy.sub_policies for op in sub] if isinstance(policy, Policy) else []
        setting = ", ".join(f"{name} {probability:g} {level:g}" for name, probability, level in ops)
        yield Treatment(policy, setting=setting, cost={"search": seconds(train.images.device) - start})

    def _rewards(self, train: Labelled, classes: int, seed: int) -> Sequence[Reward]:
        if self.folds:
            options = {"folds": self.folds, "held_out": self.held_out, "seed": seed, "split": split}
            return density_folds(train, classes, **options, **self.child)
        generator = keyed_generator(seed, "comparison", "search split")
        first, second = split(train.labels, self.held_out, generator)
        return [ClassifierReward(train[first], train[second], classes, seeds=(seed,), **self.child)]


def united(first: Treatment, second: Treatment, setting: str) -> Treatment:
    """Both: the made images of either, and for each image, labelled or made, one of the augmentations."""
    augmentations = [t.augmentation for t in (first, second) if t.augmentation is not None]
    made = [t.made for t in (first, second) if t.made is not None]
    return Treatment(
        OneOf(augmentations) if len(augmentations) > 1 else next(iter(augmentations), None),
        Labelled(torch.cat([m.images for m in made]), torch.cat([m.labels for m in made])) if made else None,
        setting,
    )
