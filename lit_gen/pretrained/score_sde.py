"""Checkpoints of score_sde_pytorch (https://github.com/yang-song/score_sde_pytorch): NCSN++, DDPM++ and DDPM.

    {"optimizer": ..., "model": state dict under "module.", "ema": {"shadow_params": list, ...}, "step": int}

Layers are numbered in the order of use (`all_modules.N`); the moving average is a nameless list of the
trainable tensors in that order, without the frozen Fourier frequencies. What a precondition must know of
these networks: the VE ones were trained on [0, 1] images, take ln(sigma) (Fourier) or the index in the
descending table of sigmas, and their output is divided by sigma; the VP and sub-VP ones take 999 t, on [-1,
1] images.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.pretrained.keymap import SELF, Info, Layout, Rule, apply, expand, same
from lit_gen.score.networks.ddpm import DDPM
from lit_gen.score.networks.ncsnpp import NCSNpp

_PREFIX = "module."
_BUFFERS = ("sigmas",)
_QKV = ("NIN_0", "NIN_1", "NIN_2")
_UNUSED = ("Dense_0.weight", "Dense_0.bias", "all_modules.0.W")  # there in unconditional networks too
_PYRAMID = {"skip": "Conv_0", "cat": "Conv_0", "strided": "Conv_0", "residual": "Conv2d_0"}
_ACTIVATIONS = {"swish": "silu", "elu": "elu", "relu": "relu", "lrelu": "leaky_relu"}
_NOTHING: tuple[str, dict[str, str], dict[str, Layout]] = ("", {}, {})  # a number without weights of ours

_BLOCK = {
    "norm0": "GroupNorm_0",
    "conv0": "Conv_0",
    "affine": "Dense_0",
    "norm1": "GroupNorm_1",
    "conv1": "Conv_1",
    "skip": "Conv_2",
}


def read(
    content: dict[str, Any], net: NCSNpp | DDPM | None = None, *, ema: bool = True, **network: Any
) -> tuple[NCSNpp | DDPM, Info]:
    """`lit_gen.pretrained.load` of an unpickled checkpoint; `network` as in `from_state_dict`."""
    state, shadow = content["model"], content.get("ema", {}).get("shadow_params")
    averaged = ema and bool(shadow)
    net, info = from_state_dict(_averaged(state, shadow) if averaged else state, net, **network)
    return net, replace(info, weights="ema" if averaged else "model", step=content.get("step"))


def from_state_dict(
    state: dict[str, Tensor],
    net: NCSNpp | DDPM | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    **network: Any,
) -> tuple[NCSNpp | DDPM, Info]:
    """(network, info) of the model's state dict, with or without its "module." prefix.

    `net` takes the weights if given, else the network is that of the official `config`, where there is one
    (`config_arguments`). Without either the architecture is read off the tensors, as one of the released
    kinds, and `network` says what they cannot: `image_size` (else attention is taken to stand at 16x16),
    `fir` (else NCSN++ has its filter), `dropout`.
    """
    state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    arguments = {}
    if net is None:
        size = network.get("image_size")
        cls, arguments = network_arguments(state, size) if config is None else config_arguments(config)
        arguments |= network
        net = cls(**arguments)
    unused = () if isinstance(net, DDPM) or net.conditional else _UNUSED
    apply(net, rules(net), state, "score_sde", ignore=_BUFFERS + unused)
    return net.eval(), Info("score_sde", arguments, sigmas=state.get("sigmas"))


def rules(net: NCSNpp | DDPM) -> list[Rule]:
    """Our keys -> all_modules.N, for a network of this architecture (no class or augmentation labels)."""
    if not isinstance(net, NCSNpp | DDPM) or net.num_classes or net.augment_dim:
        raise ConfigError("score_sde_pytorch has NCSNpp and DDPM networks without labels only.")
    found: list[Rule] = []
    for number, (path, names, layouts) in enumerate(_layers(net)):
        official = f"all_modules.{number}"
        if path.endswith(".attention"):
            found += _attention_rules(path, official)
        else:
            found += expand(net, path, official, names, layouts, {"frequencies": "W"})
    return [_nin_names(rule) for rule in found]


def _layers(net: NCSNpp | DDPM) -> Iterator[tuple[str, dict[str, str], dict[str, Layout]]]:
    """(path here, names within, layouts) of the official modules, in their order."""
    plus = isinstance(net, NCSNpp)
    nin = not plus or net.block == "ddpm"
    block = _BLOCK | {"skip": "NIN_0"} if nin else _BLOCK
    layouts = {"skip": nin_as_conv} if nin else {}

    def blocks(path: str, modules) -> Iterator:
        for n, module in enumerate(modules):
            yield f"{path}.{n}", block, layouts
            if module.attention is not None:
                yield f"{path}.{n}.attention", {}, {}

    if plus and net.embedding != "positional":
        yield ("noise.embedding", SELF, {}) if net.conditional else _NOTHING
    if net.noise is not None:
        yield from ((path, SELF, {}) for path in ("noise.hidden", "noise.out"))
    yield "stem", SELF, {}
    for i, level in enumerate(net.encoder):
        if plus and level.resize is not None:
            yield f"encoder.{i}.resize", block, {}
            if level.pyramid is not None:
                yield f"encoder.{i}.pyramid", {"conv": _PYRAMID[net.input_pyramid]}, {}
        yield from blocks(f"encoder.{i}.blocks", level.blocks)
        if not plus and level.resize is not None:
            yield f"encoder.{i}.resize", {"conv": "Conv_0"}, {}
    yield from blocks("middle", net.middle)
    for i, level in enumerate(net.decoder):
        if plus and level.resize is not None:
            yield f"decoder.{i}.resize", block, {}
        yield from blocks(f"decoder.{i}.blocks", level.blocks)
        if not plus and level.resize is not None:
            yield f"decoder.{i}.resize", {"conv": "Conv_0"}, {}
        if plus and level.head is not None:
            yield from ((f"decoder.{i}.head.{k}", SELF, {}) for k in (0, 2))
    if not plus:
        yield from ((f"head.{k}", SELF, {}) for k in (0, 2))


def _attention_rules(ours: str, theirs: str) -> Iterator[Rule]:
    for key in ("weight", "bias"):
        yield f"{ours}.norm.{key}", (f"{theirs}.GroupNorm_0.{key}",), same
        yield f"{ours}.qkv.{key}", tuple(f"{theirs}.{name}.{key}" for name in _QKV), nin_as_linear
        yield f"{ours}.proj.{key}", (f"{theirs}.NIN_3.{key}",), nin_as_linear


def nin_as_linear(*ts: Tensor) -> Tensor:
    """NIN layers (I, O), or their biases, as one linear layer's rows."""
    return torch.cat([t.T if t.ndim > 1 else t for t in ts])


def nin_as_conv(t: Tensor) -> Tensor:
    """A NIN layer (I, O), or its bias, as a 1x1 convolution's."""
    return t.T[:, :, None, None] if t.ndim > 1 else t


def _nin_names(rule: Rule) -> Rule:
    """NIN layers call their weight W and their bias b."""
    ours, keys, layout = rule
    keys = tuple(re.sub(r"(NIN_\d)\.weight$", r"\1.W", re.sub(r"(NIN_\d)\.bias$", r"\1.b", k)) for k in keys)
    return ours, keys, layout


def _averaged(state: dict[str, Tensor], shadow: list[Tensor]) -> dict[str, Tensor]:
    """`state` with its trainable tensors replaced, in order, by the nameless moving averages."""
    trainable = [key for key in state if not key.endswith((*_BUFFERS, "all_modules.0.W"))]
    if len(shadow) != len(trainable) or any(
        state[k].shape != s.shape for k, s in zip(trainable, shadow, strict=True)
    ):
        raise ConfigError(
            f"the checkpoint's moving average of {len(shadow)} tensors does not match its model's "
            f"{len(trainable)}: read the weights themselves, ema=false."
        )
    return state | dict(zip(trainable, shadow, strict=True))


def config_arguments(config: Mapping[str, Any]) -> tuple[type[NCSNpp] | type[DDPM], dict[str, Any]]:
    """The class and constructor arguments of an official config: nested mappings, or its ConfigDict.

    Raises ConfigError for what the official code cannot run or has no network for here.
    """
    model, data = config["model"], config["data"]
    arguments: dict[str, Any] = {
        "image_size": data["image_size"],
        "channels": data["num_channels"],
        "base_channels": model["nf"],
        "channel_mult": tuple(model["ch_mult"]),
        "num_blocks": model["num_res_blocks"],
        "attention_resolutions": tuple(model["attn_resolutions"]),
        "dropout": model["dropout"],
        "activation": _one_of(model, "nonlinearity", _ACTIVATIONS),
    }
    if _one_of(model, "name", {"ncsnpp": False, "ddpm": True}):
        _runs(bool(model["conditional"]), "DDPM with model.conditional=False")
        return DDPM, arguments | {"resample_conv": bool(model["resamp_with_conv"])}
    return NCSNpp, arguments | _plus_arguments(model, levels=len(model["ch_mult"]))


def _plus_arguments(model: Mapping[str, Any], levels: int) -> dict[str, Any]:
    fir, taps = bool(model["fir"]), tuple(model["fir_kernel"])
    block = _one_of(model, "resblock_type", {"biggan": "biggan", "ddpm": "ddpm"})
    out = _one_of(model, "progressive", {"none": "none", "output_skip": "skip"})
    combine = _one_of(model, "progressive_combine", {"sum": "skip", "cat": "cat"})
    residual = "residual" if fir else "strided"
    kinds = {"none": "none", "input_skip": combine, "residual": residual}
    if levels > 1:
        _runs(fir or out == "none", "model.progressive=output_skip without fir")
        plain = fir and not model["resamp_with_conv"]
        _runs(plain or block == "biggan", "model.resblock_type=ddpm but with fir and resamp_with_conv=False")
    if fir and taps != taps[::-1]:
        raise ConfigError(f"model.fir_kernel={list(taps)}: only symmetric filters are known here.")
    return {
        "embedding": _one_of(model, "embedding_type", {"fourier": "fourier", "positional": "positional"}),
        "fourier_scale": model.get("fourier_scale", 16.0),
        "fir": taps if fir else (1, 1),
        "input_pyramid": _one_of(model, "progressive_input", kinds),
        "output_pyramid": out,
        "block": block,
        "rescale": bool(model["skip_rescale"]),
        "conditional": bool(model["conditional"]),
    }


def _one_of(model: Mapping[str, Any], key: str, known: dict[str, Any]) -> Any:
    """Our name of an official option."""
    value = str(model[key]).lower()
    if value not in known:
        raise ConfigError(f"model.{key}={model[key]!r} has no network here: take one of {', '.join(known)}.")
    return known[value]


def _runs(condition: bool, what: str) -> None:
    if not condition:
        raise ConfigError(f"{what}: the official code cannot run it, and there is no such network here.")


def network_arguments(
    state: dict[str, Tensor], image_size: int | None = None
) -> tuple[type[NCSNpp] | type[DDPM], dict[str, Any]]:
    """The class and constructor arguments that a state dict tells; see `load` for `image_size`."""
    modules = _modules(state)
    fourier = "W" in modules[0]
    hidden, stem = modules[fourier], modules[fourier + 2]
    if "weight" not in hidden or hidden["weight"].ndim != 2 or stem.get("weight", torch.empty(0)).ndim != 4:
        raise ConfigError(
            "the checkpoint's layers are not those of the NCSN++, DDPM++ or DDPM networks that were released "
            "with score_sde_pytorch: give the official config=."
        )
    base, channels = stem["weight"].shape[:2]
    rest = modules[fourier + 3 :]
    ddpm = any(
        m.keys() == {"Conv_0.weight", "Conv_0.bias"} and m["Conv_0.weight"].shape[2] == 3 for m in rest
    )
    ddpm = ddpm or any("NIN_0.W" in m and "Conv_0.weight" in m for m in rest)
    levels, combined = _encoder(rest, base)
    attention = [i for i, level in enumerate(levels) if level["attention"]]
    image_size = image_size or 16 << (attention[0] if attention else len(levels) - 1)
    arguments: dict[str, Any] = {
        "image_size": image_size,
        "channels": channels,
        "base_channels": base,
        "channel_mult": tuple(level["width"] // base for level in levels),
        "num_blocks": levels[0]["blocks"],
        "attention_resolutions": tuple(image_size >> i for i in attention),
    }
    if ddpm:
        return DDPM, arguments
    heads = sum("weight" in m and m["weight"].shape[2:] == (3, 3) for m in rest)
    return NCSNpp, arguments | {
        "embedding": "fourier" if fourier else "positional",
        "embedding_mult": hidden["weight"].shape[1] // base,
        "fir": (1, 3, 3, 1) if fourier or combined != "none" else (1, 1),
        "input_pyramid": combined,
        "output_pyramid": "skip" if heads > 1 else "none",
    }


def _modules(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """all_modules.N.key -> a list of {key: tensor}."""
    modules: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"all_modules\.(\d+)\.(.+)", key)
        if match:
            modules.setdefault(int(match[1]), {})[match[2]] = tensor
    if len(modules) < 8:
        raise ConfigError("the checkpoint has no numbered 'all_modules': it is not one of score_sde_pytorch.")
    if sorted(modules) != list(range(len(modules))):
        raise ConfigError(
            "the checkpoint has layers without weights between others: give the official config=."
        )
    return [modules[n] for n in range(len(modules))]


def _encoder(modules: list[dict[str, Tensor]], width: int) -> tuple[list[dict[str, Any]], str]:
    """Width, blocks and attention of the levels before the first block that takes a skip; the pyramid."""
    levels, pyramid, kinds = [{"width": width, "blocks": 0, "attention": False}], "none", []
    for module in modules:
        if "Dense_0.weight" in module:
            c_out, c_in = module["Conv_0.weight"].shape[:2]
            if c_in != width:
                break
            halves = c_in == c_out and "Conv_2.weight" in module
            kinds.append(("down" if halves else "block", c_out))
            width = c_out
        elif "NIN_3.W" in module:
            kinds.append(("attention", width))
        elif "Conv2d_0.weight" in module:
            pyramid = "residual"
        elif module.get("Conv_0.weight", torch.empty(0)).shape[2:] == (1, 1):
            pyramid = "skip"
        else:
            kinds.append(("down", width))
    for kind, c in kinds[:-3]:  # the last three are the middle
        if kind == "down":
            levels.append({"width": c, "blocks": 0, "attention": False})
        elif kind == "attention":
            levels[-1]["attention"] = True
        else:
            levels[-1] |= {"width": c, "blocks": levels[-1]["blocks"] + 1}
    return levels, pyramid
