"""Models for the entry points: of a run folder, or of an official checkpoint and the family that it belongs
to."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_gen import checkpoints, pretrained, runs
from lit_gen.autoencoder.module import AutoencoderModule
from lit_gen.errors import ConfigError
from lit_gen.funit.module import FUNITModule
from lit_gen.funit.translator import Generator
from lit_gen.images import height_and_width
from lit_gen.instantiate import instantiate
from lit_gen.models.conditions import TestConditions
from lit_gen.module import BaseModule
from lit_gen.pretrained.funit import load_generator
from lit_gen.score.denoiser import AbstractDenoiser, ReparameterizedDenoiser, check_precision
from lit_gen.score.guidance import ClassifierGuidance, Guidance, Unconditional, classifier_free_guidance
from lit_gen.score.module import ScoreModule
from lit_gen.score.sde import VE, Process
from lit_gen.score.translation import TranslationModule

__all__ = [
    "FAMILIES",
    "autoguidance",
    "classifier",
    "classifier_free",
    "content_augment",
    "funit_run",
    "guide",
    "load",
    "open_model",
    "open_official",
    "open_translator",
    "sample_in",
]

FAMILIES = {
    "EDMPrecond": "edm",
    "Precond": "edm",
    "VPPrecond": "vp",
    "VEPrecond": "ve",
    "iDDPMPrecond": "iddpm",
}
"""The class of an EDM or EDM2 snapshot -> the option of conf/model with its process and precondition."""


Module = TypeVar("Module", bound=nn.Module)


def open_model(cfg: DictConfig) -> tuple[Any, DictConfig | None, Path]:
    """(module in eval mode, configuration of its run, file read): of `cfg.run` as `load`, or of
    `cfg.weights`.

    Official weights bring their network; `cfg.model` says the process and precondition they were trained
    with. `cfg.guidance` wraps either. Raises ConfigError where neither or both of `run` and `weights` are
    given, and where the checkpoint contradicts the model.
    """
    if (cfg.run is None) == (cfg.weights is None):
        raise ConfigError(
            "Give run=<run folder or checkpoint>, or weights=<official checkpoint> with model=..."
        )
    if cfg.run is not None:
        if cfg.model is not None:
            raise ConfigError("model=... goes with weights=...; a run has its own model.")
        module, run_cfg, path = load(cfg.run, cfg.checkpoint, ema=cfg.ema, device=cfg.device)
        if isinstance(module, AutoencoderModule):
            raise ConfigError(
                f"run={cfg.run} is an autoencoder, which samples nothing: lit-gen prepare encoder={cfg.run} "
                "makes latents, and a score model of these (data=latents) samples."
            )
        return guide(module, cfg), run_cfg, path
    module, _, _ = open_official(cfg, cfg.device)
    return guide(module, cfg), None, Path(cfg.weights)


def open_official(cfg: DictConfig, device: str | None) -> tuple[ScoreModule, dict[str, Any], bool]:
    """(module in eval mode, configuration that makes it, whether the weights are an average) of
    `cfg.weights`, of the family `cfg.model`. Raises ConfigError."""
    if not isinstance(cfg.image_size, int | None):
        raise ConfigError(f"image_size={cfg.image_size}: official weights are of square images.")
    net, info = pretrained.load(cfg.weights, ema=cfg.ema, image_size=cfg.image_size)
    node = _official_config(cfg, net, info)
    module = instantiate({key: value for key, value in node.items() if key != "net"}, net=net)
    if problem := contradicting_levels(module.denoiser.process, info):
        raise ConfigError(problem)
    return _ready(module, device), node, info.weights == "ema"


def _official_config(
    cfg: DictConfig, net: pretrained.OfficialNetwork, info: pretrained.Info
) -> dict[str, Any]:
    family = FAMILIES.get(str(info.snapshot.get("class", "")).rpartition(".")[2])
    if cfg.model is None:
        hint = f"its class says model={family}" if family else "edm, vp, subvp, ve, ddpm, ncsnv2 ..."
        raise ConfigError(f"weights={cfg.weights} needs model=..., what it was trained with: {hint}.")
    parts = {
        name: OmegaConf.to_container(cfg.model[name], resolve=True)
        for name in ("process", "precondition", "loss", "optimizer")
    }
    sides, kind = height_and_width(info.network["image_size"]), type(net)
    return {
        "_target_": f"{ScoreModule.__module__}.{ScoreModule.__name__}",
        "net": {"_target_": f"{kind.__module__}.{kind.__name__}", **info.network},
        **parts,
        "sampler": {"_target_": "lit_gen.score.samplers.heun", "_partial_": True, "num_steps": 18},
        "image_shape": [net.channels, *sides],
        "num_classes": net.num_classes,
        "label_dropout": 0.1 if getattr(net, "null_class", False) else cfg.model.label_dropout,
    }


def contradicting_levels(process: Process, info: pretrained.Info) -> str | None:
    """What is wrong between the noise levels that a file was trained with, on [0, 1] images, and those of a
    VE process, on [-1, 1]; None where nothing is known to be."""
    if info.sigmas is None or not isinstance(process, VE):
        return None
    low, high = 2 * float(info.sigmas.min()), 2 * float(info.sigmas.max())
    ours = (process.sigma_min, process.sigma_max)
    if all(abs(a / b - 1) <= 1e-3 for a, b in zip(ours, (low, high), strict=True)):
        return None
    return (
        f"The checkpoint has noise levels from {low:.4g} to {high:.4g} for [-1, 1] images, the model "
        f"{ours[0]:.4g} to {ours[1]:.4g}: "
        f"set model.process.sigma_min={low:.4g} model.process.sigma_max={high:.4g}"
    )


def load(
    run: str | Path, checkpoint: str = "best", *, ema: bool = True, device: str | None = None
) -> tuple[Any, DictConfig, Path]:
    """The model of a run folder (`checkpoint` is "best", "last" or a path), of a checkpoint file, or of a
    folder that was exported: (module in eval mode, its configuration, the file read).

    `ema=True` loads the averaged weights where the run has them; without it a FUNIT module's raw weights
    stand in for its average. Nothing in the file is executed; targets
    outside the allow list (`lit_gen.instantiate`) are refused, whatever `allow_targets` says in the file.
    A run without such a checkpoint has the newest one that can be read instead.
    """
    path, home = Path(run), None
    if path.is_dir() and runs.is_exported(path):
        home, cfg = path, runs.saved_config(path)
        if checkpoint not in ("best", "last"):
            raise ConfigError(
                f"checkpoint={checkpoint}: {path} is an exported folder, which holds one state."
            )
        if not ema and runs.read_json(path / runs.CONFIG)["averaged"]:
            raise ConfigError(
                f"ema=false: {path} holds the averaged weights alone. Export the run with ema=false."
            )
        path = path / runs.WEIGHTS
        try:
            state: dict[str, Any] = {"state_dict": load_file(path)}
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged ({error}): export the model again.") from error
    elif path.is_dir() and not checkpoints.is_checkpoint(path):
        cfg = runs.saved_config(path)
        path, state = checkpoints.of_run(run, checkpoint)
    else:
        state = checkpoints.read(path)
        cfg = runs.config_of(state["config"])
    module = instantiate(cfg.model)
    _load_weights(module, state["state_dict"], path)
    averages = [v["shadow"] for k, v in state.get("callbacks", {}).items() if k.startswith("EMA")]
    if ema and averages:
        network = module.ema_network()
        _load_weights(network, network.state_dict() | averages[0], path)
    if not ema and isinstance(module, FUNITModule):
        module.generator_ema.load_state_dict(module.generator.state_dict())
    if isinstance(module, ScoreModule) and (module.vector_dim or module.condition_channels):
        module.condition_source = TestConditions(cfg)
    if isinstance(module, AutoencoderModule):
        module.image_source = TestConditions(cfg)
    if isinstance(module, BaseModule):
        module.find_beside(home or path.absolute().parent.parent)  # of run/checkpoints/file
    return _ready(module, device), cfg, path


def _ready(module: Module, device: str | None) -> Module:
    """In eval mode, without gradients, on the device; None: a GPU if there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return module.to(device).eval().requires_grad_(False)


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


def guide(module: Module, cfg: DictConfig) -> Module:
    """The module, its denoiser wrapped by `cfg.guidance` if there is one, its networks to sample in
    `cfg.precision` where that is given.

    Raises ConfigError for a model that has no denoiser, or one that this guidance cannot guide.
    """
    sample_in(module, cfg.get("precision"))
    if cfg.guidance is not None:
        if not isinstance(module, ScoreModule):
            raise ConfigError(f"guidance= is for score models, not for {type(module).__name__}.")
        module.denoiser = instantiate(cfg.guidance)(module)
    return module


def sample_in(module: nn.Module, precision: str | None) -> None:
    """Makes the module sample in float32, bf16 or fp16; None: as it was trained to.

    Raises ConfigError for any other precision, and for a model without a denoiser.
    """
    if precision is not None:
        if not isinstance(module, ScoreModule):
            raise ConfigError(f"precision= is for score models, not for {type(module).__name__}.")
        check_precision("precision", precision)
        module.sampling_precision = precision


def classifier_free(
    module: ScoreModule,
    weight: float = 2.0,
    interval: Sequence[float] = (0.0, math.inf),
    parts: Sequence[str] | None = None,
    channels: int | None = None,
) -> AbstractDenoiser:
    """By the model itself without its condition, or without the named parts of it; `channels` guides the
    first so many alone (`lit_gen.score.guidance.Guidance`). Raises ConfigError for a model that is told
    nothing, or was never trained without what is left out."""
    _check_interval(interval)
    parts = module.parts if parts is None else parts
    if not module.parts:
        raise ConfigError("guidance=classifier_free needs a conditional model; this one has no classes.")
    if unknown := [part for part in parts if part not in module.parts]:
        has = ", ".join(module.parts)
        raise ConfigError(f"guidance.parts={list(parts)}: the model is told a {has}, and no {unknown[0]}.")
    if never := [part for part in parts if not module.dropout[part]]:
        option = "label_dropout" if never[0] == "label" else f"condition_dropout.{never[0]}"
        raise ConfigError(
            f"guidance=classifier_free needs a model that knows images without a {never[0]}: train it with "
            f"model.{option}=0.1, or take guidance=auto with another model as the guide."
        )
    return classifier_free_guidance(module.denoiser, weight, (interval[0], interval[1]), parts, channels)


def autoguidance(
    module: ScoreModule,
    run: str,
    checkpoint: str = "best",
    weight: float = 2.0,
    interval: Sequence[float] = (0.0, math.inf),
    ema: bool = True,
) -> AbstractDenoiser:
    """By a worse model of the same images, smaller or trained for less: a run folder or a checkpoint.

    The guide may live on another process, and may lack a part of the condition that the model has. Raises
    ConfigError for a guide of other images or conditions.
    """
    _check_interval(interval)
    worse, _, path = load(run, checkpoint, ema=ema, device=str(module.device))
    if not isinstance(worse, ScoreModule) or worse.image_shape != module.image_shape:
        raise ConfigError(f"{path} cannot guide: it is no score model of images {module.image_shape}.")
    guiding: AbstractDenoiser = worse.denoiser
    for size in ("num_classes", "vector_dim", "condition_channels"):
        own, of_guide = getattr(module, size), getattr(worse, size)
        if of_guide not in (0, own):
            raise ConfigError(f"{path} cannot guide: its {size} is {of_guide}, that of the model {own}.")
    if lacking := [part for part in module.parts if part not in worse.parts]:
        guiding = Unconditional(guiding, lacking)
    if guiding.process != module.denoiser.process:
        guiding = ReparameterizedDenoiser(guiding, module.denoiser.process)
    return Guidance(module.denoiser, guiding, weight, (interval[0], interval[1]))


def classifier(
    module: ScoreModule, run: str, checkpoint: str = "best", weight: float = 1.0
) -> AbstractDenoiser:
    """By a classifier of noisy images (`lit_gen.score.classifier.ClassifierModule`), a run folder or a
    checkpoint.

    It steers unconditional models too; their samples then take class i mod its number of classes. Raises
    ConfigError for a classifier of other images or classes.
    """
    from lit_gen.score.classifier import ClassifierModule

    network, _, path = load(run, checkpoint, device=str(module.device))
    if not isinstance(network, ClassifierModule) or network.image_shape != module.image_shape:
        raise ConfigError(
            f"{path} cannot guide: it is no classifier of noisy images {module.image_shape}. "
            "Train one with experiment=digits_noisy_classifier, or one like it."
        )
    if module.num_classes not in (0, network.num_classes):
        raise ConfigError(
            f"{path} cannot guide: it tells {network.num_classes} classes apart, the model has "
            f"{module.num_classes}."
        )
    unconditional = not module.num_classes
    module.num_classes = cast(int, network.num_classes)
    return ClassifierGuidance(module.denoiser, network.on(module.denoiser.process), weight, unconditional)


def _check_interval(interval: Sequence[float]) -> None:
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ConfigError(
            f"guidance.interval={list(interval)}: give the lowest and the highest guided noise level, "
            "such as [0.2, 1.5]."
        )


def open_translator(cfg: DictConfig) -> tuple[Generator, DictConfig | None, Path]:
    """(generator in eval mode, the run's configuration, file read) of `cfg.run` or of `cfg.weights`, an
    official checkpoint. Raises ConfigError where neither is given, or both."""
    if (cfg.run is None) == (cfg.weights is None):
        raise ConfigError("Give run=<FUNIT run folder or checkpoint>, or weights=<official gen_*.pt>.")
    if cfg.run is not None:
        module, run_cfg, path = funit_run(cfg)
        return module.generator_ema, run_cfg, path
    path = Path(cfg.weights)
    return _ready(load_generator(path, average=cfg.ema), cfg.device), None, path


def funit_run(cfg: DictConfig) -> tuple[FUNITModule | TranslationModule, DictConfig, Path]:
    """`load` of a run that translates, by FUNIT or by a score model, the latter guided by `cfg.guidance`.
    Raises ConfigError for a run of another kind."""
    module, run_cfg, path = load(cfg.run, cfg.checkpoint, ema=cfg.ema, device=cfg.device)
    if not isinstance(module, FUNITModule | TranslationModule):
        raise ConfigError(
            f"{cfg.run} is a run of {type(module).__name__}, which does not translate: give one of FUNIT."
        )
    if cfg.get("guidance") is not None:
        guide(module, cfg)
    return module, run_cfg, path


def content_augment(run_cfg: DictConfig | None) -> Callable[[Tensor, torch.Generator], Tensor] | None:
    """The augmentation of content images that a few-shot translator was trained with; None without one.

    Runs of the earliest versions call it `restyle`.
    """
    data = {} if run_cfg is None else run_cfg.data
    node = data.get("content_augment", data.get("restyle"))
    return node and instantiate(node)
