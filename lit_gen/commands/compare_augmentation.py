"""Policies, GANs, and diffusion models compared as augmentation: the classifier's accuracy with each arm."""

import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lit_gen import __version__
from lit_gen.cli import check_at_least_1, entry_point, show, table
from lit_gen.comparison import Study
from lit_gen.comparison.results import summarize
from lit_gen.errors import ConfigError, Exit
from lit_gen.figures import augmentation_arms, save
from lit_gen.instantiate import allowing, config_dict, instantiate
from lit_gen.loggers import close, environment, wandb
from lit_gen.runs import write_json

INTERRUPTED = 128 + signal.SIGINT


def compare_augmentation(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Measures every cell of the study that `out` lacks, and writes `results.json` and `arms.png` there. The
    same command, by any number of processes on one `out`, shares the cells; each that ends writes them.

    Raises ConfigError for arms and data that do not fit.
    """
    check_at_least_1(cfg, "seeds")
    if cfg.workers < 0 or not cfg.shots or min(cfg.shots) < 1:
        raise ConfigError(
            f"workers={cfg.workers} must be 0 or more, shots={list(cfg.shots)} at least 1 each."
        )
    config = config_dict(cfg)
    study = study_of(config, out)
    try:
        if cfg.workers:
            with ProcessPoolExecutor(cfg.workers, get_context("spawn")) as pool:
                for done in [pool.submit(_work, config, str(out)) for _ in range(cfg.workers)]:
                    done.result()
        else:
            _work(config, str(out), study)
    except KeyboardInterrupt:
        raise Exit(INTERRUPTED, f"Stopped; the same command with out={out} goes on with it.") from None
    return _report(cfg, config, study, out)


def study_of(config: dict[str, Any], out: Path) -> Study:
    """The study of a resolved configuration."""
    cuda = torch.cuda.is_available() if config["device"] is None else config["device"] != "cpu"
    depends = ("task", "classifier", "held_out", "made", "arms")
    return Study(
        instantiate(config["task"]),
        {name: instantiate(node) for name, node in config["arms"].items()},
        out,
        classifier=config["classifier"],
        options={name: config[name] for name in depends},
        held_out=config["held_out"],
        made=config["made"],
        device=torch.device(config["device"] or "cuda") if cuda else None,
    )


def _work(config: dict[str, Any], out: str, study: Study | None = None) -> None:
    """Measures cells, in a process of its own or in this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of several threads are rounded otherwise
    try:
        with allowing(config["allow_targets"]):
            study = study or study_of(config, Path(out))
            study.work(study.cells(config["shots"], _seeds(config)), lambda text: print(text, flush=True))
    finally:
        torch.set_num_threads(threads)


def _seeds(config: dict[str, Any]) -> range:
    return range(config["seed"], config["seed"] + config["seeds"])


def _report(cfg: DictConfig, config: dict[str, Any], study: Study, out: Path) -> dict[str, Any]:
    cells = study.cells(config["shots"], _seeds(config))
    records = {cell: record for cell, record in study.records().items() if cell in cells}
    arms = list(config["arms"])
    result = summarize(records, arms, config["shots"]) | {
        "cells": list(records.values()),
        "settings": config,
        "unit_of_seconds": "CPU" if study.device.type == "cpu" else "GPU",
        "test_images": len(study.source.test),
        "classes": study.source.classes,
        "version": __version__,
        "environment": environment(),
    }
    write_json(out / "results.json", result)
    figure = save(augmentation_arms(result["by_shots"], result["made"]), out / "arms.png")
    columns, rows = _rows(result, arms, config["shots"])
    logger = wandb(str(out), name=cfg.name, mode=cfg.wandb)
    try:
        logger.log_hyperparams(config)
        logger.log_table("comparison/arms", columns=columns, data=rows)
        names = ["arm", "shots", "seed", "accuracy", "validation", "setting"]
        data = [[record[name] for name in names] for record in records.values()]
        logger.log_table("comparison/cells", columns=names, data=data)
        logger.log_image("comparison/figure", [str(figure)])
    finally:
        close([logger])
    title = f"accuracy ± standard error over {cfg.seeds} seeds (difference from none, paired)"
    show(table(title, columns, rows), f"written to {out}")
    return result


def _rows(result: dict[str, Any], arms: list[str], shots: list[int]) -> tuple[list[str], list[list[str]]]:
    """The table: arms by shots, and the seconds of a cell."""
    columns = ["", *(f"{n} a class" for n in shots), "difference from none", "choice", "arm", "classifier"]
    rows = []
    for arm in arms:
        row = [arm]
        for n in shots:
            found = result["by_shots"][str(n)].get(arm)
            row.append(_percent(found["accuracy"]) if found else "")
        row.append(_percent((result["overall"].get(arm) or {"minus": {}})["minus"].get("none"), "+"))
        row += [f"{result['seconds'][arm].get(name, 0):.1f} s" for name in columns[-3:]]
        rows.append(row)
    return columns, rows


def _percent(found: dict[str, Any] | None, sign: str = "") -> str:
    if not found:
        return ""
    error = "" if found["se"] is None else f" ± {100 * found['se']:.1f}"
    return f"{100 * found['mean']:{sign}.1f}{error} %"


main = entry_point("compare_augmentation")(lambda cfg: compare_augmentation(cfg, Path(cfg.out)))

if __name__ == "__main__":
    main()
