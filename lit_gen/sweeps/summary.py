"""What a sweep found: a table, a JSON record, plots, and the command line of the best trial."""

import shlex
from collections import Counter
from typing import Any

import optuna
from optuna.trial import TrialState

from lit_gen.cli import show, table
from lit_gen.figures import importances, save, slices
from lit_gen.runs import write_json
from lit_gen.sweeps.storage import counts
from lit_gen.sweeps.study import Sweep


def summarize(sweep: Sweep) -> dict[str, Any]:
    """Writes `sweep.json`, `slices.png` and `importance.png` into the sweep's folder, prints the best trials
    and returns the record.
    """
    study = sweep.study
    trials = [t for t in study.trials if counts(t)]
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    record = {
        "objective": sweep.objective,
        "direction": study.direction.name.lower(),
        "fixed": sweep.fixed,
        "space": {axis.key: str(axis.distribution) for axis in sweep.axes},
        "importance": _importance(sweep) if len(done) > 1 else {},
        "best": None,
        "trials": [
            {
                "number": t.number,
                "state": t.state.name.lower(),
                "value": t.value if t.state == TrialState.COMPLETE else None,
                "params": t.params,
                "error": t.user_attrs.get("error"),
                "seconds": t.duration.total_seconds() if t.duration else None,
                "intermediate": {str(k): v for k, v in sorted(t.intermediate_values.items())},
            }
            for t in trials
        ],
    }
    if done:
        best = study.best_trial
        command = shlex.join(["python", "-m", "lit_gen.train", *sweep.overrides(best.params)])
        record["best"] = {
            "number": best.number,
            "value": best.value,
            "params": best.params,
            "command": command,
        }
        save(slices(study, sweep.objective), sweep.folder / "slices.png")
    write_json(sweep.folder / "sweep.json", record)
    _print(sweep, record)
    return record


def _importance(sweep: Sweep) -> dict[str, float]:
    """fANOVA's share of each key in the variance of the objective (Hutter et al. 2014), also drawn; empty
    where the trials do not differ enough to tell."""
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        shares = dict(optuna.importance.get_param_importances(sweep.study, evaluator=evaluator))
    except (ValueError, RuntimeError, ZeroDivisionError):
        return {}
    figure = importances(sweep.study, sweep.objective, evaluator=evaluator)
    save(figure, sweep.folder / "importance.png")
    return shares


def _print(sweep: Sweep, record: dict[str, Any], shown: int = 10) -> None:
    sign = -1 if record["direction"] == "maximize" else 1
    done = sorted((t for t in record["trials"] if t["state"] == "complete"), key=lambda t: sign * t["value"])
    states = Counter(t["state"] for t in record["trials"])
    counted = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    rows = []
    for t in done[:shown]:
        values = [t["params"][axis.key] for axis in sweep.axes]
        texts = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
        rows.append([str(t["number"]), f"{t['value']:.5g}", *texts])
    lines = [f"importance of {name}: {100 * share:.0f} %" for name, share in record["importance"].items()]
    if record["best"] is not None:
        lines.append(f"best: {record['best']['command']}")
    title = f"the best of {states.total()} trials ({counted})"
    columns = ("trial", sweep.objective, *(axis.key for axis in sweep.axes))
    show(table(title, columns, rows), *lines, f"written to {sweep.folder}")
