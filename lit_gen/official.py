"""Models for the entry points: of a run folder, or of an official checkpoint and the family that it belongs
to."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lit_gen import runs
from lit_gen.errors import ConfigError
from lit_gen.guiding import guide
from lit_gen.instantiate import instantiate
from lit_gen.pretrained import edm, ncsn, score_sde, unpickle
from lit_gen.pretrained.keymap import Info
from lit_gen.score.module import ScoreModule
from lit_gen.score.samplers import heun
from lit_gen.score.sde import VE, Process

__all__ = ["FAMILIES", "open_model", "read_network"]

FAMILIES = {
    "EDMPrecond": "edm",
    "Precond": "edm",
    "VPPrecond": "vp",
    "VEPrecond": "ve",
    "iDDPMPrecond": "iddpm",
}
"""The class of an EDM or EDM2 snapshot -> the option of conf/model with its process and precondition."""


def open_model(cfg: DictConfig) -> tuple[Any, DictConfig | None, Path]:
    """(module in eval mode, configuration of its run, file read): of `cfg.run` as `runs.load`, or of
    `cfg.weights`.

    Official weights bring their network; `cfg.model` says the process and precondition they were trained
    with. `cfg.guidance` wraps either. Raises ConfigError where neither or both of `run` and `weights` are
    given, and where the checkpoint contradicts the model.
    """
    allow = list(cfg.allow_targets)
    if (cfg.run is None) == (cfg.weights is None):
        raise ConfigError(
            "Give run=<run folder or checkpoint>, or weights=<official checkpoint> with model=..."
        )
    if cfg.run is not None:
        if cfg.model is not None:
            raise ConfigError("model=... goes with weights=...; a run has its own model.")
        module, run_cfg, path = runs.load(
            cfg.run, cfg.checkpoint, ema=cfg.ema, allow=allow, device=cfg.device
        )
        return guide(module, cfg), run_cfg, path
    path = Path(cfg.weights)
    net, info = read_network(path, ema=cfg.ema, image_size=cfg.image_size)
    module = _module(cfg, net, info, allow)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return guide(module.to(device).eval().requires_grad_(False), cfg), None, path


def read_network(path: Path, *, ema: bool = True, image_size: int | None = None) -> tuple[nn.Module, Info]:
    """The network of an official checkpoint, its kind told by the content: score_sde's, ncsn's and
    ncsnv2's, EDM's.

    `image_size` is for files that cannot tell it. Raises ConfigError for any other file.
    """
    content = unpickle.load(path)
    size = {} if image_size is None else {"image_size": image_size}
    weights = "ema" if ema else "model"
    if isinstance(content, list | tuple):
        return ncsn.load(path, weights=weights, **size)
    if isinstance(content, dict) and "pytorch-lightning_version" in content:
        raise ConfigError(f"{path} is a checkpoint of lit_gen: take run={path} instead of weights=.")
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return score_sde.load(path, weights=weights, **size)
    net, info = edm.load(path)  # its names hold the resolution
    return net, replace(info, network=info.network | {"image_size": net.resolutions[0]})


def _module(cfg: DictConfig, net: nn.Module, info: Info, allow: list[str]) -> ScoreModule:
    family = FAMILIES.get(str(info.snapshot.get("class", "")).rpartition(".")[2])
    if cfg.model is None:
        hint = f"its class says model={family}" if family else "edm, vp, subvp, ve, ddpm, ncsnv2 ..."
        raise ConfigError(f"weights={cfg.weights} needs model=..., what it was trained with: {hint}.")
    parts = {
        name: instantiate(OmegaConf.to_container(cfg.model[name], resolve=True), allow)
        for name in ("process", "precondition", "loss", "optimizer")
    }
    _check_levels(parts["process"], info)
    size = info.network["image_size"]
    return ScoreModule(
        net,
        **parts,
        sampler=partial(heun, num_steps=18),
        image_shape=(net.channels, size, size),
        num_classes=net.num_classes,
    )


def _check_levels(process: Process, info: Info) -> None:
    """The noise levels that a file was trained with, on [0, 1] images, against those of a VE process, on
    [-1, 1]."""
    if info.sigmas is None or not isinstance(process, VE):
        return
    low, high = 2 * float(info.sigmas.min()), 2 * float(info.sigmas.max())
    ours = (process.sigma_min, process.sigma_max)
    if any(abs(a / b - 1) > 1e-3 for a, b in zip(ours, (low, high), strict=True)):
        raise ConfigError(
            f"The checkpoint has noise levels from {low:.4g} to {high:.4g} for [-1, 1] images, the model "
            f"{ours[0]:.4g} to {ours[1]:.4g}: "
            f"set model.process.sigma_min={low:.4g} model.process.sigma_max={high:.4g}"
        )
