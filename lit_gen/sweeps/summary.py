"""What a sweep found: a table, a JSON record, plots, and the command line of the best trial."""

import json
import shlex
import warnings
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from lit_gen.sweeps.storage import counts
from lit_gen.sweeps.study import Sweep

__all__ = ["summarise"]


def summarise(sweep: Sweep) -> dict[str, Any]:
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
        "importance": _importance(study) if len(done) > 1 else {},
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
        command = ["python", "-m", "lit_gen.train", *sweep.overrides(best.params)]
        record["best"] = {
            "number": best.number,
            "value": best.value,
            "params": best.params,
            "command": shlex.join(command),
        }
    (sweep.folder / "sweep.json").write_text(json.dumps(record, indent=1) + "\n")
    _plots(sweep, record["importance"], len(done))
    _print(sweep, record)
    return record


def _importance(study: optuna.Study) -> dict[str, float]:
    """fANOVA's share of each key in the variance of the objective (Hutter et al. 2014); empty where the
    trials do not differ enough to tell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    except (ValueError, RuntimeError, ZeroDivisionError):
        return {}


def _plots(sweep: Sweep, importance: dict[str, float], done: int) -> None:
    if not done:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trials = [t for t in sweep.study.trials if t.state == TrialState.COMPLETE]
    objective, points = [t.value for t in trials if t.value is not None], []
    figure, axes = plt.subplots(
        1,
        len(sweep.axes),
        figsize=(1 + 3.2 * len(sweep.axes), 3.2),
        sharey=True,
        constrained_layout=True,
        squeeze=False,
    )
    for panel, axis in zip(axes[0], sweep.axes, strict=True):
        values = [t.params[axis.key] for t in trials]
        if choices := getattr(axis.distribution, "choices", None):
            panel.set_xticks(range(len(choices)), choices)
            values = [choices.index(value) for value in values]
        numbers = [t.number for t in trials]
        points.append(panel.scatter(values, objective, c=numbers, cmap="viridis", s=24))
        panel.set(xlabel=axis.key)
        if getattr(axis.distribution, "log", False):
            panel.set_xscale("log")
        if min(objective) > 0:
            panel.set_yscale("log")
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel(sweep.objective)
    figure.colorbar(points[-1], ax=axes[0, -1], label="trial")
    figure.savefig(sweep.folder / "slices.png", dpi=120)
    plt.close(figure)
    if importance:
        figure, panel = plt.subplots(figsize=(6, 1 + 0.4 * len(importance)), constrained_layout=True)
        items = sorted(importance.items(), key=lambda item: item[1])
        panel.barh([name for name, _ in items], [share for _, share in items])
        panel.set(xlabel=f"share of the variance of {sweep.objective} (fANOVA)", xlim=(0, 1))
        figure.savefig(sweep.folder / "importance.png", dpi=120)
        plt.close(figure)


def _print(sweep: Sweep, record: dict[str, Any], shown: int = 10) -> None:
    sign = -1 if record["direction"] == "maximize" else 1
    done = sorted((t for t in record["trials"] if t["state"] == "complete"), key=lambda t: sign * t["value"])
    states = [t["state"] for t in record["trials"]]
    counted = ", ".join(f"{states.count(s)} {s}" for s in sorted(set(states)))
    table = Table(title=f"the best of {len(states)} trials ({counted})")
    for name in ("trial", sweep.objective, *(axis.key for axis in sweep.axes)):
        table.add_column(name, justify="right", overflow="fold")
    for t in done[:shown]:
        values = (
            f"{v:.4g}" if isinstance(v, float) else str(v)
            for v in (t["params"][axis.key] for axis in sweep.axes)
        )
        table.add_row(str(t["number"]), f"{t['value']:.5g}", *values)
    console = Console()
    if done:
        console.print(table)
    for name, share in record["importance"].items():
        console.print(f"importance of {name}: {100 * share:.0f} %", highlight=False)
    if record["best"] is not None:
        console.print(f"best: {record['best']['command']}", soft_wrap=True, highlight=False)
    console.print(f"written to {sweep.folder}", soft_wrap=True, highlight=False)
