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
from typing import Any

from lit_gen import rng
from lit_gen.errors import ConfigError
from lit_gen.search.loop import Result, Reward, Trial, append, bar, timed
from lit_gen.search.space import Choices, Space

__all__ = ["open_storage", "run_shared"]

POLL = 0.5  # seconds between looks at the study while others train its last children


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
    ledger: str | Path | None = None,
    progress: str = "",
    on_trial: Callable[[Trial, Result], None] | None = None,
) -> Result:
    """The study `name` brought to `budget` trials, together with all processes that run the same.

    `storage` is the path of a journal file (which many machines may share), or a URL that Optuna knows:
    sqlite:////absolute/path.db, postgresql://..., mysql://... Choices are TPE's, or uniform with `random`.
    What a trial draws depends on `seed` and its number, so that one process alone makes the same sequence
    again; of several, TPE's choices depend on which children were through in time, uniform ones on nothing.

    A trial whose process died is given to another: at once on the same machine, after `patience` seconds on
    another one. `ledger` is written anew, from the study; `description` must agree with that of the study;
    `progress` and `on_trial` as in `run`, also for others' trials. Raises ConfigError for a storage that
    cannot be opened and for a study of something else.
    """
    if budget < 1:
        raise ConfigError(f"budget={budget}: must be at least 1.")
    study = _open(storage, name, description or {})
    result, seen = Result(space), set()
    if ledger:
        Path(ledger).parent.mkdir(parents=True, exist_ok=True)
        Path(ledger).write_text(json.dumps({"search": description or {}}, sort_keys=True, default=str) + "\n")
    with bar(progress, budget) as advance:
        while True:
            for trial in _finished(study, seen):
                result.trials.append(trial)
                if ledger:
                    append(Path(ledger), trial)
                if on_trial:
                    on_trial(trial, result)
                advance(result)
            if len(result.trials) >= budget:
                return result
            if (claimed := _claim(study, budget, patience)) is None:
                time.sleep(POLL)
                continue
            _train(study, claimed, space, reward, _sampler(random, seed, claimed.number))


def _train(study: Any, trial: Any, space: Space, reward: Reward, sampler: Any) -> None:
    with _failing(study, trial):
        study.sampler = sampler
        choices = _choices(trial, space)
        value, seconds = timed(reward, space.decode(choices))
        # Finished already: by one who took us for dead. What we have is then of no use.
        with suppress(_optuna().exceptions.UpdateFinishedTrialError):
            trial.set_user_attr("cpu_seconds", seconds)
            trial.set_user_attr("images", int(getattr(reward, "images", 0)))
            study.tell(trial, value, skip_if_finished=True)


def _choices(trial: Any, space: Space) -> Choices:
    return tuple(
        trial.suggest_categorical(f"{i:03d}", list(range(size))) for i, size in enumerate(space.sizes)
    )


@contextmanager
def _failing(study: Any, trial: Any) -> Iterator[None]:
    """An error or Ctrl-C frees the trial's place."""
    try:
        yield
    except BaseException:
        study.tell(trial, state=_optuna().trial.TrialState.FAIL, skip_if_finished=True)
        raise


def _claim(study: Any, budget: int, patience: float) -> Any | None:
    """A trial of ours, unless `budget` trials are done or being done. Numbers are handed out once, so that
    of too many that ask at the same time the last ones step back.
    """
    if len(_counted(study, patience)) >= budget:
        return None
    trial = study.ask()
    trial.set_user_attr("owner", [socket.gethostname(), os.getpid()])
    if sum(number < trial.number for number in _counted(study, patience)) < budget:
        return trial
    study.tell(trial, state=_optuna().trial.TrialState.FAIL)
    return None


def _counted(study: Any, patience: float) -> list[int]:
    """Numbers of the trials that are done or being done; those of dead processes are closed."""
    state = _optuna().trial.TrialState
    numbers = []
    for trial in study.get_trials(deepcopy=False, states=(state.COMPLETE, state.RUNNING)):
        if trial.state == state.RUNNING and _dead(trial, patience):
            study.tell(trial.number, state=state.FAIL, skip_if_finished=True)
        else:
            numbers.append(trial.number)
    return numbers


def _dead(trial: Any, patience: float) -> bool:
    host, process = trial.user_attrs.get("owner", (None, 0))
    if host != socket.gethostname():
        return (datetime.now() - trial.datetime_start).total_seconds() > patience
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, another user's
        return False
    return False


def _finished(study: Any, seen: set[int]) -> Iterator[Trial]:
    """The trials that were finished since the last look, by number."""
    for t in study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.COMPLETE,)):
        if t.number not in seen:
            seen.add(t.number)
            choices = tuple(t.params[key] for key in sorted(t.params))
            yield Trial(t.number, choices, t.value, t.user_attrs["cpu_seconds"], t.user_attrs["images"])


def _sampler(random: bool, seed: int, number: int) -> Any:
    """A trial's own: processes that share a seed would all suggest the same."""
    optuna = _optuna()
    stream = rng.key(seed, "search", "shared", number) % 2**32
    if random:
        return optuna.samplers.RandomSampler(seed=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=stream, constant_liar=True)


def _open(storage: str, name: str, description: dict[str, Any]) -> Any:
    opened = open_storage(storage)
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=opened, study_name=name, direction="maximize", load_if_exists=True)
    text = json.dumps(description, sort_keys=True, default=str)
    if (before := study.user_attrs.get("search", text)) != text:
        raise ConfigError(f"{storage} holds another search by the name {name}, {before}: choose another.")
    study.set_user_attr("search", text)
    return study


def open_storage(storage: str) -> Any:
    """Optuna's storage of a journal file's path or a URL. Raises ConfigError."""
    optuna = _optuna()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if "://" in storage:
                return optuna.storages.get_storage(storage)
            from optuna.storages.journal import JournalFileBackend

            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            return optuna.storages.JournalStorage(JournalFileBackend(storage))
    except Exception as error:  # the database's own types
        raise ConfigError(
            f"storage={storage} cannot be opened ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Give the path of a journal file, or a URL: sqlite:////absolute/path.db, postgresql://..."
        ) from error


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("A shared search needs Optuna: pip install 'lit-gen[search]'.") from None
    return optuna
