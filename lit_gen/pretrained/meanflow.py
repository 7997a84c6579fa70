"""Checkpoints of py-meanflow (https://github.com/Gsunshine/py-meanflow).

    {"model": {"net.*": weights, "net_ema.*", "net_ema1.*", "net_ema2.*": averages, "num_updates": ...}, ...}

The network is EDM's SongUNet with two embeddings side by side, of t and of t - r, both in [0, 1], and
attention whose rows are q, k, v as ours; its output is the average velocity
(`lit_gen.score.fewstep.meanflow`), so that it goes with model=meanflow.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.pretrained import edm
from lit_gen.pretrained.keymap import Info, Rule, apply, conv_as_linear
from lit_gen.score.networks.ncsnpp import NCSNpp

_PREFIXES = {"ema": "net_ema.", "model": "net."}


def is_meanflow(content: Any) -> bool:
    """Whether an unpickled file, or a state dict, is one of py-meanflow's."""
    model = content.get("model", content) if isinstance(content, Mapping) else {}
    return isinstance(model, Mapping) and "net.map_layer0.weight" in model


def read(
    content: Mapping[str, Any], net: NCSNpp | None = None, *, ema: bool = True, **network: Any
) -> tuple[NCSNpp, Info]:
    """`lit_gen.pretrained.load` of an unpickled checkpoint or its "model". Of the averages it reads
    "net_ema", that of the published numbers; `network` says what tensors do not show, such as `dropout`."""
    model = content.get("model", content)
    weights = "ema" if ema and any(key.startswith(_PREFIXES["ema"]) for key in model) else "model"
    prefix = _PREFIXES[weights]
    state: dict[str, Tensor] = {
        key.removeprefix(prefix): value for key, value in model.items() if key.startswith(prefix)
    }
    arguments: dict[str, Any] = {}
    if net is None:
        cls, arguments = edm.network_arguments(state)
        if cls is not NCSNpp or arguments["embedding_mult"] % 2:
            raise ConfigError("it has net.* weights, but no SongUNet of two times as py-meanflow's.")
        arguments["embedding_mult"] //= 2
        arguments |= {"second_time": "concatenated"} | network
        net = NCSNpp(**arguments)
    apply(net, rules(net), state, "py-meanflow", ignore=("resample_filter",))
    updates = model.get("num_updates")
    step = int(updates) if isinstance(updates, int | Tensor) else None
    return net.eval(), Info("py-meanflow", arguments, weights, step)


def rules(net: NCSNpp) -> list[Rule]:
    """Our keys -> the official ones, without their prefix."""
    found = edm.rules(net)
    return [(ours, keys, conv_as_linear if ".qkv." in ours else layout) for ours, keys, layout in found]
