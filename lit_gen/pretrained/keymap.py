"""Literal key maps between a network of ours and an official state dict, in both directions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError

__all__ = ["CONV_AS_LINEAR", "SAME", "SELF", "Info", "Layout", "Rule", "apply", "expand", "invert"]


@dataclass(frozen=True)
class Info:
    """What a reader learned besides the weights."""

    release: str  # "score_sde", "ncsn", "ncsnv2", "edm" or "edm2"
    network: dict[str, Any]  # constructor arguments of the network
    weights: str = "model"  # "ema" if they are a moving average
    step: int | None = None  # optimizer steps so far, where the file says so
    sigmas: Tensor | None = None  # (N,) table of noise levels for images on [0, 1], where the file has one
    snapshot: dict[str, Any] = field(default_factory=dict)  # constructor arguments found in an EDM snapshot


@dataclass(frozen=True)
class Layout:
    """How the tensor of one official name, or of several, is stored here, and back."""

    to_ours: Callable[[list[Tensor]], Tensor]
    to_theirs: Callable[[Tensor], list[Tensor]]


SAME = Layout(lambda ts: ts[0], lambda t: [t])
CONV_AS_LINEAR = Layout(
    lambda ts: ts[0].flatten(1) if ts[0].ndim > 1 else ts[0],
    lambda t: [t[:, :, None, None] if t.ndim > 1 else t],
)

SELF = {"": ""}  # the table of a single layer

Rule = tuple[str, tuple[str, ...], Layout]  # our key, their keys, layout


def expand(
    net: nn.Module,
    ours: str,
    theirs: str,
    names: dict[str, str] = SELF,
    layouts: dict[str, Layout] | None = None,
    leaves: dict[str, str] | None = None,
) -> Iterator[Rule]:
    """Rules of the layers `ours`.name that exist in `net`, for a table name -> official name.

    `layouts` is by our name of a layer (else SAME), `leaves` renames tensors ("frequencies" -> "W").
    """
    for mine, official in names.items():
        path, official_path = _join(ours, mine), _join(theirs, official)
        try:
            layer = net.get_submodule(path)
        except AttributeError:
            continue
        for key in layer.state_dict() if layer is not None else ():
            if "." not in key:
                layout, leaf = (layouts or {}).get(mine, SAME), (leaves or {}).get(key, key)
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
        tensor = layout.to_ours([state[key].to(torch.float32) for key in keys])
        if tensor.shape != own[ours].shape:
            raise ConfigError(
                f"{keys[0]} of this {release} checkpoint has shape {tuple(tensor.shape)}, but the network's "
                f"{ours} {tuple(own[ours].shape)}. Give the network's own arguments."
            )
        new[ours] = tensor
    net.load_state_dict(new)


def invert(net: nn.Module, rules: list[Rule]) -> dict[str, Tensor]:
    """The official state dict of `net`, buffers that hold no weights left out."""
    own = net.state_dict()
    return {
        key: tensor.detach().clone().contiguous()
        for ours, keys, layout in rules
        for key, tensor in zip(keys, layout.to_theirs(own[ours]), strict=True)
    }


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _some(keys: list[str]) -> str:
    return (
        "nothing"
        if not keys
        else ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    )
