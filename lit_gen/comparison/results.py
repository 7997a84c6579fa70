"""What a study says: accuracies with standard errors over the seeds, paired differences, costs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lit_gen.comparison.study import Cell

__all__ = ["estimate", "overall", "summarize"]

Records = Mapping[Cell, Mapping[str, Any]]


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error (None of one value), and number of values."""
    n = len(values)
    se = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {"mean": statistics.fmean(values), "se": se, "n": n}


def _scores(records: Records, arm: str, shots: Sequence[int]) -> dict[int, float]:
    """Of each seed for which all these shots are measured: the mean over them."""
    found: dict[int, list[float]] = {}
    for cell, record in records.items():
        if cell.arm == arm and cell.shots in shots:
            found.setdefault(cell.seed, []).append(record["accuracy"])
    return {seed: statistics.fmean(v) for seed, v in sorted(found.items()) if len(v) == len(shots)}


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> dict[str, Any] | None:
    """The estimate of first - second over the seeds that both have, and for how many it is positive."""
    both = [first[seed] - second[seed] for seed in first if seed in second]
    return estimate(both) | {"better": sum(d > 0 for d in both)} if both else None


def overall(records: Records, arms: Sequence[str], shots: Sequence[int]) -> dict[str, Any]:
    """Arm -> its accuracy, the mean over `shots` of each seed, and its paired difference to every other arm
    under that arm's name."""
    scores = {arm: _scores(records, arm, shots) for arm in arms}
    scores = {arm: values for arm, values in scores.items() if values}
    return {
        arm: {
            "accuracy": estimate(list(values.values())),
            "minus": {b: paired(values, other) for b, other in scores.items() if b != arm},
        }
        for arm, values in scores.items()
    }


def _costs(records: Records, arm: str) -> dict[str, float]:
    """Mean seconds of a cell, by phase."""
    cells = [record for cell, record in records.items() if cell.arm == arm]
    found: dict[str, list[float]] = {}
    for record in cells:
        for name, value in (record["seconds"] | record["phases"]).items():
            found.setdefault(name, []).append(value)
    return {name: round(sum(values) / len(cells), 2) for name, values in found.items()}


def _by_number_made(records: Records, arm: str, shots: Sequence[int]) -> dict[str, Any]:
    """Number of made images a class -> the paired difference from none, with so many and, last, with all."""
    none = _scores(records, "none", shots)
    found: dict[str, dict[Cell, dict[str, Any]]] = {}
    for cell, record in records.items():
        if cell.arm == arm and record["made_a_class"]:
            everything = {str(record["made_a_class"]): record["accuracy"]}
            for n, value in (record["curve"] | everything).items():
                found.setdefault(n, {})[cell] = {"accuracy": value}
    curves = {n: paired(_scores(some, arm, shots), none) for n, some in found.items()}
    return {n: curve for n, curve in sorted(curves.items(), key=lambda item: int(item[0])) if curve}


def summarize(records: Records, arms: Sequence[str], shots: Sequence[int]) -> dict[str, Any]:
    """`by_shots` and `overall`: see the function `overall`; `seconds` of a cell by arm and phase;
    `made`: arm -> number of made images a class -> its difference from none, the mean over `shots`."""
    return {
        "overall": overall(records, arms, shots),
        "by_shots": {str(n): overall(records, arms, [n]) for n in shots},
        "seconds": {arm: _costs(records, arm) for arm in arms},
        "made": {arm: curve for arm in arms if (curve := _by_number_made(records, arm, shots))},
        "chosen": {
            arm: {str(cell): record["setting"] for cell, record in records.items() if cell.arm == arm}
            for arm in arms
        },
    }
