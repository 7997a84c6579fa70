"""One bar for the whole training: loss, speed, newest scores, time left."""

import time
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["ProgressBar"]


class ProgressBar(pl.Callback):
    """A rich bar on a terminal; elsewhere (log files, notebooks' stdout) a line every `line_seconds`.

    Drawn at most `rate` times a second and from numbers that are logged anyway, so that it costs a step next
    to nothing.
    """

    def __init__(self, rate: float = 4.0, line_seconds: float = 15.0):
        self.interval, self.line_seconds = 1 / rate, line_seconds
        self._bar: Progress | None = None
        self._drawn = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._start, self._start_step, self._drawn = (
            time.monotonic(),
            pl_module.batches_seen,
            time.monotonic(),
        )
        self._console = Console()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "training", total=self._total(trainer), completed=self._start_step, numbers=""
            )
            self._bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        now = time.monotonic()
        if not trainer.is_global_zero or now - self._drawn < (
            self.interval if self._bar else self.line_seconds
        ):
            return
        self._drawn = now
        step, numbers = pl_module.batches_seen, self._numbers(pl_module)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            total, pace = self._total(trainer), (step - self._start_step) / (now - self._start)
            left = f", {(total - step) / pace:.0f} s left" if total and pace else ""
            print(f"batch {step}{f' of {total}' if total else ''}: {numbers}{left}", flush=True)

    @staticmethod
    def _total(trainer: pl.Trainer) -> int | None:
        return None if trainer.max_steps < 0 else trainer.max_steps * trainer.accumulate_grad_batches

    @staticmethod
    def _numbers(pl_module: Any) -> str:
        scalars = pl_module.last_scalars
        shown = {
            n.removeprefix("train/"): v for n, v in scalars.items() if n.endswith("/loss") and n != "val/loss"
        }
        shown["img/s"] = scalars.get("throughput/images_per_second")
        shown |= {name: value for name, (_, value) in pl_module.scores.items()}
        return ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=pl_module.batches_seen, numbers=self._numbers(pl_module))
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
