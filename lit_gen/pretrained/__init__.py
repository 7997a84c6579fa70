"""Official checkpoints: `load` reads any score network's, by looking at what the file holds."""

from pathlib import Path
from typing import Any

from torch import nn

from lit_gen.pretrained import edm, ncsn, score_sde, unpickle
from lit_gen.pretrained.keymap import Info

__all__ = ["load"]


def load(path: str | Path, net: nn.Module | None = None, **network: Any) -> tuple[nn.Module, Info]:
    """(network, info) of a score_sde, ncsn, ncsnv2, EDM or EDM2 file; see the `load` of each for arguments.

    Raises ConfigError for any other file.
    """
    content = unpickle.load(path)
    if isinstance(content, list | tuple):
        return ncsn.load(path, net, **network)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return score_sde.load(path, net, **network)
    return edm.load(path, net, **network)
