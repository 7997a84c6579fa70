"""`lit_gen` as a library gives what the commands give."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lit_gen
from lit_gen import models
from lit_gen.augment import AutoAugment
from lit_gen.commands.evaluate_images import evaluate_images
from lit_gen.commands.sample import sample
from lit_gen.data import digits
from lit_gen.errors import ConfigError
from lit_gen.images import save_png, to_float
from lit_gen.score.restoration import Inpainting, box_mask
from lit_gen.score.samplers import heun

RUN = Path(__file__).parent / "fixtures" / "run_2026_11"


@pytest.fixture(scope="module")
def model():
    return lit_gen.load(RUN, checkpoint="last", device="cpu")


def test_samples_are_those_of_the_command(model, compose, tmp_path):
    options = ["checkpoint=last", "num=5", "sampler=dpm_solver", "sampler.num_steps=3", "format=npz"]
    cfg = compose(f"run={RUN}", *options, "seed=7", "device=cpu", config_name="sample")
    sample(cfg, tmp_path / "out")
    images = model.sample(5, sampler="dpm_solver", num_steps=3, seed=7)
    assert images.dtype == torch.uint8
    written = np.load(tmp_path / "out" / "images.npz")["arr_0"].transpose(0, 3, 1, 2)
    assert np.array_equal(images.numpy(), written)
    assert torch.equal(model.sample([3, 1], sampler="dpm_solver", num_steps=3, seed=7), images[[3, 1]])


def test_a_function_is_a_sampler_too(model):
    expected = model.module.sample(range(2), 0, heun)
    assert torch.equal(model.sample(2, sampler=heun), expected)
    assert torch.equal(model.sample(2, sampler="heun"), expected)
    assert torch.equal(model.sample(2), model.module.sample(range(2)))


def test_restorations_keep_what_was_measured(model):
    images = torch.stack([digits("test")[i]["image"] for i in range(2)])
    operator = Inpainting(box_mask(8, 8, 2, 2, 4, 4))
    measured = operator(to_float(images))
    restored = model.restore(measured, operator, method="repaint", num_steps=2, samples=3, label=4)
    assert restored.shape == (2, 3, 1, 8, 8)
    known = box_mask(8, 8, 2, 2, 4, 4).expand(2, 3, 1, 8, 8)
    difference = (restored.int() - images[:, None].int()).abs()
    assert difference[known].max() <= 1 < difference[~known].max()


def test_a_folder_is_measured_as_by_the_command(compose, tmp_path, monkeypatch):
    monkeypatch.setenv("LITGEN_CACHE", str(tmp_path / "cache"))
    for i in range(60):
        save_png(digits("test")[i]["image"], tmp_path / ("a" if i % 2 else "b") / f"{i}.png")
    options = ["extractor=digits64", "measures=[fd,kd]", "device=cpu"]
    sets = [f"images={tmp_path / 'a'}", f"reference={tmp_path / 'b'}"]
    evaluate_images(compose(*options, *sets, config_name="evaluate_images"), tmp_path / "out")
    recorded = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    found = lit_gen.evaluate_images(
        tmp_path / "a", tmp_path / "b", extractor="digits64", metrics=["fd", "kd"], device="cpu"
    )
    assert {name: estimate.value for name, estimate in found.items()} == {
        entry["key"]: entry["value"] for entry in recorded
    }


def test_pictures_are_augmented():
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8))
    torch.manual_seed(0)
    augmented = AutoAugment("classification_cifar10")(picture)
    assert isinstance(augmented, Image.Image) and augmented.size == (32, 32)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: model.sample(2, sampler="huen"), "sampler='huen': choose among .*heun"),
        (lambda model: model.sample(2, sampler="heun", steps=3), "heun.* has no option 'steps'"),
        (lambda model: model.sample(2, num_steps=3), "num_steps: options go with the name of a sampler"),
        (lambda model: model.sample(2, label=10), "label=10: the model's classes are 0 to 9"),
        (lambda model: model.sample(0), "num=0: give at least one"),
        (lambda model: lit_gen.load("nowhere"), "nowhere"),
        (lambda model: lit_gen.load("x.pkl", model="emd"), "model='emd': choose among .*edm"),
    ],
)
def test_mistakes_are_named(model, call, says):
    with pytest.raises(ConfigError, match=says):
        call(model)


def test_importing_the_package_imports_no_torch():
    code = "import lit_gen, sys; print('torch' in sys.modules, lit_gen.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", lit_gen.__version__]
    assert callable(lit_gen.load) and models.load is not lit_gen.load
