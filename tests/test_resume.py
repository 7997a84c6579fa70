"""A resumed run ends bit-identical to one that was never stopped."""

import multiprocessing
import shutil

import lightning.pytorch as pl
import pytest
import torch

from lit_gen import checkpoints, runs

# 1,437 images in batches of 128: step 12 begins the second epoch
MID_EPOCH, AFTER_EVALUATION, EPOCH_END = 6, 10, 12


class KeepAt(pl.Callback):
    """Saves a checkpoint of its own at the given steps."""

    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, pl_module, *_):
        pass

    def on_train_batch_start(self, trainer, pl_module, *_):
        # The state before batch k + 1 is the state after batch k, with all callbacks done.
        if pl_module.batches_seen in self.steps:
            source = checkpoints.folder(trainer.default_root_dir) / "last.ckpt"
            if torch.load(source, weights_only=True)["batches_seen"] == pl_module.batches_seen:
                shutil.copy(source, self.folder / f"{pl_module.batches_seen}.ckpt")


def assert_same(a, b, at="checkpoint"):
    """Every tensor, number and string in two nested containers is the same."""
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for k in a:
            assert_same(a[k], b[k], f"{at}.{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    else:
        assert a == b or (a != a and b != b), f"{at}: {a} != {b}"


def state(folder):
    checkpoint = checkpoints.read(checkpoints.folder(folder) / "last.ckpt")
    kept = (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "callbacks",
        "batches_seen",
        "global_step",
        "config",
    )
    return {k: checkpoint[k] for k in kept}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_is_bit_identical(fit, tmp_path, workers):
    options = [f"data.num_workers={workers}", "callbacks.checkpoint.every=2"]
    steps = (MID_EPOCH, AFTER_EVALUATION, EPOCH_END)
    kept = tmp_path / "kept"
    kept.mkdir()
    fit(tmp_path / "whole", *options, callbacks=[KeepAt(kept, steps)])
    expected, numbers = state(tmp_path / "whole"), runs.history(tmp_path / "whole")
    assert expected["batches_seen"] == 20
    for step in steps:
        folder = tmp_path / f"from{step}"
        fit(folder, *options, f"logger.csv.save_dir={folder}", checkpoint=kept / f"{step}.ckpt")
        found = state(folder)
        found["config"] = expected["config"]  # the folder's name
        assert_same(found, expected)
        for name in ("train/loss", "val/loss", "train/grad_norm"):
            later = {k: v for k, v in numbers[name].items() if k > step}
            assert runs.history(folder)[name] == later, (step, name)


def test_accumulated_gradients_resume_too(fit, tmp_path):
    options = ["trainer.accumulate_grad_batches=2", "trainer.max_steps=6", "callbacks.checkpoint.every=4"]
    kept = tmp_path / "kept"
    kept.mkdir()
    fit(tmp_path / "whole", *options, callbacks=[KeepAt(kept, (4, 8))])
    expected = state(tmp_path / "whole")
    assert (expected["batches_seen"], expected["global_step"]) == (12, 6)
    for step in (4, 8):
        fit(tmp_path / f"from{step}", *options, checkpoint=kept / f"{step}.ckpt")
        found = state(tmp_path / f"from{step}")
        found["config"] = expected["config"]
        assert_same(found, expected)


def _write_for_ever(path):
    while True:
        for letter in "ab":
            runs.write_whole(path, letter * 10**6)


def test_a_kill_leaves_the_configuration_whole(tmp_path):
    """Every launch of a run writes config.yaml anew; what a resumed run reads must not be half of it."""
    path = tmp_path / "config.yaml"
    runs.write_whole(path, "a" * 10**6)
    for _ in range(5):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(path,))
        before = path.stat().st_ino
        writer.start()
        while path.stat().st_ino == before:
            assert writer.is_alive()
        writer.kill()
        writer.join()
        assert path.read_text() in ("a" * 10**6, "b" * 10**6)
