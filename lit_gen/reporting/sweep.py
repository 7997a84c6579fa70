"""The sections of a sweep, and of a policy search."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_gen import runs
from lit_gen.augment import Policy
from lit_gen.reporting.drawings import importance_bars, parallel_coordinates, search_rewards, sweep_slice
from lit_gen.reporting.parts import Section, curves, number, picture, sequence
from lit_gen.reporting.run import of_run, policy_plots
from lit_gen.runs import redacted

BEST_SHOWN = 8  # trials whose last grids stand side by side


def trials_of(folder: Path) -> list[Path]:
    """The run folders of a sweep, by number."""
    found = [path.parent for path in folder.glob("*/config.yaml") if path.parent.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def of_sweep(folder: Path, trials: Sequence[Path], **options: int) -> list[Section]:
    """All trials, what their keys matter, and the sections of the best (`of_run` with the options)."""
    record = runs.read_json(folder / "sweep.json")
    objective, told = record.get("objective", "objective"), record.get("trials", ())
    paths = {path.name: path for path in trials}
    found = runs.differences({name: runs.saved_config(p) for name, p in paths.items()})
    different = {
        key: {name: redacted({key: value})[key] for name, value in by_trial.items()}
        for key, by_trial in found.items()
    }  # what is a secret is told by the key
    states = {str(trial["number"]): trial["state"] for trial in told}
    values = {name: runs.summary(path).get(objective) for name, path in paths.items()}
    sign = -1 if record.get("direction") == "maximize" else 1
    finite = {n: v for n, v in values.items() if v is not None and math.isfinite(v)}
    known = dict(sorted(finite.items(), key=lambda item: sign * item[1]))  # the best first
    rows = [
        [name, states.get(name, ""), number(values[name]), *(number(v[name]) for v in different.values())]
        for name in [*known, *(n for n in values if n not in known)]
    ]
    keys = {key: [by_trial[name] for name in known] for key, by_trial in different.items()}
    grids = [sequence(sorted(paths[n].glob("grids/grid_*.png"))[-1:], 1) for n in [*known][:BEST_SHOWN]]
    for name, shown in zip(known, grids, strict=False):
        for image in shown:
            image["caption"] = f"trial {name}: {objective} {number(known[name])}"
    failed = [[str(trial["number"]), redacted(trial["error"])] for trial in told if trial.get("error")]
    sections: list[Section] = [
        {"title": "Trials", "columns": ["trial", "state", objective, *different], "table": rows},
        {"title": "What matters", **_what_matters(record, keys, known, objective, sign)},
        {"title": "Curves", "plots": curves({name: runs.history(path) for name, path in paths.items()})},
        {"title": "Samples of the best", "pictures": [shown for shown in grids if shown]},
        {"title": "Failed", "columns": ["trial", "error"], "table": failed},
    ]
    if best := record.get("best"):
        text, command = f"Trial {best['number']}: {best['value']:.5g}", redacted(best["command"])
        sections.insert(0, {"title": "Best", "text": text, "command": command})
    shown = str(best["number"]) if best else rows[0][0]
    if shown in paths:
        for section in of_run(paths[shown], **options):
            sections.append(section | {"title": f"Trial {shown}: {section['title'].lower()}"})
    return sections


def _what_matters(
    record: Mapping[str, Any],
    keys: Mapping[str, Sequence[Any]],
    known: Mapping[str, float],
    objective: str,
    sign: int,
) -> Section:
    """Parallel coordinates of the trials that have an objective, the importance of the keys, and the
    objective over each of them. `known`: trial -> objective, best first; `keys`: key -> their values."""
    if len(known) < 2 or not keys:
        return {}
    scores = list(known.values())
    parallel = parallel_coordinates(keys, objective, scores, sign > 0)
    places = [axis["values"] for axis in parallel["data"][0]["dimensions"]]
    importance = record.get("importance") or _importance(dict(zip(keys, places, strict=False)), scores)
    plots = [parallel] + ([importance_bars(importance, objective)] if importance else [])
    ordered = sorted(keys, key=lambda key: -importance.get(key, 0.0))
    plots += [sweep_slice(key, keys[key], objective, scores, list(known)) for key in ordered]
    text = "Drag along an axis to choose trials; drag its title to move it. Each point below is a trial."
    return {"text": text, "plots": plots}


def _importance(keys: Mapping[str, Sequence[float]], scores: Sequence[float]) -> dict[str, float]:
    """fANOVA's share of each key in the variance of the scores (Hutter et al. 2014), for sweeps that kept
    none; empty without Optuna and where trials do not differ enough to tell."""
    try:
        import optuna
    except ImportError:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: optuna.distributions.FloatDistribution(min(v), max(v)) for key, v in keys.items()}
    study = optuna.create_study()
    for *row, score in zip(*keys.values(), scores, strict=True):
        params = dict(zip(keys, map(float, row), strict=True))
        study.add_trial(optuna.create_trial(params=params, distributions=dict(space), value=score))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    except (ValueError, RuntimeError, ZeroDivisionError):
        return {}


def logs_of(folder: Path) -> dict[str, Path]:
    """The trial logs of a policy search, by name: of the search, its random baseline, and its seeds."""
    found = [p for pattern in ("*.jsonl", "seed_*/*.jsonl") for p in sorted(folder.glob(pattern))]
    kinds = ("ledger", "random", "randaugment")
    return {str(p.relative_to(folder).with_suffix("")): p for p in found if p.stem.split("_")[0] in kinds}


def of_search(folder: Path, logs: Mapping[str, Path]) -> list[Section]:
    """What a policy search found, how its rewards rose, and what was compared."""
    results = runs.read_json(folder / "report.json").get("results", {})
    columns = list(dict.fromkeys(k for row in results.values() for k in row if k != "test_scores"))
    table = [[name, *(number(row.get(c)) for c in columns)] for name, row in results.items()]
    sections: list[Section] = [
        {"title": "Result", "columns": ["", *columns], "table": table},
        {"title": "Rewards", "plots": [search_rewards({name: _rewards(p) for name, p in logs.items()})]},
    ]
    for path in sorted({p.parent for p in logs.values()}):
        sheet = picture(path / "sheet.png", "draws of each sub-policy")
        file = path / "policy.yaml"
        plots = policy_plots(Policy.load(file)) if file.is_file() else []
        title = "Policy" if path == folder else f"Policy of {path.name}"
        sections.append({"title": title, "plots": plots, "pictures": [[sheet]] if sheet else []})
    return sections


def _rewards(log: Path) -> list[float]:
    """The rewards of a trial log, but for a last line that is being written."""
    text = log.read_text()
    lines = (json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines())
    return [line["reward"] for line in lines if "reward" in line]
