"""Files of U-ViT (https://github.com/baofff/U-ViT), DiT (https://github.com/facebookresearch/DiT), and SiT
(https://github.com/willisma/SiT), whose network is DiT's.

    state dict                                            the released files
    {"model": state dict, "ema": state dict, "opt", ...}  what DiT's and SiT's training writes

The number of attention heads is not in a file: those of the released widths are known, for others `heads`
has to say it. Images are taken to be square.
"""

import math
import re
from typing import Any

from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.pretrained.keymap import Info, Rule, apply, same
from lit_gen.score.networks.dit import DiT
from lit_gen.score.networks.uvit import UViT

_HEADS = {384: 6, 512: 8, 768: 12, 1024: 16, 1152: 16}  # by width
_STEMS = {"x_embedder.proj.weight": DiT, "patch_embed.proj.weight": UViT}
_BLOCK = [
    (r"\battention\.", "attn."),
    (r"(?<!embedder)\.mlp\.0\.", ".mlp.fc1."),
    (r"(?<!embedder)\.mlp\.2\.", ".mlp.fc2."),
]
_LITERAL = {
    DiT: [
        (r"^stem\.", "x_embedder.proj."),
        (r"^positions$", "pos_embed"),
        (r"^time\.", "t_embedder.mlp."),
        (r"^label\.", "y_embedder.embedding_table."),
        (r"^modulation\.", "final_layer.adaLN_modulation.1."),
        (r"^head\.", "final_layer.linear."),
        (r"(blocks\.\d+)\.modulation\.", r"\1.adaLN_modulation.1."),
        *_BLOCK,
    ],
    UViT: [
        (r"^stem\.", "patch_embed.proj."),
        (r"^positions$", "pos_embed"),
        (r"^time\.", "time_embed."),
        (r"^label\.", "label_emb."),
        (r"^encoder\.", "in_blocks."),
        (r"^middle\.", "mid_block."),
        (r"^decoder\.", "out_blocks."),
        (r"^head\.", "decoder_pred."),
        (r"^smooth\.", "final_layer."),
        (r"\bmix\.", "skip_linear."),
        *_BLOCK,
    ],
}


def knows(content: Any) -> bool:
    """Whether an unpickled file holds one of these networks."""
    return any(stem in state for state in _states(content).values() for stem in _STEMS)


def read(
    content: dict[str, Any], net: DiT | UViT | None = None, *, ema: bool = True, **network: Any
) -> tuple[DiT | UViT, Info]:
    """`lit_gen.pretrained.load` of an unpickled file.

    `network` can say what tensors do not: `heads`, the `image_size` of images that are not square, and
    whether the last row of the table of classes is `null_class`. A released U-ViT's is if there are 1001, a
    DiT's always.
    """
    states = _states(content)
    name = "ema" if "ema" in states and (ema or "model" not in states) else "model"
    state, arguments = states[name], {}
    if net is None:
        cls, arguments = network_arguments(state, **network)
        net = cls(**arguments)
    release = type(net).__name__.lower()
    apply(net, rules(net), state, release)
    return net.eval(), Info(release, arguments, weights=name)


def rules(net: DiT | UViT) -> list[Rule]:
    """Our keys -> the official ones."""
    if type(net) not in _LITERAL:
        raise ConfigError(f"the releases of U-ViT, DiT, and SiT have no {type(net).__name__}.")
    return [(key, (_official(key, _LITERAL[type(net)]),), same) for key in net.state_dict()]


def network_arguments(state: dict[str, Tensor], **network: Any) -> tuple[type[DiT | UViT], dict[str, Any]]:
    """The class and constructor arguments that names and shapes of a state dict tell, `network` first."""
    stem, cls = next((key, cls) for key, cls in _STEMS.items() if key in state)
    width, channels, patch_size, _ = state[stem].shape
    first = "blocks.0" if cls is DiT else "mid_block"
    if "pos_embed" not in state or f"{first}.mlp.fc1.weight" not in state:
        raise ConfigError("the checkpoint's layers are not those of U-ViT, DiT, or SiT.")
    heads = network.get("heads") or _HEADS.get(width)
    if heads is None:
        raise ConfigError(f"no released network is {width} wide, its heads are unknown: give heads.")
    table = "y_embedder.embedding_table.weight" if cls is DiT else "label_emb.weight"
    rows, inner = len(state.get(table, ())), len(state[f"{first}.mlp.fc1.weight"])
    null_class = bool(network.get("null_class", cls is DiT or rows == 1001))
    patches = state["pos_embed"].shape[1] - (0 if cls is DiT else 1 + (rows > 0))
    side = math.isqrt(patches)
    if "image_size" not in network and side * side != patches:
        raise ConfigError(f"its {patches} patches make no square: give image_size=[height,width].")
    arguments = {"image_size": side * patch_size, "channels": channels, "patch_size": patch_size}
    arguments |= {"width": width, "heads": heads, "mlp_ratio": inner / width}
    arguments |= {"num_classes": max(rows - null_class, 0), "null_class": null_class}
    return cls, arguments | (_dit if cls is DiT else _uvit)(state, patch_size) | network


def _dit(state: dict[str, Tensor], patch_size: int) -> dict[str, Any]:
    return {
        "depth": _count(state, "blocks"),
        "out_channels": len(state["final_layer.linear.weight"]) // patch_size**2,
    }


def _uvit(state: dict[str, Tensor], patch_size: int) -> dict[str, Any]:
    return {
        "depth": 2 * _count(state, "in_blocks"),
        "qkv_bias": "mid_block.attn.qkv.bias" in state,
        "time_mlp": "time_embed.0.weight" in state,
        "skip": "out_blocks.0.skip_linear.weight" in state,
        "conv": "final_layer.weight" in state,
    }


def _count(state: dict[str, Tensor], name: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})


def _states(content: Any) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a file, "model" and "ema"."""
    if not isinstance(content, dict):
        return {}
    named = {name: content[name] for name in ("model", "ema") if isinstance(content.get(name), dict)}
    return named or {"model": content}


def _official(key: str, table: list[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        key = re.sub(pattern, replacement, key)
    return key
