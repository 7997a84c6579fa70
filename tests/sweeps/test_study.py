"""Sweeps whose trials are functions: what is suggested, told, recorded, shared and resumed."""

import json
import multiprocessing
import os
import signal
import socket
import time
from functools import partial

import optuna
import pytest

from lit_gen import loggers
from lit_gen.errors import ConfigError
from lit_gen.sweeps import study
from lit_gen.sweeps.space import parse
from lit_gen.sweeps.study import Sweep
from lit_gen.sweeps.summary import summarize
from lit_gen.sweeps.trials import TrialFailed, TrialStopped, intermediate

SPACE = ["x=interval(-2,2)", "y=tag(log,interval(0.01,1))", "z=a,b", "fixed=1"]


def value_of(overrides):
    given = dict(o.split("=") for o in overrides)
    return (float(given["x"]) - 1) ** 2 + float(given["y"]) + (given["z"] == "b")


def quadratic(overrides, folder, **_):
    return value_of(overrides)


def sweep(folder, execute=quadratic, n_trials=12, space=SPACE, **options):
    fixed, axes = parse(space)
    options = {"sampler": partial(optuna.samplers.TPESampler, n_startup_trials=5)} | options
    return Sweep(folder, fixed, axes, n_trials=n_trials, interval=0.01, execute=execute, **options)


def log(folder, values, name="fd_x_0_n9"):
    """As a training logs it, a number a step."""
    loggers.csv(str(folder)).log_metrics({name: values[-1]}, step=len(values))


def test_the_command_line_is_the_space():
    fixed, axes = parse(["a=1,2", "b=int(interval(1,8))", "c=range(0,10,5)", "+d=choice([1,2],[3])", "e=3"])
    assert fixed == ["e=3"]
    found = {axis.key: axis.distribution for axis in axes}
    assert found["a"].choices == ("1", "2")
    assert (found["b"].low, found["b"].high, type(found["b"].low)) == (1, 8, int)
    assert (found["c"].low, found["c"].high, found["c"].step) == (0, 5, 5)
    assert found["+d"].choices == ("[1,2]", "[3]")
    assert [axis.override(v) for axis, v in zip(axes, ["2", 3, 5, "[1,2]"], strict=True)] == [
        "a=2", "b=3", "c=5", "+d=[1,2]",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="Nothing to search"):
        parse(["a=1"])
    with pytest.raises(ConfigError, match=r"tag\(log"):
        parse(["a=tag(log,interval(0,1))"])


def test_it_finds_the_minimum_and_says_how(tmp_path, capsys):
    one = sweep(tmp_path / "s", n_trials=40)
    one.run()
    record = summarize(one)
    assert record == json.loads((tmp_path / "s" / "sweep.json").read_text())
    best = record["best"]
    assert best["value"] == min(t["value"] for t in record["trials"]) < 0.3
    assert best["value"] == pytest.approx(value_of(best["command"].split()[3:]))
    assert best["command"].startswith("python -m lit_gen.train fixed=1 x=")
    assert sum(record["importance"].values()) == pytest.approx(1)
    assert {p.name for p in (tmp_path / "s").glob("*.png")} == {"slices.png", "importance.png"}
    assert best["command"] in capsys.readouterr().out.replace("\n", "")


def test_failed_and_nan_trials_are_recorded_and_end_nothing(tmp_path):
    def execute(overrides, folder, **_):
        kind = int(folder.name) % 4
        if kind == 0:
            raise TrialFailed("exit code 1")
        return {1: float("nan"), 2: None}.get(kind, 1.0)

    one = sweep(tmp_path / "s", execute, n_trials=8)
    one.run()
    record = summarize(one)
    states = [t["state"] for t in record["trials"]]
    assert states == ["fail", "fail", "fail", "complete"] * 2
    errors = [t["error"] for t in record["trials"][:3]]
    assert errors[0] == "exit code 1" and "nan" in errors[1] and "summary.json" in errors[2]
    assert record["best"]["value"] == 1.0


def test_bad_trials_are_pruned_by_their_intermediate_distances(tmp_path):
    def execute(overrides, folder, *, watch, **_):
        bad = float(dict(o.split("=") for o in overrides)["x"]) > 0
        values = []
        for step in range(5):
            values.append((100.0 if bad else 1.0) / (step + 1))
            log(folder, values)
            if watch():
                raise TrialStopped
        return values[-1]

    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    one = sweep(tmp_path / "s", execute, n_trials=12, pruner=pruner)
    one.run()
    pruned = [t for t in one.study.trials if t.state == optuna.trial.TrialState.PRUNED]
    assert pruned and all(t.params["x"] > 0 for t in pruned)
    assert all(len(t.intermediate_values) < 5 for t in pruned)
    kept = [t for t in one.study.trials if t.params["x"] <= 0]
    assert kept and all(list(t.intermediate_values) == [1, 2, 3, 4, 5] for t in kept)


def test_going_on_repeats_no_suggestion(tmp_path):
    for n_trials in (6, 12, 15):
        sweep(tmp_path / "s", n_trials=n_trials).run()
    one = sweep(tmp_path / "s", n_trials=15)
    params = [tuple(t.params.values()) for t in one.study.trials]
    assert len(params) == 15 == len(set(params))
    assert one.run() is one.study and len(one.study.trials) == 15


def test_a_finite_space_is_tried_once(tmp_path, capsys):
    seen = []

    def execute(overrides, folder, **_):
        seen.append(tuple(overrides))
        return float(len(seen))

    sweep(tmp_path / "s", execute, n_trials=50, space=["a=1,2,3", "b=x,y"]).run()
    assert len(seen) == 6 == len(set(seen))
    assert "exhausted" in capsys.readouterr().out


def test_another_space_in_the_same_folder_is_refused(tmp_path):
    sweep(tmp_path / "s", n_trials=2).run()
    with pytest.raises(ConfigError, match=r"another space.*hydra\.sweep\.dir"):
        sweep(tmp_path / "s", space=["x=interval(0,1)", "fixed=1"])
    with pytest.raises(ConfigError, match="another fixed"):
        sweep(tmp_path / "s", space=[*SPACE[:3], "fixed=2"])


def _hanging(overrides, folder, **_):
    (folder / "begun").touch()
    time.sleep(600)


def _whole(folder, execute, n_trials):
    sweep(folder, execute, n_trials=n_trials).run()


def test_a_killed_sweep_goes_on_with_the_same_trial(tmp_path):
    folder = tmp_path / "s"
    sweep(folder, n_trials=3).run()
    process = multiprocessing.get_context("fork").Process(target=_whole, args=(folder, _hanging, 5))
    process.start()
    deadline = time.monotonic() + 1800
    while not (folder / "3" / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = sweep(folder, n_trials=5).study.trials
    assert [t.state.name for t in before] == ["COMPLETE"] * 3 + ["RUNNING"]
    seen = []

    def execute(overrides, where, **_):
        seen.append((where.name, overrides))
        return value_of(overrides[:-1])

    again = sweep(folder, execute, n_trials=5)
    again.run()
    assert [name for name, _ in seen] == ["3", "4"]
    assert seen[0][1] == [*again.overrides(before[3].params), "resume=auto"]
    assert [t.state.name for t in again.study.trials] == ["COMPLETE"] * 5


def test_a_trial_that_ends_while_it_is_looked_at_is_not_run_again(tmp_path, monkeypatch):
    """Another process ends it after its state was read and lets go of its lock."""
    one, other = sweep(tmp_path / "s"), sweep(tmp_path / "s")
    trial = one.study.ask(one.distributions)
    trial.set_user_attr("owner", [socket.gethostname(), os.getpid()])

    def lock(folder):
        one.study.tell(trial, 1.0)
        return open(folder.parent / ".lock", "w")

    monkeypatch.setattr(study, "_lock", lock)
    assert other._orphan() is None


def test_a_trial_that_ended_without_its_sweep_is_not_run_again(tmp_path):
    folder = tmp_path / "s"

    def ends(overrides, where, **_):
        (where / "summary.json").write_text('{"objective": 0.25}')
        raise KeyboardInterrupt  # the sweep dies, the trial's process went on to its end

    with pytest.raises(KeyboardInterrupt):
        sweep(folder, ends, n_trials=1).run()

    def never(*_, **__):
        raise AssertionError

    assert sweep(folder, never, n_trials=1).run().best_value == 0.25


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("fd", "fd_x_n9"), ("map50", "val/map50"), ("top1", "k_shot/top1_k5"), ("val/loss", "val/loss")],
)
def test_the_pruner_sees_the_objective_of_any_system(tmp_path, objective, expected):
    logged = ["fd_x_n9", "se/fd_x_n9", "fd_x_n99", "val/map50", "val/map", "val/loss"]
    logged += ["k_shot/top1_k1", "k_shot/top1_k5", "k_shot/top1_seen_k5"]
    logger = loggers.csv(str(tmp_path))
    for step in (1, 2):
        names = [name for name in logged if step == 1 or name != "fd_x_n99"]
        logger.log_metrics({name: 10.0 * logged.index(name) + step for name in names}, step=step)
    first = 10.0 * logged.index(expected)
    assert intermediate(tmp_path, objective) == {1: first + 1, 2: first + 2}


def _slow(overrides, folder, **_):
    (folder / f"ran{os.getpid()}").touch()
    time.sleep(0.02)
    return value_of(overrides[:-1])


@pytest.mark.parametrize("storage", [None, "sqlite"])
def test_two_machines_share_a_sweep(tmp_path, storage):
    folder = tmp_path / "s"
    url = f"sqlite:///{tmp_path}/study.db" if storage else None
    sweep(folder, n_trials=1, storage=url).run()
    start = multiprocessing.get_context("fork")
    both = [
        start.Process(target=lambda: sweep(folder, _slow, n_trials=14, n_jobs=2, storage=url).run())
        for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(1800)
    assert [process.exitcode for process in both] == [0, 0]
    trials = [
        t for t in sweep(folder, n_trials=1, storage=url).study.trials if "left out" not in t.user_attrs
    ]
    assert len(trials) == 14 and all(t.state.name == "COMPLETE" for t in trials)
    assert len({tuple(t.params.values()) for t in trials}) == 14
    ran = [len(list((folder / str(t.number)).glob("ran*"))) for t in trials[1:]]
    assert ran == [1] * 13
    assert len({p.name for p in folder.glob("*/ran*")}) == 2


def test_a_storage_that_cannot_be_opened_is_named_without_its_password(tmp_path):
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        sweep(tmp_path / "s", storage="nosuchdb://user:secret@host/db")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("options", [{"n_trials": 0}, {"n_jobs": 0}, {"direction": "down"}])
def test_impossible_options(tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        sweep(tmp_path / "s", **options)
