"""diffusers' `UNet2DModel` (https://github.com/huggingface/diffusers), in both directions: the network is
DDPM, ADM without augmentation labels, or NCSN++ as of 256-pixel VE models.

    config.json and diffusion_pytorch_model.safetensors (or .bin) in a folder, or in its subfolder unet

A network of two of these kinds takes [-1, 1] images and c_noise. Of NCSN++ it takes [0, 1] images
(`center_input_sample`) and the noise level on these, and returns the score: our output divided by that level.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.pretrained import unpickle
from lit_gen.pretrained.diffusers import BEFORE_0_17, FILES
from lit_gen.pretrained.keymap import Info, Rule, apply, expand
from lit_gen.score.networks import ADM, DDPM, NCSNpp
from lit_gen.score.networks.embeddings import PositionalEmbedding
from lit_gen.score.networks.layers import Attention

Network = DDPM | ADM | NCSNpp

_BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
    "conv": "conv",
}
_ENDS = {
    "noise.embedding": "time_proj",
    "noise.hidden": "time_embedding.linear_1",
    "noise.out": "time_embedding.linear_2",
    "noise.label": "class_embedding",
    "stem": "conv_in",
    "head.0": "conv_norm_out",
    "head.2": "conv_out",
}
_FREE = ("_class_name", "_diffusers_version", "_name_or_path", "sample_size", "dropout", "add_attention")
_DEFAULTS = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""Of diffusers, where a file leaves them out."""


def find(path: str | Path) -> Path | None:
    """The folder with the `config.json` of a `UNet2DModel`: `path`, or its subfolder unet; None without
    one."""
    for folder in (Path(path), Path(path) / "unet"):
        if (folder / "config.json").is_file() and _json(folder / "config.json").get(
            "_class_name"
        ) == "UNet2DModel":
            return folder
    return None


def load(folder: Path, net: Network | None = None, **network: Any) -> tuple[Network, Info]:
    """(network in eval mode, info) of a folder that `find` gives. Raises ConfigError for a network that we do
    not have."""
    config = _DEFAULTS | _json(folder / "config.json")
    cls, arguments = network_arguments(config)
    arguments |= network
    net = cls(**arguments) if net is None else net
    ours = unet_config(net)
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    if wrong := [key for key in listed if key not in _FREE and listed[key] != ours.get(key)]:
        raise ConfigError(
            f"{folder / 'config.json'}: {wrong[0]}={config[wrong[0]]}, where a {type(net).__name__} has "
            f"{ours.get(wrong[0])}: there is no such network here."
        )
    file = next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])
    state = unpickle.load(file)
    for ours_now, before in BEFORE_0_17:  # patterns of today's names -> theirs of then
        old, new = before.strip("."), ours_now.replace("\\.", ".").strip(".")
        state = {re.sub(rf"\.{old}\.", f".{new}.", key): tensor for key, tensor in state.items()}
    apply(net, rules(net), state, "diffusers")
    scheduler = _json(folder.parent / "scheduler" / "scheduler_config.json")
    levels = [scheduler[key] for key in ("sigma_min", "sigma_max") if key in scheduler]
    sigmas = torch.tensor(levels) if len(levels) == 2 and isinstance(net, NCSNpp) else None
    return net.eval(), Info("diffusers", arguments, sigmas=sigmas)


def network_arguments(config: dict[str, Any]) -> tuple[type[Network], dict[str, Any]]:
    """The class and constructor arguments of a `config.json`."""
    widths, size = list(config["block_out_channels"]), config["sample_size"]
    base, height = widths[0], size[0] if isinstance(size, list) else size
    arguments: dict[str, Any] = {
        "image_size": size if isinstance(size, int) else tuple(size),
        "channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "base_channels": base,
        "channel_mult": tuple(width // base for width in widths),
        "num_blocks": config["layers_per_block"],
        "attention_resolutions": tuple(
            height >> i for i, kind in enumerate(config["down_block_types"]) if kind.startswith("Attn")
        ),
        "dropout": config.get("dropout", 0.0),
    }
    if config["time_embedding_type"] == "fourier":
        pyramids = {"input_pyramid": "skip", "output_pyramid": "skip"}
        return NCSNpp, arguments | {"embedding": "fourier", "fir": (1, 3, 3, 1)} | pyramids
    if config["resnet_time_scale_shift"] == "scale_shift":
        width = config.get("time_embedding_dim") or 4 * base
        classes = config["num_class_embeds"] or 0
        return ADM, arguments | {"emb_mult": width // base, "num_classes": classes}
    return DDPM, arguments | {"decoder_attention": "each"}


def unet_config(net: Any) -> dict[str, Any]:
    """The `config.json` that gives the function of the network, without `sample_size`. Raises ConfigError,
    which says why, for a network that diffusers has no `UNet2DModel` of."""
    if reason := _unlike(net):
        raise ConfigError(f"diffusers has no UNet2DModel like this {type(net).__name__}: {reason}.")
    middle: Any = net.middle[0]
    kind = {DDPM: ("", ""), ADM: ("Resnet", ""), NCSNpp: ("Skip", "Skip")}[type(net)]
    plain = {"": ("DownBlock2D", "UpBlock2D"), "Resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
    down, up = plain.get(kind[0], ("SkipDownBlock2D", "SkipUpBlock2D"))
    attended = [_attends(level) for level in net.encoder]
    widths = [int(level.blocks[-1].conv1.out_channels) for level in net.encoder]
    with_attention = [f"Attn{kind[1]}{name}" for name in ("DownBlock2D", "UpBlock2D")]
    found = _DEFAULTS | {
        "_class_name": "UNet2DModel",
        "in_channels": net.channels,
        "out_channels": net.out_channels,
        "block_out_channels": widths,
        "layers_per_block": len(net.encoder[0].blocks),
        "down_block_types": [with_attention[0] if a else down for a in attended],
        "up_block_types": [with_attention[1] if a else up for a in attended[::-1]],
        "time_embedding_dim": net.noise.hidden.out_features,
        "dropout": net.encoder[0].blocks[0].dropout,
        "norm_eps": net.middle[0].norm0.eps,
        "norm_num_groups": net.middle[0].norm0.num_groups,
        "attention_head_dim": None,
    }
    if type(net) is DDPM:
        return found | {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0}
    if type(net) is ADM:
        return found | {
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": widths[-1] // middle.attention.heads,
            "attn_norm_num_groups": found["norm_num_groups"],
            "num_class_embeds": net.num_classes or None,
        }
    root = {"mid_block_scale_factor": 2**0.5, "norm_num_groups": None}
    return found | root | {"center_input_sample": True, "time_embedding_type": "fourier"}


def _attends(level: Any) -> bool:
    return any(block.attention is not None for block in level.blocks)


def _unlike(net: Any) -> str | None:
    """What no `UNet2DModel` has, of the network; None where there is one."""
    if not isinstance(net, Network):
        return "its blocks are others"
    given = [name for name in ("augment_dim", "vector_dim", "condition_channels") if getattr(net, name)]
    if given or net.patch > 1 or (net.num_classes and not isinstance(net, ADM)):
        other = "patches" if net.patch > 1 else "classes, which enter elsewhere"
        return f"it has {given[0] if given else other}"
    if isinstance(net, DDPM) and not (net.resample_conv and isinstance(net.head[1], nn.SiLU)):
        return "it resamples without weights, or its activation is another than silu"
    if isinstance(net, NCSNpp):
        options = {
            "embedding": "fourier",
            "input_pyramid": "skip",
            "output_pyramid": "skip",
            "block": "biggan",
        }
        options |= {"activation": "silu", "rescale": True, "conditional": True, "second_time": "none"}
        if other := [f"{k}={getattr(net, k)}" for k, value in options.items() if getattr(net, k) != value]:
            return f"its {other[0]} is not that of NCSN++ for 256 pixels, {options[other[0].split('=')[0]]}"
        row = net.resample.kernel.sum((0, 1, 2)) * 8
        if net.channels != 3 or net.out_channels != 3 or row.round().tolist() != [1, 3, 3, 1]:
            return "it has other than 3 channels, or another filter than (1, 3, 3, 1)"
    return _unlike_sizes(net)


def _unlike_sizes(net: Any) -> str | None:
    kind = type(net)
    norms = {norm.num_groups for norm in net.modules() if isinstance(norm, nn.GroupNorm)}
    if len(norms) > 1 or (kind is NCSNpp and norms != {32}):
        return f"its norms have {sorted(norms)} groups: widths that are multiples of 128 have 32 everywhere"
    embedding, width = net.noise.embedding, net.stem.out_channels
    expected = width if isinstance(embedding, PositionalEmbedding) else 2 * width
    if embedding.channels != expected or net.encoder[0].blocks[-1].conv1.out_channels != width:
        return "its first level is wider than its embedding: channel_mult must begin with 1"
    if net.middle[0].attention is None:
        return "its middle has no attention"
    for level in (*net.encoder, *(net.decoder if kind is ADM else ())):
        if len({block.attention is None for block in level.blocks}) > 1:
            return "a level has attention in some blocks only"
    heads = {m.qkv.in_features // m.heads for m in net.modules() if isinstance(m, Attention)}
    if kind is ADM and len(heads) > 1:
        return f"its attention heads have {sorted(heads)} channels: take widths of at least 64"
    return None


def rows(*ts: Tensor) -> Tensor:
    """q, k, and v layers as one."""
    return torch.cat(ts)


def transposed(t: Tensor) -> Tensor:
    """An embedding (num_classes, width) as a linear layer (width, num_classes) of one-hot rows."""
    return t.T


def rules(net: Any) -> list[Rule]:
    """Our keys -> those of diffusers."""
    found = list(expand(net, "", "", _ENDS, {"noise.label": transposed}, {"frequencies": "weight"}))
    for ours, theirs, attention in _blocks(net):
        found += expand(net, ours, theirs, _BLOCK)
        if attention and net.get_submodule(ours).attention is not None:
            found += expand(net, f"{ours}.attention", attention, {"norm": "group_norm", "proj": "to_out.0"})
            for key in ("weight", "bias"):
                parts = tuple(f"{attention}.to_{part}.{key}" for part in "qkv")
                found.append((f"{ours}.attention.qkv.{key}", parts, rows))
    for i in range(1, len(net.encoder)):
        found += expand(net, f"encoder.{i}.pyramid.conv", f"down_blocks.{i - 1}.skip_conv")
    for i in range(len(net.decoder) if isinstance(net, NCSNpp) else 0):
        last = i == len(net.decoder) - 1
        names = (
            ("conv_norm_out", "conv_out") if last else (f"up_blocks.{i}.skip_{k}" for k in ("norm", "conv"))
        )
        found += expand(net, f"decoder.{i}.head", "", dict(zip(("0", "2"), names, strict=True)))
    return found


def _blocks(net: Any) -> Iterator[tuple[str, str, str | None]]:
    """(path here, theirs, theirs of its attention) of the residual blocks, and of what resamples."""
    plus, first = type(net) is NCSNpp, 0 if type(net) is DDPM else 1
    for side, theirs, resamplers in (
        ("encoder", "down", "downsamplers.0"),
        ("decoder", "up", "upsamplers.0"),
    ):
        for i, level in enumerate(getattr(net, side)):
            path = f"{theirs}_blocks.{i}"
            for n in range(len(level.blocks)):
                k = 0 if plus and side == "decoder" else n  # NCSN++ attends once on the way up
                yield f"{side}.{i}.blocks.{n}", f"{path}.resnets.{n}", f"{path}.attentions.{k}"
            if level.resize is not None:
                name = f"resnet_{theirs}" if plus else resamplers
                yield f"{side}.{i}.resize", f"{theirs}_blocks.{i - first}.{name}", None
    yield "middle.0", "mid_block.resnets.0", "mid_block.attentions.0"
    yield "middle.1", "mid_block.resnets.1", None


def state_dict(net: Network) -> dict[str, Tensor]:
    """The weights by the names of diffusers. Where a DDPM attends in the last block of a level alone, the
    others get an attention that adds nothing."""
    own, state = net.state_dict(), {}
    for ours, keys, layout in rules(net):
        t = own[ours].T if layout is transposed else own[ours]
        state |= dict(zip(keys, t.chunk(len(keys)), strict=True))
    for i, level in enumerate(net.decoder if isinstance(net, DDPM) else ()):
        path = f"up_blocks.{i}.attentions"
        template = {key: t for key, t in state.items() if key.startswith(f"{path}.{len(level.blocks) - 1}.")}
        for n in range(len(level.blocks) - 1):
            for key, t in template.items():
                state.setdefault(re.sub(rf"^{path}\.\d+", f"{path}.{n}", key), torch.zeros_like(t))
    return {key: t.detach().cpu().contiguous().clone() for key, t in state.items()}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: is no JSON ({error}).") from error
    return found if isinstance(found, dict) else {}
