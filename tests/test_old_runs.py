"""A run folder and checkpoint written by lit_gen 0.1.0 in November 2026 still load, sample, and resume.

`fixtures/run_2026_11` was made by `python -m lit_gen.train` with a network of a few thousand weights and 4
steps; `expected_images.npz` holds the images 0 to 3 of seed 0 that the code of that day sampled from it.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lit_gen import models, runs, train
from lit_gen.commands.evaluate import evaluate

OLD = Path(__file__).parent / "fixtures" / "run_2026_11"


@pytest.fixture
def old(tmp_path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def test_it_samples_the_same_images(old):
    module, _, path = models.load(old, checkpoint="last", device="cpu")
    assert path.name == "last.ckpt"
    images = module.sample(range(4), seed=0).permute(0, 2, 3, 1).numpy()
    expected = np.load(old / "expected_images.npz")["arr_0"]
    assert np.abs(images.astype(int) - expected).max() <= 1  # another CPU may round otherwise


def test_a_checkpoint_alone_is_enough(old):
    module, _, _ = models.load(old / "checkpoints" / "last.ckpt", device="cpu")
    assert module.image_shape == (1, 8, 8)


def test_its_numbers_are_read(old):
    assert runs.history(old)["train/loss"][4] == pytest.approx(1.1517, abs=1e-3)


def test_it_is_evaluated_by_the_extractor_that_it_was_trained_with(old, compose):
    cfg = compose(f"run={old}", "num=16", "checkpoint=last", f"out={old / 'e'}", config_name="evaluate")
    record = evaluate(cfg, old / "e")
    assert record["key"].startswith("fd_digits64_") and "confident_fraction" in record
    assert runs.saved_config(old).metrics.objective == "fd"


def test_it_resumes(old, command):
    changes = ["trainer.max_steps=6", "callbacks.quality.final_images=32", f"logger.csv.save_dir={old}"]
    code, _, err = command(train.main, f"resume={old}", *changes)
    assert code == 0, err
    losses = runs.history(old)["train/loss"]
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
