"""What a policy search leaves behind: the found policy as files, the report, the curve, the table."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lit_gen import __version__
from lit_gen.augment import Augmentation, Policy, RandAugment
from lit_gen.augment.sheet import policy_sheet
from lit_gen.images import save_png
from lit_gen.search import PolicySpace, Result
from lit_gen.search.tasks import Task

__all__ = ["print_report", "print_seeds", "report_of", "write"]


def report_of(
    cfg: DictConfig,
    task: Task,
    results: dict[str, list[Result]],
    found: dict[str, Augmentation],
    prepared: float,
) -> dict[str, Any]:
    """Costs and rewards of the searches, and test scores of their results, of nothing and of what else is
    compared."""
    rows: dict[str, dict[str, Any]] = {}
    for name, augmentation in {"none": None, **(task.compared or {}), **found}.items():
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
    out: Path, task: Task, results: dict[str, list[Result]], found: Augmentation, report: dict[str, Any]
) -> dict[str, Path]:
    """The found policy in two forms, the report, and pictures: name -> file."""
    row = report["results"]["found"]
    summary = ", ".join(f"{k} {v:g}" for k, v in row.items() if k != "test_scores")
    comment = f"lit-gen search, {report['unit']}: {summary}"
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    if isinstance(found, Policy):
        (out / "policy.yaml").write_text(found.to_yaml(comment))
    (out / "augment").mkdir(exist_ok=True)
    head = f"# @package data.augment\n# {comment}\n"
    (out / "augment" / "found.yaml").write_text(head + OmegaConf.to_yaml(_as_config(found)))
    files = {"curve": _curve(out, results)}
    if task.example is not None:
        image, boxes = task.example
        sheet = policy_sheet(found, image, boxes, scale=max(1, 64 // image.shape[-1]))
        files["sheet"] = save_png(sheet, out / "sheet.png")
    return files


def _as_config(found: Augmentation) -> DictConfig:
    """What conf/augment would say."""
    options = {"fill": found.fill, "min_visibility": found.min_visibility}
    if isinstance(found, Policy):
        subs = [[list(op) for op in sub] for sub in found.sub_policies]
        policy = {"_target_": "lit_gen.augment.Policy", "ops": found.ops, "sub_policies": subs}
    else:
        assert isinstance(found, RandAugment)  # no other space is searched
        numbers = {"num_ops": found.num_ops, "magnitude": found.magnitude}
        policy = {"_target_": "lit_gen.augment.RandAugment"} | numbers
    return OmegaConf.create({"_target_": "lit_gen.augment.AutoAugment", "policy": policy | options})


def _curve(out: Path, results: dict[str, list[Result]]) -> Path:
    """Rewards by child model, and which ops the search chose as it went on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    space = results["found"][0].space
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for colour, (name, parts) in zip(("C0", "C7"), results.items(), strict=False):
        for part, result in enumerate(parts):
            rewards = torch.tensor([t.reward for t in result.trials])
            at = range(1, len(rewards) + 1)
            axes[0].plot(at, rewards, ".", color=colour, markersize=2, alpha=0.4)
            axes[0].plot(at, rewards.cummax(0).values, color=colour, label=None if part else f"{name}, best")
    axes[0].set(xlabel="child models", ylabel="reward")
    axes[0].legend(fontsize=7)
    axes[0].grid(alpha=0.3)
    if isinstance(space, PolicySpace):
        trials = [t.choices for result in results["found"] for t in result.trials]
        size = max(1, len(trials) // 20)
        windows = [trials[i : i + size] for i in range(0, len(trials), size)]
        shares = [space.op_frequencies(window) for window in windows]
        last = Counter(shares[-1])
        for op, _ in last.most_common(6):
            axes[1].plot([size * (i + 1) for i in range(len(shares))], [s[op] for s in shares], label=op)
        axes[1].axhline(1 / len(space.ops), color="C7", linestyle=":", label="chance")
        axes[1].set(xlabel="child models", ylabel="fraction of the ops chosen")
        axes[1].legend(fontsize=7)
    else:
        axes[1].set_axis_off()
    path = out / "curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def print_report(report: dict[str, Any], out: Path, is_policy: bool) -> None:
    table = Table(title=f"{report['unit']}; child models of the test differ by seed")
    columns = ("", "best reward", "test", "s.d.", "child models", "images", "CPU s")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for name, row in report["results"].items():
        scores = row.get("test_scores", [])
        table.add_row(
            name,
            f"{row['reward']:.4f}" if "reward" in row else "",
            f"{row['test']:.4f}" if scores else "",
            f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else "",
            *(f"{row[k]:,.0f}" if k in row else "" for k in ("children", "images", "cpu_seconds")),
        )
    console = Console()
    console.print(table)
    if report["preparation_cpu_seconds"] >= 1:
        console.print(f"prepared in {report['preparation_cpu_seconds']:.0f} CPU s")
    use = f"python -m lit_gen.train --config-dir={out} augment=found ..."
    files = [f"use it: {use}", f"written to {out}"]
    if is_policy:
        files.insert(1, f"or: augment=file data.augment.policy.source={out / 'policy.yaml'}")
    for line in files:
        console.print(line, soft_wrap=True, highlight=False)


def print_seeds(reports: Sequence[dict[str, Any]], out: Path) -> dict[str, dict[str, Any]]:
    """The table over searches of several seeds, and what is in it: each seed's test score (the mean of its
    children) makes a mean and a standard deviation, its gain over no augmentation too."""
    rows: dict[str, dict[str, Any]] = {}
    table = Table(title=f"{reports[0]['unit']}, {len(reports)} seeds")
    for i, column in enumerate(("", "test", "against none", "seeds better", "CPU s a search")):
        table.add_column(column, justify="right" if i else "left")
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
        table.add_row(
            name,
            f"{row['test_mean']:.4f} +- {row['test_sd']:.4f}",
            *(("", "") if name == "none" else _gain(row, len(reports))),
            f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else "",
        )
    console = Console()
    console.print(table)
    console.print(f"written to {out}", soft_wrap=True, highlight=False)
    return rows


def _gain(row: dict[str, Any], seeds: int) -> tuple[str, str]:
    return f"{row['gain_mean']:+.4f} +- {row['gain_sd']:.4f}", f"{row['better']} of {seeds}"
