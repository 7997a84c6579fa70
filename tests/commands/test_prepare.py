"""`lit-gen prepare`: from any data set to one that trains, or a message."""

import shlex

import pytest
import torch
from hydra import compose, initialize_config_dir

from lit_gen.cli import CONF_DIR
from lit_gen.commands.prepare import prepare
from lit_gen.config import schema
from lit_gen.data.prepared import data_module
from lit_gen.errors import ConfigError
from lit_gen.instantiate import instantiate

pytest.importorskip("litdata")


def config(*overrides, name="prepare"):
    schema.register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(name, list(overrides))


def test_both_splits_are_written_and_train_as_their_source_does(tmp_path, capsys):
    out = f"{tmp_path}/a set"
    prepare(config("data=digits", f"out={out}", "shard_mib=0.02", "workers=1"))
    said = capsys.readouterr().out
    assert "1,437 images, 10 classes" in said and "360 images" in said
    advice = [word for word in shlex.split(said.partition("train on it: ")[2]) if word.startswith("data")]
    assert f"data.path={out}" in advice and "data.image_size=8" in advice
    made = instantiate(config(*advice, name="train").data)
    made.check()
    source = instantiate(config("data=digits", name="train").data)
    batches = zip(made.train_dataloader(), source.train_dataloader(), range(15), strict=False)
    assert all(
        torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"]) for a, b, _ in batches
    )
    with pytest.raises(ConfigError, match="holds these data already"):
        prepare(config("data=digits", f"out={out}", "shard_mib=0.02"))


def test_an_interrupted_command_goes_on(tmp_path, monkeypatch):
    from lit_gen.commands import prepare as command

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    write = command.write_shards
    calls = iter([write, stopped])
    monkeypatch.setattr(command, "write_shards", lambda *a, **k: next(calls)(*a, **k))
    cfg = config("data=digits", f"out={tmp_path}", "workers=0")
    with pytest.raises(KeyboardInterrupt):
        prepare(cfg)
    kept = (tmp_path / "train" / "chunk-0-0.bin").stat().st_mtime_ns
    monkeypatch.undo()
    prepare(cfg)
    assert (tmp_path / "train" / "chunk-0-0.bin").stat().st_mtime_ns == kept
    assert len(data_module(str(tmp_path)).test) == 360


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["format=tar"], "format=tar: must be litdata or zip"),
        (["workers=-1"], "workers=-1: must be auto"),
        (["shard_mib=0"], "shard_mib=0"),
        (["format=zip", "out=s3://bucket/set"], "written to a local folder"),
        (["out=gopher://bucket/set"], "gopher://bucket/set/train: cannot be opened"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        prepare(config("data=digits", f"out={tmp_path}/set", *options))
    assert not (tmp_path / "set").exists()
