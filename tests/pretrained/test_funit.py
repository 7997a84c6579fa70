"""Official checkpoints, through the recorded ones: read, written back, and refused with a reason."""

import json
import os
from pathlib import Path

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.funit.networks import FewShotGenerator, PatchDiscriminator
from lit_gen.pretrained import funit as official

ROOT = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[1] / "goldens") / "funit"
CASES = sorted(p.parent for p in ROOT.glob("*/config.json"))
GENERATORS = [p for case in CASES for p in sorted(case.glob("gen_*.pt"))]
DISCRIMINATORS = [p for case in CASES for p in sorted(case.glob("dis_*.pt"))]

WITH_OPTIMIZERS = [c for c in CASES if list(c.glob("optimizer_*.pt")) and (c / "dis_00000000.pt").is_file()]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def assert_same(written: dict, read: dict) -> None:
    assert list(written) == list(read)
    for key, value in read.items():
        assert torch.equal(written[key], value), key


@pytest.mark.parity
@pytest.mark.parametrize("path", GENERATORS, ids=name)
def test_generator_round_trip(path, tmp_path):
    """Names, order, buffers and values of the file that we write equal those of the file that we read."""
    raw, average = official.load_generator(path, average=False), official.load_generator(path)
    (written,) = official.save_checkpoint(tmp_path, 7, raw, average)
    assert written.name == "gen_00000007.pt"
    ours, theirs = torch.load(written, weights_only=True), torch.load(path, weights_only=True)
    for entry in ("gen", "gen_test"):
        assert_same(ours[entry], theirs[entry])


@pytest.mark.parity
@pytest.mark.parametrize("path", DISCRIMINATORS, ids=name)
def test_discriminator_round_trip(path):
    discriminator = official.load_discriminator(path)
    assert_same(official.discriminator_weights(discriminator), torch.load(path, weights_only=True)["dis"])


def networks() -> tuple[FewShotGenerator, PatchDiscriminator]:
    torch.manual_seed(0)
    generator = FewShotGenerator(
        width=2, code_size=3, content_downs=2, class_downs=3, mlp_width=4, num_mlp_layers=2
    )
    return generator, PatchDiscriminator(3, channels=1, width=2, num_res_blocks=6, max_width=8)


def test_any_architecture_is_read_off_the_shapes(tmp_path):
    """A capped discriminator, one channel, another depth: what was written comes back."""
    generator, discriminator = networks()
    gen, dis = official.save_checkpoint(tmp_path, 0, generator, generator, discriminator)
    for network, again in (
        (generator, official.load_generator(gen)),
        (discriminator, official.load_discriminator(dis)),
    ):
        assert_same(again.state_dict(), network.state_dict())


def test_generator_alone_and_raw_weights(tmp_path):
    """A file without the average says how to read it."""
    generator, _ = networks()
    torch.save({"gen": official.generator_weights(generator)}, tmp_path / "gen.pt")
    assert_same(
        official.load_generator(tmp_path / "gen.pt", average=False).state_dict(), generator.state_dict()
    )
    with pytest.raises(ConfigError, match="no 'gen_test': set average=False"):
        official.load_generator(tmp_path / "gen.pt")


def test_optimizer_state_follows_its_parameters(tmp_path):
    """Every running square, written and read back, belongs to the same parameter; official numbers follow
    official names."""
    generator, discriminator = networks()
    optimizers = {
        "generator": torch.optim.RMSprop(generator.parameters(), lr=0.1),
        "discriminator": torch.optim.RMSprop(discriminator.parameters(), lr=0.2),
    }
    both = dict(zip(optimizers, (generator, discriminator), strict=True))
    for which, optimizer in optimizers.items():
        for i, p in enumerate(both[which].parameters()):
            p.grad = torch.full_like(p, i + 1.0)
        optimizer.step()
    official.save_checkpoint(tmp_path, 1, generator, generator, discriminator, optimizers)
    theirs = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    shapes = [p.shape for n, p in official.generator_weights(generator).items() if "running" not in n]
    assert [theirs["gen"]["state"][i]["square_avg"].shape for i in range(len(shapes))] == shapes
    again = official.load_optimizers(tmp_path / "optimizer.pt", generator, discriminator)
    for which, optimizer in optimizers.items():
        fresh = torch.optim.RMSprop(both[which].parameters())
        fresh.load_state_dict(again[which])
        assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        for p in both[which].parameters():
            assert torch.equal(fresh.state[p]["square_avg"], optimizer.state[p]["square_avg"])


@pytest.mark.parity
@pytest.mark.parametrize("case", WITH_OPTIMIZERS, ids=lambda case: case.name)
def test_official_optimizers_load(case):
    """Official files' states, empty or not, fit our parameters' shapes and keep the case's settings."""
    config = json.loads((case / "config.json").read_text())
    rates = {"generator": config["lr_dis"], "discriminator": config["lr_gen"]}  # swapped there
    generator = official.load_generator(case / "gen_00000000.pt")
    discriminator = official.load_discriminator(case / "dis_00000000.pt")
    for path in sorted(case.glob("optimizer_*.pt")):
        states = official.load_optimizers(path, generator, discriminator)
        for which, network in (("generator", generator), ("discriminator", discriminator)):
            optimizer = torch.optim.RMSprop(network.parameters())
            optimizer.load_state_dict(states[which])
            assert optimizer.param_groups[0]["weight_decay"] == config["weight_decay"]
            assert optimizer.param_groups[0]["lr"] == rates[which]
            for p, state in optimizer.state.items():
                assert state["square_avg"].shape == p.shape


def test_refusals(tmp_path):
    generator, discriminator = networks()
    with pytest.raises(ConfigError, match="There is no checkpoint"):
        official.load_generator(tmp_path / "gen.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ConfigError, match=r"text.pt cannot be read"):
        official.load_generator(tmp_path / "text.pt")
    torch.save({"dis": official.discriminator_weights(discriminator)}, tmp_path / "dis.pt")
    with pytest.raises(ConfigError, match=r"has \['dis'\], not 'gen' or 'gen_test'"):
        official.load_generator(tmp_path / "dis.pt")
    weights = official.generator_weights(generator)
    torch.save({"gen_test": weights | {"extra.weight": torch.zeros(1)}}, tmp_path / "gen.pt")
    with pytest.raises(ConfigError, match=r"unknown \['extra.weight'\]"):
        official.load_generator(tmp_path / "gen.pt")
    torch.save({"gen_test": {"unet.weight": torch.zeros(1)}}, tmp_path / "gen.pt")
    with pytest.raises(ConfigError, match="another network than FUNIT's"):
        official.load_generator(tmp_path / "gen.pt")
    state = torch.optim.RMSprop(discriminator.parameters()).state_dict()
    with pytest.raises(ConfigError, match="FewShotGenerator has"):
        official.optimizer_state(state, generator, official.generator_keys(generator), official=True)
