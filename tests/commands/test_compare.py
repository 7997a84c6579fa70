"""`lit-gen compare`: its numbers are those of each run's own evaluation; its pictures show the same seeds."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lit_gen import figures, runs
from lit_gen.commands import compare as comparing
from lit_gen.commands.evaluate import evaluate
from lit_gen.errors import ConfigError
from lit_gen.evaluation.samples import with_error
from lit_gen.metrics import Estimate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def two(fit, folder, monkeypatch):
    """Two runs that differ by their seed, trained once."""
    monkeypatch.setenv("LITGEN_CACHE", str(folder / "cache"))
    for name, seed in (("one", 0), ("two", 5)):
        if not (folder / name).exists():
            experiment = fit(folder / name, f"seed={seed}")
            saver = next(c for c in experiment.trainer.callbacks if type(c).__name__ == "SaveConfig")
            OmegaConf.save(OmegaConf.create(saver.config), folder / name / "config.yaml")
    return [folder / "one", folder / "two"]


def options(two, out, *more):
    paths = ",".join(map(str, two))
    return [f"runs=[{paths}]", "num=96", "grid=9", "device=cpu", "wandb=offline", f"out={out}", *more]


def test_the_numbers_are_those_of_the_evaluations(two, compose, tmp_path, capsys):
    out = tmp_path / "out"
    record = comparing.compare_runs(compose(*options(two, out), config_name="compare"), out)
    shown = capsys.readouterr().out
    assert record == json.loads((out / "comparison.json").read_text())
    assert list(record["results"]) == ["one", "two"]
    assert record["differences"]["seed"] == {"one": 0, "two": 5}
    assert not [key for key in record["differences"] if key.startswith("logger")]
    for name, run in zip(("one", "two"), two, strict=True):
        where = tmp_path / f"evaluation of {name}"
        cfg = compose(f"run={run}", "num=96", "device=cpu", f"out={where}", config_name="evaluate")
        own = evaluate(cfg, where)
        assert record["results"][name] == own["results"]
        assert with_error(Estimate(own["fd"], own["results"][0]["se"])) in shown
    pictures = [Image.open(out / name) for name in ("curves.png", "grids.png")]
    assert all(p.width > 200 for p in pictures)
    wandb = list(out.glob("wandb/offline-run-*/files/media/**/*.*"))
    assert {p.name.split("_")[0] for p in wandb} == {"grids", "curves", "comparison"}
    with pytest.raises(ConfigError, match="already holds a comparison"):
        comparing.compare_runs(compose(*options(two, out), config_name="compare"), out)


def test_pictures_stand_beside_one_another_unchanged():
    pictures = {
        name: torch.full((3, 30, 40), value, dtype=torch.uint8) for name, value in (("a", 7), ("b", 9))
    }
    sheet = comparing.side_by_side(pictures, pad=5)
    assert (sheet == 7).all(0).sum() >= 1200 and (sheet == 9).all(0).sum() >= 1200
    columns = [(sheet == value).all(0).any(0).nonzero().min().item() for value in (7, 9)]
    assert columns[0] < columns[1]


def test_curves_need_two_points(tmp_path):
    for name, rows in (("a", "0.5,1\n"), ("b", "0.5,1\n0.25,2\n")):
        (tmp_path / name / "csv" / "version_0").mkdir(parents=True)
        (tmp_path / name / "csv" / "version_0" / "metrics.csv").write_text("fd_x_1_n9,step\n" + rows)
    a, b = (runs.history(tmp_path / name) for name in "ab")
    assert figures.distance_curves({"a": a}) is None
    figure = figures.distance_curves({"a": a, "b": b})
    assert figures.save(figure, tmp_path / "c.png") == tmp_path / "c.png"
    assert np.asarray(Image.open(tmp_path / "c.png")).min() < 128


def test_sigmas_are_of_the_difference():
    assert comparing.sigmas(Estimate(1.0, 3.0), Estimate(11.0, 4.0)) == pytest.approx(2.0)
    assert comparing.sigmas(Estimate(1.0, None), Estimate(11.0, 4.0)) is None


def test_names_tell_the_runs_apart(tmp_path):
    a, b = tmp_path / "a" / "1", tmp_path / "b" / "1"
    assert comparing.names_of([a, b]) == ["a/1", "b/1"]
    assert comparing.names_of([a, b.parent / "2"]) == ["1", "2"]
    with pytest.raises(ConfigError, match="named twice"):
        comparing.names_of([a, a])


MISTAKES = {
    "runs=[{one}]": "two run folders or more",
    "runs=[{one},{one}]": "named twice",
    "runs=[{one},{two}] names=[a]": "2 different names",
    "runs=[{one},{two}] measures=[fid]": "no metric 'fid'",
    "runs=[{one},{two}] num=1": "at least 2",
    "runs=[{one},nowhere]": "no checkpoint nowhere",
    "runs=[{one},{other}]": "trained on other data",
}


@pytest.mark.parametrize(("overrides", "says"), MISTAKES.items(), ids=list(MISTAKES))
def test_mistakes_are_named(two, compose, tmp_path, overrides, says):
    other = tmp_path / "other"
    other.mkdir()
    config = OmegaConf.load(two[0] / "config.yaml")
    config.data.test.split = "train"
    OmegaConf.save(config, other / "config.yaml")
    (other / "checkpoints").symlink_to(two[0] / "checkpoints")
    given = overrides.format(one=two[0], two=two[1], other=other).split()
    out = tmp_path / "out"
    cfg = compose(*given, f"out={out}", "device=cpu", config_name="compare")
    with pytest.raises(ConfigError, match=says):
        comparing.compare_runs(cfg, out)
    assert not out.exists()
