"""experiment=images: what is told from the data and the device is in the configuration that a run saves."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_gen import runs, train
from lit_gen.__main__ import main as lit_gen
from lit_gen.config import fitting
from lit_gen.errors import ConfigError
from lit_gen.instantiate import config_dict

SHORT = [
    "trainer.max_steps=2",
    "sampler.num_steps=2",
    "callbacks.grid.num=2",
    "callbacks.grid.trajectories=1",
]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 18, 24, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path):
    """No weights but those that a test puts there, and nothing remembered of other tests."""
    for function in (fitting._survey, fitting._gpu_gib, fitting._no_inception):
        function.cache_clear()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no net")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("LITGEN_WEIGHTS", raising=False)


def call(main, *arguments) -> int:
    before, sys.argv = sys.argv, ["lit-gen", *map(str, arguments)]
    try:
        main()
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before


def test_a_prepared_set_is_trained_on_without_a_survey(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos.parent)
    options = ["data.path=photos", "data.image_size=[8,12]"]
    assert call(lit_gen, "prepare", "data=images", *options, "out=set", "workers=1") == 0
    options = ["data=prepared", "data.path=set", "data.image_size=[8,12]", "data.batch_size=4"]
    assert call(train.main, "experiment=images", *options, "logger=csv", "trainer=cpu", *SHORT) == 0
    out = capsys.readouterr().out
    assert "Images of 8x12 are trained on a CPU" in out and "40 color" not in out


def test_one_line_trains_and_samples(photos, monkeypatch, capsys, caplog):
    monkeypatch.chdir(photos.parent)
    assert call(train.main, "experiment=images", "data.path=photos", "logger=csv", "trainer=cpu", *SHORT) == 0
    out = capsys.readouterr().out
    assert "photos: 40 color images, most of them 18x24" in out and "of 16x24 are trained on a CPU" in out
    (folder,) = Path("runs/images").iterdir()
    saved = runs.saved_config(folder)
    assert list(saved.data.image_size) == [16, 24] and saved.data.batch_size == 32
    assert saved.metrics.objective == "val/loss" and "quality" not in saved.callbacks
    assert saved.trainer.max_steps == 2 and json.loads((folder / "summary.json").read_text())["steps"] == 2
    assert call(lit_gen, "sample", f"run={folder}", "num=2", "out=samples", "format=png") == 0
    assert {Image.open(p).size for p in Path("samples").rglob("0*.png")} == {(24, 16)}


def test_the_configuration_on_a_cpu_and_on_a_gpu(compose, photos, monkeypatch):
    def model(*overrides):
        cfg = compose("experiment=images", f"data.path={photos}", *overrides)
        return config_dict(cfg.data), config_dict(cfg.model)["net"], cfg

    data, net, _ = model("trainer.accelerator=cpu")
    assert (data["image_size"], net["base_channels"], net["channel_mult"]) == ([16, 24], 32, [1, 2, 2])
    data, net, _ = model("trainer.accelerator=cpu", "data.image_size=16", "data.batch_size=3")
    assert (data["image_size"], data["batch_size"], net["image_size"]) == (16, 3, 16)
    monkeypatch.setattr(fitting, "_gpu_gib", lambda accelerator: 80.0)
    data, net, cfg = model("data.image_size=64")
    assert (net["base_channels"], net["channel_mult"], net["attention_resolutions"]) == (
        128,
        [1, 2, 2, 2],
        [16, 8],
    )
    assert data["batch_size"] == 32 and cfg.trainer.max_steps == 100_000  # of 40 images


@pytest.mark.parametrize(("gib", "size", "batch"), [(80, 64, 256), (16, 64, 32), (80, 32, 256), (8, 256, 1)])
def test_the_batch_fits_the_memory(monkeypatch, gib, size, batch):
    monkeypatch.setattr(fitting, "_gpu_gib", lambda accelerator: gib)
    assert fitting._batch_size(size, "auto", 10**6) == batch
    assert fitting._batch_size(size, "auto", 5) == min(batch, 4)


def test_fid_where_the_weights_are_given(compose, photos, tmp_path):
    (tmp_path / "inception.pth").write_bytes(b"weights")
    with_weights = [f"data.path={photos}", f"metrics.extractor.weights={tmp_path / 'inception.pth'}"]
    cfg = compose("experiment=images", *with_weights)
    assert (cfg.metrics.objective, cfg.callbacks.quality._target_) == (
        "fd",
        "lit_gen.callbacks.SampleQuality",
    )
    cfg = compose("experiment=images", *with_weights, "data.channels=5")
    assert (cfg.metrics.objective, cfg.callbacks.quality._target_) == ("val/loss", None)
    assert (
        compose("experiment=images", f"data.path={photos}", "metrics=none").callbacks.quality._target_ is None
    )
    with pytest.raises(ConfigError, match="is no file"):
        fitting.with_inception(3, "uint8", "nowhere.pth", 1, 2)


def test_other_commands_read_the_data_so(compose, photos):
    cfg = compose("data=images", f"data.path={photos}", config_name="preview")
    assert config_dict(cfg.data)["image_size"] == [16, 24]


def test_mistakes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(train.main, "experiment=images") == 2
    assert "data.path is missing" in capsys.readouterr().err
    assert call(train.main, "experiment=images", "data.path=nowhere") == 2
    assert "nowhere: no such folder or zip file" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if p.name != "torch"]
