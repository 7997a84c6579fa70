"""A policy search from the command line: its trial logs, its curves, and its report beside a random search of
the same budget."""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_gen.augment import Augmentation, Policy
from lit_gen.augment.conditional import ConditionalAugment
from lit_gen.cli import entry_point
from lit_gen.errors import ConfigError, Exit
from lit_gen.instantiate import config_dict, instantiate
from lit_gen.loggers import close, wandb
from lit_gen.rng import key
from lit_gen.runs import read_json, write_json
from lit_gen.search import (
    TPE,
    ConditionalSpace,
    GenerativeReward,
    Grid,
    Method,
    PolicySpace,
    Random,
    Result,
    Space,
    SyntheticReward,
    Trial,
    merge,
    run,
    run_shared,
)
from lit_gen.search.report import print_report, print_seeds, report_of, write
from lit_gen.search.space import Searched, randaugment_grid
from lit_gen.search.tasks import Task
from lit_gen.sweeps.storage import open_storage

INTERRUPTED = 128 + signal.SIGINT  # the exit code after Ctrl-C
WINDOW = 50  # trials over which op frequencies and mean rewards are logged


def search(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Searches as `cfg` says, in `out`: a trial log per search (`ledger.jsonl`, of the random baseline
    `random.jsonl`), `policy.yaml`, `augment/found.yaml` (`--config-dir=<out> augment=found` uses it),
    `report.json`, `curve.png`, `sheet.png`. Prints the report and returns it. With `seeds` above 1 each seed
    has a folder `seed_<k>` like that, and `out` the report over them.

    What is in the trial logs is not done again. With `storage` several processes share a search: one writes
    `out`, the others, its workers (`worker`), train child models for it and return when there is nothing left
    to train. Raises ConfigError for what does not fit, and if `out` holds another search.
    """
    settings = _checked(cfg, out)
    if cfg.worker:
        with suppress(OSError):  # the folder that Hydra made, unless it is the search's own
            out.rmdir()
        return _work_for_others(cfg)
    if cfg.seeds == 1:
        return _search(cfg, settings, out)
    reports = []
    for part in _parts(cfg):
        folder = out / f"seed_{part.seed}"
        reports.append(_finished(part, folder) or search(part, folder))
    report = {"unit": reports[0]["unit"], "results": print_seeds(reports, out)}
    OmegaConf.save(OmegaConf.create(settings), out / "config.yaml")
    write_json(out / "report.json", report)
    return report


def _parts(cfg: DictConfig) -> Iterator[DictConfig]:
    """The configuration of each seed."""
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        part = cfg.copy()
        part.seed, part.seeds = seed, 1
        yield part


def _finished(cfg: DictConfig, out: Path) -> dict[str, Any] | None:
    """The report of a search with these very settings that came to its end."""
    if not (report := read_json(out / "report.json")):
        return None
    before, now = config_dict(OmegaConf.load(out / "config.yaml")), config_dict(cfg)
    free = ("out", "workers", "wandb")
    return report if all(before.get(k) == v for k, v in now.items() if k not in free) else None


def _work_for_others(cfg: DictConfig) -> dict[str, Any]:
    """Trains child models of searches that other processes report on; the numbers it returns are of all."""
    results: dict[str, list[Result]] = {}
    for part in _parts(cfg):
        try:
            results = _Search(part).run(None, None)
        except KeyboardInterrupt:
            raise Exit(INTERRUPTED, "Stopped; another process takes the place of this one.") from None
        print(f"{cfg.name}-seed{part.seed} in {cfg.storage}: every child model is trained", flush=True)
    return {name: [result.cost for result in parts] for name, parts in results.items()}


class _Search:
    """What is searched for, in what, by what: `prepared` is the CPU seconds that it took to make these."""

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.space: Space = instantiate(cfg.space)
        self.strategy: Callable[..., Method] = instantiate(cfg.strategy)
        self.method = getattr(self.strategy, "func", self.strategy)
        if self.method is Grid and (cells := math.prod(self.space.sizes)) > cfg.budget:
            raise ConfigError(
                f"The grid has {cells} cells, budget={cfg.budget}: raise it, or space=randaugment."
            )
        if cfg.storage and self.method not in (TPE, Random):
            raise ConfigError("storage= shares searches of strategy=tpe and random; others have workers=.")
        if cfg.storage:
            open_storage(cfg.storage)
        data = instantiate(cfg.data) if cfg.data else None
        start = time.process_time()
        self.task: Task = instantiate(cfg.reward)(self.space, data, cfg.seed)
        more = {name: _augmentation(name, node) for name, node in cfg.compare.items()}
        self.task.compared = {**self.task.compared, **more}
        if (cfg.randaugment or cfg.compare) and any(
            isinstance(r, SyntheticReward) for r in self.task.rewards
        ):
            raise ConfigError(
                "randaugment= and compare=: the synthetic reward knows the policies of its space only."
            )
        generative = [isinstance(this, kind) for this, kind in self._kinds()]
        if len(set(generative)) > 1 or (generative[0] and cfg.randaugment):
            raise ConfigError(
                "reward=generative searches space=conditional, and compares with nothing but such "
                "augmentations (no randaugment=); the other rewards search the other spaces."
            )
        self.prepared = time.process_time() - start

    def _kinds(self) -> Iterator[tuple[object, type]]:
        """What is of a kind in a search for generative training, and in no other."""
        yield self.space, ConditionalSpace
        yield self.task.rewards[0], GenerativeReward
        yield from ((augmentation, ConditionalAugment) for augmentation in self.task.compared.values())

    def run(self, out: Path | None, logger: Any) -> dict[str, list[Result]]:
        """Runs the policy search and its random-search baseline; without `out`, only trains child models."""
        cfg = self.cfg
        results = {"found": self._searches("ledger", self.space, self.strategy, out, logger)}
        if cfg.random_baseline and self.method is not Random:
            results["best of random"] = self._searches("random", self.space, Random, out, logger)
        if cfg.randaugment and not cfg.worker:
            cells = randaugment_grid(self.space, cfg.budget)
            results["RandAugment, best of its grid"] = self._searches("randaugment", cells, Grid, out, logger)
        return results

    def _searches(
        self, log: str, space: Space, strategy: Callable[..., Method], out: Path | None, logger: Any
    ) -> list[Result]:
        """A search for each reward of the task, with the trial logs `<log>.jsonl` or `<log>_<part>.jsonl`."""
        cfg, results, settings = self.cfg, [], config_dict(self.cfg)
        many, main = len(self.task.rewards) > 1, log == "ledger"
        method = self.method if main else strategy
        described = {k: settings[k] for k in ("space", "reward", "data", "seed")}
        described["strategy"] = settings["strategy"] if main else log
        for part, reward in enumerate(self.task.rewards):
            name = f"{log}_{part}" if many else log
            seed = key(cfg.seed, "search", part) if many else cfg.seed
            options: dict[str, Any] = {"description": described | {"part": part}, "progress": name}
            if out:
                options["trial_log"] = out / f"{name}.jsonl"
                options["on_trial"] = _logging(logger, "search" if main and not many else name)
            if cfg.storage and method is not Grid:
                options |= {"name": f"{cfg.name}-seed{cfg.seed}-{name}", "storage": cfg.storage}
                random = method is Random
                results.append(run_shared(space, reward, cfg.budget, random=random, seed=seed, **options))
            else:
                made = strategy(space=space, seed=seed)
                results.append(run(space, reward, made, cfg.budget, workers=cfg.workers, **options))
        return results


def _augmentation(name: str, node: Any) -> Searched:
    found = instantiate(node)
    found = getattr(found, "policy", found)  # conf/augment has transforms around them
    if not isinstance(found, Augmentation | ConditionalAugment):
        raise ConfigError(f"compare.{name} is no augmentation: give _target_: lit_gen.augment.AugMix, ...")
    return found


def _search(cfg: DictConfig, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    this = _Search(cfg)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").unlink(missing_ok=True)
    OmegaConf.save(OmegaConf.create(settings), out / "config.yaml")
    logger = wandb(str(out), name=f"{cfg.name}-seed{cfg.seed}", mode=cfg.wandb)
    try:
        logger.log_hyperparams(settings)
        results = this.run(out, logger)
        found = {name: _best(parts, cfg.top) for name, parts in results.items()}
        report = report_of(cfg, this.task, results, found, this.prepared)
        files = write(out, this.task, results, found["found"], report)
        for name, file in files.items():
            logger.log_image(f"search/{name}", [str(file)])
        tested = {f"test/{k}": row["test"] for k, row in report["results"].items() if "test" in row}
        logger.log_metrics(tested)
    except KeyboardInterrupt:
        raise Exit(INTERRUPTED, f"Stopped; the same command with out={out} resumes the search.") from None
    finally:
        close([logger])
    print_report(report, out, found["found"])
    return report


def _checked(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """The resolved configuration, if it makes sense and `out` is ours to write in."""
    for name, least in (("budget", 1), ("top", 1), ("test_children", 0), ("workers", 0), ("seeds", 1)):
        if cfg[name] < least:
            raise ConfigError(f"{name}={cfg[name]}: must be at least {least}.")
    if cfg.worker and not cfg.storage:
        raise ConfigError("worker=true needs storage=, the one of the search to help with.")
    if cfg.storage and cfg.workers:
        raise ConfigError(
            f"workers={cfg.workers} with storage=: start the same command again instead, with worker=true."
        )
    if cfg.seeds > 1 and not cfg.test_children:
        raise ConfigError("seeds= compares test scores: test_children must be at least 1.")
    if (out / "policy.yaml").exists() and not list(out.glob("ledger*.jsonl")):
        raise ConfigError(f"{out} holds a policy that is no search's: choose another out=.")
    settings = config_dict(cfg)
    if (out / "config.yaml").exists():
        before = config_dict(OmegaConf.load(out / "config.yaml"))
        for name in ("strategy", "space", "reward", "data", "seed", "seeds", "storage"):
            if before.get(name) != settings[name]:
                raise ConfigError(
                    f"{out} holds another search: its {name} was {before.get(name)} and is now "
                    f"{settings[name]}. Choose another out=."
                )
    return settings


def _logging(logger: Any, name: str) -> Callable[[Trial, Result], None]:
    def on_trial(trial: Trial, result: Result) -> None:
        recent, space = result.trials[-WINDOW:], result.space
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
        logger.log_metrics({f"{name}/{k}": v for k, v in numbers.items()}, step=len(result.trials))

    return on_trial


def _best(results: Sequence[Result], top: int) -> Searched:
    """The `top` best of each search, merged; of augmentations that cannot be merged the best."""
    best = [policy for result in results for policy in result.top(top)]
    policies = [policy for policy in best if isinstance(policy, Policy)]
    if len(policies) == len(best):
        return merge(policies)
    return max(results, key=lambda r: r.best_reward).best


main = entry_point("search")(lambda cfg: search(cfg, Path(cfg.out)))

if __name__ == "__main__":
    main()
