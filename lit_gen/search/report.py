"""What a policy search leaves behind: the found policy as files, the report, the curve, the table."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lit_gen import __version__
from lit_gen.augment import Policy, RandAugment
from lit_gen.augment.conditional import ConditionalAugment
from lit_gen.augment.sheet import policy_sheet
from lit_gen.cli import show, table
from lit_gen.figures import save, search_curves
from lit_gen.images import save_png
from lit_gen.runs import write_json
from lit_gen.search import PolicySpace, Result
from lit_gen.search.space import Searched
from lit_gen.search.tasks import Task


def report_of(
    cfg: DictConfig,
    task: Task,
    results: dict[str, list[Result]],
    found: dict[str, Searched],
    prepared: float,
) -> dict[str, Any]:
    """Costs and rewards of the searches, and test scores of their results, of nothing and of what else is
    compared."""
    rows: dict[str, dict[str, Any]] = {}
    for name, augmentation in {"none": None, **task.compared, **found}.items():
        rows[name] = {}
        if name in results:
            costs = [Counter(result.cost) for result in results[name]]
            rows[name] |= {k: round(sum(c[k] for c in costs), 1) for k in costs[0]}
            rows[name]["reward"] = statistics.mean(r.best_reward for r in results[name])
        if cfg.test_children:
            scores = [task.test(augmentation, k) for k in range(cfg.test_children)]
            rows[name] |= {"test": statistics.mean(scores), "test_scores": scores}
    return {
        "unit": task.unit,
        "results": rows,
        "preparation_cpu_seconds": round(prepared, 1),
        "top": cfg.top,
        "seed": cfg.seed,
        "versions": {"lit_gen": __version__, "torch": torch.__version__},
    }


def write(
    out: Path, task: Task, results: dict[str, list[Result]], found: Searched, report: dict[str, Any]
) -> dict[str, Path]:
    """The found policy in two forms, the report, and pictures: name -> file."""
    row = report["results"]["found"]
    summary = ", ".join(f"{k} {v:g}" for k, v in row.items() if k != "test_scores")
    comment = f"lit-gen search, {report['unit']}: {summary}"
    write_json(out / "report.json", report)
    if isinstance(found, Policy):
        (out / "policy.yaml").write_text(found.to_yaml(comment))
    group, package = _group(found)
    (out / group).mkdir(parents=True, exist_ok=True)
    head = f"# @package {package}\n# {comment}\n"
    (out / group / "found.yaml").write_text(head + OmegaConf.to_yaml(_as_config(found)))
    files = {"curve": _curve(results, out / "curve.png")}
    if task.example is not None:
        image, boxes = task.example
        sheet = policy_sheet(found, image, boxes, scale=max(1, 64 // image.shape[-1]))
        files["sheet"] = save_png(sheet, out / "sheet.png")
    return files


def _group(found: Searched) -> tuple[str, str]:
    """The group of conf that the result belongs to, and the part of a configuration that it sets."""
    return (
        ("model/augment", "model") if isinstance(found, ConditionalAugment) else ("augment", "data.augment")
    )


def _as_config(found: Searched) -> DictConfig:
    """What a file of that group would say."""
    if isinstance(found, ConditionalAugment):
        node = {"_target_": "lit_gen.augment.conditional.ConditionalAugment", **asdict(found)}
        node["untold"] = list(found.untold)
        return OmegaConf.create({"augment": node, "net": {"augment_dim": found.label_dim}})
    options = {"fill": found.fill, "min_visibility": found.min_visibility}
    if isinstance(found, Policy):
        subs = [[list(op) for op in sub] for sub in found.sub_policies]
        policy = {"_target_": "lit_gen.augment.Policy", "ops": found.ops, "sub_policies": subs}
    else:
        assert isinstance(found, RandAugment)  # no other space is searched
        numbers = {"num_ops": found.num_ops, "magnitude": found.magnitude}
        policy = {"_target_": "lit_gen.augment.RandAugment"} | numbers
    return OmegaConf.create({"_target_": "lit_gen.augment.AutoAugment", "policy": policy | options})


def _curve(results: dict[str, list[Result]], path: Path) -> Path:
    """Rewards by child model, and, of the six ops that the search chose most at its end, how often."""
    rewards = {name: [[t.reward for t in part.trials] for part in parts] for name, parts in results.items()}
    space = results["found"][0].space
    if not isinstance(space, PolicySpace):
        return save(search_curves(rewards, {}, 0.0), path)
    trials = [t.choices for result in results["found"] for t in result.trials]
    size = max(1, len(trials) // 20)
    windows = {i + size: space.op_frequencies(trials[i : i + size]) for i in range(0, len(trials), size)}
    last = Counter(windows[max(windows)])
    shares = {op: {at: window[op] for at, window in windows.items()} for op, _ in last.most_common(6)}
    return save(search_curves(rewards, shares, 1 / len(space.ops)), path)


def print_report(report: dict[str, Any], out: Path, found: Searched) -> None:
    """Prints a table of the results, and how to train with what was found."""
    rows = []
    for name, row in report["results"].items():
        scores = row.get("test_scores", [])
        best = f"{row['reward']:.4f}" if "reward" in row else ""
        test = f"{row['test']:.4f}" if scores else ""
        deviation = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        costs = (f"{row[k]:,.0f}" if k in row else "" for k in ("child_models", "images", "cpu_seconds"))
        rows.append([name, best, test, deviation, *costs])
    lines = [f"use it: python -m lit_gen.train --config-dir={out} {_group(found)[0]}=found ..."]
    if report["preparation_cpu_seconds"] >= 1:
        lines.insert(0, f"prepared in {report['preparation_cpu_seconds']:.0f} CPU s")
    if isinstance(found, Policy):
        lines.append(f"or: augment=file data.augment.policy.source={out / 'policy.yaml'}")
    title = f"{report['unit']}; child models of the test differ by seed"
    columns = ("", "best reward", "test", "s.d.", "child models", "images", "CPU s")
    show(table(title, columns, rows), *lines, f"written to {out}")


def print_seeds(reports: Sequence[dict[str, Any]], out: Path) -> dict[str, dict[str, Any]]:
    """The table over searches of several seeds, and what is in it: each seed's test score (the mean of its
    child models) makes a mean and a standard deviation, its gain over no augmentation too."""
    rows: dict[str, dict[str, Any]] = {}
    texts = []
    for name in reports[0]["results"]:
        parts = [report["results"][name] for report in reports]
        scores = [part["test"] for part in parts]
        gains = [s - r["results"]["none"]["test"] for s, r in zip(scores, reports, strict=True)]
        row = {"test": scores, "gain": gains, "better": sum(g > 0 for g in gains)}
        row |= {"test_mean": statistics.mean(scores), "test_sd": statistics.stdev(scores)}
        row |= {"gain_mean": statistics.mean(gains), "gain_sd": statistics.stdev(gains)}
        if "cpu_seconds" in parts[0]:
            row["cpu_seconds"] = statistics.mean(part["cpu_seconds"] for part in parts)
        rows[name] = row
        gain = f"{row['gain_mean']:+.4f} +- {row['gain_sd']:.4f}", f"{row['better']} of {len(reports)}"
        test = f"{row['test_mean']:.4f} +- {row['test_sd']:.4f}"
        cost = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
        texts.append([name, test, *(("", "") if name == "none" else gain), cost])
    columns = ("", "test", "against none", "seeds better", "CPU s per search")
    title = f"{reports[0]['unit']}, {len(reports)} seeds"
    show(table(title, columns, texts), f"written to {out}")
    return rows
