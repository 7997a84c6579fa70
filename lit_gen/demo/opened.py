"""The models of the page: of runs that are given, or the small ones that ship with the package."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.images import height_and_width
from lit_gen.inputs import run_data
from lit_gen.instantiate import instantiate
from lit_gen.models.api import SampledModel, Translator, load

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = ("digits", "letters")
"""Small models that ship with the package; docs/demo.md says how they were trained."""


@dataclass(frozen=True)
class ScoreModel:
    """A model that samples and restores, the names of its classes, and some test images of its run, uint8 (C,
    H, W), each with its class, None for an unconditional model."""

    model: SampledModel
    classes: list[str]
    examples: list[tuple[Tensor, int | None]]

    @classmethod
    def of(cls, model: SampledModel, num: int = 12) -> "ScoreModel":
        """With the data of the run, if they can be had here."""
        count, pixels = model.module.num_classes, model.module.pixels
        try:
            data = None if model.config is None else run_data(model.config).dataset("test")
        except (ConfigError, OSError, ImportError, InstantiationException):
            data = None
        rows = [] if data is None else [data[i] for i in range(min(num, len(data)))]
        names = [str(name) for name in getattr(data, "classes", ())]
        return cls(
            model,
            names if len(names) == count else [str(i) for i in range(count)],
            [(pixels.picture(row["image"]), int(row["label"]) if count else None) for row in rows],
        )

    def label(self, name: str) -> int | None:
        """The number of a class; None for what is none."""
        return self.classes.index(name) if name in self.classes else None

    @property
    def restores(self) -> bool:
        """Whether it is a model of pixels, with the channels of pictures."""
        return self.model.module.codec is None and self.model.module.image_shape[0] in (1, 3)


def open_models(
    given: Sequence[str], *, checkpoint: str = "best", ema: bool = True, device: str | None = None
) -> dict[str, ScoreModel | Translator]:
    """The models of run folders, checkpoints, or exported folders, by the last parts of their paths; without
    any, those that ship with the package. Raises ConfigError for what is no model that generates or
    translates."""
    paths = [Path(path).expanduser().resolve() for path in given] or [WEIGHTS / name for name in SHIPPED]
    parts = [path.parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ConfigError(f"run={list(given)}: the same run is given twice.")
    depth = next(n for n in range(1, 100) if len({p[-n:] for p in parts}) == len(parts))
    models = {}
    for path, named in zip(paths, parts, strict=True):
        model = load(path, checkpoint=checkpoint, ema=ema, device=device)
        models["/".join(named[-depth:])] = ScoreModel.of(model) if isinstance(model, SampledModel) else model
    return models


def image_shape(model: Translator) -> tuple[int, ...]:
    """(C, H, W) of a translator's run. Raises ConfigError for weights without a configuration."""
    if model.config is None:
        raise ConfigError(f"{model.path} comes without the configuration of a run.")
    return (int(model.config.data.channels), *height_and_width(model.config.data.image_size))


def own_images(model: Translator, num: int = 6, k: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """(contents, K images of a target class, K of the next one), uint8 (N, C, H, W) each, of a translator's
    run. Raises ConfigError where its data cannot be read here."""
    try:
        data = instantiate(model.config.data) if model.config is not None else None
    except (OSError, ImportError, InstantiationException) as error:
        raise ConfigError(
            f"The run's data cannot be read here ({error}): upload contents and images of both classes."
        ) from error
    if data is None:
        raise ConfigError(f"{model.path} comes without data: upload contents and images of both classes.")
    contents = torch.stack([data.train[i]["image"] for i in data.contents(num, 0).tolist()])
    first, second, *_ = data.examples(k, seed=0)[0].values()
    return contents, first, second
