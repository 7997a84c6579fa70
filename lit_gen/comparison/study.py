"""The study: a cell for every arm, number of shots, and seed, each measured once, by however many processes.

A cell depends on its arm, shots, and seed alone. It is a line of `cells.jsonl`, written whole when the cell
is done; processes on one `out` share the cells by locked files, which end with their process. What an arm
gave is kept in `treatments/`, for the arm that unites two others.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lit_gen.augment import Policy
from lit_gen.comparison.arms import united
from lit_gen.comparison.generators import sheet
from lit_gen.comparison.task import Arm, Source, Task, Treatment, seconds, split
from lit_gen.errors import ConfigError
from lit_gen.images import save_png
from lit_gen.rng import key, keyed_generator
from lit_gen.search import Labelled
from lit_gen.search.rewards import accuracy, train_classifier

__all__ = ["Cell", "Study", "Union"]

POLL = 1.0  # seconds between looks at the cells that others measure


@dataclass(frozen=True)
class Cell:
    """One training: an arm, on so many labelled images a class, by a seed."""

    arm: str
    shots: int
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}-{self.shots}-{self.seed}"


@dataclass(frozen=True)
class Union:
    """The two arms that do best on the validation part of the labelled images, together. `among`: names of
    arms; None: all of the study that learn from the labelled images alone, but for `controls`."""

    among: Sequence[str] | None = None
    controls: Sequence[str] = ("none", "copies")
    needs_other = False


class Study:
    """`arms`: name -> arm; `options`, which a cell's result depends on beside its arm's own: plain values,
    "arms" by name among them. `classifier` goes to `train_classifier`. `held_out` of every class validates
    the candidates of an arm. `made`: numbers of made images a class that are tried beside all that were made.
    """

    def __init__(
        self,
        source: Source,
        arms: Mapping[str, Arm | Union],
        out: Path,
        *,
        classifier: dict[str, Any],
        options: Mapping[str, Any],
        held_out: float = 0.5,
        made: Sequence[int] = (),
        device: torch.device | None = None,
    ):
        if not 0 < held_out < 1 or any(n < 1 for n in made):
            raise ConfigError(f"held_out={held_out} must lie within (0, 1), made={list(made)} be at least 1.")
        if classifier.get("steps") is None:
            raise ConfigError("classifier.steps must be given: it is the same for all arms.")
        for name, arm in arms.items():
            if arm.needs_other and source.other is None:
                raise ConfigError(
                    f"arms.{name} learns from other classes or typefaces; the data have none. Leave it out."
                )
        self.source, self.arms, self.out = source, dict(arms), out
        self.classifier, self.held_out, self.made = classifier, held_out, list(made)
        self.device = device or torch.device("cpu")
        shared = {name: value for name, value in options.items() if name != "arms"}
        self.digests = {
            name: _digest(shared, options["arms"].get(name) if name in arms else None)
            for name, arm in arms.items()
        }
        for name, arm in arms.items():
            if isinstance(arm, Union):
                parts = self.united_arms(arm)
                if len(parts) < 2:
                    raise ConfigError(f"arms.{name} unites two of {', '.join(parts) or 'none'}: add arms.")
                self.digests[name] = _digest(self.digests[name], [self.digests[part] for part in parts])
        for folder in ("locks", "treatments"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    def united_arms(self, union: Union) -> list[str]:
        """Names of the arms that the union is of. Raises ConfigError for an arm that the study lacks."""
        if union.among is not None:
            if missing := [name for name in union.among if name not in self.arms]:
                raise ConfigError(f"The union is among {missing[0]!r}, which is no arm of the study.")
            return list(union.among)
        return [
            name
            for name, arm in self.arms.items()
            if not isinstance(arm, Union) and not arm.needs_other and name not in union.controls
        ]

    def cells(self, shots: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
        """All of them, seed by seed, unions last."""
        names = sorted(self.arms, key=lambda name: isinstance(self.arms[name], Union))
        return [Cell(name, n, seed) for seed in seeds for n in shots for name in names]

    def records(self) -> dict[Cell, dict[str, Any]]:
        """What is measured so far under the options of today; a torn last line is none."""
        file = self.out / "cells.jsonl"
        found = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            cell = Cell(record["arm"], record["shots"], record["seed"])
            if record["options"] == self.digests.get(cell.arm):
                found[cell] = record
        return found

    def work(self, cells: Sequence[Cell], report: Any = print) -> None:
        """Measures what is left of the cells, beside other processes that do the same; returns when all are
        measured. `report(text)` hears of every cell measured here."""
        while True:
            done = self.records()
            left = [cell for cell in cells if cell not in done]
            if not left:
                return
            for cell in left:
                if any(part not in done for part in self._parts(cell)):
                    continue
                with self._claimed(cell) as mine:
                    if mine and cell not in self.records():
                        record = self.measure(cell)
                        self._append(record)
                        report(
                            f"{cell}: {record['accuracy']:.4f} in {sum(record['seconds'].values()):.1f} s, "
                            f"{len(left) - 1} cells left"
                        )
                        break
            else:
                time.sleep(POLL)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The record of a cell: what is chosen on the labelled images, and its accuracy on the test images.
        `seconds`: of the choice, of the arm on all labelled images, and of the classifier."""
        task, start = self.source.task(cell.shots, cell.seed, self.device), seconds(self.device)
        arm = self.arms[cell.arm]
        index, candidates, borrowed = 0, [], 0.0
        if not isinstance(arm, Union):
            index, candidates, borrowed = self._choose(arm, task, cell.seed)
        chosen = seconds(self.device)
        treatment = self._union(cell) if isinstance(arm, Union) else self._treatment(cell, arm, task, index)
        given = seconds(self.device)
        score = self._score(task.train, treatment, task.test, cell.seed)
        spent = {"choice": chosen - start + borrowed, "arm": given - chosen + treatment.borrowed}
        spent["classifier"] = seconds(self.device) - given
        record: dict[str, Any] = {"arm": cell.arm, "shots": cell.shots, "seed": cell.seed, "accuracy": score}
        record |= {"setting": treatment.setting, "index": index, "candidates": candidates}
        record["validation"] = candidates[index][1] if candidates else None
        is_copy = treatment.made is None or treatment.made is task.train
        record["made_a_class"] = 0 if is_copy else len(treatment.made or ()) // task.classes
        record["curve"] = self._curve(task, treatment, cell.seed)
        record["seconds"] = {name: round(value, 3) for name, value in spent.items()}
        record["phases"] = {name: round(value, 3) for name, value in treatment.cost.items()}
        return record | {"options": self.digests[cell.arm]}

    def _choose(self, arm: Arm, task: Task, seed: int) -> tuple[int, list[tuple[str, float]], float]:
        """The candidate of the best validation accuracy, the earlier of equals, [setting, accuracy] of all,
        and what they borrowed; the first, of none, where a class has one image."""
        labels = task.train.labels.cpu()
        if int(labels.bincount(minlength=task.classes).min()) < 2:
            return 0, [], 0.0
        parts = split(labels, self.held_out, keyed_generator(seed, "comparison", "choice"))
        fit, rest = (task.train[part] for part in parts)
        found, borrowed = [], 0.0
        for treatment in arm.treatments(fit, task.classes, key(seed, "choice"), self._other(arm, task)):
            found.append((treatment.setting, self._score(fit, treatment, rest, key(seed, "choice"))))
            borrowed = treatment.borrowed
        return max(range(len(found)), key=lambda i: found[i][1]), found, borrowed

    @staticmethod
    def _other(arm: Arm, task: Task) -> Labelled | None:
        return task.other if arm.needs_other else None

    def _score(self, train: Labelled, treatment: Treatment, test: Labelled, seed: int) -> float:
        made, augmentation = treatment.made, treatment.augmentation
        classes = self.source.classes
        net = train_classifier(train, augmentation, classes=classes, made=made, seed=seed, **self.classifier)
        return accuracy(net, test)

    def _curve(self, task: Task, treatment: Treatment, seed: int) -> dict[str, float]:
        """Accuracy with the first n made images of each class, for each n of `self.made` that is fewer than
        were made."""
        if treatment.made is None or treatment.made is task.train:
            return {}
        counts = treatment.made.labels.bincount(minlength=task.classes)
        some = [n for n in self.made if n < int(counts.max())]
        fewer = {n: replace(treatment, made=treatment.made[_first(treatment.made.labels, n)]) for n in some}
        return {str(n): self._score(task.train, each, task.test, seed) for n, each in fewer.items()}

    def _treatment(self, cell: Cell, arm: Arm, task: Task, index: int) -> Treatment:
        """The candidate made from all labelled images, also into `treatments/`, with a picture in `made/`."""
        candidates = arm.treatments(task.train, task.classes, cell.seed, self._other(arm, task))
        treatment = next(islice(candidates, index, None))
        if treatment.augmentation is None or isinstance(treatment.augmentation, Policy):
            file = self._file(cell)
            part = file.with_suffix(".part")
            torch.save(_plain(treatment), part)
            part.replace(file)
        if treatment.made is not None:
            save_png(sheet(task.train, treatment.made), self.out / "made" / f"{cell}.png")
        return treatment

    def _file(self, cell: Cell) -> Path:
        return self.out / "treatments" / f"{cell}-{self.digests[cell.arm]}.pt"

    def _parts(self, cell: Cell) -> list[Cell]:
        """The cells that a union waits for."""
        arm = self.arms[cell.arm]
        return [replace(cell, arm=name) for name in self.united_arms(arm)] if isinstance(arm, Union) else []

    def _union(self, cell: Cell) -> Treatment:
        records = self.records()
        parts = [records[part] for part in self._parts(cell)]
        best = sorted(parts, key=lambda record: -(record["validation"] or 0.0))[:2]  # stable: the first named
        found = []
        for record in best:
            part = replace(cell, arm=record["arm"])
            if self._file(part).exists():
                found.append(_treatment_of(torch.load(self._file(part), self.device, weights_only=True)))
            else:  # an augmentation that is made at once
                arm, task = self.arms[part.arm], self.source.task(part.shots, part.seed, self.device)
                assert not isinstance(arm, Union)
                found.append(self._treatment(part, arm, task, record["index"]))
        return united(found[0], found[1], " + ".join(record["arm"] for record in best))

    @contextmanager
    def _claimed(self, cell: Cell) -> Iterator[bool]:
        """Whether the cell is this process's until the context ends; the lock of a killed process is free."""
        lock = FileLock(self.out / "locks" / f"{cell}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _append(self, record: dict[str, Any]) -> None:
        with FileLock(self.out / "locks" / "cells.lock"), open(self.out / "cells.jsonl", "ab+") as file:
            whole = not file.seek(0, os.SEEK_END) or (file.seek(-1, os.SEEK_END), file.read())[1] == b"\n"
            line = json.dumps(record).encode() + b"\n"
            file.write(line if whole else b"\n" + line)  # ends a line that a killed process tore


def _digest(*options: Any) -> str:
    return f"{key(json.dumps(options, sort_keys=True, default=str)):016x}"


def _first(labels: Tensor, n: int) -> Tensor:
    """Rows of the first n of each class."""
    return torch.cat([(labels == label).nonzero()[:n, 0] for label in labels.unique()])


def _plain(treatment: Treatment) -> dict[str, Any]:
    policy, made = treatment.augmentation, treatment.made
    record: dict[str, Any] = {"setting": treatment.setting}
    if isinstance(policy, Policy):
        subs = [[list(op) for op in sub] for sub in policy.sub_policies]
        record["policy"] = {"sub_policies": subs, "ops": policy.ops, "fill": policy.fill}
    if made is not None:
        record["made"] = {"images": made.images.cpu(), "labels": made.labels.cpu()}
    return record


def _treatment_of(record: dict[str, Any]) -> Treatment:
    policy = Policy(**record["policy"]) if "policy" in record else None
    return Treatment(policy, Labelled(**record["made"]) if "made" in record else None, record["setting"])
