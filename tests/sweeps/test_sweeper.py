"""`python -m lit_gen.train -m hydra/sweeper=optuna`, with trials that train."""

import json
import signal
import subprocess
import sys
import time

import pytest

from lit_gen import runs


def command(folder, *arguments):
    base = [sys.executable, "-m", "lit_gen.train", "-m", "hydra/sweeper=optuna", f"hydra.sweep.dir={folder}"]
    return [*base, "trainer=cpu", "logger=csv", *arguments]


MISTAKES = {
    "model.optimizer.lrr=1,2": "lrr",
    "data.batch_size=64": "Nothing to search",
    "seed=1,2 hydra.sweeper.n_trials=0": "n_trials=0",
    "seed=1,2 hydra.sweeper.trials=3": "trials",
    "seed=interval(1": "seed",
}


@pytest.mark.parametrize(("arguments", "says"), MISTAKES.items(), ids=list(MISTAKES))
def test_mistakes_end_with_one_message(monkeypatch, capfd, tmp_path, arguments, says):
    from lit_gen import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *command(tmp_path / "s", *arguments.split())[3:]])
    with pytest.raises(SystemExit) as end:
        train.main()
    err = capfd.readouterr().err
    assert end.value.code == 2 and says in err and "Traceback" not in err, err
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.slow
def test_a_sweep_killed_while_a_trial_trains_goes_on_with_it(tmp_path, tiny):
    """Kill -9 of the sweeper and, in the second half, of its trial too; then the same command again."""
    folder = tmp_path / "s"
    tiny = [o for o in tiny if not o.startswith(("trainer.max_steps", "callbacks.checkpoint"))]
    arguments = command(
        folder,
        *tiny,
        "trainer.max_steps=60",
        "callbacks.checkpoint.every=5",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.interval=0.1",
        "model.optimizer.lr=tag(log,interval(1e-4,1e-2))",
    )
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 1800
    while not (folder / "1" / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    import os

    os.killpg(process.pid, signal.SIGKILL)  # the sweeper and the trial
    process.wait()
    assert not (folder / "1" / "summary.json").exists()
    lr = runs.saved_config(folder / "1").model.optimizer.lr
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in (folder / "1" / "output.log").read_text()
    record = json.loads((folder / "sweep.json").read_text())
    assert [t["state"] for t in record["trials"]] == ["complete"] * 3
    assert record["trials"][1]["params"]["model.optimizer.lr"] == lr
    assert len({t["params"]["model.optimizer.lr"] for t in record["trials"]}) == 3
    for t in record["trials"]:
        run = folder / str(t["number"])
        assert runs.saved_config(run).model.optimizer.lr == t["params"]["model.optimizer.lr"]
        assert sorted(runs.history(run)["train/loss"])[-1] == 60
        assert json.loads((run / "summary.json").read_text())["fd"] == t["value"]
    assert {"slices.png", "importance.png"} <= {p.name for p in folder.glob("*.png")}


@pytest.mark.slow
def test_a_hopeless_trial_is_stopped_and_a_wrong_one_recorded(tmp_path, tiny):
    folder = tmp_path / "s"
    tiny = [o for o in tiny if not o.startswith(("data.batch_size", "trainer.max_steps"))]
    arguments = command(
        folder,
        *tiny,
        "trainer.max_steps=400",
        "callbacks.quality.every=5",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.interval=0.1",
        "hydra.sweeper.pruner.n_startup_trials=1",
        "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner",
        "~hydra.sweeper.pruner.n_startup_trials",
        "+hydra.sweeper.pruner.upper=0.0",
        "data.batch_size=32,5000",
    )
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=1800)
    record = json.loads((folder / "sweep.json").read_text())
    states = {t["params"]["data.batch_size"]: t for t in record["trials"]}
    assert states["32"]["state"] == "pruned" and states["32"]["intermediate"]
    assert states["5000"]["state"] == "fail" and "exit code 2" in states["5000"]["error"]
    assert "exhausted" in done.stdout
    assert done.returncode == 2 and "None of the 2 trials" in done.stderr
    assert (folder / states["32"]["number"].__str__() / "checkpoints" / "last.ckpt").is_file()
