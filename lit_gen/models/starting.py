"""Starting weights: the networks of a training begin as those of a run, a checkpoint, or an official file."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen import pretrained
from lit_gen.autoencoder.module import AutoencoderModule
from lit_gen.callbacks.contracts import HasAverage
from lit_gen.errors import ConfigError
from lit_gen.funit.module import FUNITModule
from lit_gen.instantiate import config_dict
from lit_gen.models.loading import FAMILIES, contradicting_levels, load
from lit_gen.pretrained import diffusers, unet2d, unpickle
from lit_gen.pretrained.funit import load_discriminator, load_generator
from lit_gen.score.fewstep.teacher import Distillation
from lit_gen.score.module import ScoreModule
from lit_gen.score.networks import EDM2

__all__ = ["Start", "start_from"]

# Tensors that depend on the number of classes, conditions, or channels: their names, the axis along which
# they may differ, and what it counts. Those of axis None may have any shape, and be absent.
_EDGES = (
    (re.compile(r"(^|\.)(label|augment|vector)\."), None, "classes or other conditions"),
    (re.compile(r"(^|\.)second\."), None, "a second time"),
    (re.compile(r"(^|\.)stem\.weight$|\.pyramid\.conv\.weight$"), 1, "input channels"),
    (re.compile(r"(^|\.)head(\.2)?\.|decoder\.out\.|\.cls_logits\."), 0, "output channels or classes"),
)
_OPTIONAL = ("discriminator", "loss")  # networks that the weights may lack
# Options of networks that the shapes of their tensors do not tell.
_UNSEEN = {"fir", "input_pyramid", "output_pyramid", "block", "rescale", "activation", "resample_conv"}
_UNSEEN |= {"heads", "head_channels", "label_balance", "concat_balance", "res_balance"}
_UNSEEN |= {"attention_balance", "clip"}


@dataclass
class Start:
    """What a training began with. `new`: tensors that keep their random start, and `left_out`: those of the
    file that nothing takes, each with the reason; `notes`: what the user should know of the rest."""

    path: Path
    averaged: bool
    loaded: int = 0
    new: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        return vars(self) | {"path": str(self.path)}

    def lines(self) -> list[str]:
        """What is printed of it."""
        kind = "averaged weights" if self.averaged else "weights"
        lines = [f"starts from the {kind} of {self.path}: {self.loaded} tensors loaded"]
        for what, tensors in (("initialized as new", self.new), ("left out", self.left_out)):
            lines += [f"  {what}: {name} ({why})" for name, why in tensors.items()]
        return lines + [f"  note: {note}" for note in self.notes]


@dataclass
class _Source:
    """Networks by name, what is known of their options, and what `Start` says of them."""

    path: Path
    networks: dict[str, nn.Module]
    options: dict[str, dict[str, Any]]
    averaged: bool
    notes: list[str]


def start_from(
    module: nn.Module, weights: str | Path, config: Mapping[str, Any], *, ema: bool = True
) -> Start:
    """Puts weights into the networks of a module that is about to be trained, and into what averages them.

    `weights` is a run folder (its best checkpoint) or checkpoint of lit_gen, or an official file of EDM,
    EDM2, score_sde, ncsn, U-ViT, DiT, SiT, py-meanflow, FUNIT (gen_*.pt; dis_*.pt of the same number beside
    it is read too), or an autoencoder of diffusers or Stable Diffusion; `config` is the module's
    configuration, `model`. `ema` takes the averaged weights where there are some. What depends on the number
    of classes, conditions, or channels, and on a second time, keeps its first values where those differ.
    Raises ConfigError for weights of another family or size.
    """
    path = Path(weights)
    source = _of_run(module, path, config, ema) if _is_ours(path) else _official(module, path, config, ema)
    start = Start(source.path, source.averaged, notes=source.notes)
    for name, net in _networks(module).items():
        theirs = source.networks.get(name)
        if name == "loss" and type(theirs) is not type(net):
            theirs = None  # another objective's
        if theirs is None:
            if name in _OPTIONAL:
                own = [key for key, p in net.named_parameters() if p.requires_grad]
                start.new |= {f"{name}.{key}": "the file has none" for key in own}
                continue
            raise ConfigError(f"weights={path} holds {', '.join(source.networks)}, no {name}.")
        options = (config.get(name) or {}, source.options.get(name) or {})
        _take(name, net, theirs, options, start)
    if isinstance(module, FUNITModule):
        module.generator_ema.load_state_dict(module.generator.state_dict())
    if isinstance(loss := getattr(module, "loss", None), Distillation):
        loss.start_from(_networks(module)["net"])
        teacher = ("loss.teacher.", "loss.started")
        for tensors in (start.new, start.left_out):
            for key in [key for key in tensors if key.startswith(teacher)]:
                del tensors[key]
    return start


def _networks(module: nn.Module) -> dict[str, nn.Module]:
    """What weights are read for, by the name in the configuration."""
    if isinstance(module, FUNITModule):
        return {"generator": module.generator, "discriminator": module.discriminator}
    if isinstance(module, AutoencoderModule):
        own: dict[str, nn.Module] = {"network": module.network}
        return own if module.discriminator is None else own | {"discriminator": module.discriminator}
    if not isinstance(module, HasAverage):
        raise ConfigError(
            f"weights= is for models with an ema_network(), which {type(module).__name__} lacks."
        )
    loss = getattr(module, "loss", None)  # EDM2's has weights of its own
    return {"net": module.ema_network()} | ({"loss": loss} if isinstance(loss, nn.Module) else {})


def _is_ours(path: Path) -> bool:
    if path.is_dir() or not path.exists():
        return path.is_dir() and unet2d.find(path) is None
    if path.suffix in (".pkl", ".safetensors"):
        return False
    content = unpickle.load(path)
    return isinstance(content, dict) and "pytorch-lightning_version" in content


def _of_run(module: nn.Module, path: Path, config: Mapping[str, Any], ema: bool) -> _Source:
    other, run, read = load(path, ema=ema, device="cpu")
    networks = _networks(other)
    if isinstance(other, FUNITModule):
        networks["generator"] = other.generator_ema
    if set(networks) - set(_OPTIONAL) != set(_networks(module)) - set(_OPTIONAL):
        raise ConfigError(
            f"weights={path} is a run of {type(other).__name__}; this training is of {type(module).__name__}."
        )
    _check_teacher(getattr(module, "loss", None), other, path)
    theirs = config_dict(run.model)
    notes = [
        f"the {part} was {theirs[part]} there and is {config[part]} here: the network has to learn the "
        "difference"
        for part in ("process", "precondition")
        if part in theirs and part in config and theirs[part] != config[part]
    ]
    averages = [c for c in (run.callbacks or {}).values() if str((c or {}).get("_target_")).endswith(".EMA")]
    averaged = ema and bool(averages or isinstance(other, FUNITModule))
    return _Source(read, networks, {name: theirs.get(name) or {} for name in networks}, averaged, notes)


def _check_teacher(loss: object, other: nn.Module, path: Path) -> None:
    """Raises ConfigError for a run that cannot be the teacher of a loss."""
    if not (isinstance(loss, Distillation) and loss.distill and isinstance(other, ScoreModule)):
        return
    other.refuse_consistency("model.loss.distill=true", "give weights= of a diffusion model")
    never = [part for part in other.parts if not other.dropout[part]]
    if loss.guidance != 1 and never:
        raise ConfigError(
            f"model.loss.guidance={loss.guidance}: the model of weights={path} does not know images without "
            f"a {never[0]}. Train it with dropped conditions, or set model.loss.guidance=1."
        )


def _official(module: nn.Module, path: Path, config: Mapping[str, Any], ema: bool) -> _Source:
    if isinstance(module, FUNITModule):
        networks: dict[str, nn.Module] = {"generator": load_generator(path, average=ema)}
        beside = path.with_name(path.name.replace("gen_", "dis_"))
        if beside != path and beside.is_file():
            networks["discriminator"] = load_discriminator(beside)
        return _Source(path, networks, {}, ema, [])
    if isinstance(module, AutoencoderModule):
        network, _ = diffusers.load(path)
        return _Source(path, {"network": network}, {"network": network.options}, False, [])
    if not isinstance(module, ScoreModule):
        raise ConfigError(
            f"weights={path}: official files are of score models and FUNIT; for "
            f"{type(module).__name__}, give a run or a checkpoint of one."
        )
    net = module.ema_network()
    try:
        official, info = pretrained.load(path, ema=ema)
        heads = (config.get("net") or {}).get("head_channels")
        if isinstance(official, EDM2) and heads and not info.snapshot:  # its tensors do not tell them
            official, info = pretrained.load(path, ema=ema, head_channels=heads)
    except ConfigError as error:
        try:  # not one of the released kinds; it may still be of this very network
            official, info = pretrained.load(path, copy.deepcopy(net), ema=ema)
        except ConfigError:
            raise error from None
    guessed = {"fir"} if info.release == "score_sde" else set()
    options = {key: value for key, value in info.network.items() if key not in guessed}
    notes = [contradicting_levels(module.denoiser.process, info)]
    family = FAMILIES.get(str(info.snapshot.get("class", "")).rpartition(".")[2])
    notes.append(f"the file's class says that it was trained with model={family}" if family else None)
    return _Source(path, {"net": official}, {"net": options}, info.weights == "ema", [n for n in notes if n])


def _take(
    name: str, net: nn.Module, theirs: nn.Module, options: tuple[dict[str, Any], dict[str, Any]], start: Start
) -> None:
    """Loads what fits of one network and notes the rest in `start`."""
    if type(net) is not type(theirs):
        raise ConfigError(
            f"weights={start.path} holds a {type(theirs).__name__}, but model.{name} is a "
            f"{type(net).__name__}: take weights of that network, or another model.{name}."
        )
    own, given = net.state_dict(), theirs.state_dict()
    fitting: dict[str, Tensor] = {}
    wrong: list[str] = []
    for key in own | given:
        mine, other = own.get(key), given.get(key)
        if mine is not None and other is not None and mine.shape == other.shape:
            fitting[key] = other
            continue
        reason = _reason(key, mine, other)
        if reason is None and name != "loss":
            wrong.append(f"{key} ({_shape(other)} there, {_shape(mine)} here)")
        elif mine is None:
            start.left_out[f"{name}.{key}"] = reason or "it has none"
        else:
            start.new[f"{name}.{key}"] = reason or "another shape"
    different = _differences(*options)
    if wrong or any(option in _UNSEEN for option in different):
        raise ConfigError(_another(name, wrong, different, start.path))
    with torch.no_grad():
        net.load_state_dict(own | fitting)
    start.loaded += len(fitting)


def _reason(key: str, mine: Tensor | None, other: Tensor | None) -> str | None:
    """Why a tensor may differ; None: it may not."""
    for pattern, axis, words in _EDGES:
        if not pattern.search(key):
            continue
        if mine is None or other is None:
            only = "only the weights have" if mine is None else "only this model has"
            return f"{words}, which {only}" if axis is None else None
        if axis is None:
            return f"{words}: {_shape(other)} there, {_shape(mine)} here"
        if other.ndim == mine.ndim > axis and _without(other, axis) == _without(mine, axis):
            return f"{words}: {other.shape[axis]} there, {mine.shape[axis]} here"
    return None


def _without(tensor: Tensor, axis: int) -> list[int]:
    return [n for i, n in enumerate(tensor.shape) if i != axis]


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else "x".join(map(str, tensor.shape)) or "one number"


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options that both know and that differ, without those that a network may be continued under."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return "fourier" if value == "fourier_edm" else value

    free = {"image_size", "channels", "out_channels", "num_classes", "augment_dim", "dropout"}
    free |= {"vector_dim", "condition_channels", "second_time"}
    free |= {"checkpoint_blocks", "fourier_scale", "attention_width", "_target_"}
    return {
        key: (theirs[key], mine[key])
        for key in mine.keys() & theirs.keys() - free
        if None not in (mine[key], theirs[key]) and plain(mine[key]) != plain(theirs[key])
    }


def _another(name: str, wrong: list[str], different: dict[str, tuple[Any, Any]], path: Path) -> str:
    message = f"weights={path} are of another network than model.{name}"
    if wrong:
        message += f": {len(wrong)} tensors differ, the first is {wrong[0]}"
    if different:
        told = ", ".join(f"{key}={a} there and {b} here" for key, (a, b) in sorted(different.items()))
        wanted = " ".join(
            f"model.{name}.{key}={str(list(a) if isinstance(a, tuple) else a).replace(' ', '')}"
            for key, (a, _) in sorted(different.items())
        )
        message += f". Its options: {told}. Set {wanted}"
    return message + "."
