"""What samples are told: by the options of a command, or by a run's own images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lit_gen.data.archive import open_store
from lit_gen.data.conditions import read_table
from lit_gen.data.reader import ImageForm
from lit_gen.errors import ConfigError
from lit_gen.images import Pixels
from lit_gen.instantiate import allowing, instantiate, trusted
from lit_gen.models.generation import check_label, classes
from lit_gen.score.condition import Condition
from lit_gen.score.module import GivesConditions, ScoreModule


class TestConditions:
    """A run's images and the conditions of the test images. The data are opened when they are asked for; they
    may name what was allowed when this was made."""

    __test__ = False  # no class of tests

    def __init__(self, cfg: DictConfig):
        self._cfg, self._trusted = cfg, trusted()

    @cached_property
    def _data(self) -> Any:
        with allowing(self._trusted):
            return instantiate(self._cfg.data)

    def _telling(self) -> GivesConditions:
        if not isinstance(data := self._data, GivesConditions):
            raise ConfigError(f"A {type(data).__name__} tells no conditions of its images: give condition.*.")
        return data

    def dataset(self, split: str) -> Any:
        return self._data.dataset(split)

    def vectors(self) -> Tensor | None:
        return self._telling().vectors()

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self._telling().conditions(indices)


def class_index(label: int | str | None, run_cfg: DictConfig | None) -> int | None:
    """The class of a number or a name, for which the run's data are opened. Raises ConfigError for a name
    that there is not."""
    if label is None or isinstance(label, int):
        return label
    if run_cfg is None:
        raise ConfigError(f"label={label}: official weights do not name their classes; give a number.")
    names = [str(name) for name in instantiate(run_cfg.data).dataset("test").classes]
    if label not in names:
        shown = f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" or "none"
        raise ConfigError(f"label={label}: the classes are {shown}.")
    return names.index(label)


@dataclass(frozen=True)
class Told:
    """What the options `label`, `condition.vector`, and `condition.image` of a command tell a model of image
    i: row i of `vectors`, named `columns`, and image i of those called `names`, both over again where they
    end.

    What they leave open is the module's to say (`ScoreModule.condition_at`).
    """

    module: ScoreModule
    label: int | None = None
    vectors: Tensor | None = None
    columns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    read: Callable[[str], Tensor] | None = None

    @classmethod
    def of(cls, cfg: DictConfig, run_cfg: DictConfig | None, module: ScoreModule) -> "Told":
        """Raises ConfigError for what cannot be read."""
        label = class_index(cfg.label, run_cfg)
        check_label(module, label)
        known = OmegaConf.select(run_cfg, "data.condition", default=None) if run_cfg is not None else None
        known = known or {}
        vectors, columns = _vectors(cfg.condition.vector, known)
        names, read = _condition_images(cfg.condition.image, known, module.condition_channels)
        if vectors is None and isinstance(known.get("vector"), str):
            columns = tuple(known.get("columns") or ())
        return cls(module, label, vectors, columns, names, read)

    def __call__(self, indices: Sequence[int]) -> Condition:
        parts: dict[str, Tensor] = {}
        if self.vectors is not None:
            parts["vector"] = self.vectors[[i % len(self.vectors) for i in indices]]
        if self.read is not None:
            images = [self.read(self.name(i)) for i in indices]
            if len({image.shape for image in images}) > 1:
                raise ConfigError("condition.image: its images differ in size; bring them to one.")
            parts["image"] = torch.stack(images)
        given = Condition(**parts) if parts else None
        return self.module.condition_at(indices, classes(self.label, len(indices)), given)

    def name(self, i: int) -> str:
        """Of the condition image of image i."""
        return self.names[i % len(self.names)]


def _vectors(given: Any, known: Any) -> tuple[Tensor | None, tuple[str, ...]]:
    """The rows (N, V) of `condition.vector`: one of numbers, or those of a table, of the run's columns."""
    if given is None:
        return None, ()
    if isinstance(given, str):
        _, columns, vectors = read_table(given, known.get("columns"))
        return vectors, tuple(columns)
    numbers = given if isinstance(given, Sequence) else [given]
    if not all(isinstance(x, int | float) for x in numbers):
        raise ConfigError(f"condition.vector={given}: give numbers, as [30,0.5], or a csv or npz file.")
    return torch.tensor([[float(x) for x in numbers]]), tuple(known.get("columns") or ())


def _condition_images(
    path: str | None, known: Any, channels: int
) -> tuple[tuple[str, ...], Callable[[str], Tensor] | None]:
    """The names of the images of `condition.image`, and what reads one as float32 (C, h, w) in [-1, 1]."""
    if path is None:
        return (), None
    pixels = Pixels(known.get("dtype") or "uint8", known.get("range"))
    form = ImageForm(max(channels, 1), pixels=pixels)
    file = Path(path).expanduser()
    if file.is_file() and file.suffix.lower() in form.endings:
        return (file.name,), lambda name: pixels.to_model(form.read(file.read_bytes(), str(file)))
    store = open_store(file)
    names = tuple(form.chosen(store.names))
    if not names:
        raise ConfigError(f"condition.image={path}: no images ({', '.join(form.endings)}).")
    return names, lambda name: pixels.to_model(form.read(store.read(name), f"{path}/{name}"))
