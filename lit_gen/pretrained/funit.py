"""Official FUNIT checkpoints (https://github.com/NVlabs/FUNIT): read into our networks, and ours written in
that layout.

    gen_%08d.pt    {"gen": weights, "gen_test": their moving average}
    dis_%08d.pt    {"dis": weights}
    optimizer.pt   {"gen": RMSprop state, "dis": RMSprop state}

The number in a name is the iteration. The architecture is read off the shapes, so that no configuration need
come along. Files are opened with `weights_only=True`: nothing in them is executed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.funit.networks import FewShotGenerator, PatchDiscriminator

__all__ = [
    "discriminator_keys",
    "discriminator_weights",
    "generator_keys",
    "generator_weights",
    "load_discriminator",
    "load_generator",
    "load_optimizers",
    "optimizer_state",
    "save_checkpoint",
]

Weights = dict[str, Tensor]


def generator_keys(generator: FewShotGenerator) -> dict[str, str]:
    """Our parameter names -> the official ones, in the official order."""
    class_downs, content_downs = generator.class_encoder.downs, generator.content_encoder.downs
    num_blocks = len(generator.decoder.blocks)
    layers = {"class_encoder.stem": "enc_class_model.model.0.conv"}
    layers |= {f"class_encoder.down.{i}": f"enc_class_model.model.{i + 1}.conv" for i in range(class_downs)}
    layers |= {"class_encoder.out": f"enc_class_model.model.{class_downs + 2}"}
    layers |= {"content_encoder.stem": "enc_content.model.0.conv"}
    layers |= {f"content_encoder.down.{i}": f"enc_content.model.{i + 1}.conv" for i in range(content_downs)}
    for ours, official in (
        ("content_encoder", f"enc_content.model.{content_downs + 1}"),
        ("decoder", "dec.model.0"),
    ):
        layers |= {
            f"{ours}.blocks.{i}.conv{k}": f"{official}.model.{i}.model.{k}.conv"
            for i in range(num_blocks)
            for k in (0, 1)
        }
    layers |= {f"decoder.up.{i}": f"dec.model.{2 * i + 2}.conv" for i in range(content_downs)}
    layers |= {"decoder.out": f"dec.model.{2 * content_downs + 1}.conv"}
    layers |= {f"mlp.{2 * i}": f"mlp.model.{i}.fc" for i in range((len(generator.mlp) + 1) // 2)}
    return _parameters(layers, generator)


def discriminator_keys(discriminator: PatchDiscriminator) -> dict[str, str]:
    """Our parameter names -> the official ones, in the official order."""
    layers = {"stem": "cnn_f.0.conv"}
    for s in range(len(discriminator.stages)):
        for b in (0, 1):  # two blocks, then a padding and a pooling without parameters
            ours, official = f"stages.{s}.{b}", f"cnn_f.{1 + 4 * s + b}"
            layers |= {f"{ours}.conv0": f"{official}.conv_0.conv", f"{ours}.conv1": f"{official}.conv_1.conv"}
            layers |= {f"{ours}.shortcut": f"{official}.conv_s.conv"}
    return _parameters(layers | {"head": "cnn_c.0.conv"}, discriminator)


def _parameters(layers: dict[str, str], network: nn.Module) -> dict[str, str]:
    names = dict(network.named_parameters())
    kinds = ("weight", "bias")
    return {
        f"{a}.{kind}": f"{b}.{kind}" for a, b in layers.items() for kind in kinds if f"{a}.{kind}" in names
    }


def load_generator(path: str | Path, average: bool = True) -> FewShotGenerator:
    """The generator of gen_*.pt: its moving average, which the paper evaluates, or with `average=False` the
    raw weights.

    Raises ConfigError if the file cannot be read or holds another network.
    """
    checkpoint = _read(path, ("gen", "gen_test"))
    wanted = "gen_test" if average else "gen"
    if wanted not in checkpoint:
        raise ConfigError(f"{path} holds {sorted(checkpoint)}, no '{wanted}': set average={not average}.")
    state = checkpoint[wanted]
    _require(
        path,
        state,
        "enc_class_model.model.0.conv.weight",
        "enc_content.model.0.conv.weight",
        "mlp.model.0.fc.weight",
    )
    width, channels = state["enc_content.model.0.conv.weight"].shape[:2]
    generator = FewShotGenerator(
        channels=channels,
        width=width,
        code_size=state["mlp.model.0.fc.weight"].shape[1],
        content_downs=_count(state, "enc_content.model.{}.conv.weight") - 1,
        class_downs=_count(state, "enc_class_model.model.{}.conv.weight") - 1,
        num_res_blocks=_count(state, "dec.model.0.model.{}.model.0.conv.weight"),
        mlp_width=state["mlp.model.0.fc.weight"].shape[0],
        num_mlp_layers=_count(state, "mlp.model.{}.fc.weight"),
    )
    _load(path, generator, generator_keys(generator), state)
    return generator


def load_discriminator(path: str | Path) -> PatchDiscriminator:
    """The discriminator of dis_*.pt. Raises ConfigError like `load_generator`."""
    state = _read(path, ("dis",))["dis"]
    _require(path, state, "cnn_f.0.conv.weight", "cnn_c.0.conv.weight")
    width, channels = state["cnn_f.0.conv.weight"].shape[:2]
    num_classes, max_width = state["cnn_c.0.conv.weight"].shape[:2]
    num_res_blocks = sum(1 for name in state if name.endswith("conv_0.conv.weight"))
    discriminator = PatchDiscriminator(num_classes, channels, width, num_res_blocks, max_width)
    _load(path, discriminator, discriminator_keys(discriminator), state)
    return discriminator


def generator_weights(generator: FewShotGenerator) -> Weights:
    """Our generator's weights under the official names, with the official buffers (running moments that
    nothing reads).
    """
    keys, state = generator_keys(generator), generator.state_dict()
    weights: Weights = {}
    for ours, official in keys.items():
        if ours.startswith("decoder.blocks") and ours.endswith("weight"):
            norm = official.replace("conv.weight", "norm")
            width = state[ours].shape[0]
            weights[f"{norm}.running_mean"] = state[ours].new_zeros(width)
            weights[f"{norm}.running_var"] = state[ours].new_ones(width)
        weights[official] = state[ours]
    return weights


def discriminator_weights(discriminator: PatchDiscriminator) -> Weights:
    """Our discriminator's weights under the official names."""
    state = discriminator.state_dict()
    return {official: state[ours] for ours, official in discriminator_keys(discriminator).items()}


def optimizer_state(
    state: dict[str, Any], network: nn.Module, keys: dict[str, str], *, official: bool
) -> dict[str, Any]:
    """An optimizer's state renumbered from the official order of parameters (`official=True`: into ours), or
    back.

    `keys` is `generator_keys(network)` or `discriminator_keys(network)`. Raises ConfigError if the numbers of
    parameters differ.
    """
    ours = [name for name, _ in network.named_parameters()]
    theirs = list(keys)
    source, target = (theirs, ours) if official else (ours, theirs)
    group = state["param_groups"][0]
    if len(state["param_groups"]) != 1 or len(group["params"]) != len(ours):
        raise ConfigError(
            f"The optimizer state is for {sum(len(g['params']) for g in state['param_groups'])} parameters, "
            f"{type(network).__name__} has {len(ours)}: take it from the same run as the weights."
        )
    place = {name: i for i, name in enumerate(target)}
    entries = {place[source[i]]: entry for i, entry in state["state"].items()}
    return {
        "state": dict(sorted(entries.items())),
        "param_groups": [group | {"params": list(range(len(ours)))}],
    }


def load_optimizers(
    path: str | Path, generator: FewShotGenerator, discriminator: PatchDiscriminator
) -> dict[str, Any]:
    """optimizer.pt as {"generator": state, "discriminator": state} for
    `torch.optim.RMSprop(network.parameters())`.
    """
    checkpoint = _read(path, ("gen", "dis"))
    _require(path, checkpoint, "gen", "dis")
    return {
        "generator": optimizer_state(checkpoint["gen"], generator, generator_keys(generator), official=True),
        "discriminator": optimizer_state(
            checkpoint["dis"], discriminator, discriminator_keys(discriminator), official=True
        ),
    }


def save_checkpoint(
    folder: str | Path,
    iteration: int,
    generator: FewShotGenerator,
    average: FewShotGenerator,
    discriminator: PatchDiscriminator | None = None,
    optimizers: dict[str, torch.optim.Optimizer] | None = None,
) -> list[Path]:
    """Writes gen_%08d.pt and, where given, dis_%08d.pt and optimizer.pt as the official code reads them.

    `optimizers` is {"generator": ..., "discriminator": ...}. Returns the files written.
    """
    files: dict[str, dict[str, Any]] = {
        f"gen_{iteration:08d}.pt": {
            "gen": generator_weights(generator),
            "gen_test": generator_weights(average),
        }
    }
    if discriminator is not None:
        files[f"dis_{iteration:08d}.pt"] = {"dis": discriminator_weights(discriminator)}
    if optimizers is not None:
        if discriminator is None:
            raise ConfigError("optimizer.pt holds both optimizers: give the discriminator as well.")
        networks = {
            "gen": ("generator", generator, generator_keys(generator)),
            "dis": ("discriminator", discriminator, discriminator_keys(discriminator)),
        }
        files["optimizer.pt"] = {
            official: optimizer_state(optimizers[ours].state_dict(), network, keys, official=False)
            for official, (ours, network, keys) in networks.items()
        }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        torch.save(content, folder / name)
    return [folder / name for name in files]


def _read(path: str | Path, expected: tuple[str, ...]) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no checkpoint {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here; all mean the same to the user
        raise ConfigError(f"The checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(checkpoint, dict) or not any(name in checkpoint for name in expected):
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        wanted = " or ".join(f"'{name}'" for name in expected)
        raise ConfigError(
            f"{path} is no official FUNIT checkpoint of this kind: it has {found}, not {wanted}."
        )
    return checkpoint


def _require(path: str | Path, state: dict[str, Any], *names: str) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        raise ConfigError(f"{path} holds another network than FUNIT's: it has no {', '.join(missing)}.")


def _count(state: Weights, pattern: str) -> int:
    count = 0
    while pattern.format(count) in state:
        count += 1
    return count


def _load(path: str | Path, network: nn.Module, keys: dict[str, str], state: Weights) -> None:
    extra = [n for n in state if n not in set(keys.values()) and ".norm.running_" not in n]
    missing = [n for n in keys.values() if n not in state]
    if extra or missing:
        raise ConfigError(f"{path} does not fit FUNIT's networks: missing {missing}, unknown {extra}.")
    weights = {ours: state[official] for ours, official in keys.items()}
    network.to(next(iter(weights.values())).dtype)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit FUNIT's networks: {error}") from error
