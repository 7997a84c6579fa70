"""Official FUNIT networks (https://github.com/NVlabs/FUNIT), read into ours.

    gen_%08d.pt    {"gen": weights, "gen_test": their moving average}
    dis_%08d.pt    {"dis": weights}

The number in a name is the iteration. The architecture is read off the shapes, so that no configuration need
come along. Nothing in a file is executed.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.funit.networks import FewShotGenerator, PatchDiscriminator
from lit_gen.pretrained import unpickle
from lit_gen.pretrained.keymap import Rule, apply, same

_UNUSED = (".norm.running_mean", ".norm.running_var")  # moments that nothing reads


def rules(network: FewShotGenerator | PatchDiscriminator) -> list[Rule]:
    """Our keys -> the official ones, in the official order."""
    generator = isinstance(network, FewShotGenerator)
    layers = _generator_layers(network) if generator else _discriminator_layers(network)
    names = network.state_dict().keys()
    kinds = [(a, b, kind) for a, b in layers.items() for kind in ("weight", "bias") if f"{a}.{kind}" in names]
    return [(f"{ours}.{kind}", (f"{official}.{kind}",), same) for ours, official, kind in kinds]


def _generator_layers(generator: FewShotGenerator) -> dict[str, str]:
    class_downs, content_downs = generator.class_encoder.downs, generator.content_encoder.downs
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
            for i in range(len(generator.decoder.blocks))
            for k in (0, 1)
        }
    layers |= {f"decoder.up.{i}": f"dec.model.{2 * i + 2}.conv" for i in range(content_downs)}
    layers |= {"decoder.out": f"dec.model.{2 * content_downs + 1}.conv"}
    layers |= {f"mlp.{2 * i}": f"mlp.model.{i}.fc" for i in range((len(generator.mlp) + 1) // 2)}
    return layers


def _discriminator_layers(discriminator: PatchDiscriminator) -> dict[str, str]:
    layers = {"stem": "cnn_f.0.conv"}
    for s in range(len(discriminator.stages)):
        for b in (0, 1):  # two blocks, then a padding and a pooling without parameters
            ours, official = f"stages.{s}.{b}", f"cnn_f.{1 + 4 * s + b}"
            layers |= {f"{ours}.conv0": f"{official}.conv_0.conv", f"{ours}.conv1": f"{official}.conv_1.conv"}
            layers |= {f"{ours}.shortcut": f"{official}.conv_s.conv"}
    return layers | {"head": "cnn_c.0.conv"}


def load_generator(path: str | Path, average: bool = True) -> FewShotGenerator:
    """The generator of gen_*.pt in float32: its moving average, which the paper evaluates, or with
    `average=False` the raw weights.

    Raises ConfigError if the file cannot be read or holds another network.
    """
    checkpoint = _read(path, "gen", "gen_test")
    wanted = "gen_test" if average else "gen"
    if wanted not in checkpoint:
        raise ConfigError(f"{path} holds {sorted(checkpoint)}, no '{wanted}': set average={not average}.")
    state = checkpoint[wanted]
    stem, fc = "enc_content.model.0.conv.weight", "mlp.model.0.fc.weight"
    if missing := [n for n in ("enc_class_model.model.0.conv.weight", stem, fc) if n not in state]:
        raise ConfigError(f"{path} holds another network than FUNIT's: it has no {', '.join(missing)}.")
    generator = FewShotGenerator(
        channels=state[stem].shape[1],
        width=state[stem].shape[0],
        code_size=state[fc].shape[1],
        content_downs=_count(state, "enc_content.model.{}.conv.weight") - 1,
        class_downs=_count(state, "enc_class_model.model.{}.conv.weight") - 1,
        num_res_blocks=_count(state, "dec.model.0.model.{}.model.0.conv.weight"),
        mlp_width=state[fc].shape[0],
        num_mlp_layers=_count(state, "mlp.model.{}.fc.weight"),
    )
    apply(generator, rules(generator), state, "FUNIT", ignore=_UNUSED)
    return generator


def load_discriminator(path: str | Path) -> PatchDiscriminator:
    """The discriminator of dis_*.pt in float32.

    Raises ConfigError if the file cannot be read or holds another network.
    """
    state = _read(path, "dis")["dis"]
    stem, head = "cnn_f.0.conv.weight", "cnn_c.0.conv.weight"
    if missing := [n for n in (stem, head) if n not in state]:
        raise ConfigError(f"{path} holds another network than FUNIT's: it has no {', '.join(missing)}.")
    (width, channels), (num_classes, max_width) = state[stem].shape[:2], state[head].shape[:2]
    blocks = sum(name.endswith("conv_0.conv.weight") for name in state)
    discriminator = PatchDiscriminator(num_classes, channels, width, blocks, max_width)
    apply(discriminator, rules(discriminator), state, "FUNIT")
    return discriminator


def _read(path: str | Path, *entries: str) -> dict[str, Any]:
    """The checkpoint, which has one of the entries."""
    checkpoint = unpickle.load(path)
    if not isinstance(checkpoint, dict) or not set(entries) & checkpoint.keys():
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        wanted = " or ".join(map(repr, entries))
        raise ConfigError(
            f"{path} is no official FUNIT checkpoint of this kind: it has {found}, not {wanted}."
        )
    return checkpoint


def _count(state: dict[str, Tensor], pattern: str) -> int:
    count = 0
    while pattern.format(count) in state:
        count += 1
    return count
