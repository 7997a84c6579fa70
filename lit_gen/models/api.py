"""lit_gen as a library: `lit_gen.load` and `lit_gen.evaluate_images`.

model = lit_gen.load("runs/digits/2026-...")           # or lit_gen.load("edm-cifar10.pkl", model="edm")
images = model.sample(64, sampler="dpm_solver", num_steps=10, seed=0)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, open_dict
from torch import Tensor

from lit_gen.cli import CONF_DIR
from lit_gen.config import schema
from lit_gen.data.images import pixels_of, shape_of
from lit_gen.errors import ConfigError
from lit_gen.evaluation.samples import Measurement, References, measure_images
from lit_gen.funit.module import FUNITModule
from lit_gen.funit.translator import Generator, class_code
from lit_gen.images import to_float
from lit_gen.inputs import open_images, open_reference
from lit_gen.instantiate import allowing, instantiate
from lit_gen.metrics import Estimate, Extractor, check_metrics
from lit_gen.models.generation import check_label, classes, restore_images, sample_images, translate_images
from lit_gen.models.loading import load as load_run
from lit_gen.models.loading import open_model, open_translator
from lit_gen.score.condition import Condition
from lit_gen.score.module import ScoreModule
from lit_gen.score.restoration import LinearOperator, Noise, Observation
from lit_gen.score.translation import TranslationModule

Sampler = Callable[..., Tensor]


@dataclass(frozen=True)
class SampledModel:
    """A score model in eval mode; `config` is that of its run, None for official weights, and `path` is the
    file that was read."""

    module: ScoreModule
    config: DictConfig | None
    path: Path

    def sample(
        self,
        num: int | Sequence[int],
        *,
        seed: int = 0,
        sampler: str | Sampler | None = None,
        label: int | None = None,
        condition: Condition | None = None,
        batch_size: int = 256,
        **options: Any,
    ) -> Tensor:
        """Images (N, C, H, W) on the CPU, as the training images were stored (uint8, uint16, or float32, see
        `module.pixels`): the first `num`, or those of the given indices. Image i
        depends on (seed, i) alone.

        `sampler` is the name of one in conf/sampler, with `options` of that file (`num_steps=10`), or a
        function as in `lit_gen.score.samplers`; None: the model's own. `label`: the class of all images of a
        conditional model; None: class i mod num_classes for image i. `condition` has a row for each image;
        None: what the model takes besides a class is that of the run's test image i. Raises ConfigError for a
        sampler, option, or class that there is not, and a condition that does not fit the model.
        """
        chosen = _function("sample", "sampler", sampler, options)
        indices = range(num) if isinstance(num, int) else list(num)
        if len(indices) == 0:
            raise ConfigError(f"num={num}: give at least one image to sample.")
        check_label(self.module, label)
        row = {index: i for i, index in enumerate(indices)}

        def told(part: Sequence[int]) -> Condition:
            own = None if condition is None else condition.rows([row[i] for i in part])
            return self.module.condition_at(part, classes(label, len(part)), own)

        if condition is not None and len(condition) != len(indices):
            raise ConfigError(f"A condition of {len(condition)} rows for {len(indices)} images.")
        images = sample_images(self.module, indices, seed, batch_size, chosen, told)
        assert images is not None  # one process has all
        return images

    def restore(
        self,
        measured: Tensor,
        operator: LinearOperator | Observation,
        *,
        method: str | Callable[..., Tensor] = "pigdm",
        noise_std: Noise = 0.0,
        samples: int = 1,
        seed: int = 0,
        label: int | Tensor | Condition | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> Tensor:
        """Restorations (N, samples, C, H, W), stored as the training images were, of measurements
        `operator(x) + noise_std * noise`, float (N, ...), of images x in [-1, 1]. `noise_std` is a number, or
        a map that broadcasts to one measurement.

        `method` is the name of one in conf/method, with `options` of that file, or a function as in
        `lit_gen.score.restoration`. `label`: the class of all images, int64 (N,), or a `Condition` of N rows.
        Raises ConfigError for a method or option that there is not, and for noise that the method refuses.
        """
        chosen = _function("restore", "method", method, options)
        if isinstance(label, int):
            label = classes(label, len(measured))
        restored = restore_images(
            self.module, operator, measured, chosen, samples, seed, batch_size, label, noise_std
        )
        assert restored is not None  # one process has all
        return restored


@dataclass(frozen=True)
class Translator:
    """A few-shot translator in eval mode; `config` is that of its run, None for official weights, and `path`
    is the file that was read."""

    generator: Generator
    config: DictConfig | None
    path: Path

    def translate(self, content: Tensor, classes: Tensor, *, batch_size: int = 64) -> Tensor:
        """The content, uint8 (N, C, H, W), in the class that `classes`, uint8 (K, C, H, W), shows: uint8
        (N, C, H, W) on the CPU."""
        return translate_images(
            self.generator, content, class_code(self.generator, to_float(classes)), batch_size
        )


def load(
    source: str | Path,
    *,
    model: str | None = None,
    checkpoint: str = "best",
    ema: bool = True,
    image_size: int | Sequence[int] | None = None,
    device: str | None = None,
    allow_targets: Sequence[str] = (),
) -> SampledModel | Translator:
    """The model of a run folder or checkpoint of lit_gen, or, with `model`, of an official checkpoint.

    `model` says what official weights were trained with: "funit", or an option of conf/model such as "edm",
    "vp", "ve", "ddpm", "ncsnv2". `checkpoint` ("best", "last", or a file) is that of a run folder;
    `ema=False` takes the weights instead of their moving average; `image_size` is for official files that do
    not say it; `device` None is a GPU if there is one. Nothing in a file is executed; a run may name only
    what `lit_gen.instantiate` allows, `allow_targets` adds prefixes. Raises ConfigError.
    """
    if model is None:
        with allowing(allow_targets):
            module, config, path = load_run(source, checkpoint, ema=ema, device=device)
        if isinstance(module, FUNITModule | TranslationModule):
            return Translator(module.generator_ema, config, path)
        if not isinstance(module, ScoreModule):
            raise ConfigError(f"{source} is a run of {type(module).__name__}, which generates no images.")
        return SampledModel(module, config, path)
    options = {"weights": str(source), "ema": ema, "image_size": image_size, "device": device}
    if model == "funit":
        return Translator(*open_translator(_composed("translate", [], options)))
    _check_choice("model", model)
    module, config, path = open_model(_composed("sample", [f"model={model}"], options))
    return SampledModel(module, config, path)


def evaluate_images(
    images: str | Path,
    reference: str | Path,
    *,
    extractor: str | Extractor = "inception",
    metrics: Sequence[str] = (),
    reference_n: int | None = None,
    reference_resize: str | None = None,
    training: str | Path | None = None,
    image_size: int | Sequence[int] | None = None,
    fit: str = "crop",
    channels: int = 3,
    dtype: str | None = None,
    range: Sequence[float] | None = None,
    k: int = 5,
    batch_size: int = 256,
    device: str | None = None,
) -> dict[str, Estimate]:
    """The metrics of images against reference images, each with its standard error, by the name that says the
    network and the number of images; the same numbers as `lit-gen evaluate-images`.

    `images`, `reference` and `training` are folders, zips, or npz files (`lit_gen.inputs.open_images`); of a
    `reference` that is a file of statistics, say the number of its images and how they were resized; of
    arrays, their `channels`, `dtype`, and `range` (`lit_gen.images.Pixels`).
    `extractor` is one of conf/extractor by name, or an `Extractor`; `metrics` some of
    `lit_gen.metrics.METRICS`, or all that are possible. Raises ConfigError.
    """
    check_metrics(metrics)
    network: Extractor = (
        _chosen("evaluate_images", "extractor", extractor, {}) if isinstance(extractor, str) else extractor
    )
    stored = {"image_size": image_size, "fit": fit, "channels": channels, "dtype": dtype, "range": range}
    generated = open_images(images, **stored)
    network = network.reading(pixels_of(generated), shape_of(generated)[0])
    real = open_reference(reference, network, n=reference_n, resize=reference_resize, **stored)
    known = None if training is None else open_images(training, **stored)
    measurement = Measurement(network, tuple(metrics), k, batch_size=batch_size, device=device)
    against = References(real, str(reference), known)
    return measure_images(measurement, generated, against, len(generated)).results


def _composed(command: str, overrides: list[str], values: dict[str, Any]) -> DictConfig:
    """The configuration of a command, with values that are set as they are; also while an application of
    Hydra, as a command is one, runs."""
    schema.register()
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = hydra.compose(command, overrides)
    finally:
        GlobalHydra.instance().hydra = running
    for name, value in values.items():
        cfg[name] = value
    return cfg


def _function(command: str, group: str, given: Any, options: dict[str, Any]) -> Any:
    """What is given as a name, as that option of a configuration group, with options of its own; a function
    as it is."""
    if isinstance(given, str):
        return _chosen(command, group, given, options)
    if options:
        raise ConfigError(
            f"{', '.join(options)}: options go with the name of a {group}, one of conf/{group}; give them "
            "to a function by functools.partial."
        )
    return given


def _chosen(command: str, group: str, name: str, options: dict[str, Any]) -> Any:
    """The object of an option of a configuration group, with options of its own."""
    _check_choice(group, name)
    cfg = _composed(command, [f"{group}={name}"], {})
    with open_dict(cfg):
        cfg[group].update(options)
    return instantiate(cfg[group])


def _check_choice(group: str, name: str) -> None:
    choices = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
    if name not in choices:
        raise ConfigError(f"{group}={name!r}: choose among {', '.join(choices)}.")
