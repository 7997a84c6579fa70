"""What a configuration may call, and what it may not."""

import functools
import inspect
import shutil
import sys
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from lit_gen import checkpoints, models
from lit_gen import instantiate as instantiate_module
from lit_gen.cli import entry_point
from lit_gen.commands.train import train
from lit_gen.errors import ConfigError
from lit_gen.instantiate import ALLOWED, MOVED, RENAMED_KEYS, allowing, instantiate, up_to_date

REFUSED = (
    "os.system",
    "builtins.eval",
    "subprocess.run",
    "torch.load",  # torch is not allowed as a whole
    "torch.nnevil.Linear",
    "lit_generous.thing",
    "lightning.fabric.Fabric",
    # through an allowed module to what it has imported
    "lit_gen.cli.os.system",
    "lit_gen.cli.os.getcwd",
    "lit_gen.checkpoints.torch.load",
    "torch.nn.modules.module.torch.load",
    "torchvision.datasets.utils.zipfile.ZipFile",
)


@pytest.mark.parametrize("target", REFUSED)
@pytest.mark.parametrize(
    "nest",
    [
        lambda node: node,
        lambda node: {"_target_": "torch.nn.Identity", "option": node},
        lambda node: {"_target_": "torch.nn.Identity", "option": node | {"_partial_": True}},
        lambda node: {"options": [[{"deep": node}]]},
        lambda node: OmegaConf.create({"name": node["_target_"], "it": {"_target_": "${name}"}}),
    ],
    ids=["itself", "an_argument", "a_partial", "in_lists", "interpolated"],
)
def test_a_target_outside_the_list_is_refused_wherever_it_stands(target, nest):
    node = nest({"_target_": target})
    with pytest.raises(ConfigError, match=rf"_target_ '{target}' is outside .*add allow_targets=\["):
        instantiate(node)


def test_nothing_is_called_before_every_target_has_been_looked_at(monkeypatch):
    made = []
    monkeypatch.setattr(torch.nn.Identity, "__init__", lambda self, *a, **k: made.append(1))
    with pytest.raises(ConfigError):
        instantiate({"a": {"_target_": "torch.nn.Identity"}, "b": {"_target_": "os.getcwd"}})
    assert made == []


def test_what_a_user_trusts_is_called(monkeypatch):
    node = {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 2}
    with pytest.raises(ConfigError):
        instantiate(node)
    with allowing(["decimal."]), allowing(["fractions."]):
        assert instantiate(node) == 0.5
    with pytest.raises(ConfigError):  # it ends with the block
        instantiate(node)
    monkeypatch.setenv("LITGEN_ALLOW_TARGETS", "fractions.,decimal.")
    assert instantiate(node) == 0.5


def test_a_run_folder_allows_itself_nothing(compose, tmp_path):
    """Its saved `allow_targets` was the wish of whoever made it, not of whoever resumes or samples it."""
    old = Path(shutil.copytree(Path(__file__).parent / "fixtures" / "run_2026_11", tmp_path / "run"))
    config = OmegaConf.load(old / "config.yaml")
    config.allow_targets = ["fractions."]
    config.model.process = {"_target_": "fractions.Fraction"}
    OmegaConf.save(config, old / "config.yaml")
    with pytest.raises(ConfigError, match="Fraction' is outside"):
        models.load(old, device="cpu")
    checkpoint = checkpoints.read(old / "checkpoints" / "last.ckpt")
    checkpoint["config"]["model"]["process"] = {"_target_": "fractions.Fraction"}
    torch.save(checkpoint, old / "checkpoints" / "last.ckpt")
    with pytest.raises(ConfigError, match="Fraction' is outside"):
        train(compose(f"resume={old}"), old, [f"resume={old}"])


def test_what_a_command_line_allows_holds_while_the_command_runs(monkeypatch, tmp_path):
    found = []
    node = {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 2}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "run=none", "std=0.1", "+allow_targets=[fractions.]"])
    entry_point("average")(lambda cfg: found.append(instantiate(node)))()
    assert found == [0.5]
    with pytest.raises(ConfigError, match="outside"):
        instantiate(node)


def test_the_packages_of_the_list_are_called():
    for target, kind in {
        "torch.nn.Linear": torch.nn.Linear,
        "torch.optim.Adam": functools.partial,
        "torchvision.models.resnet18": functools.partial,
        "torchvision.transforms.v2.RandomHorizontalFlip": functools.partial,
        "lightning.pytorch.plugins.environments.SLURMEnvironment": functools.partial,
        "lit_gen.schedules.warmup": functools.partial,
    }.items():
        options = {"in_features": 1, "out_features": 1} if kind is torch.nn.Linear else {"_partial_": True}
        assert isinstance(instantiate({"a": {"_target_": target} | options})["a"], kind)


def test_options_that_a_partial_does_not_have_are_refused_at_once():
    node = {"schedule": {"_target_": "lit_gen.schedules.warmup", "_partial_": True, "step_count": 3}}
    with pytest.raises(ConfigError, match=r"schedule: warmup has no option 'step_count'"):
        instantiate(node)


def test_a_nested_partial_is_a_plain_one():
    """Hydra's own looks its target up again at every call."""
    node = {"schedule": {"_target_": "lit_gen.schedules.warmup", "_partial_": True, "steps": 4}}
    schedule = instantiate(node)["schedule"]
    assert type(schedule) is functools.partial and schedule(0) == 0.25


def test_targets_of_earlier_versions_are_found():
    for new in MOVED.values():
        assert new.startswith(ALLOWED)
        assert hydra.utils.get_object(new.rstrip("."))


def test_options_of_earlier_versions_are_found(monkeypatch):
    keys = {"lit_gen.schedules.warmup": {"length": "steps"}}
    monkeypatch.setattr(instantiate_module, "RENAMED_KEYS", keys)
    node = {"_target_": "lit_gen.schedules.warmup", "_partial_": True, "length": 4}
    assert instantiate({"lr": [node]})["lr"][0](0) == 0.25
    assert up_to_date(node) == {"_target_": "lit_gen.schedules.warmup", "_partial_": True, "steps": 4}
    assert up_to_date({"length": 4}) == {"length": 4}  # of another target
    with pytest.raises(ConfigError, match="no option 'length'"):  # none is dropped
        instantiate({"lr": node | {"steps": 4}})


def test_every_renamed_option_is_one_of_today():
    for prefix, keys in RENAMED_KEYS.items():
        home = hydra.utils.get_object(prefix.rstrip("."))
        targets = [home]
        if not callable(home):  # a module
            own = [f for f in vars(home).values() if getattr(f, "__module__", None) == home.__name__]
            targets = [f for f in own if callable(f)]
        options = {name for target in targets for name in inspect.signature(target).parameters}
        assert set(keys.values()) <= options
