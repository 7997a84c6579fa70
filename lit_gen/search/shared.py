"""One search by several processes or machines: its trials are those of an Optuna study in a storage that all
of them reach, a file or a database.

    result = run_shared(space, reward, 300, storage="/shared/search.journal", name="mine")   # in each process

Every process tries one policy at a time until the study has `budget` trials, and all return the same result.
"""

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gen import rng
from lit_gen.errors import ConfigError
from lit_gen.search.loop import Result, Reward, Trial, append, bar, timed
from lit_gen.search.space import Choices, Space
from lit_gen.sweeps.storage import agree, claim, open_study, optuna_or_error, release

if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as StudyTrial
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

__all__ = ["run_shared"]

POLL = 0.5  # seconds between looks at the study while others train its last child models


def run_shared(
    space: Space,
    reward: Reward,
    budget: int,
    *,
    storage: str,
    name: str = "search",
    random: bool = False,
    seed: int = 0,
    description: dict[str, Any] | None = None,
    patience: float = 3600.0,
    trial_log: str | Path | None = None,
    progress: str = "",
    on_trial: Callable[[Trial, Result], None] | None = None,
) -> Result:
    """The study `name` brought to `budget` trials, together with all processes that run the same.

    `storage` is the path of a journal file (which many machines may share), or a URL that Optuna knows:
    sqlite:////absolute/path.db, postgresql://..., mysql://... Choices are TPE's, or uniform with `random`.
    What a trial draws depends on `seed` and its number, so that one process alone makes the same sequence
    again; of several, TPE's choices depend on which child models were done in time, uniform ones on nothing.

    A trial whose process died is given to another: at once on the same machine, after `patience` seconds on
    another one. `trial_log` is written anew, from the study; `description` must agree with that of the study;
    `progress` and `on_trial` as in `run`, also for others' trials. Raises ConfigError for a storage that
    cannot be opened and for a study of something else.
    """
    if budget < 1:
        raise ConfigError(f"budget={budget}: must be at least 1.")
    study = open_study(storage, name, "maximize")
    text = json.dumps(description or {}, sort_keys=True, default=str)
    agree(study, {"search": text}, "choose another name.")
    result, seen = Result(space), set()
    if trial_log:
        Path(trial_log).parent.mkdir(parents=True, exist_ok=True)
        Path(trial_log).write_text(
            json.dumps({"search": description or {}}, sort_keys=True, default=str) + "\n"
        )
    with bar(progress, budget) as advance:
        while True:
            for trial in _finished(study, seen):
                result.trials.append(trial)
                if trial_log:
                    append(Path(trial_log), trial)
                if on_trial:
                    on_trial(trial, result)
                advance(result)
            if len(result.trials) >= budget:
                return result
            if (claimed := claim(study, budget, lambda: _counted(study, patience))) is None:
                time.sleep(POLL)
                continue
            _train(study, claimed, space, reward, _sampler(random, seed, claimed.number))


def _train(study: "Study", trial: "StudyTrial", space: Space, reward: Reward, sampler: "BaseSampler") -> None:
    with _failing(study, trial):
        study.sampler = sampler
        choices = _choices(trial, space)
        value, seconds = timed(reward, space.decode(choices))
        # Finished already: by one who took us for dead. What we have is then of no use.
        with suppress(optuna_or_error().exceptions.UpdateFinishedTrialError):
            trial.set_user_attr("cpu_seconds", seconds)
            trial.set_user_attr("images", int(getattr(reward, "images", 0)))
            study.tell(trial, value, skip_if_finished=True)


def _choices(trial: "StudyTrial", space: Space) -> Choices:
    return tuple(
        trial.suggest_categorical(f"{i:03d}", list(range(size))) for i, size in enumerate(space.sizes)
    )


@contextmanager
def _failing(study: "Study", trial: "StudyTrial") -> Iterator[None]:
    """An error or Ctrl-C frees the trial's place."""
    try:
        yield
    except BaseException:
        release(study, trial)
        raise


def _counted(study: "Study", patience: float) -> list[int]:
    """Numbers of the trials that are done or being done; those of dead processes are closed."""
    state = optuna_or_error().trial.TrialState
    numbers = []
    for trial in study.get_trials(deepcopy=False, states=(state.COMPLETE, state.RUNNING)):
        if trial.state == state.RUNNING and _dead(trial, patience):
            release(study, trial.number)
        else:
            numbers.append(trial.number)
    return numbers


def _dead(trial: "FrozenTrial", patience: float) -> bool:
    host, process = trial.user_attrs.get("owner", (None, 0))
    if host != socket.gethostname():
        start = trial.datetime_start
        return start is not None and (datetime.now() - start).total_seconds() > patience
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, another user's
        return False
    return False


def _finished(study: "Study", seen: set[int]) -> Iterator[Trial]:
    """The trials that were finished since the last look, by number."""
    for t in study.get_trials(deepcopy=False, states=(optuna_or_error().trial.TrialState.COMPLETE,)):
        if t.number not in seen and t.value is not None:
            seen.add(t.number)
            choices = tuple(t.params[key] for key in sorted(t.params))
            yield Trial(t.number, choices, t.value, t.user_attrs["cpu_seconds"], t.user_attrs["images"])


def _sampler(random: bool, seed: int, number: int) -> "BaseSampler":
    """A trial's own: processes that share a seed would all suggest the same."""
    optuna = optuna_or_error()
    stream = rng.key(seed, "search", "shared", number) % 2**32
    if random:
        return optuna.samplers.RandomSampler(seed=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=stream, constant_liar=True)
