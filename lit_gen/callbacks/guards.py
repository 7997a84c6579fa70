"""Ending a training well: not-a-number losses, Ctrl-C, SIGTERM, preemption."""

import os
import signal
import subprocess
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_gen.callbacks.checkpoint import Checkpoint, wait_for_last
from lit_gen.callbacks.contracts import base
from lit_gen.checkpoints import folder
from lit_gen.errors import ConfigError, Exit
from lit_gen.module import BaseModule, callbacks_of

__all__ = ["NaNGuard", "NotFiniteError", "Signals", "Stopped"]


class NotFiniteError(RuntimeError):
    """A loss became NaN or infinite; the message says where and what to resume from."""


class Stopped(Exit):
    """The run was asked to stop and saves its state. `code` is 128 + the signal's number."""

    def __init__(self, signum: int, step: int):
        self.signum = signum
        super().__init__(
            128 + signum,
            f"Stopped by {signal.Signals(signum).name} after batch {step}; "
            "the state is saved, resume=<run folder> goes on.",
        )


class NaNGuard(Callback):
    """Stops when the loss is not finite, naming the batch, what the module showed its guard, and the last
    good checkpoint.

    On a GPU the look costs a synchronisation, so the first bad step is remembered on the device and read
    every `every` batches and before every checkpoint: a bad state is never saved. On a CPU every step is
    looked at.
    """

    def __init__(self, every: int = 50):
        if every < 1:
            raise ConfigError(f"callbacks.nan_guard.every={every}: must be at least 1 batch.")
        self.every = every
        self._bad: dict[str, Tensor] | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        module = base(pl_module)
        step, shown = module.batches_seen, module.nan_context
        if shown is None:
            return
        bad = ~torch.isfinite(shown["loss"]).all()
        if self._looks_at_once(bad.device):
            if bad:
                self._stop(trainer, step, shown)
            return
        now = {"step": torch.full((), step, device=bad.device), **shown}  # filled there: a copy would wait
        if self._bad is None:
            self._bad = {"seen": bad, **{k: v.clone() for k, v in now.items()}}
        else:
            first = bad & ~self._bad["seen"]
            kept = {
                k: torch.where(first, v, self._bad[k]) if v.shape == self._bad[k].shape else v
                for k, v in now.items()
            }
            self._bad = {"seen": self._bad["seen"] | bad, **kept}
        if step % self.every == 0 or self._will_save(trainer, step):
            self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Reads the remembered flag; raises NotFiniteError if it is set."""
        if self._bad is not None and bool(self._bad["seen"]):
            shown = {k: v for k, v in self._bad.items() if k not in ("seen", "step")}
            self._stop(trainer, int(self._bad["step"]), shown)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)

    @staticmethod
    def _looks_at_once(device: torch.device) -> bool:
        return device.type == "cpu"

    @staticmethod
    def _will_save(trainer: Trainer, step: int) -> bool:
        return any(step % c.every == 0 for c in callbacks_of(trainer, Checkpoint))

    @staticmethod
    def _stop(trainer: Trainer, step: int, shown: dict[str, Tensor]) -> None:
        details = "; ".join(f"{name}: {_brief(value)}" for name, value in shown.items())
        wait_for_last(trainer)
        last = folder(trainer.default_root_dir) / "last.ckpt"
        good = f"The last good checkpoint is {last}." if last.exists() else "No checkpoint had been saved."
        clipping = base(trainer.lightning_module).clipping_option
        raise NotFiniteError(
            f"The loss is not finite at batch {step} (rank {trainer.global_rank}). {details}. {good} "
            f"Try a smaller learning rate, gradient clipping ({clipping}=1) "
            "or trainer.precision=32-true."
        )


def _brief(value: Tensor) -> str:
    numbers = value.float().flatten().cpu()
    if numbers.numel() == 1:
        return f"{numbers.item():.4g}"
    broken = int((~torch.isfinite(numbers)).sum())
    text = f"{numbers.min():.4g} to {numbers.max():.4g}, median {numbers.median():.4g}"
    return text + (f" ({broken} of {numbers.numel()} not finite)" if broken else "")


def _nothing() -> None: ...


class Signals(Callback):
    """Ctrl-C, SIGTERM and SIGUSR1 save and end the run; a second Ctrl-C ends it at once.

    A signal within a batch waits for its end, so that what is saved is the state after a whole step; one that
    comes during an evaluation breaks it off. `requeue=True` asks SLURM to queue the job again after SIGUSR1
    or SIGTERM (`scontrol requeue`): use it with `resume=auto`. With several ranks any of them may get the
    signal; they agree by one small reduction every `agree_every` batches and stop after the same one.
    """

    CAUGHT = (signal.SIGINT, signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))

    def __init__(self, requeue: bool = False, agree_every: int = 20):
        if agree_every < 1:
            raise ConfigError(f"callbacks.signals.agree_every={agree_every}: must be at least 1 batch.")
        self.requeue, self.agree_every = requeue, agree_every
        self.received = 0
        self._deferring = False
        self._module: BaseModule | None = None  # in training
        self._before: dict[int, Callable | int | None] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module, self._deferring = base(pl_module), trainer.world_size > 1
        # Lightning has the ranks agree before every batch, which waits for the device. SIGTERM is ours, and
        # they agree below.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing
        # After Lightning has set its own, whose SIGTERM handler talks to other ranks from inside the handler.
        try:
            self._before = {s: signal.signal(s, self._receive) for s in self.CAUGHT}
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            self._before = {}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum
        if not self._deferring and self._module is not None:
            raise Stopped(signum, self._module.batches_seen)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self._deferring = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        step, signum = base(pl_module).batches_seen, self.received
        if trainer.world_size > 1:
            if step % self.agree_every:
                return
            flag = torch.full((), float(signum), device=pl_module.device)
            signum = int(trainer.strategy.reduce(flag, reduce_op="max"))
        if step % trainer.accumulate_grad_batches == 0:
            if signum:
                self._save(trainer)
                raise Stopped(signum, step)
            self._deferring = trainer.world_size > 1

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped):
            if trainer.world_size == 1:
                self._save(trainer)
            if (
                self.requeue
                and exception.signum != signal.SIGINT
                and trainer.is_global_zero
                and "SLURM_JOB_ID" in os.environ
            ):
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)

    @staticmethod
    def _save(trainer: Trainer) -> None:
        for guard in callbacks_of(trainer, NaNGuard):
            guard.check(trainer)
        for saver in callbacks_of(trainer, Checkpoint):
            saver.save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
