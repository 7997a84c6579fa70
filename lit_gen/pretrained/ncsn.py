"""Checkpoints of NCSN (https://github.com/ermongroup/ncsn) and NCSNv2 (https://github.com/ermongroup/ncsnv2).

    ncsn    [model state dict, optimizer state]
    ncsnv2  [model state dict, optimizer state, epoch, step, moving average by name]

Model keys carry "module.", those of the moving average do not. The networks were trained on [0, 1] images (2x
- 1 inside), so that their sigmas are half of ours; NCSN takes the index in a descending table of sigmas,
NCSNv2 divides its output by the sigma.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.pretrained.keymap import Info, Rule, apply, same
from lit_gen.score.networks.ncsn import NCSN
from lit_gen.score.networks.ncsnv2 import NCSNv2

_PREFIX = "module."
# Names of the residual stages and refine blocks, in the order of use, by their number.
_STAGES = {4: "1 2 3 4", 5: "1 2 3 4 5", 6: "1 2 3 31 4 5"}
_REFINE = {4: "1 2 3 4", 5: "1 2 3 4 5", 6: "1 2 31 3 4 5"}
_LITERAL = [
    (r"^stem\.", "begin_conv."),
    (r"^head\.", "end_conv."),
    (r"^norm\.", "normalizer."),
    (r"\.norm([12])\.", r".normalize\1."),
    (r"\.adapt\.(\d)\.", r".adapt_convs.\1."),
    (r"\.output\.", ".output_convs."),
    (r"\.fuse\.", ".msf."),
    (r"\.pool\.", ".crp."),
    (r"\.rows\.", ".embed."),
]


def read(
    content: Sequence[Any], net: NCSN | NCSNv2 | None = None, *, ema: bool = True, **network: Any
) -> tuple[NCSN | NCSNv2, Info]:
    """`lit_gen.pretrained.load` of an unpickled checkpoint.

    `network` can say the `image_size`, which the tensors cannot (32, 128 or 256 by depth; nothing but a check
    depends on it).
    """
    if not (content and isinstance(content[0], dict)):
        raise ConfigError("it is not an ncsn or ncsnv2 checkpoint: the list does not open with a state dict.")
    averaged = ema and len(content) > 4
    state = content[0] | ({_PREFIX + key: value for key, value in content[4].items()} if averaged else {})
    net, info = from_state_dict(state, net, **network)
    step = content[3] if len(content) > 3 else None
    return net, replace(info, weights="ema" if averaged else "model", step=step)


def from_state_dict(
    state: dict[str, Tensor], net: NCSN | NCSNv2 | None = None, **network: Any
) -> tuple[NCSN | NCSNv2, Info]:
    """(network, info) of the model's state dict, with or without its "module." prefix."""
    state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    arguments: dict[str, Any] = {}
    if net is None:
        if "begin_conv.weight" not in state or "refine1.crp.convs.0.weight" not in state:
            raise ConfigError("the checkpoint's layers are not those of NCSN or NCSNv2.")
        base, channels = state["begin_conv.weight"].shape[:2]
        depth = 4 + ("res5.0.conv1.weight" in state) + ("res31.0.conv1.weight" in state)
        arguments = {"image_size": 32 << (2 if depth == 5 else 3 if depth == 6 else 0), "channels": channels}
        arguments |= {"base_channels": base} | network
        if "normalizer.embed.weight" in state:
            net = NCSN(**arguments, num_levels=len(state["normalizer.embed.weight"]))
            arguments["num_levels"] = net.num_levels
        else:
            arguments["depth"] = depth
            net = NCSNv2(**arguments)
    release = "ncsn" if isinstance(net, NCSN) else "ncsnv2"
    apply(net, rules(net), state, release, ignore=("sigmas",))
    return net.eval(), Info(release, arguments, sigmas=state.get("sigmas"))


def rules(net: NCSN | NCSNv2) -> list[Rule]:
    """Our keys -> the official ones."""
    if not isinstance(net, NCSN | NCSNv2):
        raise ConfigError("the ncsn and ncsnv2 releases have NCSN and NCSNv2 networks only.")
    head = half if isinstance(net, NCSN) else same
    return [
        (key, (_official(key, len(net.stages)),), head if key.startswith("head.") else same)
        for key in net.state_dict()
    ]


def half(t: Tensor) -> Tensor:
    """The official NCSN returns the score of [0, 1] images, twice that of our own [-1, 1] ones. Of any
    shape."""
    return t / 2


def _official(key: str, depth: int) -> str:
    stages, refine = _STAGES[depth].split(), _REFINE[depth].split()
    key = re.sub(r"^stages\.(\d)", lambda m: "res" + stages[int(m[1])], key)
    key = re.sub(r"^refine\.(\d)", lambda m: "refine" + refine[int(m[1])], key)
    for pattern, replacement in _LITERAL:
        key = re.sub(pattern, replacement, key)
    # A unit's layers are named by block and stage: convs.0.1 is 1_2_conv.
    key = re.sub(
        r"(adapt_convs\.\d|output_convs)\.(conv|norm)s\.(\d)\.(\d)",
        lambda m: f"{m[1]}.{int(m[3]) + 1}_{int(m[4]) + 1}_{m[2]}",
        key,
    )
    # The convolutions of the one kind of block that pools lie one module deeper.
    if re.match(rf"res({'|'.join(_pooling(depth))})\.0\.(conv2|shortcut)\.", key):
        key = re.sub(r"(conv2|shortcut)\.", r"\1.conv.", key)
    return key


def _pooling(depth: int) -> list[str]:
    """Names of the stages that halve the resolution; the first does not, the last two are dilated."""
    return _STAGES[depth].split()[1:-2]
