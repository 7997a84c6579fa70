"""A configuration becomes an experiment; a run folder becomes a model again.

A run folder holds `config.yaml` (resolved), `checkpoints/`, `grids/`, `wandb/`, `metrics.csv` and
`summary.json`.
"""

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf

from lit_gen import __version__, checkpoints
from lit_gen.callbacks import EMA, NaNGuard, Signals
from lit_gen.errors import ConfigError
from lit_gen.instantiate import instantiate

__all__ = ["Experiment", "SaveConfig", "build", "claim", "history", "load", "saved_config", "write_whole"]


class SaveConfig(pl.Callback):
    """Puts the resolved configuration into every checkpoint, so that a checkpoint alone is enough to rebuild
    its model."""

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config
        checkpoint["lit_gen_version"] = __version__


@dataclass
class Experiment:
    """`config` is the resolved configuration, without the callbacks and loggers that are switched off."""

    module: Any
    data: pl.LightningDataModule
    trainer: pl.Trainer
    config: dict[str, Any]


def build(cfg: DictConfig, folder: Path) -> Experiment:
    """Everything that a training needs, made from the configuration and checked against one another.

    Raises ConfigError for whatever would fail later: data that is not there, a batch size that does not fit,
    images that the network does not take, targets that are not allowed.
    """
    allow = list(cfg.allow_targets)
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    config |= {group: _switched_on(group, config[group]) for group in ("callbacks", "logger")}
    data = instantiate(config["data"], allow)
    torch.manual_seed(cfg.seed)  # the initial weights
    module = instantiate(config["model"], allow)
    # Averages and guards first: what measures or saves after them finds the batch completed.
    callbacks = [instantiate(c, allow) for c in config["callbacks"].values()]
    if hasattr(module, "check"):
        module.check()
    _check_answers(module, dict(zip(config["callbacks"], callbacks, strict=True)))
    callbacks.sort(key=lambda c: not isinstance(c, EMA | NaNGuard | Signals))
    loggers = []
    if _is_rank_zero():
        loggers = [instantiate(lg, allow) for lg in config["logger"].values()]
    trainer = trainer_for(
        config["trainer"], allow, callbacks=[SaveConfig(config), *callbacks], loggers=loggers, folder=folder
    )
    if _is_rank_zero():  # the others wait for its prepare_data, so that a download happens once
        data.check(trainer.world_size)
        _check_batch(module, data)
    return Experiment(module, data, trainer, config)


def _switched_on(group: str, nodes: dict[str, Any]) -> dict[str, Any]:
    """Those that something is made of. `_target_: null` (metrics=none) or null instead of the node switches
    one off, whatever an experiment sets of it; one without a `_target_` is a mistake.
    """
    for name, node in nodes.items():
        if node is not None and not (isinstance(node, dict) and "_target_" in node):
            raise ConfigError(
                f"{group}.{name}={node} names no class: no choice of a group has made it, these are options "
                f"alone. Leave it out (~{group}.{name}), or give {group}.{name}._target_."
            )
    return {name: node for name, node in nodes.items() if node and node["_target_"]}


def _check_answers(module: Any, callbacks: dict[str, Any]) -> None:
    """Callbacks name in `asks` the methods of the module that they call."""
    for name, callback in callbacks.items():
        if isinstance(callback, EMA):
            module.ema_network()
        for method in getattr(callback, "asks", ()):
            if not hasattr(module, method):
                raise ConfigError(
                    f"callbacks.{name} ({type(callback).__name__}) calls {method} of the model, a "
                    f"{type(module).__name__}, which has none: leave it out (~callbacks.{name}), or take the "
                    "callbacks of the model's family (callbacks=default, classifier, detection, funit)."
                )


def _check_batch(module: Any, data: Any) -> None:
    if not hasattr(data, "keyed_train"):
        return  # a data module of the user's
    given = set(data.keyed_train()[0, 0])
    if missing := getattr(module, "reads", frozenset()) - given:
        raise ConfigError(
            f"A {type(module).__name__} needs {', '.join(sorted(missing))} in a batch; the data, a "
            f"{type(data).__name__}, give {', '.join(sorted(given))}: they are of different families. Take "
            "an experiment of the model's (experiment=digits, funit_glyphs, detector_scenes), or its data."
        )


def _is_rank_zero() -> bool:
    from lightning.pytorch.utilities import rank_zero_only

    return rank_zero_only.rank == 0


def trainer_for(
    config: dict[str, Any], allow: Any = (), *, callbacks: Any = (), loggers: Any = (), folder: Path
) -> pl.Trainer:
    """The Trainer of a configuration, with what lit_gen does itself switched off (sampler injection, bars,
    checkpoints)."""
    options = dict(config)
    if options["accelerator"] == "auto" and not torch.cuda.is_available():
        options["accelerator"] = "cpu"  # not Apple's GPUs, which have no float64 and which nobody has tried
    if options["precision"] == "auto":
        cuda = options["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        options["precision"] = (
            "bf16-mixed" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
        )
    if options["precision"] in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
        raise ConfigError(
            f"trainer.precision={options['precision']} keeps the weights in half precision, where an average "
            "stands still. Take bf16-mixed, which computes in bfloat16 on weights in float32."
        )
    if options["deterministic"]:
        options["benchmark"] = False  # it picks kernels by their time
    plugins = [checkpoints.AtomicCheckpointIO()]
    if options.pop("plugins", None):
        plugins += [instantiate(p, allow) for p in config["plugins"]]
    if isinstance(options["strategy"], dict):
        options["strategy"] = instantiate(options["strategy"], allow)
    if options["max_steps"] < 1:
        raise ConfigError(f"trainer.max_steps={options['max_steps']}: must be at least 1.")
    return instantiate(
        {"_target_": options.pop("_target_")},
        allow,
        **options,
        callbacks=list(callbacks),
        logger=list(loggers) or False,
        plugins=plugins,
        default_root_dir=str(folder),
        max_epochs=-1,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def claim(folder: Path, resume: bool) -> None:
    """Makes the run folder ours. Raises ConfigError if it holds another run or cannot be written."""
    if (folder / "config.yaml").exists() and not resume:
        raise ConfigError(
            f"{folder} already holds a run: continue it with resume={folder}, "
            "or choose another hydra.run.dir."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"The run folder {folder} cannot be written: {error.strerror}.") from error


def saved_config(run: str | Path) -> DictConfig:
    """The resolved configuration of a run folder or of a checkpoint file."""
    path = Path(run)
    if path.is_file():
        return OmegaConf.create(checkpoints.read(path)["config"])
    if not path.is_dir():
        raise ConfigError(f"There is no run folder {path}.")
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} is not a run folder of lit_gen: it has no config.yaml.")
    return OmegaConf.load(path / "config.yaml")


def load(
    run: str | Path, checkpoint: str = "best", *, ema: bool = True, allow: Any = (), device: str | None = None
) -> tuple[Any, DictConfig, Path]:
    """The model of a run folder (`checkpoint` is "best", "last" or a path) or of a checkpoint file: (module
    in eval mode, its configuration, the file read).

    `ema=True` loads the averaged weights where the run has them. Nothing in the file is executed; targets
    outside the allow list (`lit_gen.instantiate`) are refused, whatever the file itself allows. "best" falls
    back on the newest checkpoint that loads, "last" too.
    """
    path = Path(run)
    if path.is_dir():
        cfg = saved_config(path)
        path = (
            checkpoints.folder(path) / f"{checkpoint}.ckpt"
            if checkpoint in ("best", "last")
            else Path(checkpoint)
        )
        if checkpoint in ("best", "last") and not path.is_file():
            path, state, _ = checkpoints.newest_good(run)
        else:
            state = checkpoints.read(path)
    else:
        state = checkpoints.read(path)
        cfg = OmegaConf.create(state["config"])
    module = instantiate(cfg.model, allow)
    _load_weights(module, state["state_dict"], path)
    if ema:
        averages = [v["shadow"] for k, v in state.get("callbacks", {}).items() if k.startswith("EMA")]
        if averages:
            weights = dict(module.ema_network().named_parameters())
            with torch.no_grad():
                for name, value in averages[0].items():
                    weights[name].copy_(value)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return module.to(device).eval().requires_grad_(False), cfg, path


def _load_weights(module: torch.nn.Module, weights: dict[str, Any], path: Path) -> None:
    own = module.state_dict()
    wrong = sorted(set(own) ^ set(weights)) or [k for k in own if own[k].shape != weights[k].shape]
    if wrong:
        raise ConfigError(
            f"{path} holds the weights of another model: {len(wrong)} entries differ, "
            f"the first is {wrong[0]!r}. "
            "Was model.* changed since it was saved?"
        )
    module.load_state_dict(weights)


def write_whole(path: Path, text: str) -> Path:
    """The file as it was before or with this text, at any moment and whatever happens."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)
    return path


def history(run: str | Path) -> dict[str, dict[int, float]]:
    """Logged numbers of a run over all its launches: name -> {batches seen: value}; later launches win.

    The run may be training meanwhile: a last line that is not written to its end is left out. Runs of
    before `metrics.csv` have `csv/version_<launch>/metrics.csv`, a column a name.
    """
    result: dict[str, dict[int, float]] = {}
    run = Path(run)
    for file in sorted(run.glob("csv/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        names, *rows = _whole_rows(file) or [[]]
        if "step" not in names:
            continue  # Lightning's logger, caught at writing its file anew
        for row in rows:
            cells = dict(zip(names, row, strict=False))
            step = int(cells.pop("step"))
            for name, value in cells.items():
                if value:
                    result.setdefault(name, {})[step] = float(value)
    if (run / "metrics.csv").is_file():
        for step, name, value in _whole_rows(run / "metrics.csv")[1:]:
            result.setdefault(name, {})[int(step)] = float(value)
    return result


def _whole_rows(path: Path) -> list[list[str]]:
    text = path.read_bytes()
    return list(csv.reader(text[: text.rfind(b"\n") + 1].decode().splitlines()))
