"""One search by several processes or machines: its trials are those of an Optuna study in a storage that all
of them reach, a file or a database.

    result = run_shared(space, reward, 300, storage="/shared/search.journal", name="mine")   # in each process

Every process tries one policy at a time until the study has `budget` trials, and all return the same result.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gen import rng
from lit_gen.errors import ConfigError
from lit_gen.search.loop import Result, Reward, Trial, head_of, recording, timed
from lit_gen.search.methods import suggest, tpe_sampler
from lit_gen.search.space import Space
from lit_gen.sweeps.storage import agree, claim, open_study, optuna_or_error, release

__all__ = ["run_shared"]

if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as StudyTrial
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial


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
    result = Result(space)
    if trial_log:
        Path(trial_log).parent.mkdir(parents=True, exist_ok=True)
        Path(trial_log).write_text(head_of(description or {}) + "\n")
    with recording(result, budget, trial_log, progress, on_trial) as record:
        while True:
            for trial in _finished(study, {trial.number for trial in result.trials}):
                record(trial)
            if len(result.trials) >= budget:
                return result
            if (claimed := claim(study, budget, lambda: _counted(study, patience))) is None:
                time.sleep(POLL)
                continue
            _train(study, claimed, space, reward, _sampler(random, seed, claimed.number))


def _train(study: "Study", trial: "StudyTrial", space: Space, reward: Reward, sampler: "BaseSampler") -> None:
    try:
        study.sampler = sampler
        value, seconds = timed(reward, space.decode(suggest(trial, space)))
        # Finished already: by one who took us for dead. What we have is then of no use.
        with suppress(optuna_or_error().exceptions.UpdateFinishedTrialError):
            trial.set_user_attr("cpu_seconds", seconds)
            trial.set_user_attr("images", int(getattr(reward, "images", 0)))
            study.tell(trial, value, skip_if_finished=True)
    except BaseException:  # also Ctrl-C: frees the trial's place
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
    """The finished trials that were not seen before, by number."""
    for t in study.get_trials(deepcopy=False, states=(optuna_or_error().trial.TrialState.COMPLETE,)):
        if t.number not in seen and t.value is not None:
            choices = tuple(t.params[key] for key in sorted(t.params))
            yield Trial(t.number, choices, t.value, t.user_attrs["cpu_seconds"], t.user_attrs["images"])


def _sampler(random: bool, seed: int, number: int) -> "BaseSampler":
    """A trial's own: processes that share a seed would all suggest the same."""
    stream = rng.key(seed, "search", "shared", number) % 2**32
    return optuna_or_error().samplers.RandomSampler(stream) if random else tpe_sampler(stream, several=True)
