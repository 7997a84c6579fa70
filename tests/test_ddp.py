"""Two processes are one: same losses, same distances, same weights; and they resume exactly."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.loops import training_epoch_loop
from PIL import Image
from ranks import trained

from lit_gen import checkpoints, runs

# Whatever draws random numbers in a step; dropout alone draws from each process's own generator.
RANDOM = ["model/augment=edm", "model.net.augment_dim=9", "model.label_dropout=0.2", "model.net.dropout=0"]


def command(*arguments):
    return [sys.executable, "-m", "lit_gen.train", *arguments]


def launch(*arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(folder, name="last"):
    return checkpoints.read(checkpoints.folder(folder) / f"{name}.ckpt")


def logged_once(folder):
    """Whether each loss has one line."""
    lines = [line for line in (folder / "metrics.csv").read_text().splitlines() if ",train/loss," in line]
    return len(lines) == len({line.split(",")[0] for line in lines}) > 0


@pytest.fixture
def two(on_ranks, compose, tiny, tmp_path):
    """The tiny experiment by two gloo processes, 20 steps, saved at 10 and 20."""
    folder, by = tmp_path / "two", ["trainer=ddp_cpu", "logger=csv"]
    on_ranks(2, partial(trained, compose, folder, *tiny, *RANDOM, "callbacks.checkpoint.every=10", by=by))
    return folder


def test_two_processes_equal_one(two, fit, tmp_path):
    one = tmp_path / "one"
    fit(one, *RANDOM)
    a, b = runs.history(one), runs.history(two)
    names = [n for n in a if not n.startswith(("throughput", "memory"))]
    assert {"train/loss", "train/grad_norm", "train/loss_noise_q1", "val/loss"} <= set(names)
    assert any(n.startswith("fd_digits64") for n in names)
    for name in names:
        assert a[name].keys() == b[name].keys(), name
        for step, value in a[name].items():
            assert b[name][step] == pytest.approx(value, rel=2e-5, abs=1e-6), (name, step)
    for key, value in weights(one)["state_dict"].items():
        torch.testing.assert_close(weights(two)["state_dict"][key], value, rtol=1e-4, atol=2e-5)
    assert logged_once(two)  # rank 0 alone logs
    for name in ("grid_0000010.png", "grid_0000020.png"):
        picture, other = (np.asarray(Image.open(run / "grids" / name)).astype(int) for run in (one, two))
        assert np.abs(picture - other).max() <= 1, name


@pytest.mark.slow
def test_more_processes_than_images_to_show_and_to_measure(tiny, fit, tmp_path):
    """A rank without a share neither fails nor keeps the others waiting."""
    few = ["callbacks.grid.num=1", "callbacks.quality.num_images=2", "callbacks.quality.final_images=2"]
    few += ["model.net.dropout=0"]  # the only numbers that a process draws for itself
    few += [
        "trainer.max_steps=2",
        "data.batch_size=126",
        "callbacks.grid.every=1",
        "callbacks.quality.every=1",
    ]
    three = [f"hydra.run.dir={tmp_path / 'three'}", "trainer=ddp_cpu", "trainer.devices=3", "logger=csv"]
    launch(*three, *tiny, *few)
    fit(tmp_path / "one", *few)
    a, b = (runs.history(tmp_path / name) for name in ("one", "three"))
    (name,) = (n for n in a if n.startswith("fd_digits64"))
    assert b[name] == pytest.approx(a[name], rel=1e-2)
    assert b["samples/confident_fraction"] == a["samples/confident_fraction"]
    for step in (1, 2):
        pictures = (tmp_path / run / "grids" / f"grid_{step:07d}.png" for run in ("one", "three"))
        picture, other = (np.asarray(Image.open(path)).astype(int) for path in pictures)
        assert np.abs(picture - other).max() <= 1


def test_ranks_do_not_wait_for_one_another_before_every_batch(monkeypatch, fit, tmp_path):
    """Lightning's question whether a rank got SIGTERM is left out where `Signals` asks it, less often."""
    asked = []
    loop = training_epoch_loop._TrainingEpochLoop
    assert callable(loop._broadcast_sigterm_tensor)  # or Lightning does it otherwise
    monkeypatch.setattr(loop, "_broadcast_sigterm_tensor", lambda self: asked.append(1))
    loops = fit(tmp_path, "trainer.max_steps=1").trainer.fit_loop
    loops.epoch_loop._broadcast_sigterm_tensor()
    assert not asked


@pytest.mark.slow
def test_two_processes_resume_bit_identically(two, tmp_path):
    folder = tmp_path / "again"
    where = checkpoints.folder(folder)
    where.mkdir(parents=True)
    (folder / "config.yaml").write_bytes((two / "config.yaml").read_bytes())
    (where / "last.ckpt").write_bytes((checkpoints.folder(two) / "previous.ckpt").read_bytes())
    assert weights(folder)["batches_seen"] == 10
    launch(f"resume={folder}")
    for key in ("state_dict", "optimizer_states", "callbacks"):
        assert_same(weights(folder)[key], weights(two)[key])


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.slow
def test_multirun_trials_with_ddp_have_one_configuration_each(tmp_path, tiny):
    launch(
        "-m",
        "seed=1,2",
        "trainer=ddp_cpu",
        f"hydra.sweep.dir={tmp_path}",
        *tiny,
        "trainer.max_steps=2",
        "logger=csv",
    )
    for number, seed in enumerate((1, 2)):
        folder = tmp_path / str(number)
        assert runs.saved_config(folder).seed == seed
        assert weights(folder)["batches_seen"] == 2
        assert logged_once(folder)
    a, b = (weights(tmp_path / n)["state_dict"] for n in "01")
    assert not all(torch.equal(a[k], b[k]) for k in a)
    assert not list(tmp_path.glob("*/*/config.yaml"))  # no rank ran a sweep of its own


@pytest.mark.slow
def test_a_failing_trial_does_not_end_the_sweep(tmp_path, tiny):
    tiny = [o for o in tiny if not o.startswith("data.batch_size")]
    options = ["-m", "data.batch_size=5000,64", f"hydra.sweep.dir={tmp_path}", *tiny, "trainer.max_steps=2"]
    sweep = command(*options, "trainer=cpu", "logger=csv")
    done = subprocess.run(sweep, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 1
    assert "exit code 2" in done.stderr and "output.log" in done.stderr
    assert "1437 images" in (tmp_path / "0" / "output.log").read_text()
    assert weights(tmp_path / "1")["batches_seen"] == 2
