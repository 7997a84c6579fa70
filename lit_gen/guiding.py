"""Guidance for the entry points: `guidance=...` wraps the denoiser of a loaded model, so that samples,
restorations, encodings and distances are guided alike."""

import math
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from lit_gen import runs
from lit_gen.errors import ConfigError
from lit_gen.instantiate import instantiate
from lit_gen.score.denoiser import AbstractDenoiser, OnProcess, check_precision
from lit_gen.score.guidance import ClassifierGuidance, Guidance, Unconditional, classifier_free_guidance
from lit_gen.score.module import ScoreModule

__all__ = ["autoguidance", "classifier", "classifier_free", "guide", "sample_in"]


def guide(module: Any, cfg: DictConfig) -> Any:
    """The module, its denoiser wrapped by `cfg.guidance` if there is one, its networks to sample in
    `cfg.precision` where that is given.

    Raises ConfigError for a model that has no denoiser, or one that this guidance cannot guide.
    """
    sample_in(module, cfg.get("precision"))
    if cfg.guidance is not None:
        if not isinstance(module, ScoreModule):
            raise ConfigError(f"guidance= is for score models, not for {type(module).__name__}.")
        module.denoiser = instantiate(cfg.guidance, list(cfg.allow_targets))(module)
    return module


def sample_in(module: Any, precision: str | None) -> None:
    """Makes the module sample in float32, bf16 or fp16; None: as it was trained to.

    Raises ConfigError for any other precision, and for a model without a denoiser.
    """
    if precision is not None:
        if not isinstance(module, ScoreModule):
            raise ConfigError(f"precision= is for score models, not for {type(module).__name__}.")
        check_precision("precision", precision)
        module.sampling_precision = precision


def classifier_free(
    module: ScoreModule, weight: float = 2.0, interval: Sequence[float] = (0.0, math.inf)
) -> AbstractDenoiser:
    """By the model itself without the class (`lit_gen.score.guidance.Guidance`)."""
    _check_interval(interval)
    if not module.num_classes:
        raise ConfigError(
            "guidance=classifier_free needs a class-conditional model; this one has no classes."
        )
    if not module.label_dropout:
        raise ConfigError(
            "guidance=classifier_free needs a model that knows images without a class: train it with "
            "model.label_dropout=0.1, or take guidance=auto with another model as the guide."
        )
    return classifier_free_guidance(module.denoiser, weight, tuple(interval))


def autoguidance(
    module: ScoreModule,
    run: str,
    checkpoint: str = "best",
    weight: float = 2.0,
    interval: Sequence[float] = (0.0, math.inf),
    ema: bool = True,
) -> AbstractDenoiser:
    """By a worse model of the same images, smaller or trained for less: a run folder or a checkpoint.

    The guide may live on another process, and may have no classes where the model has.
    """
    _check_interval(interval)
    worse, _, path = runs.load(run, checkpoint, ema=ema, device=str(module.device))
    if not isinstance(worse, ScoreModule) or worse.image_shape != module.image_shape:
        raise ConfigError(f"{path} cannot guide: it is no score model of images {module.image_shape}.")
    guiding: AbstractDenoiser = worse.denoiser
    if worse.num_classes and worse.num_classes != module.num_classes:
        raise ConfigError(
            f"{path} cannot guide: it knows {worse.num_classes} classes, the model {module.num_classes}."
        )
    if not worse.num_classes:
        guiding = Unconditional(guiding)
    if guiding.process != module.denoiser.process:
        guiding = OnProcess(guiding, module.denoiser.process)
    return Guidance(module.denoiser, guiding, weight, tuple(interval))


def classifier(
    module: ScoreModule, run: str, checkpoint: str = "best", weight: float = 1.0
) -> AbstractDenoiser:
    """By a classifier of noisy images (`lit_gen.score.classifier.ClassifierModule`), a run folder or a
    checkpoint.

    It steers unconditional models too; their samples then take class i mod its number of classes.
    """
    from lit_gen.score.classifier import ClassifierModule

    judge, _, path = runs.load(run, checkpoint, device=str(module.device))
    if not isinstance(judge, ClassifierModule) or judge.image_shape != module.image_shape:
        raise ConfigError(
            f"{path} cannot guide: it is no classifier of noisy images {module.image_shape}. "
            "Train one with experiment=digits_noisy_classifier, or one like it."
        )
    if module.num_classes not in (0, judge.num_classes):
        raise ConfigError(
            f"{path} cannot guide: it tells {judge.num_classes} classes apart, the model has "
            f"{module.num_classes}."
        )
    unconditional = not module.num_classes
    module.num_classes = judge.num_classes
    return ClassifierGuidance(module.denoiser, judge.on(module.denoiser.process), weight, unconditional)


def _check_interval(interval: Sequence[float]) -> None:
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ConfigError(
            f"guidance.interval={list(interval)}: give the lowest and the highest guided noise level, "
            "such as [0.2, 1.5]."
        )
