"""A policy search from the command line: its books, its curves, its report beside equal-budget random."""

import json
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lit_gen import __version__
from lit_gen.augment import Augmentation, Policy
from lit_gen.augment.search import Method, PolicySpace, Random, Result, Space, Trial, merge, run
from lit_gen.augment.sheet import policy_sheet
from lit_gen.errors import ConfigError
from lit_gen.images import save_png
from lit_gen.instantiate import instantiate
from lit_gen.loggers import close, wandb
from lit_gen.rng import key
from lit_gen.search_tasks import Task, grid

__all__ = ["Interrupted", "search"]

WINDOW = 50  # trials over which op frequencies and mean rewards are logged


class Interrupted(RuntimeError):
    """The search was stopped by Ctrl-C; its ledger is complete."""

    exit_code = 128 + signal.SIGINT


def search(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Searches as `cfg` says, in `out`: a ledger a search (`ledger.jsonl`, of random control
    `random.jsonl`), `policy.yaml`, `augment/found.yaml` (`--config-dir=<out> augment=found` uses it),
    `report.json`, `curve.png`, `sheet.png`. Prints the report and returns it.

    What is in the ledgers is not done again. Raises ConfigError for what does not fit, and if `out` holds
    another search.
    """
    settings = _checked(cfg, out)
    allow = list(cfg.allow_targets)
    space = instantiate(cfg.space, allow)
    strategy: Callable[..., Method] = instantiate(cfg.strategy, allow)
    if getattr(strategy, "func", strategy) is grid and (cells := _cells(space)) > cfg.budget:
        raise ConfigError(f"The grid has {cells} cells, budget={cfg.budget}: raise it, or space=randaugment.")
    data = instantiate(cfg.data, allow) if cfg.data else None
    start = time.process_time()
    task: Task = instantiate(cfg.reward, allow)(space, data, cfg.seed)
    prepared = time.process_time() - start
    out.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(settings), out / "config.yaml")
    logger = wandb(str(out), name=f"{cfg.name}-seed{cfg.seed}", mode=cfg.wandb)
    try:
        logger.log_hyperparams(settings)
        results = {"found": _searches(cfg, out, space, task, strategy, logger, "ledger")}
        if cfg.control and getattr(strategy, "func", strategy) is not Random:
            results["best of random"] = _searches(cfg, out, space, task, Random, logger, "random")
        found = {name: _best(parts, cfg.top) for name, parts in results.items()}
        report = _report(cfg, task, results, found, prepared)
        files = _write(out, task, results, found["found"], report)
        for name, file in files.items():
            logger.log_image(f"search/{name}", [str(file)])
        logger.log_metrics(
            {f"test/{k}": row["test"] for k, row in report["results"].items() if "test" in row}
        )
    except KeyboardInterrupt:
        raise Interrupted(f"Stopped; the same command with out={out} goes on.") from None
    finally:
        close([logger])
    _print(report, out, isinstance(found["found"], Policy))
    return report


def _checked(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """The resolved configuration, if it makes sense and `out` is ours to write in."""
    for name, least in (("budget", 1), ("top", 1), ("test_children", 0), ("workers", 0)):
        if cfg[name] < least:
            raise ConfigError(f"{name}={cfg[name]}: must be at least {least}.")
    if (out / "policy.yaml").exists() and not list(out.glob("ledger*.jsonl")):
        raise ConfigError(f"{out} holds a policy that is no search's: choose another out=.")
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if (out / "config.yaml").exists():
        before = OmegaConf.to_container(OmegaConf.load(out / "config.yaml"))
        for name in ("strategy", "space", "reward", "data", "seed"):
            if before.get(name) != settings[name]:
                raise ConfigError(
                    f"{out} holds another search: its {name} was {before.get(name)} and is now "
                    f"{settings[name]}. Choose another out=."
                )
    return settings


def _cells(space: Space) -> int:
    cells = 1
    for size in space.sizes:
        cells *= size
    return cells


def _searches(
    cfg: DictConfig,
    out: Path,
    space: Space,
    task: Task,
    strategy: Callable[..., Method],
    logger: Any,
    ledger: str,
) -> list[Result]:
    """A search for each reward of the task."""
    results = []
    for part, reward in enumerate(task.rewards):
        many = len(task.rewards) > 1
        name = f"{ledger}_{part}" if many else ledger
        seed = key(cfg.seed, "search", part) if many else cfg.seed
        described = {k: _plain(cfg[k]) for k in ("space", "reward", "data", "seed")}
        described |= {"strategy": _plain(cfg.strategy) if ledger == "ledger" else "random", "part": part}
        results.append(
            run(
                space,
                reward,
                strategy(space=space, seed=seed),
                cfg.budget,
                ledger=out / f"{name}.jsonl",
                description=described,
                workers=cfg.workers,
                progress=name,
                on_trial=_logging(logger, space, name if ledger != "ledger" or many else "search"),
            )
        )
    return results


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _logging(logger: Any, space: Space, name: str) -> Callable[[Trial, Result], None]:
    def on_trial(trial: Trial, result: Result) -> None:
        recent = result.trials[-WINDOW:]
        numbers = {
            "reward": trial.reward,
            "best": result.best_reward,
            f"mean_of_{WINDOW}": statistics.mean(t.reward for t in recent),
            "cpu_seconds": result.cost["cpu_seconds"],
            "images": result.cost["images"],
        }
        if isinstance(space, PolicySpace):
            shares = space.op_frequencies([t.choices for t in recent])
            numbers |= {f"ops/{op}": share for op, share in shares.items()}
        logger.log_metrics({f"{name}/{k}": v for k, v in numbers.items()}, step=trial.number + 1)

    return on_trial


def _best(results: Sequence[Result], top: int) -> Augmentation:
    """The `top` best of each search, merged; of augmentations that cannot be merged the best."""
    best = [policy for result in results for policy in result.top(top)]
    if all(isinstance(policy, Policy) for policy in best):
        return merge(best)
    return max(results, key=lambda r: r.best_reward).best


# --- The report ---


def _report(
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


def _write(
    out: Path, task: Task, results: dict[str, list[Result]], found: Augmentation, report: dict[str, Any]
) -> dict[str, Path]:
    """The found policy in two forms, the report, and pictures: name -> file."""
    row = report["results"]["found"]
    summary = ", ".join(f"{k} {v:g}" for k, v in row.items() if k != "test_scores")
    comment = f"python -m lit_gen.search, {report['unit']}: {summary}"
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
        policy = {
            "_target_": "lit_gen.augment.RandAugment",
            "num_ops": found.num_ops,
            "magnitude": found.magnitude,
        }
    return OmegaConf.create({"_target_": "lit_gen.augment.AutoAugment", "policy": policy | options})


def _curve(out: Path, results: dict[str, list[Result]]) -> Path:
    """Rewards by child, and which ops the search chose as it went on."""
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
    axes[0].set(xlabel="children", ylabel="reward")
    axes[0].legend(fontsize=7)
    axes[0].grid(alpha=0.3)
    if isinstance(space, PolicySpace):
        trials = [t.choices for result in results["found"] for t in result.trials]
        size = max(1, len(trials) // 20)
        windows = [trials[i : i + size] for i in range(0, len(trials), size)]
        shares = [space.op_frequencies(window) for window in windows]
        last = shares[-1]
        for op in sorted(last, key=last.get, reverse=True)[:6]:
            axes[1].plot([size * (i + 1) for i in range(len(shares))], [s[op] for s in shares], label=op)
        axes[1].axhline(1 / len(space.ops), color="C7", linestyle=":", label="chance")
        axes[1].set(xlabel="children", ylabel="share among the ops chosen")
        axes[1].legend(fontsize=7)
    else:
        axes[1].set_axis_off()
    path = out / "curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _print(report: dict[str, Any], out: Path, is_policy: bool) -> None:
    table = Table(title=f"{report['unit']}; children of the test differ by seed")
    columns = ("", "best reward", "test", "s.d.", "children", "images", "CPU s")
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
