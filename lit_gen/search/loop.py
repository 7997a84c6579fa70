"""The search loop: ask a method for policies, train their child models, tell it the rewards, log the trials.

result = run(space, reward, PPO(space, seed=0), budget=300, trial_log="search.jsonl", workers=2)
Path("found.yaml").write_text(result.best.to_yaml(result.summary()))
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lit_gen.errors import ConfigError
from lit_gen.search.methods import Method
from lit_gen.search.space import Choices, Searched, Space

__all__ = ["Result", "Reward", "Trial", "run"]

Reward = Callable[[Searched], float]  # a validation score; may have `images`, how many a child model sees


@dataclass(frozen=True)
class Trial:
    """One child model: its policy's choices, its reward, and what it cost."""

    number: int
    choices: Choices
    reward: float
    cpu_seconds: float
    images: int


@dataclass
class Result:
    """The trials of a search, in order."""

    space: Space
    trials: list[Trial] = field(default_factory=list)

    def top(self, k: int) -> list[Searched]:
        """The k policies of highest reward, best first; the earlier of equals."""
        ranked = sorted(self.trials, key=lambda t: (-t.reward, t.number))
        return [self.space.decode(t.choices) for t in ranked[:k]]

    @property
    def best(self) -> Searched:
        """The policy of highest reward."""
        return self.top(1)[0]

    @property
    def best_reward(self) -> float:
        return max(t.reward for t in self.trials)

    @property
    def cost(self) -> dict[str, float]:
        """Numbers of child models and of images, and CPU seconds."""
        return {
            "child_models": len(self.trials),
            "images": sum(t.images for t in self.trials),
            "cpu_seconds": round(sum(t.cpu_seconds for t in self.trials), 1),
        }

    def summary(self) -> str:
        """For the head of a policy file."""
        cost = ", ".join(f"{k} {v}" for k, v in self.cost.items())
        return f"reward {self.best_reward:.4f}; {cost}"


def run(
    space: Space,
    reward: Reward,
    method: Method,
    budget: int,
    *,
    trial_log: str | Path | None = None,
    description: dict[str, Any] | None = None,
    workers: int = 0,
    progress: str = "",
    on_trial: Callable[[Trial, Result], None] | None = None,
) -> Result:
    """Up to `budget` trials.

    `trial_log` is a file with one line per trial. If it exists, the search resumes there: the method is told
    the old rewards again, so that a killed and restarted search makes the sequence of an uninterrupted one.
    `description` (any JSON; method, seed, data) is written first, and must agree on a restart. `workers`
    processes train the child models of one `ask` in parallel, which changes nothing but the time; then
    `reward` must be picklable. `on_trial` sees every new trial, for logging. `progress` is the title of a
    progress bar. Raises ConfigError for a budget below 1 or a negative number of workers.
    """
    if budget < 1 or workers < 0:
        raise ConfigError(
            f"A search needs a budget of at least 1 and workers >= 0, got {budget} and {workers}."
        )
    old = _open(Path(trial_log), description or {}) if trial_log else []
    result = Result(space)
    with (
        _child_models(reward, workers) as train,
        recording(result, budget, trial_log, progress, on_trial) as record,
    ):
        while len(result.trials) < budget:
            rows = method.ask()
            if not rows:
                break
            asked, rows = rows, rows[: budget - len(result.trials)]
            start = len(result.trials)
            known = old[start : start + len(rows)]
            _agree(known, rows, trial_log)
            for trial in known:
                record(trial, known=True)
            fresh = rows[len(known) :]
            for row, (value, seconds) in zip(fresh, train([space.decode(r) for r in fresh]), strict=True):
                record(Trial(len(result.trials), row, value, seconds, int(getattr(reward, "images", 0))))
            if len(rows) == len(asked):  # a batch cut off by the budget is told when the budget has grown
                method.tell(rows, [t.reward for t in result.trials[start:]])
    return result


@contextmanager
def recording(
    result: Result,
    budget: int,
    trial_log: str | Path | None,
    progress: str,
    on_trial: Callable[[Trial, Result], None] | None,
) -> Iterator[Callable[..., None]]:
    """Yields `record(trial, known=False)`, which adds a trial to the result, shows it, and, unless it was
    known before, writes its line of the trial log (on the disk when this returns) and tells `on_trial`."""
    interval = 0.1 if sys.stdout.isatty() else 15.0
    with tqdm(
        total=budget, desc=progress, disable=not progress, file=sys.stdout, mininterval=interval
    ) as bar:

        def record(trial: Trial, known: bool = False) -> None:
            result.trials.append(trial)
            if trial_log and not known:
                with open(trial_log, "a") as file:
                    file.write(json.dumps(vars(trial)) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            if on_trial and not known:
                on_trial(trial, result)
            bar.set_postfix_str(f"reward {trial.reward:.4f}, best {result.best_reward:.4f}", refresh=False)
            bar.update()

        yield record


def head_of(description: dict[str, Any]) -> str:
    """The first line of a trial log."""
    return json.dumps({"search": description}, sort_keys=True, default=str)


def _open(path: Path, description: dict[str, Any]) -> list[Trial]:
    """The trials of the log; a torn last line, of a search that was killed while writing, is cut off."""
    head = head_of(description)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + "\n")
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    lines = whole.splitlines()
    if not lines or lines[0] != head:
        raise ConfigError(f"{path} is of another search, {(lines or ['empty'])[0]}; name another trial log.")
    records = [json.loads(line) for line in lines[1:]]
    return [Trial(**record | {"choices": tuple(record["choices"])}) for record in records]


def _agree(known: Sequence[Trial], rows: Sequence[Choices], trial_log: str | Path | None) -> None:
    for trial, row in zip(known, rows, strict=False):
        if trial.choices != tuple(row):
            raise ConfigError(
                f"{trial_log}: this method asks for another trial {trial.number}: settings or seed differ."
            )


_reward: Reward | None = None  # of a worker process


def _start_worker(reward: Reward) -> None:
    global _reward
    torch.set_num_threads(1)
    _reward = reward


def _work(policy: Searched) -> tuple[float, float]:
    assert _reward is not None
    return timed(_reward, policy)


def timed(reward: Reward, policy: Searched) -> tuple[float, float]:
    """The reward, and the CPU seconds that it took."""
    start = time.process_time()
    value = float(reward(policy))
    return value, time.process_time() - start


@contextmanager
def _child_models(
    reward: Reward, workers: int
) -> Iterator[Callable[[Sequence[Searched]], Iterator[tuple[float, float]]]]:
    """Yields what gives rewards and CPU seconds of policies, by worker processes if there are any."""
    if not workers:
        yield lambda policies: (timed(reward, p) for p in policies)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (reward,)) as pool:
        yield lambda policies: pool.map(_work, policies)
