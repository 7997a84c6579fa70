"""Condition: what a model is told about the images that it generates, row by row.

A denoiser and all that wraps one take it in the place of a class label. Samplers, restoration, and
likelihoods know nothing of it: `lit_gen.score.denoiser.ConditionedDenoiser` binds one to a denoiser, and
their `label` then counts its rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lit_gen.errors import ConfigError

__all__ = ["PARTS", "Condition", "Label", "class_of", "rows_of"]

PARTS = ("label", "vector", "image")


@dataclass(frozen=True)
class Condition:
    """Of B images, each part None where nothing is said of it.

    - `label`: the class, int64 (B,), -1 for none; or float rows (B, num_classes), zeros for none.
    - `vector`: numbers in the units of the training data, float32 (B, V); NaN for what is not known. The
      network standardizes them (`lit_gen.score.networks.embeddings.VectorEmbedding`).
    - `image`: float32 (B, C, h, w) in [-1, 1], of the size of the generated images or smaller; NaN where
      nothing is known.

    Raises ConfigError for parts of different lengths or other shapes.
    """

    label: Tensor | None = None
    vector: Tensor | None = None
    image: Tensor | None = None

    def __post_init__(self):
        shapes = {name: tuple(part.shape) for name, part in self.parts().items()}
        lengths = [shape[0] for shape in shapes.values()]
        if any(length != lengths[0] for length in lengths):
            raise ConfigError(f"The parts of a condition have different numbers of rows: {shapes}.")
        for name, ndim in (("vector", 2), ("image", 4)):
            if name in shapes and len(shapes[name]) != ndim:
                form = "(B, V)" if name == "vector" else "(B, C, h, w)"
                raise ConfigError(f"A condition's {name} of shape {shapes[name]}: give {form}.")

    def __len__(self) -> int:
        return next((len(part) for part in self.parts().values()), 0)

    def parts(self) -> dict[str, Tensor]:
        """The parts that there are, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in found.items() if part is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        """The condition whose parts are function(part)."""
        return Condition(**{name: function(part) for name, part in self.parts().items()})

    def rows(self, index: Any) -> "Condition":
        """The rows of an int64 tensor, a list, or a slice."""
        return self.map(lambda part: part[index])

    def to(self, device: torch.device | str) -> "Condition":
        return self.map(lambda part: part.to(device))

    def without(self, *names: str) -> "Condition":
        """Nothing said of the named parts."""
        return Condition(**{name: part for name, part in self.parts().items() if name not in names})

    def kept(self, kept: Mapping[str, Tensor]) -> "Condition":
        """Only the rows where kept[part], bool (B,), is true say anything of that part; parts that `kept`
        does not name stay."""
        parts = self.parts()
        return Condition(
            **parts | {name: _dropped(name, parts[name], kept[name]) for name in parts if name in kept}
        )

    def lerp(self, other: "Condition", weight: Tensor) -> "Condition":
        """self + weight (other - self) with `weight` (B,): on straight lines between the rows of both, of
        which a label must be float rows."""
        return Condition(
            **{
                name: torch.lerp(a, b, weight.to(a).reshape(-1, *(1,) * (a.ndim - 1)))
                for (name, a), b in zip(self.parts().items(), other.parts().values(), strict=True)
            }
        )


Label = Tensor | Condition | None
"""What a denoiser is told: a class, int64 (B,) or float (B, num_classes), or a `Condition`."""


def class_of(label: Label) -> Tensor | None:
    """The class alone."""
    return label.label if isinstance(label, Condition) else label


def rows_of(label: Label, index: Any, device: torch.device | str) -> Label:
    """The rows of an int64 tensor, a list, or a slice, on the device."""
    if label is None:
        return None
    return (label.rows(index) if isinstance(label, Condition) else label[index]).to(device)


def _dropped(name: str, part: Tensor, kept: Tensor) -> Tensor:
    nothing = torch.nan if name != "label" else 0.0 if part.is_floating_point() else -1
    return part.where(kept.reshape(-1, *(1,) * (part.ndim - 1)), nothing)
