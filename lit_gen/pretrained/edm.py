"""Snapshots of EDM (https://github.com/NVlabs/edm) and EDM2 (https://github.com/NVlabs/edm2).

    .pkl                {"ema": preconditioned network, ...}, a pickle with source code: read, never executed
    .pt, .safetensors   the state dict of the preconditioned network or of the network inside

Networks are SongUNet (our NCSNpp), DhariwalUNet (ADM) or EDM2's UNet. Names hold the resolution, shapes the
rest, so that state dicts need no configuration. The networks take [-1, 1] images and c_noise of the EDM, VP,
VE, or iDDPM preconditioning.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.pretrained.keymap import SELF, Info, Layout, Rule, apply, conv_as_linear, expand
from lit_gen.pretrained.unpickle import Record, tensors
from lit_gen.score.networks.adm import ADM
from lit_gen.score.networks.edm2 import EDM2
from lit_gen.score.networks.ncsnpp import NCSNpp

Network = NCSNpp | ADM | EDM2

_IGNORED = (
    "resample_filter",
    *(f"logvar_{key}" for key in ("fourier.freqs", "fourier.phases", "linear.weight")),
)
_BLOCK = {name: name for name in ("", "norm0", "conv0", "affine", "norm1", "conv1", "skip")} | {
    "attention.norm": "norm2",
    "attention.qkv": "qkv",
    "attention.proj": "proj",
}
_BLOCK2 = {
    "": "",
    "conv0": "conv_res0",
    "affine": "emb_linear",
    "conv1": "conv_res1",
    "skip": "conv_skip",
    "attention.qkv": "attn_qkv",
    "attention.proj": "attn_proj",
}
_EMBEDDING = {
    "noise.embedding": "map_noise",
    "noise.label": "map_label",
    "noise.augment": "map_augment",
    "noise.hidden": "map_layer0",
    "noise.out": "map_layer1",
    "head.0": "out_norm",
    "head.2": "out_conv",
}
_EMBEDDING2 = SELF | {
    "embedding": "emb_fourier",
    "noise": "emb_noise",
    "label": "emb_label",
    "head": "out_conv",
}
_BUFFERS = {"frequencies": "freqs", "phases": "phases"}
# What NCSNpp can, of the options that EDM's SongUNet does not have.
_SONG = {
    "input_pyramid": ("none", "skip", "residual"),
    "block": ("biggan",),
    "activation": ("silu",),
    "rescale": (True,),
    "conditional": (True,),
}
# Constructor arguments that tensors do not show: official name -> ours.
_HIDDEN = {
    "dropout": "dropout",
    "channels_per_head": "head_channels",
    "label_balance": "label_balance",
    "concat_balance": "concat_balance",
    "res_balance": "res_balance",
    "attn_balance": "attention_balance",
    "clip_act": "clip",
}


def read(content: Any, net: Network | None = None, **network: Any) -> tuple[Network, Info]:
    """`lit_gen.pretrained.load` of an unpickled snapshot or state dict.

    The architecture is read off names and shapes, the constructor arguments that a snapshot records, and
    `network`, which goes first.
    """
    recorded: dict[str, Any] = {}
    if isinstance(content, dict) and isinstance(content.get("ema"), Record):
        content = content["ema"]
    if isinstance(content, Record):
        recorded = dict(content.state.get("_init_kwargs") or {}) | {"class": content.name}
        content = dict(tensors(content))
    if not (isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values())):
        raise ConfigError("it is neither an EDM snapshot with an 'ema' network nor a state dict.")
    net, info = from_state_dict(content, net, hidden=hidden_arguments(recorded), **network)
    return net, replace(info, weights="ema", snapshot=recorded)


def hidden_arguments(official: dict[str, Any]) -> dict[str, Any]:
    """Our names of the official constructor arguments that tensors do not show."""
    hidden = {_HIDDEN[key]: value for key, value in official.items() if key in _HIDDEN}
    return hidden | ({"fir": tuple(official["resample_filter"])} if "resample_filter" in official else {})


def from_state_dict(
    state: dict[str, Tensor],
    net: Network | None = None,
    *,
    hidden: dict[str, Any] | None = None,
    **network: Any,
) -> tuple[Network, Info]:
    """(network, info) of a state dict; `hidden` are arguments to be used where the class has them."""
    state = {re.sub(r"^(model|unet)\.", "", key): value for key, value in state.items()}
    arguments: dict[str, Any] = {}
    if net is None:
        cls, arguments = network_arguments(state)
        known = cls.__init__.__annotations__
        arguments |= {key: value for key, value in (hidden or {}).items() if key in known} | network
        net = cls(**arguments)
    release = "edm2" if isinstance(net, EDM2) else "edm"
    apply(net, rules(net), state, release, ignore=_IGNORED)
    return net.eval(), Info(release, arguments)


def rules(net: Network) -> list[Rule]:
    """Our keys -> the official ones."""
    if not isinstance(net, NCSNpp | ADM | EDM2):
        raise ConfigError(f"EDM's releases have no {type(net).__name__}: take NCSNpp, ADM or EDM2.")
    if isinstance(net, NCSNpp):
        for name, wanted in _SONG.items():
            if getattr(net, name) not in wanted:
                raise ConfigError(f"EDM's releases have no NCSNpp with {name}={getattr(net, name)!r}.")
    cls = EDM2 if isinstance(net, EDM2) else NCSNpp
    table = _EMBEDDING2 if cls is EDM2 else _EMBEDDING
    found = list(expand(net, "", "", table, leaves=_BUFFERS))
    for ours, theirs in _blocks(net):
        layouts = {"attention.qkv": _qkv(net, ours), "attention.proj": conv_as_linear}
        found += expand(net, ours, theirs, _BLOCK2 if cls is EDM2 else _BLOCK, layouts)
    return found


def _blocks(net: Network) -> Iterator[tuple[str, str]]:
    """(path here, official path) of everything between the embedding and the head."""
    sizes = [f"{r}x{r}" for r in net.resolutions]
    yield "stem", f"enc.{sizes[0]}_conv"
    for i, (level, size) in enumerate(zip(net.encoder, sizes, strict=True)):
        yield f"encoder.{i}.resize", f"enc.{size}_down"
        if isinstance(net, NCSNpp) and level.pyramid is not None:
            yield f"encoder.{i}.pyramid.conv", f"enc.{size}_aux_{net.input_pyramid}"
        yield from ((f"encoder.{i}.blocks.{n}", f"enc.{size}_block{n}") for n in range(len(level.blocks)))
    yield from ((f"middle.{n}", f"dec.{sizes[-1]}_in{n}") for n in (0, 1))
    for i, (level, size) in enumerate(zip(net.decoder, reversed(sizes), strict=True)):
        yield f"decoder.{i}.resize", f"dec.{size}_up"
        yield from ((f"decoder.{i}.blocks.{n}", f"dec.{size}_block{n}") for n in range(len(level.blocks)))
        yield f"decoder.{i}.head.0", f"dec.{size}_aux_norm"
        yield f"decoder.{i}.head.2", f"dec.{size}_aux_conv"


def _qkv(net: nn.Module, block: str) -> Layout:
    attention = dict(net.named_modules()).get(f"{block}.attention")
    return partial(qkv_rows, heads=getattr(attention, "heads", 1))


def qkv_rows(t: Tensor, heads: int) -> Tensor:
    """Official rows go head, channel, then q, k, v; ours q, k, v, then head, channel, of a linear layer.
    `t` is (3 c, ...)."""
    return conv_as_linear(t).unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)


def network_arguments(state: dict[str, Tensor]) -> tuple[type[Network], dict[str, Any]]:
    """The class and constructor arguments that names and shapes of a state dict tell."""
    sizes = sorted({int(m[1]) for key in state if (m := re.match(r"enc\.(\d+)x\d+_", key))}, reverse=True)
    second = "emb_noise.weight" in state
    conv, first = ("conv_res0", "emb_noise") if second else ("conv0", "map_layer0")
    needed = [f"enc.{r}x{r}_block0.{conv}.weight" for r in sizes]
    if (
        not sizes
        or not {f"{first}.weight", f"enc.{sizes[0]}x{sizes[0]}_conv.weight", *needed} <= state.keys()
    ):
        raise ConfigError("the checkpoint's layers are not those of a network of EDM or EDM2.")
    widths = [len(state[key]) for key in needed]
    c_emb, c_noise = state[f"{first}.weight"].shape
    qkv = "attn_qkv" if second else "qkv"
    stem = state[f"enc.{sizes[0]}x{sizes[0]}_conv.weight"]
    arguments = {
        "image_size": sizes[0],
        "channels": stem.shape[1] - second,
        "num_blocks": sum(bool(re.match(rf"enc\.{sizes[0]}x\d+_block\d+\.{conv}\.weight", k)) for k in state),
        "attention_resolutions": tuple(r for r in sizes if f"enc.{r}x{r}_block0.{qkv}.weight" in state),
        "num_classes": _width(state, "emb_label.weight" if second else "map_label.weight"),
    }
    if second or "out_conv.weight" in state:
        # Blocks narrower than one head have no attention; the middle has it wherever it can.
        middle = f"dec.{sizes[-1]}x{sizes[-1]}_in0.{qkv}.weight" in state
        arguments["attention_width"] = 1 if middle else widths[-1] + 1
    if second:
        return EDM2, arguments | _edm2_widths(widths, c_noise, c_emb)
    arguments["augment_dim"] = _width(state, "map_augment.weight")
    if "out_conv.weight" in state:
        arguments |= {"base_channels": c_noise, "emb_mult": c_emb // c_noise}
        arguments["channel_mult"] = tuple(w // c_noise for w in widths)
        return ADM, arguments | {"out_channels": len(state["out_conv.weight"])}
    return NCSNpp, arguments | _song(state, sizes, widths, len(stem), c_noise, c_emb)


def _width(state: dict[str, Tensor], key: str) -> int:
    return state[key].shape[1] if key in state else 0


def _edm2_widths(widths: list[int], c_noise: int, c_emb: int) -> dict[str, Any]:
    base = math.gcd(*widths, c_noise, c_emb)  # only the products are visible
    return {
        "base_channels": base,
        "channel_mult": tuple(w // base for w in widths),
        "noise_mult": c_noise // base,
        "emb_mult": c_emb // base,
    }


def _taps(kernel: Tensor) -> tuple[float, ...]:
    """The row whose outer product a resampling filter is, with 1 as its smallest entry."""
    row = kernel.float()[0, 0].sum(0)
    return tuple((row / row[row != 0].abs().min()).tolist())


def _song(
    state: dict[str, Tensor], sizes: list[int], widths: list[int], base: int, c_noise: int, c_emb: int
) -> dict[str, Any]:
    filters = [value for key, value in state.items() if key.endswith("resample_filter")]
    heads = [key for key in state if key.endswith("_aux_conv.weight")]
    down = f"enc.{sizes[-1]}x{sizes[-1]}_aux_"
    return {
        "base_channels": base,
        "channel_mult": tuple(w // base for w in widths),
        "embedding": "fourier_edm" if "map_noise.freqs" in state else "positional",
        "embedding_mult": c_noise // base,
        "emb_mult": c_emb // base,
        "fir": _taps(filters[0]) if filters else (1, 1),
        "input_pyramid": next((k for k in ("skip", "residual") if f"{down}{k}.weight" in state), "none"),
        "output_pyramid": "skip" if len(heads) > 1 else "none",
        "out_channels": len(state[heads[0]]),
    }
