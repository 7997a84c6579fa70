"""Engines that start trials elsewhere: each trial is a process that launches its own ranks."""

import importlib.util
import subprocess
import sys

import pytest

from lit_gen import checkpoints, runs
from lit_gen.sweeps import trials

NEEDS_SUBMITIT = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="pip install 'lit-gen[slurm]'"
)


def test_a_trial_knows_nothing_of_the_ranks_around_it(tmp_path, monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    code = "import os, json; print(json.dumps(sorted(os.environ)))"
    monkeypatch.setattr(trials, "TRAIN", (sys.executable, "-c", code))
    assert trials.run_trial([], tmp_path, environment={"MINE": "1"}) is None
    inside = (tmp_path / "output.log").read_text()
    assert '"MINE"' in inside and '"SLURM_JOB_ID"' in inside
    assert not any(name in inside for name in ("LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"))


@pytest.mark.slow
@NEEDS_SUBMITIT
def test_submitit_runs_trials_of_two_ranks(tmp_path, tiny):
    command = [sys.executable, "-m", "lit_gen.train", "-m", "hydra/launcher=submitit_local", "seed=1,2"]
    options = [f"hydra.sweep.dir={tmp_path}", "trainer=ddp_cpu", *tiny, "trainer.max_steps=2", "logger=csv"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    for number, seed in enumerate((1, 2)):
        folder = tmp_path / str(number)
        assert runs.saved_config(folder).seed == seed
        assert checkpoints.read(folder / "checkpoints" / "last.ckpt")["batches_seen"] == 2
        assert (folder / "metrics.csv").read_text().count("step,name,value") == 1


@NEEDS_SUBMITIT
def test_the_slurm_launcher_composes():
    command = [sys.executable, "-m", "lit_gen.train", "hydra/launcher=submitit_slurm"]
    options = ["hydra.launcher.gpus_per_node=8", "--cfg", "hydra", "-p", "hydra.launcher"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "gpus_per_node: 8" in done.stdout and "tasks_per_node: 1" in done.stdout
