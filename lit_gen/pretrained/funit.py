"""Official FUNIT generators (https://github.com/NVlabs/FUNIT), read into our network.

    gen_%08d.pt    {"gen": weights, "gen_test": their moving average}

The number in a name is the iteration. The architecture is read off the shapes, so that no configuration need
come along. Nothing in a file is executed.
"""

from pathlib import Path

from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.funit.networks import FewShotGenerator
from lit_gen.pretrained import unpickle
from lit_gen.pretrained.keymap import Rule, apply, same

_UNUSED = (".norm.running_mean", ".norm.running_var")  # moments that nothing reads


def rules(generator: FewShotGenerator) -> list[Rule]:
    """Our keys -> the official ones, in the official order."""
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
    names = generator.state_dict().keys()
    kinds = [(a, b, kind) for a, b in layers.items() for kind in ("weight", "bias") if f"{a}.{kind}" in names]
    return [(f"{ours}.{kind}", (f"{official}.{kind}",), same) for ours, official, kind in kinds]


def load_generator(path: str | Path, average: bool = True) -> FewShotGenerator:
    """The generator of gen_*.pt in float32: its moving average, which the paper evaluates, or with
    `average=False` the raw weights.

    Raises ConfigError if the file cannot be read or holds another network.
    """
    checkpoint = unpickle.load(path)
    if not isinstance(checkpoint, dict) or not {"gen", "gen_test"} & checkpoint.keys():
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ConfigError(
            f"{path} is no official FUNIT checkpoint of this kind: it has {found}, not 'gen' or 'gen_test'."
        )
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


def _count(state: dict[str, Tensor], pattern: str) -> int:
    count = 0
    while pattern.format(count) in state:
        count += 1
    return count
