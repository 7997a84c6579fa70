"""Which checkpoints a run keeps: the last, the one before it, and the best."""

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

from lit_gen.callbacks.contracts import base
from lit_gen.checkpoints import FullySharded, folder, put_in_place
from lit_gen.errors import ConfigError

__all__ = ["Checkpoint"]


class Checkpoint(LightningCheckpoint):
    """Saves `last.ckpt` every `every` batches and at the end, keeps the one before as `previous.ckpt`, and
    copies the best.

    `best.ckpt` is the one with the smallest (`mode="min"`) score named `monitor`
    (`lit_gen.module.Results`), the Frechet distance for one; a checkpoint is saved whenever a new best
    appears. Batches are counted, not optimizer steps. Files are written atomically
    (`lit_gen.checkpoints`).
    """

    def __init__(self, every: int = 1000, monitor: str | None = "fd", mode: str = "min"):
        if every < 1:
            raise ConfigError(f"callbacks.checkpoint.every={every}: must be at least 1 batch.")
        if mode not in ("min", "max"):
            raise ConfigError(f"callbacks.checkpoint.mode={mode!r}: must be min or max.")
        self.every, self.monitor, self.mode = every, monitor, mode
        self.best: float | None = None
        self.best_step: int | None = None
        self._saved_at = -1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        module = base(pl_module)
        step, better = module.batches_seen, False
        score = module.results.scores.get(self.monitor) if self.monitor else None
        if score is not None and score.step == step and self._is_better(score.value):
            self.best, self.best_step, better = score.value, step, True
        if (better or step % self.every == 0) and step % trainer.accumulate_grad_batches == 0:
            self.save(trainer)
            if better:
                self._copy_best(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Writes last.ckpt for the present batch count, once. Every rank must call it."""
        where = folder(trainer.default_root_dir)
        last, previous = where / "last.ckpt", where / "previous.ckpt"
        step = base(trainer.lightning_module).batches_seen
        if step != self._saved_at:
            wait_for_last(trainer)
            if trainer.is_global_zero and last.exists():
                _link(last, previous)
            trainer.save_checkpoint(last)
            self._saved_at = step
        return last

    def _copy_best(self, trainer: Trainer) -> None:
        wait_for_last(trainer)
        if trainer.is_global_zero:
            where = folder(trainer.default_root_dir)
            _link(where / "last.ckpt", where / "best.ckpt")

    def _is_better(self, score: float) -> bool:
        return self.best is None or (score < self.best if self.mode == "min" else score > self.best)


def wait_for_last(trainer: Trainer) -> None:
    """Until last.ckpt is there: a sharded one is written in the background."""
    if isinstance(trainer.strategy, FullySharded):
        trainer.strategy.wait()


def _link(source: Path, target: Path) -> None:
    """Makes target the same file as source, or a folder of the same files, by renaming finished links or
    copies into place."""
    part = target.with_name(f".{target.name}.part")
    if source.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, copy_function=_link_file)
    else:
        part.unlink(missing_ok=True)
        _link_file(source, part)
    put_in_place(part, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
