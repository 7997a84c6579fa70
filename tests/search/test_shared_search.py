"""One study, several processes: every trial once, no trial lost with its process, books for all."""

import json
import signal
import subprocess
import sys
import time

import pytest

from lit_gen.errors import ConfigError
from lit_gen.search import SyntheticReward, detection_space, run_shared
from lit_gen.sweeps.storage import open_study

optuna = pytest.importorskip("optuna")
SPACE = detection_space(num_sub_policies=2)
SCRIPT = """
import sys, time
from lit_gen.search import SyntheticReward, detection_space, run_shared

class Slow(SyntheticReward):
    def __call__(self, policy):
        time.sleep(float(sys.argv[2]))
        return super().__call__(policy)

space = detection_space(num_sub_policies=2)
random = sys.argv[4] == "random"
print("ready", flush=True)
sys.stdin.readline()
run_shared(space, Slow(space, 2), int(sys.argv[3]), storage=sys.argv[1], random=random, seed=5)
"""


def start(storage, seconds, budget, kind):
    """A process that has imported everything and waits for a line."""
    command = [sys.executable, "-c", SCRIPT, storage, str(seconds), str(budget), kind]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def synthetic():
    return SyntheticReward(SPACE, 2)


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_one_process_alone_is_reproducible_and_resumes(tmp_path, kind):
    """In one go, and in two: the same trials; the trial log has them."""
    given = {"random": kind == "random", "seed": 5}
    whole = run_shared(SPACE, synthetic(), 14, storage=f"{tmp_path}/a/whole.journal", **given)
    storage = f"sqlite:///{tmp_path}/parts.db"
    run_shared(SPACE, synthetic(), 6, storage=storage, **given)
    seen = []
    parts = run_shared(
        SPACE,
        synthetic(),
        14,
        storage=storage,
        trial_log=tmp_path / "l.jsonl",
        on_trial=lambda t, r: seen.append((t, len(r.trials))),
        **given,
    )
    assert [(t.number, t.choices, t.reward) for t in parts.trials] == [
        (t.number, t.choices, t.reward) for t in whole.trials
    ]
    assert seen == [(t, i + 1) for i, t in enumerate(parts.trials)]
    lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()[1:]]
    assert [(t["number"], tuple(t["choices"])) for t in lines] == [
        (t.number, t.choices) for t in whole.trials
    ]
    assert all(t.reward == synthetic()(SPACE.decode(t.choices)) for t in parts.trials)
    assert len({t.choices for t in parts.trials}) == 14


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_processes_share_the_trials(tmp_path, kind):
    """Three processes: the budget exactly, all of them at work, and uniform choices those of one process."""
    storage = f"{tmp_path}/s.journal" if kind == "journal" else f"sqlite:///{tmp_path}/s.db"
    open_study(storage, "search", "maximize")  # the tables, before three processes make them
    processes = [start(storage, 0.2, 20, "random") for _ in range(3)]
    for process in processes:
        go(process)
    assert [process.wait(timeout=1800) for process in processes] == [0, 0, 0]
    trials = run_shared(SPACE, synthetic(), 20, storage=storage, random=True, seed=5).trials
    assert len(trials) == 20
    owners = {tuple(t.user_attrs["owner"]) for t in open_study(storage, "search", "maximize").get_trials()}
    assert len(owners) == 3
    alone = run_shared(
        SPACE, synthetic(), 40, storage=f"{tmp_path}/alone.journal", random=True, seed=5
    ).trials
    by_number = {t.number: t.choices for t in alone}
    assert all(by_number[t.number] == t.choices for t in trials)


@pytest.mark.slow
def test_the_trial_of_a_killed_process_is_done_by_another(tmp_path):
    storage = f"{tmp_path}/s.journal"
    killed, other = start(storage, 30, 5, "random"), start(storage, 0, 5, "random")
    go(killed)
    study = open_study(storage, "search", "maximize")
    while not study.get_trials() or "owner" not in study.get_trials()[0].user_attrs:
        assert killed.poll() is None
        time.sleep(0.05)
    go(other)
    while sum(t.value is not None for t in study.get_trials()) < 4:
        time.sleep(0.05)
    assert other.poll() is None  # it waits for the fifth
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert other.wait(timeout=1800) == 0
    states = [t.state.name for t in study.get_trials()]
    assert sorted(states) == ["COMPLETE"] * 5 + ["FAIL"] and states[0] == "FAIL"


def test_an_error_frees_the_place_of_its_trial(tmp_path):
    storage = f"{tmp_path}/s.journal"

    def broken(policy):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_shared(SPACE, broken, 3, storage=storage)
    assert len(run_shared(SPACE, synthetic(), 3, storage=storage).trials) == 3


def test_one_that_was_taken_for_dead_goes_on(tmp_path):
    """Its trial was closed while it trained: the result is dropped, another trial takes the place."""
    storage, calls = f"{tmp_path}/s.journal", []

    def slow(policy):
        calls.append(policy)
        if len(calls) == 2:
            other = open_study(storage, "search", "maximize")
            other.tell(1, state=optuna.trial.TrialState.FAIL)
        return synthetic()(policy)

    result = run_shared(SPACE, slow, 3, storage=storage)
    assert [t.number for t in result.trials] == [0, 2, 3] and len(calls) == 4


def test_what_does_not_fit_is_refused(tmp_path):
    storage = f"{tmp_path}/s.journal"
    run_shared(SPACE, synthetic(), 2, storage=storage, description={"seed": 1})
    with pytest.raises(ConfigError, match=r"another search, .*choose another name"):
        run_shared(SPACE, synthetic(), 2, storage=storage, description={"seed": 2})
    with pytest.raises(ConfigError, match="budget=0"):
        run_shared(SPACE, synthetic(), 0, storage=storage)
    with pytest.raises(ConfigError, match="cannot be opened"):
        run_shared(SPACE, synthetic(), 2, storage=f"sqlite:///{tmp_path}/no/such/folder/s.db")
    with pytest.raises(ConfigError, match="cannot be opened"):
        run_shared(SPACE, synthetic(), 2, storage="nonsense://x")
