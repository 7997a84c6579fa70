"""Optuna studies that processes and machines share: open one, agree on it, claim and release its trials.

A storage is the path of a journal file, which many machines may share, or a database's URL that Optuna
knows: sqlite:////absolute/path.db, postgresql://..., mysql://...
"""

import os
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lit_gen.errors import ConfigError

if TYPE_CHECKING:  # Optuna is optional: the policy search works without it
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial


LEFT_OUT = "left out"  # the attribute of a trial that was asked for and never run


def optuna_or_error() -> ModuleType:
    """Optuna, which logs warnings only, and not of what is experimental. Raises ConfigError where it is not
    installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("This search needs Optuna: pip install 'lit-gen[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def open_storage(storage: str) -> "BaseStorage":
    """Optuna's storage of a journal file's path or a URL. Raises ConfigError, without a URL's password."""
    optuna = optuna_or_error()
    try:
        if "://" in storage:
            return optuna.storages.get_storage(storage)
        from optuna.storages.journal import JournalFileBackend

        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(storage))
    except Exception as error:  # the database's own types
        scheme, is_url, _ = storage.partition("://")
        raise ConfigError(
            f"storage={f'{scheme}://...' if is_url else storage} cannot be opened ({type(error).__name__}). "
            "Give the path of a journal file, or a URL: sqlite:////absolute/path.db, postgresql://..."
        ) from error


def open_study(storage: str, name: str, direction: str) -> "Study":
    """The study `name` of the storage, created if it does not exist, to "minimize" or "maximize"."""
    optuna = optuna_or_error()
    return optuna.create_study(
        storage=open_storage(storage), study_name=name, direction=direction, load_if_exists=True
    )


def agree(study: "Study", settings: Mapping[str, Any], remedy: str) -> None:
    """Writes the settings into a new study; raises ConfigError, with `remedy`, where an existing study has
    others."""
    for name, value in settings.items():
        there = study.user_attrs.get(name)
        if there is None:
            study.set_user_attr(name, value)
        elif there != value:
            raise ConfigError(
                f"The study {study.study_name!r} already has another {name}, {there}, not {value}: {remedy}"
            )


def claim(
    study: "Study",
    budget: int,
    counted: Callable[[], Sequence[int]],
    distributions: "dict[str, BaseDistribution] | None" = None,
) -> "Trial | None":
    """A trial that belongs to this process, or None if `budget` trials exist already.

    `counted()` gives the numbers of the trials that the budget counts. Every number is handed out once, so if
    too many processes ask at the same time, those with the last numbers step back.
    """
    if len(counted()) >= budget:
        return None
    trial = study.ask(distributions)
    trial.set_user_attr("owner", [socket.gethostname(), os.getpid()])
    if sum(number < trial.number for number in counted()) < budget:
        return trial
    leave_out(study, trial, "one too many")
    return None


def host_of(trial: "FrozenTrial") -> str | None:
    """The machine that claimed a trial."""
    owner = trial.user_attrs.get("owner")
    return trial.user_attrs.get("host") if owner is None else owner[0]  # "host": in studies of version 0.1


def leave_out(study: "Study", trial: "Trial", reason: str) -> None:
    """Closes a claimed trial that is not run."""
    trial.set_user_attr(LEFT_OUT, reason)
    release(study, trial)


def counts(trial: "FrozenTrial") -> bool:
    """Whether a trial was run or is being run."""
    return LEFT_OUT not in trial.user_attrs


def release(study: "Study", trial: "Trial | int") -> None:
    """Frees the place of a trial that has no result."""
    study.tell(trial, state=optuna_or_error().trial.TrialState.FAIL, skip_if_finished=True)
