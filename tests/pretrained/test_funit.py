"""Official generators, through the recorded ones: read, written back, and refused with a reason."""

import os
from pathlib import Path

import pytest
import torch
from official import invert

from lit_gen.errors import ConfigError
from lit_gen.funit.networks import FewShotGenerator
from lit_gen.pretrained.funit import load_generator, rules

ROOT = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[1] / "goldens") / "funit"
GENERATORS = sorted(ROOT.glob("*/gen_*.pt"))


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def assert_same(written: dict, read: dict) -> None:
    assert list(written) == list(read)
    for key, value in read.items():
        assert torch.equal(written[key], value), key


@pytest.mark.parity
@pytest.mark.parametrize("path", GENERATORS, ids=name)
def test_generator_round_trip(path):
    """Names, order and values, written back, equal those of the file, but for its unused moments."""
    file = torch.load(path, weights_only=True)
    for average, entry in ((False, "gen"), (True, "gen_test")):
        generator = load_generator(path, average=average)
        used = {key: value for key, value in file[entry].items() if ".norm.running_" not in key}
        assert_same(invert(generator, rules(generator)), used)


def network() -> FewShotGenerator:
    torch.manual_seed(0)
    return FewShotGenerator(
        channels=1, width=2, code_size=3, content_downs=2, class_downs=3, mlp_width=4, num_mlp_layers=2
    )


def test_any_architecture_is_read_off_the_shapes(tmp_path):
    """One channel, another depth: what was written comes back; a file without the average says how to read
    it.
    """
    generator, file = network(), tmp_path / "gen.pt"
    torch.save({"gen": invert(generator, rules(generator))}, file)
    assert_same(load_generator(file, average=False).state_dict(), generator.state_dict())
    with pytest.raises(ConfigError, match="no 'gen_test': set average=False"):
        load_generator(file)


def test_refusals(tmp_path):
    generator, file = network(), tmp_path / "gen.pt"
    with pytest.raises(ConfigError, match="does not exist"):
        load_generator(file)
    file.write_text("not a checkpoint")
    with pytest.raises(ConfigError, match=r"gen.pt cannot be read"):
        load_generator(file)
    torch.save({"dis": {}}, file)
    with pytest.raises(ConfigError, match=r"has \['dis'\], not 'gen' or 'gen_test'"):
        load_generator(file)
    torch.save({"gen_test": invert(generator, rules(generator)) | {"extra.weight": torch.zeros(1)}}, file)
    with pytest.raises(ConfigError, match=r"has extra\.weight besides"):
        load_generator(file)
    torch.save({"gen_test": {"unet.weight": torch.zeros(1)}}, file)
    with pytest.raises(ConfigError, match="another network than FUNIT's"):
        load_generator(file)
