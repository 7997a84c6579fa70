"""From a configuration to a trained run folder."""

import logging
import shlex
import time
import warnings
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from lit_gen import checkpoints, runs
from lit_gen.cli import show
from lit_gen.config.experiment import Experiment, build
from lit_gen.config.schema import TrainSchema
from lit_gen.errors import ConfigError
from lit_gen.figures import curves, save
from lit_gen.instantiate import config_dict, up_to_date
from lit_gen.loggers import close, environment
from lit_gen.models import start_from

log = logging.getLogger(__name__)

STARTED = "weights.json"  # of the run folder: what the networks started from
GROUPS = ("experiment", "data", "augment", "model", "sampler", "metrics", "callbacks", "logger", "trainer")


def train(cfg: DictConfig, folder: Path, overrides: list[str], main: bool = True) -> float | None:
    """Trains (or resumes training) in `folder` and returns the final value of `metrics.objective`, if it is
    measured.

    `overrides` are the command line's; `main` says that this process is rank 0.
    """
    _quiet()
    checkpoint = None
    if cfg.resume and (cfg.resume != "auto" or any(checkpoints.folder(folder).glob("*.ckpt"))):
        cfg, checkpoint = _resumed(cfg, folder, overrides, main)
    elif main:
        runs.claim(folder, resume=cfg.resume is not None)
    experiment = build(cfg, folder)
    module, data, trainer = experiment.module, experiment.data, experiment.trainer
    assert isinstance(data, LightningDataModule)  # `build` has seen to it
    if cfg.weights and checkpoint is None:
        start = start_from(module, cfg.weights, experiment.config["model"], ema=cfg.weights_ema)
        if main:
            runs.write_json(folder / STARTED, start.record())
            print(*start.lines(), sep="\n", flush=True)
    if main:
        runs.write_whole(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(experiment.config)))
        module.keep_beside(folder)
        _introduce(cfg, experiment, folder, checkpoint)
        around = environment()
        runs.write_json(folder / "environment.json", around)
        for logger in trainer.loggers:
            logger.log_hyperparams(experiment.config | {"environment": around})
    start, status = time.perf_counter(), "failed"
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        seconds = time.perf_counter() - start
        if trainer.is_global_zero:
            _finish(experiment, folder, seconds)
        status = "success"
    finally:
        close(trainer.loggers, status)
    return module.results.objective(cfg.metrics.objective)


def _resumed(cfg: DictConfig, folder: Path, overrides: list[str], main: bool) -> tuple[DictConfig, Path]:
    """The saved configuration with this command's changes, and the newest checkpoint that loads."""
    saved = OmegaConf.merge(OmegaConf.structured(TrainSchema), runs.saved_config(folder))
    assert isinstance(saved, DictConfig)
    if main:
        runs.claim(folder, resume=True)
    before = saved.weights
    for change in OverridesParser.create().parse_overrides(overrides):
        _apply(saved, change, again=cfg.resume == "auto")
    if saved.weights != before:
        raise ConfigError(
            f"weights={saved.weights}: a resumed run goes on from its own checkpoint"
            f"{f' and began with weights={before}' if before else ''}. Leave it out, or begin a new run."
        )
    saved.resume = None
    path, state, bad = checkpoints.newest_good(folder, sharded=False)
    for problem in bad:
        log.warning("%s Resuming from %s instead.", problem, path)
    was, now = up_to_date(state["config"]["model"]), config_dict(saved.model)
    for part in (
        "_target_",
        "net",
        "network",
        "process",
        "precondition",
        "generator",
        "discriminator",
        "freeze",
    ):
        if was.get(part) != now.get(part):
            raise ConfigError(
                f"{path} holds another model: model.{part} is {was.get(part)} there and {now.get(part)} here."
            )
    return saved, path


def _apply(saved: DictConfig, change: Override, again: bool) -> None:
    """One command-line override on the configuration of a resumed run. `again`: the run's first command,
    typed once more."""
    key = change.key_or_group
    if key == "resume":
        return
    if key in GROUPS:
        if again:
            return
        raise ConfigError(
            f"{change.input_line}: a resumed run keeps its {key}; "
            "only values such as trainer.max_steps can change."
        )
    if not change.is_add() and OmegaConf.select(saved, key, default=GROUPS) is GROUPS:
        if again and key.startswith(("callbacks.", "logger.")):
            return  # of one that the first command switched off
        raise ConfigError(f"{change.input_line}: the configuration of the run has no {key}.")
    try:
        with open_dict(saved):
            if change.is_delete():
                parent, _, name = key.rpartition(".")
                OmegaConf.select(saved, parent).pop(name)
            else:
                OmegaConf.update(saved, key, change.value())
    except OmegaConfBaseException as error:
        raise ConfigError(f"{change.input_line}: {error}") from error


def _quiet() -> None:
    """Silences what Lightning says about choices that are ours; everything else is shown."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*val_dataloader.*",
        ".*does not have many workers.*",
        ".*The `srun` command is available.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*in eval mode at the start of training.*",  # a loss's teacher
        ".*torch.distributed.nn.functional.all_gather is deprecated.*",
        ".*`broadcast_buffers` is deprecated.*",  # what takes its place came with torch 2.14
    ):
        warnings.filterwarnings("ignore", message)


def _introduce(cfg: DictConfig, experiment: Experiment, folder: Path, checkpoint: Path | None) -> None:
    module, data, trainer = experiment.module, experiment.data, experiment.trainer
    if introduction := experiment.config.get("introduction"):
        print(introduction, flush=True)
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    print(
        f"{cfg.name}: {size:,} parameters, {len(data.train):,} training images, batch {data.batch_size}, "
        f"{trainer.max_steps:,} steps on {trainer.world_size} x {trainer.strategy.root_device.type} "
        f"({trainer.precision})",
        flush=True,
    )
    print(f"{'resumed from ' + str(checkpoint) if checkpoint else 'run folder ' + str(folder)}", flush=True)


def _finish(experiment: Experiment, folder: Path, seconds: float) -> None:
    """summary.json, the closing table, and what to type next."""
    module, data = experiment.module, experiment.data
    steps = module.batches_seen
    summary: dict[str, Any] = {
        "steps": steps,
        "train_seconds": round(seconds, 2),
        "images_per_second": round(module.training_pace(), 1),
        **module.results.summary,
        "objective": module.results.objective(experiment.config["metrics"]["objective"]),
        "batch_size": data.batch_size,
        "parameters": sum(p.numel() for p in module.parameters()),
    }
    if started := runs.read_json(folder / STARTED):
        summary["weights"] = started
    runs.write_json(folder / "summary.json", summary)
    for logger in experiment.trainer.loggers:
        logger.log_metrics(
            {f"summary/{k}": v for k, v in summary.items() if isinstance(v, int | float)}, step=steps
        )
    for logger in experiment.trainer.loggers:
        logger.save()
    if figure := curves(runs.history(folder)):
        save(figure, folder / "curves.png")
    _table(summary, experiment, folder)


def _table(summary: dict[str, Any], experiment: Experiment, folder: Path) -> None:
    table = Table(show_header=False, title="result")
    rows = {"batches": f"{summary['steps']:,}", "seconds": f"{summary['train_seconds']:.1f}"}
    if summary["images_per_second"]:  # not known before the second log
        rows["images/s while training"] = f"{summary['images_per_second']:,.0f}"
    module, allowed = experiment.module, experiment.config["allow_targets"]
    for label, text in (rows | module.results.rows).items():
        table.add_row(label, text)
    trusted = f" allow_targets=[{','.join(allowed)}]" if allowed else ""
    quoted = shlex.quote(str(folder))
    commands = {what: command.format(run=quoted) for what, command in module.next_commands.items()}
    commands["train on"] = f"python -m lit_gen.train resume={quoted} trainer.max_steps={2 * summary['steps']}"
    advice = [f"{what}: {command}{trusted}" for what, command in commands.items()]
    show(table, f"run folder: {folder}", *advice)
