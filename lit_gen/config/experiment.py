"""A configuration becomes an experiment: module, data, trainer, checked against one another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig

from lit_gen import __version__, checkpoints
from lit_gen.callbacks import EMA, NaNGuard, Signals
from lit_gen.callbacks.contracts import Data, HasKeyedTrain, Samples, missing
from lit_gen.errors import ConfigError
from lit_gen.instantiate import config_dict, instantiate
from lit_gen.module import BaseModule


class SaveConfig(pl.Callback):
    """Puts the resolved configuration into every checkpoint, so that a checkpoint alone is enough to rebuild
    its model."""

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
        checkpoint["lit_gen_version"] = __version__


@dataclass
class Experiment:
    """`config` is the resolved configuration, without the callbacks and loggers that are switched off."""

    module: BaseModule
    data: Data
    trainer: pl.Trainer
    config: dict[str, Any]


def build(cfg: DictConfig, folder: Path) -> Experiment:
    """Everything that a training needs, made from the configuration and checked against one another.

    Raises ConfigError for whatever would fail later: data that is not there, a batch size that does not fit,
    images that the network does not take, targets that are not allowed.
    """
    config = config_dict(cfg)
    config |= {group: _switched_on(group, config[group]) for group in ("callbacks", "logger")}
    data = instantiate(config["data"])
    torch.manual_seed(cfg.seed)  # the initial weights
    module = instantiate(config["model"])
    # Averages and guards first: what measures or saves after them finds the batch completed.
    callbacks = [instantiate(c) for c in config["callbacks"].values()]
    _check_kinds(module, data)
    _check_requirements(module, dict(zip(config["callbacks"], callbacks, strict=True)))
    callbacks.sort(key=lambda c: not isinstance(c, EMA | NaNGuard | Signals))
    loggers = []
    if _is_rank_zero():
        loggers = [instantiate(lg) for lg in config["logger"].values()]
    trainer = trainer_for(
        config["trainer"], callbacks=[SaveConfig(config), *callbacks], loggers=loggers, folder=folder
    )
    if isinstance(trainer.strategy, checkpoints.FullySharded):
        module.sharded_networks()  # refuses what cannot be sharded
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


def _check_kinds(module: object, data: object) -> None:
    if not isinstance(module, BaseModule):
        raise ConfigError(
            f"model._target_ is {type(module).__name__}: a model must derive from lit_gen.module.BaseModule."
        )
    if not (isinstance(data, pl.LightningDataModule) and hasattr(type(data), "check")):
        raise ConfigError(
            f"data._target_ is {type(data).__name__}: data must be a LightningDataModule with what "
            "lit_gen.callbacks.contracts.Data lists."
        )


def _check_requirements(module: BaseModule, callbacks: dict[str, pl.Callback]) -> None:
    """Callbacks name in `requires` the Protocol of the module that they use; its sampler has to fit."""
    if isinstance(module, Samples):
        module.check()
    for name, callback in callbacks.items():
        requires = getattr(callback, "requires", None)
        if requires is not None and not isinstance(module, requires):
            raise ConfigError(
                f"callbacks.{name} ({type(callback).__name__}) calls {', '.join(missing(module, requires))} "
                f"of the model, a {type(module).__name__}, which lacks them: leave it out "
                f"(~callbacks.{name}), or take the callbacks of the model's family (callbacks=default, "
                "classifier, detection, funit)."
            )


def _check_batch(module: BaseModule, data: Data) -> None:
    if not isinstance(data, HasKeyedTrain):
        return  # a data module of the user's
    batch = data.on_after_batch_transfer(data.keyed_train()[0, 0], 0)
    given = set(batch)
    if lacking := module.batch_keys - given:
        raise ConfigError(
            f"A {type(module).__name__} needs {', '.join(sorted(lacking))} in a batch; the data, a "
            f"{type(data).__name__}, give {', '.join(sorted(given))}: they are of different families. Take "
            "an experiment of the model's (experiment=digits, funit_glyphs, detector_scenes), or its data."
        )
    module.check_batch(batch)


def _is_rank_zero() -> bool:
    from lightning.pytorch.utilities import rank_zero_only

    return vars(rank_zero_only)["rank"] == 0  # Lightning sets it without a declaration


def trainer_for(
    config: dict[str, Any], *, callbacks: Any = (), loggers: Any = (), folder: Path
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
        plugins += [instantiate(p) for p in config["plugins"]]
    if isinstance(options["strategy"], dict):
        options["strategy"] = instantiate(options["strategy"])
    sharded = isinstance(options["strategy"], checkpoints.FullySharded)
    if sharded and options["precision"] not in ("bf16-mixed", "32-true"):
        raise ConfigError(
            f"trainer.precision={options['precision']}: trainer=fsdp takes bf16-mixed or 32-true."
        )
    if options["max_steps"] < 1:
        raise ConfigError(f"trainer.max_steps={options['max_steps']}: must be at least 1.")
    return instantiate(
        {"_target_": options.pop("_target_")},
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
