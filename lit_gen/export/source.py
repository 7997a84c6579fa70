"""What is exported, and what is known of where it comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lit_gen import checkpoints, runs
from lit_gen.errors import ConfigError
from lit_gen.funit.module import FUNITModule
from lit_gen.instantiate import config_dict
from lit_gen.models.loading import load, open_official


@dataclass(frozen=True)
class Source:
    """A model in eval mode; the `config` of its run, of official weights `model` alone; the file that was
    read; the run folder that it lies in, if any; whether the weights are a moving average; after how many
    batches they were saved, where that is known; and whether an average was asked for."""

    module: Any
    config: dict[str, Any]
    path: Path
    run: Path | None
    averaged: bool
    step: int | None
    ema: bool = True

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.path.stem)


@dataclass(frozen=True)
class Usage:
    """How a folder is loaded: the `library` that does it, `lines` of Python in which {here} stands for where
    it is, and what else a reader should know."""

    library: str
    lines: str
    notes: str = ""


Write = Callable[[Source, Path], Usage]
"""Writes a format into an empty folder."""


def open_source(cfg: DictConfig) -> Source:
    """Of `cfg.run`, a run folder, checkpoint, or exported folder, or of `cfg.weights` with `cfg.model`.
    Raises ConfigError."""
    if (cfg.run is None) == (cfg.weights is None):
        raise ConfigError("Give run=<run folder or checkpoint>, or weights=<official weights> with model=...")
    if cfg.weights is not None:
        module, node, averaged = open_official(cfg, "cpu")
        return Source(module, {"model": node}, Path(cfg.weights), None, averaged, None)
    module, run_cfg, path = load(cfg.run, cfg.checkpoint, ema=cfg.ema, device="cpu")
    config = config_dict(run_cfg)
    if runs.is_exported(path.parent):
        told = runs.read_json(path.parent / runs.CONFIG)
        return Source(module, config, path, None, told["averaged"], told["step"])
    state = checkpoints.read(path, sharded=False)
    averages = any(name.startswith("EMA") for name in state.get("callbacks", {}))
    averaged = cfg.ema and (averages or isinstance(module, FUNITModule))
    home = next((p for p in path.absolute().parents[:2] if (p / "config.yaml").is_file()), None)
    step = state.get("batches_seen", state.get("global_step"))
    return Source(module, config, path, home, averaged, step, cfg.ema)


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """The state of a module as safetensors stores it: on the CPU, contiguous, no two of one memory."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in module.state_dict().items()}


def portable(config: Any) -> Any:
    """The configuration without secrets, and with the names alone of files that are named by absolute
    paths, or in a home folder, which are of one machine."""
    if isinstance(config, dict):
        return {key: portable(value) for key, value in runs.redacted(config).items()}
    if isinstance(config, list):
        return [portable(value) for value in config]
    if not isinstance(config, str):
        return config
    path = config.removeprefix("file://")
    return Path(path).name if path.startswith("~") or Path(path).is_absolute() else config
