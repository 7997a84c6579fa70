"""One bar for the whole training: loss, speed, newest scores, time left; and what takes long beside it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lit_gen.callbacks.contracts import base
from lit_gen.module import Results, callbacks_of

__all__ = ["ProgressBar", "working"]


class ProgressBar(Callback):
    """A rich bar on a terminal; elsewhere (log files, notebooks' stdout) a line every `line_seconds`.

    Drawn at most `rate` times a second and from numbers that are logged anyway, so that it costs a step next
    to nothing. Other callbacks show by `working` what they do before, between and after the batches.
    """

    def __init__(self, rate: float = 4.0, line_seconds: float = 15.0):
        self.interval, self.line_seconds = 1 / rate, line_seconds
        self._bar: Progress | None = None
        self._task: TaskID | None = None  # the training's
        self._drawn = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._start_step = base(pl_module).batches_seen
        self._start = self._drawn = time.monotonic()
        self._open()
        if self._bar is not None:
            self._task = self._bar.add_task(
                "training", total=self._total(trainer), completed=self._start_step, numbers=""
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        now = time.monotonic()
        if not trainer.is_global_zero or now - self._drawn < (
            self.interval if self._bar else self.line_seconds
        ):
            return
        self._drawn = now
        module = base(pl_module)
        step, numbers = module.batches_seen, self._numbers(module.results)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            total, pace = self._total(trainer), (step - self._start_step) / (now - self._start)
            left = f"{(total - step) / pace:.0f} s left" if total and pace else ""
            known = ", ".join(text for text in (numbers, left) if text)
            print(f"batch {step}{f' of {total}' if total else ''}{': ' if known else ''}{known}", flush=True)

    @contextmanager
    def work(self, what: str, total: int, announce: bool) -> Iterator[Callable[[int], None]]:
        """See `working`."""
        alone = self._bar is None
        self._open()
        try:
            yield (
                self._line(what, total, announce) if self._bar is None else self._row(self._bar, what, total)
            )
        finally:
            if alone:
                self._close()
            elif self._bar is not None:
                for task in self._bar.task_ids:
                    if task != self._task:
                        self._bar.remove_task(task)

    @staticmethod
    def _row(bar: Progress, what: str, total: int) -> Callable[[int], None]:
        """Advances a second row of the bar."""
        task, start, done = bar.add_task(what, total=total, numbers=""), time.monotonic(), 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            pace = done / max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done, numbers=f"{pace:.3g}/s")

        return advance

    def _line(self, what: str, total: int, announce: bool) -> Callable[[int], None]:
        """Prints a line every `line_seconds`."""
        start = last = time.monotonic()
        done = 0
        if announce:
            print(f"{what}: {total:,}", flush=True)

        def advance(n: int) -> None:
            nonlocal done, last
            done, now = done + n, time.monotonic()
            if now - last < self.line_seconds:
                return
            last, pace = now, done / (now - start)
            left = f", {(total - done) / pace:.0f} s left" if done < total else ""
            print(f"{what}: {done:,} of {total:,}, {pace:.3g}/s{left}", flush=True)

        return advance

    @staticmethod
    def _total(trainer: Trainer) -> int | None:
        return None if trainer.max_steps < 0 else trainer.max_steps * trainer.accumulate_grad_batches

    @staticmethod
    def _numbers(results: Results) -> str:
        scalars = results.logged
        shown = {
            n.removeprefix("train/"): v for n, v in scalars.items() if n.endswith("/loss") and n != "val/loss"
        }
        if (pace := scalars.get("throughput/images_per_second")) is not None:
            shown["img/s"] = pace
        shown |= {name: score.value for name, score in results.scores.items()}
        return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None and self._task is not None:
            module = base(pl_module)
            self._bar.update(self._task, completed=module.batches_seen, numbers=self._numbers(module.results))
        self._close()

    def on_exception(self, *_: Any, **__: Any) -> None:
        self._close()

    def _open(self) -> None:
        """Starts a bar where none is and the output is a terminal."""
        console = Console()
        if self._bar is None and console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            self._bar.start()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


@contextmanager
def working(
    trainer: Trainer, what: str, total: int, announce: bool = True
) -> Iterator[Callable[[int], None]]:
    """Shows work of `total` items, "sampling for fid5k" for one, its pace and the time left, where the
    trainer has a `ProgressBar`, on rank 0 alone: `with working(...) as advance: advance(number of items
    done)`.

    On a terminal it is a row of the bar; elsewhere a line before the first item, unless `announce` is False,
    and one every `line_seconds`.
    """
    bars = callbacks_of(trainer, ProgressBar)
    if not bars or not trainer.is_global_zero:
        yield lambda n: None
    else:
        with bars[0].work(what, total, announce) as advance:
            yield advance
