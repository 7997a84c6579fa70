"""Autoencoders of latent diffusion: diffusers' `AutoencoderKL` (https://github.com/huggingface/diffusers),
and the checkpoints of latent-diffusion and Stable Diffusion that it came from.

    diffusers          config.json and diffusion_pytorch_model.safetensors (or .bin) in a folder, or in its
                       subfolder vae
    latent-diffusion   one file, "encoder.down.0.block.0...", or "first_stage_model." before each; decoder
                       levels are counted from the highest resolution, and attention is of 1x1 convolutions
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_gen.autoencoder.networks import AutoencoderKL
from lit_gen.errors import ConfigError
from lit_gen.pretrained import unpickle
from lit_gen.pretrained.keymap import Rule, apply, conv_as_linear, same

FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PREFIX = "first_stage_model."
_BLOCKS = ["DownEncoderBlock2D", "UpDecoderBlock2D"]

# Patterns of our names -> theirs, one after another.
_DIFFUSERS = [
    (r"^encoder\.levels\.(\d+)\.blocks", r"encoder.down_blocks.\1.resnets"),
    (r"^encoder\.levels\.(\d+)\.resample", r"encoder.down_blocks.\1.downsamplers.0"),
    (r"^decoder\.levels\.(\d+)\.blocks", r"decoder.up_blocks.\1.resnets"),
    (r"^decoder\.levels\.(\d+)\.resample", r"decoder.up_blocks.\1.upsamplers.0"),
    (r"\.middle\.1\.norm", ".mid_block.attentions.0.group_norm"),
    (r"\.middle\.1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.middle\.1\.out", ".mid_block.attentions.0.to_out.0"),
    (r"\.middle\.0", ".mid_block.resnets.0"),
    (r"\.middle\.2", ".mid_block.resnets.1"),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"^to_moments\.", "quant_conv."),
    (r"^from_latents\.", "post_quant_conv."),
]
BEFORE_0_17 = [
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
]
_LATENT_DIFFUSION = [
    (r"^encoder\.levels\.(\d+)\.blocks", r"encoder.down.\1.block"),
    (r"^encoder\.levels\.(\d+)\.resample", r"encoder.down.\1.downsample"),
    (r"^decoder\.levels\.(\d+)\.blocks", r"decoder.up.\1.block"),
    (r"^decoder\.levels\.(\d+)\.resample", r"decoder.up.\1.upsample"),
    (r"\.middle\.1\.norm", ".mid.attn_1.norm"),
    (r"\.middle\.1\.([qkv])\.", r".mid.attn_1.\1."),
    (r"\.middle\.1\.out", ".mid.attn_1.proj_out"),
    (r"\.middle\.0", ".mid.block_1"),
    (r"\.middle\.2", ".mid.block_2"),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"^to_moments\.", "quant_conv."),
    (r"^from_latents\.", "post_quant_conv."),
]


@dataclass(frozen=True)
class Scale:
    """Of latents for a score model, (z - shift) factor, numbers or one for each channel. 0.18215 is Stable
    Diffusion's."""

    factor: float | list[float] = 0.18215
    shift: float | list[float] = 0.0


def load(path: str | Path) -> tuple[AutoencoderKL, Scale]:
    """The autoencoder of a file, or of a folder with `config.json`, in eval mode; a `config.json` beside a
    file is read too. Raises ConfigError for any other."""
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    config = _config(path.with_name("config.json"))
    content = unpickle.load(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    try:
        network = from_state_dict(state, int(config.get("norm_num_groups", 32)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return network, _scale(config, network.latent_channels)


def from_state_dict(state: dict[str, Tensor], groups: int = 32) -> AutoencoderKL:
    """The autoencoder of a state dict of either layout; `groups` are those of its norms, which the tensors do
    not tell. Tensors beside an autoencoder called `first_stage_model` are left out."""
    if any(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): t for key, t in state.items() if key.startswith(PREFIX)}
    state = {key: t for key, t in state.items() if not key.startswith("loss.")}
    release, level, blocks = "diffusers", "encoder.down_blocks.{}.resnets", "encoder.down_blocks.0.resnets.{}"
    if "encoder.down.0.block.0.conv1.weight" in state:
        release, level, blocks = "latent-diffusion", "encoder.down.{}.block", "encoder.down.0.block.{}"
    if level.format(0) + ".0.conv1.weight" not in state:
        raise ConfigError("its layers are not those of an AutoencoderKL.")
    depth = _count(state, level + ".0.conv1.weight")
    options: dict[str, Any] = {
        "channels": state["encoder.conv_in.weight"].shape[1],
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "widths": [len(state[level.format(i) + ".0.conv1.weight"]) for i in range(depth)],
        "blocks": _count(state, blocks + ".conv1.weight"),
        "groups": groups,
        "attention": any(".attn_1." in key or ".mid_block.attentions." in key for key in state),
        "projections": "quant_conv.weight" in state,
    }
    network = AutoencoderKL(**options)
    apply(network, rules(network, release, state), state, release)
    return network.eval()


def rules(network: AutoencoderKL, release: str, state: Any = ()) -> list[Rule]:
    """Our keys -> those of the release, "diffusers" or "latent-diffusion". A `state` may be of a diffusers
    before 0.17, whose attention had other names."""
    found, last = [], len(network.options["widths"]) - 1
    older = release == "diffusers" and any(".attentions.0.query." in key for key in state)
    for key in network.state_dict():
        theirs, layout = key, same
        for pattern, name in _DIFFUSERS if release == "diffusers" else _LATENT_DIFFUSION:
            theirs = re.sub(pattern, name, theirs)
        for pattern, name in BEFORE_0_17 if older else ():
            theirs = re.sub(pattern, name, theirs)
        if release == "latent-diffusion":
            theirs = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}", theirs)
            attention = ".mid.attn_1." in theirs and ".norm." not in theirs
            layout = conv_as_linear if attention else same
        found.append((key, (theirs,), layout))
    return found


def _scale(config: dict[str, Any], channels: int) -> Scale:
    """(z - shift_factor) scaling_factor, or where the latents' mean and deviation are given, as of Playground
    v2.5, (z - latents_mean) scaling_factor / latents_std. Raises ConfigError for these of another number of
    channels."""
    factor, shift = config.get("scaling_factor") or 0.18215, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return Scale(factor, shift)
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    if {len(mean), len(std)} != {channels} or not all(s > 0 for s in std) or shift:
        raise ConfigError(
            f"config.json: latents_mean={mean}, latents_std={std}, shift_factor={shift}: give {channels} "
            "numbers each, the deviations above 0, and no shift_factor beside them."
        )
    return Scale([factor / s for s in std], mean)


def _file_in(folder: Path) -> Path:
    for place in (folder, folder / "vae"):
        for name in FILES:
            if (place / name).is_file():
                return place / name
    raise ConfigError(
        f"{folder}: neither a run folder of lit_gen nor a model of diffusers: it has no config.yaml and no "
        f"{FILES[0]}."
    )


def _config(path: Path) -> dict[str, Any]:
    """`config.json`; empty without one. Raises ConfigError for an architecture that we do not have."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: is no JSON ({error}).") from error
    kinds = [*config.get("down_block_types", ()), *config.get("up_block_types", ())]
    other = next((kind for kind in kinds if kind not in _BLOCKS), None)
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or other:
        raise ConfigError(
            f"{path}: an autoencoder of {other or config['_class_name']}; only AutoencoderKL of "
            f"{' and '.join(_BLOCKS)} can be read."
        )
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        raise ConfigError(f"{path}: act_fn={config['act_fn']}: only autoencoders with silu can be read.")
    return config


def _count(state: dict[str, Tensor], pattern: str) -> int:
    n = 0
    while pattern.format(n) in state:
        n += 1
    return n
