"""The scripts of examples/ run, are below 60 lines, and know no Hydra."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "examples"


def run(monkeypatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(FOLDER / name), run_name="__main__")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_it_is_short_and_plain(path):
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert "hydra" not in text.lower().replace("without lightning or hydra", "")


def test_the_plain_loop_learns_and_samples(monkeypatch, tmp_path, capsys):
    arguments = ("--steps", 20, "--sampler-steps", 2, "--out", tmp_path / "digits.png")
    run(monkeypatch, "train_score_model.py", *arguments)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert Image.open(tmp_path / "digits.png").size > (300, 300)


def test_the_photo_is_restored_better_than_by_its_mean(monkeypatch, tmp_path, capsys):
    """A gray photo, the best constant, has a PSNR of 10 dB."""
    run(monkeypatch, "restore_photo.py", "--size", 48, "--steps", 10, "--out", tmp_path / "restored.png")
    assert float(capsys.readouterr().out.split()[1]) > 18
    assert Image.open(tmp_path / "restored.png").mode == "RGB"


def test_the_detector_trains_on_augmented_scenes(monkeypatch, capsys):
    run(monkeypatch, "detection_augmentation.py", "--images", 8, "--side", 64)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 0"))
    assert line.count("loss") == 4
