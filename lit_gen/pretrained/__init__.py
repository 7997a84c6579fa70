"""Official checkpoints: `load` reads any score network's, by looking at what the file holds;
`lit_gen.pretrained.funit` reads FUNIT's generators.
"""

from pathlib import Path
from typing import Any

from lit_gen.errors import ConfigError
from lit_gen.pretrained import edm, meanflow, ncsn, score_sde, transformers, unet2d, unpickle
from lit_gen.pretrained.keymap import Info
from lit_gen.score.networks import ADM, DDPM, EDM2, NCSN, DiT, NCSNpp, NCSNv2, UViT

__all__ = ["Info", "OfficialNetwork", "load"]

OfficialNetwork = ADM | DDPM | DiT | EDM2 | NCSN | NCSNpp | NCSNv2 | UViT


def load(
    path: str | Path, net: Any = None, *, ema: bool = True, image_size: int | None = None, **network: Any
) -> tuple[OfficialNetwork, Info]:
    """(network in eval mode, info) of a score_sde, ncsn, ncsnv2, EDM, EDM2, py-meanflow, U-ViT, DiT, or SiT
    file, or of a folder of diffusers' UNet2DModel.

    `net` takes the weights if given; otherwise the architecture is read off the tensors. `image_size` is for
    files that cannot tell it, and so are other arguments of the network, or an official `config` of score_sde
    (`score_sde.from_state_dict`). `ema=False` takes the raw weights where the file has both. Raises
    ConfigError for any other file, for one that asks for foreign code, for weights that do not fit, and for
    an `image_size` that is not the file's.
    """
    if (folder := unet2d.find(path)) is not None:
        return _of_its_size(*unet2d.load(folder, net, **network), image_size)
    content = unpickle.load(path)
    if isinstance(content, dict) and "pytorch-lightning_version" in content:
        raise ConfigError(f"{path} is a checkpoint of lit_gen: take run={path} instead of weights=.")
    size = {} if image_size is None else {"image_size": image_size}
    try:
        if isinstance(content, list | tuple):
            return ncsn.read(content, net, ema=ema, **size, **network)
        if meanflow.is_meanflow(content):
            return _of_its_size(*meanflow.read(content, net, ema=ema, **network), image_size)
        if transformers.knows(content):
            return transformers.read(content, net, ema=ema, **size, **network)
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            return score_sde.read(content, net, ema=ema, **size, **network)
        return _of_its_size(*edm.read(content, net, **network), image_size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _of_its_size(net: OfficialNetwork, info: Info, asked: int | None) -> tuple[OfficialNetwork, Info]:
    """What was read of a file whose names hold the resolution. Raises ConfigError where another is asked
    for."""
    if asked is not None and asked != info.network.get("image_size", asked):
        size = info.network["image_size"]
        raise ConfigError(f"image_size={asked}: its network is of {size}x{size} images. Leave it out.")
    return net, info
