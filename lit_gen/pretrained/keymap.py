"""Literal key maps from an official state dict to a network of ours."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError


@dataclass(frozen=True)
class Info:
    """What a reader learned besides the weights."""

    release: str  # "score_sde", "ncsn", "ncsnv2", "edm", "edm2", "py-meanflow", "uvit", or "dit"
    network: dict[str, Any]  # constructor arguments of the network
    weights: str = "model"  # "ema" if they are a moving average
    step: int | None = None  # optimizer steps so far, where the file says so
    sigmas: Tensor | None = None  # (N,) table of noise levels for images on [0, 1], where the file has one
    snapshot: dict[str, Any] = field(default_factory=dict)  # constructor arguments found in an EDM snapshot


Layout = Callable[..., Tensor]
"""The tensors of one official name, or of several, as the network of ours stores them."""

Rule = tuple[str, tuple[str, ...], Layout]
"""Our key, the official keys, and the layout."""

SELF = {"": ""}  # the table of a single layer


def same(t: Tensor) -> Tensor:
    """The tensor as it is. Of any shape."""
    return t


def conv_as_linear(t: Tensor) -> Tensor:
    """A 1x1 convolution (O, I, 1, 1), or its bias, as a linear layer's."""
    return t.flatten(1) if t.ndim > 1 else t


def expand(
    net: nn.Module,
    ours: str,
    theirs: str,
    names: dict[str, str] = SELF,
    layouts: dict[str, Layout] | None = None,
    leaves: dict[str, str] | None = None,
) -> Iterator[Rule]:
    """Rules of the layers `ours`.name that exist in `net`, for a table name -> official name.

    `layouts` is by our name of a layer (else `same`), `leaves` renames tensors ("frequencies" -> "W").
    """
    for mine, official in names.items():
        path, official_path = _join(ours, mine), _join(theirs, official)
        try:
            layer = net.get_submodule(path)
        except AttributeError:
            continue
        for key in layer.state_dict() if layer is not None else ():
            if "." not in key:
                layout, leaf = (layouts or {}).get(mine, same), (leaves or {}).get(key, key)
                yield _join(path, key), (_join(official_path, leaf),), layout


def apply(
    net: nn.Module, rules: list[Rule], state: dict[str, Tensor], release: str, ignore: tuple[str, ...] = ()
) -> None:
    """Loads `state` into `net`; ConfigError for missing or odd keys, and surplus but for `ignore` endings."""
    own, new = net.state_dict(), {}
    needed = {key for _, keys, _ in rules for key in keys}
    missing = sorted(needed - state.keys())
    surplus = sorted(k for k in state.keys() - needed if not k.endswith(ignore or ("\0",)))
    if missing or surplus or len(rules) != len(own):
        raise ConfigError(
            f"this {release} checkpoint does not fit {type(net).__name__} as it was built: "
            f"it lacks {_some(missing)} and has {_some(surplus)} besides. Give the network's own arguments."
        )
    for ours, keys, layout in rules:
        tensor = layout(*(state[key].to(torch.float32) for key in keys))
        if tensor.shape != own[ours].shape:
            raise ConfigError(
                f"{keys[0]} of this {release} checkpoint has shape {tuple(tensor.shape)}, but the network's "
                f"{ours} {tuple(own[ours].shape)}. Give the network's own arguments."
            )
        new[ours] = tensor
    net.load_state_dict(new)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more or "nothing"
