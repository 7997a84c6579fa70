"""Official checkpoints: `load` reads any score network's, by looking at what the file holds;
`lit_gen.pretrained.funit` reads FUNIT's generators.
"""

from pathlib import Path
from typing import Any

from lit_gen.errors import ConfigError
from lit_gen.pretrained import edm, ncsn, score_sde, unpickle
from lit_gen.pretrained.keymap import Info
from lit_gen.score.networks import ADM, DDPM, EDM2, NCSN, NCSNpp, NCSNv2

__all__ = ["Info", "OfficialNetwork", "load"]

OfficialNetwork = ADM | DDPM | EDM2 | NCSN | NCSNpp | NCSNv2


def load(
    path: str | Path, *, ema: bool = True, image_size: int | None = None
) -> tuple[OfficialNetwork, Info]:
    """(network in eval mode, info) of a score_sde, ncsn, ncsnv2, EDM or EDM2 file.

    `ema=False` takes the raw weights where the file has both. `image_size` is for files that cannot tell it.
    Raises ConfigError for any other file.
    """
    content = unpickle.load(path)
    size: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    weights = "ema" if ema else "model"
    if isinstance(content, list | tuple):
        return ncsn.load(path, weights=weights, **size)
    if isinstance(content, dict) and "pytorch-lightning_version" in content:
        raise ConfigError(f"{path} is a checkpoint of lit_gen: take run={path} instead of weights=.")
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return score_sde.load(path, weights=weights, **size)
    return edm.load(path)  # its names hold the resolution
