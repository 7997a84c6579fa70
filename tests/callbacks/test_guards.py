import os
import signal
import threading

import lightning.pytorch as pl
import pytest
import torch

from lit_gen import checkpoints
from lit_gen.callbacks import NaNGuard, NotFiniteError, Stopped
from lit_gen.errors import ConfigError


class Poison(pl.Callback):
    """Makes a weight NaN before the given batch."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, *_):
        if pl_module.batches_seen == self.step - 1:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(torch.nan)


def test_a_nan_stops_with_step_noise_levels_and_last_good_checkpoint(fit, tmp_path):
    with pytest.raises(NotFiniteError) as caught:
        fit(tmp_path, "callbacks.checkpoint.every=5", callbacks=[Poison(8)])
    message = str(caught.value)
    assert "at batch 8 " in message and "noise levels of the batch" in message and "median" in message
    assert str(tmp_path / "checkpoints" / "last.ckpt") in message
    good = checkpoints.read(tmp_path / "checkpoints" / "last.ckpt")
    assert good["batches_seen"] == 5
    assert all(torch.isfinite(w).all() for w in good["state_dict"].values())


def test_where_a_look_would_wait_the_first_bad_batch_is_remembered(fit, tmp_path, monkeypatch):
    """As on a GPU: found late, but before it is saved, and the batch that was bad first is the one named."""
    monkeypatch.setattr(NaNGuard, "_looks_at_once", staticmethod(lambda device: False))
    batches = []
    counter = pl.Callback()
    counter.on_train_batch_start = lambda trainer, module, *_: batches.append(module.batches_seen)
    with pytest.raises(NotFiniteError, match=r"at batch 7 .*noise levels"):
        fit(tmp_path, "callbacks.checkpoint.every=5", callbacks=[Poison(7), counter])
    assert len(batches) == 10
    assert checkpoints.read(tmp_path / "checkpoints" / "last.ckpt")["batches_seen"] == 5


def test_a_nan_in_the_first_batch_says_that_nothing_was_saved(fit, tmp_path):
    with pytest.raises(NotFiniteError, match=r"at batch 1 .* No checkpoint had been saved"):
        fit(tmp_path, callbacks=[Poison(1)])


class Signal(pl.Callback):
    """Sends this process a signal in the middle of the given batch, or during the evaluation after it."""

    def __init__(self, step, signum, evaluation=False):
        self.step, self.signum, self.evaluation = step, signum, evaluation

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.evaluation and pl_module.batches_seen == self.step - 1:
            os.kill(os.getpid(), self.signum)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.evaluation and pl_module.batches_seen == self.step:
            sample = pl_module.sample

            def interrupted(*args, **kwargs):
                os.kill(os.getpid(), self.signum)
                return sample(*args, **kwargs)

            pl_module.sample = interrupted


@pytest.fixture(scope="module")
def undisturbed(fit, tmp_path_factory):
    """The weights of the tiny experiment's end."""
    return fit(tmp_path_factory.mktemp("whole")).module.state_dict()


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("evaluation", [False, True])
def test_signals_save_whole_steps_and_resume_exactly(fit, undisturbed, tmp_path, signum, code, evaluation):
    before = signal.getsignal(signum)
    step = 10 if evaluation else 7
    with pytest.raises(Stopped) as caught:
        fit(tmp_path / "cut", callbacks=[Signal(step, signum, evaluation)])
    assert caught.value.code == code and f"after batch {step}" in str(caught.value)
    assert signal.getsignal(signum) is before
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert checkpoints.read(last)["batches_seen"] == step
    resumed = fit(tmp_path / "rest", checkpoint=last).module.state_dict()
    assert all(torch.equal(undisturbed[k], resumed[k]) for k in undisturbed)


@pytest.mark.parametrize(
    "option", ["callbacks.nan_guard.every=0", "callbacks.checkpoint.every=0", "callbacks.validation.every=0"]
)
def test_impossible_intervals(fit, tmp_path, option):
    with pytest.raises(Exception, match="at least 1 batch") as caught:
        fit(tmp_path, option)
    assert isinstance(caught.value.__cause__, ConfigError)
