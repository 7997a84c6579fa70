"""A sweep: Optuna is asked for values, a process trains with them, Optuna is told what came of it."""

import fcntl
import itertools
import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import optuna
from optuna.distributions import BaseDistribution, IntDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from lit_gen.errors import ConfigError
from lit_gen.sweeps.space import Axis
from lit_gen.sweeps.storage import agree, claim, counts, host_of, leave_out, open_study
from lit_gen.sweeps.trials import TrialFailed, TrialStopped, intermediate, result, run_trial

ATTEMPTS = 50  # suggestions in a row that were all tried before: the space is exhausted
FINITE = 10_000  # points of a space that is listed

_Claimed = tuple[optuna.Trial, TextIO]  # a trial, and the lock of its folder


class Sweep:
    """`n_trials` trials in `folder`, `n_jobs` at a time; each in `folder/<its number>`.

    The state is in the storage alone (see `storage`; None: `folder/journal.log`): sweeps that are
    started again, also on other machines, continue together until there are `n_trials`. A trial that was
    interrupted resumes from its checkpoint when its sweep is started again on the same machine. Failed and
    NaN trials are recorded as such.

    `sampler(seed=...)` makes Optuna's sampler; the seed differs at every start, so that no start repeats
    another's suggestions, and values that were tried before are not tried again. `objective` is a key of
    summary.json, `watch` the logged score that the pruner sees (see `intermediate`).
    """

    def __init__(
        self,
        folder: Path,
        fixed: Sequence[str],
        axes: Sequence[Axis],
        *,
        n_trials: int,
        sampler: Callable[..., optuna.samplers.BaseSampler],
        pruner: optuna.pruners.BasePruner | None = None,
        n_jobs: int = 1,
        storage: str | None = None,
        objective: str = "objective",
        direction: str = "minimize",
        watch: str = "fd",
        seed: int = 0,
        interval: float = 1.0,
        execute: Callable[..., float | None] = run_trial,
    ):
        if n_trials < 1 or n_jobs < 1:
            raise ConfigError(f"n_trials={n_trials} and n_jobs={n_jobs} must be at least 1.")
        if direction not in ("minimize", "maximize"):
            raise ConfigError(f"direction={direction}: must be minimize or maximize.")
        self.folder, self.fixed, self.axes = folder, list(fixed), list(axes)
        self.n_trials, self.n_jobs, self.interval = n_trials, n_jobs, interval
        self.objective, self.watch, self.execute = objective, watch, execute
        self.distributions = {axis.key: axis.distribution for axis in axes}
        folder.mkdir(parents=True, exist_ok=True)
        self._stop = threading.Event()
        self.study = open_study(storage or str(folder / "journal.log"), folder.name, direction)
        self.study.sampler = sampler(seed=seed + len(self.study.trials))
        self.study.pruner = pruner or optuna.pruners.NopPruner()
        settings = {
            "space": {axis.key: distribution_to_json(axis.distribution) for axis in axes},
            "fixed": self.fixed,
            "objective": objective,
        }
        remedy = (
            f"choose another hydra.sweep.dir than {folder}, or give the same arguments to resume the sweep."
        )
        agree(self.study, settings, remedy)

    def run(self) -> optuna.Study:
        """Ends when there are `n_trials` or the space is exhausted. Interrupted, it ends its trials first:
        they save themselves and resume when the sweep does.
        """
        with ThreadPoolExecutor(self.n_jobs) as pool:
            try:
                workers = [pool.submit(self._work, slot) for slot in range(self.n_jobs)]
                while not all(worker.done() for worker in workers):
                    time.sleep(min(self.interval, 0.2))  # waiting for them would not let a signal in
            finally:
                self._stop.set()
        for worker in workers:
            worker.result()
        return self.study

    def _work(self, slot: int) -> None:
        """Runs trials, one after another, on the GPU of this slot."""
        try:
            while not self._stop.is_set() and (claimed := self._next()) is not None:
                trial, lock = claimed
                with lock:
                    self._run(trial, lock, slot)
        except BaseException:
            self._stop.set()
            raise

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """What to type for these values."""
        return [*self.fixed, *(axis.override(params[axis.key]) for axis in self.axes)]

    def _next(self) -> _Claimed | None:
        """A trial that was interrupted, or a new one; None when there are enough."""
        lock = _lock(self.folder, wait=True)  # one thread of one process of this folder at a time
        assert lock is not None
        with lock:
            return self._orphan() or self._new()

    def _orphan(self) -> _Claimed | None:
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            ours = host_of(trial) == socket.gethostname() and set(trial.params) == set(self.distributions)
            if ours and (lock := _lock(self.folder / str(trial.number))):
                # Whoever had the lock may have ended the trial between our look at its state and the lock.
                if self.study.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING:
                    return optuna.Trial(self.study, trial._trial_id), lock
                lock.close()
        return None

    def _new(self) -> _Claimed | None:
        for _ in range(ATTEMPTS):
            trial = claim(
                self.study, self.n_trials, lambda: [t.number for t in self._counting()], self.distributions
            )
            if trial is None:
                return None
            before = [t for t in self._counting() if t.number < trial.number]
            if all(t.params != trial.params for t in before):
                lock = _lock(self.folder / str(trial.number))
                assert lock is not None, "a new trial's folder is locked by nobody"
                return trial, lock
            leave_out(self.study, trial, "tried before")
            if not self._suggest_untried(before):
                break
        print("All values that are suggested were tried: the space is exhausted.", flush=True)
        return None

    def _suggest_untried(self, before: Sequence[FrozenTrial]) -> bool:
        """Of a finite space, makes the next suggestion one that was not tried; false if there is none."""
        values = [_values(axis.distribution) for axis in self.axes]
        if not all(values) or math.prod(map(len, values)) > FINITE:
            return True
        points = (dict(zip(self.distributions, point, strict=True)) for point in itertools.product(*values))
        tried = [t.params for t in before]
        untried = [point for point in points if point not in tried]
        if untried:
            self.study.enqueue_trial(random.Random(len(before)).choice(untried))
        return bool(untried)

    def _counting(self) -> list[FrozenTrial]:
        return [t for t in self.study.get_trials(deepcopy=False) if counts(t)]

    def _run(self, trial: optuna.Trial, lock: TextIO, slot: int) -> None:
        folder = self.folder / str(trial.number)
        try:
            value = result(folder, self.objective)  # of a trial that ended after its sweep had been killed
            if value is None:
                value = self.execute(
                    # Once a trial has a checkpoint, it resumes from there; before, this begins it.
                    [*self.overrides(trial.params), "resume=auto"],
                    folder,
                    objective=self.objective,
                    watch=self._watch(trial, folder),
                    environment=_environment(slot, self.n_jobs),
                    pass_fds=(lock.fileno(),),
                    interval=self.interval,
                )
            if value is None:
                raise TrialFailed(f"the run has no {self.objective} in its summary.json (metrics=none?)")
            if not math.isfinite(value):
                raise TrialFailed(f"{self.objective} is {value}")
        except (TrialStopped, TrialFailed) as end:
            if self._stop.is_set():
                return  # stays open: the sweep resumes it when it is started again
            if failed := isinstance(end, TrialFailed):
                trial.set_user_attr("error", str(end))
            self._say(self.study.tell(trial, state=TrialState.FAIL if failed else TrialState.PRUNED))
        else:
            self._say(self.study.tell(trial, value))

    def _watch(self, trial: optuna.Trial, folder: Path) -> Callable[[], bool]:
        """Reports what the run has logged since it was asked last; true if the trial should end."""
        told = dict(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)

        def watch() -> bool:
            if self._stop.is_set():
                return True
            for step, value in sorted(intermediate(folder, self.watch).items()):
                if step not in told and math.isfinite(value):
                    told[step] = value
                    trial.report(value, step)
            return bool(told) and trial.should_prune()

        return watch

    def _say(self, trial: FrozenTrial) -> None:
        done = trial.state == TrialState.COMPLETE
        error = trial.user_attrs.get("error")
        try:
            best = f"; the best is {self.study.best_value:.5g} of trial {self.study.best_trial.number}"
        except ValueError:  # none is complete yet
            best = ""
        what = f"{trial.value:.5g}" if done else trial.state.name.lower()
        print(f"trial {trial.number}: {what}{f' ({error})' if error else ''}{best}", flush=True)


def _values(distribution: BaseDistribution) -> Sequence[Any]:
    """All values; none where they are infinitely many."""
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    return getattr(distribution, "choices", ())


def _lock(folder: Path, wait: bool = False) -> TextIO | None:
    """A lock that lasts as long as this process or the trial that inherits it; None if somebody has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")  # noqa: SIM115 (held until the trial ends)
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _environment(slot: int, n_jobs: int) -> dict[str, str]:
    """Of trials that run side by side each sees one GPU, in turn."""
    if n_jobs == 1:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    devices = [device for device in visible.split(",") if device]
    return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
