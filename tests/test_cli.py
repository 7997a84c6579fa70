"""What a user sees who types something wrong: one message, exit code 2, nothing written."""

import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from lit_gen import checkpoints, runs, train
from lit_gen.__main__ import COMMANDS
from lit_gen.commands import evaluate, sample

MISTAKES = {
    "experiment=nope": "Available options in 'experiment':",
    "data=nope": "Available options in 'data':",
    "trainer.max_steps=abc": "could not be converted to Integer",
    "trainer.max_stesp=3": "trainer.max_stesp",
    "trainer.max_steps=0": "at least 1",
    "data.batch_size=5000": "1437 images",
    "data.num_workers=-1": "0 (load in the main process)",
    "data.image_size=10": "image_size 8",
    "model.net.channel_mult=[1,1,1,1,1,1]": "8",
    "callbacks.ema.decay=2": "[0, 1)",
    "model.label_dropout=1.5": "probability",
    "+model.net.bogus=1": "has no option 'bogus'",
    "model=vp": "experiment of that family",
    "model.process._target_=os.system": "allow_targets",
    "resume=nowhere/at/all": "no run folder",
    "seed=[": "seed",
    "callbacks/averages=[power]": "callbacks.ema={'decay': 0.999} names no class",
    "data=folder": "data.train.path is missing: give data.train.path=...",
    "data=bccd": "model.net.channels takes its value from there",
    "data=cifar10": "data.train: the images could not be found or downloaded",
    "data=glyphs": "needs image, label in a batch; the data, a FewShotDataModule, give",
    "experiment=funit_glyphs metrics=digits": "SampleQuality) calls check, sample, sampler_name of the model",
    "experiment=digits_edm sampler=pc sampler.S_churn=1": "Could not override 'sampler.S_churn'",
    "experiment=digits_ncsnv2 sampler=pc": "predictor_corrector has no option 'step_size'",
    "sampler=langevin": "step_size must be between",
    "sampler/grid=uniform_steps": "needs a DiscreteVP process, not EDM",
    "experiment=detector_scenes augment=flip": "Flip changes images alone",
    "~sampler": "needs a sampler",
    "sampler=null": "leave the group out (~group)",
    "callbacks.grid=5": "callbacks.grid=5 names no class",
}


@pytest.mark.parametrize(("mistake", "says"), MISTAKES.items(), ids=list(MISTAKES))
def test_mistakes_end_with_one_message(command, tmp_path, mistake, says):
    code, _, err = command(train.main, "trainer=cpu", *mistake.split())
    assert code == 2
    assert says in err
    assert "Traceback" not in err and "Error executing job" not in err
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("config.yaml"))


def test_an_existing_run_is_not_overwritten(command, tmp_path, tiny):
    folder = f"hydra.run.dir={tmp_path}/run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0")
    code, _, err = command(train.main, folder, *tiny)
    assert code == 2 and f"resume={tmp_path}/run" in err
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 0"


def test_a_folder_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command(train.main, f"hydra.run.dir={tmp_path}/file/run")
    assert code != 0 and "file/run" in err


@pytest.mark.parametrize("main", [sample.main, evaluate.main])
def test_a_run_is_needed(command, main):
    code, _, err = command(main)
    assert code == 2 and "run" in err and "Traceback" not in err


def test_help_helps(command, listed_once):
    code, out, _ = command(train.main, "--help")
    assert code == 0
    assert "experiment=NAME" in out and "trainer: auto" in out and "resume=" in out


@pytest.fixture(scope="module")
def listed_once():
    """Hydra looks for the options of all groups, the same for every command, and copies its configuration at
    each: seconds for a help text."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("list_groups", "get_group_options"):
            found, method = {}, getattr(ConfigLoaderImpl, name)

            def kept(self, *arguments, _found=found, _method=method, **more):
                key = arguments, *more.values()
                if key not in _found:
                    _found[key] = _method(self, *arguments, **more)
                return _found[key]

            patch.setattr(ConfigLoaderImpl, name, kept)
        yield


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"train"}))
def test_every_command_has_help(command, listed_once, name):
    main = import_module(f"lit_gen.commands.{name.replace('-', '_')}").main
    code, out, _ = command(main, "--help")
    assert (
        code == 0 and f"lit-gen {name}" in out and ("\nout: " in out or name == "demo")
    )  # which writes nothing


def test_train_sample_evaluate_resume(command, tmp_path, tiny):
    """The whole life of a run, as README tells it."""
    run = tmp_path / "run"
    code, out, err = command(train.main, f"hydra.run.dir={run}", "trainer=cpu", *tiny)
    assert code == 0, err
    assert f"lit-gen sample run={run}" in out
    for name in (
        "config.yaml",
        "summary.json",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "grids/grid_0000020.png",
    ):
        assert (run / name).is_file(), name
    assert (run / "grids" / "trajectory_0000020.png").is_file()
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    code, out, err = command(sample.main, f"run={run}", "num=5", "batch_size=2", f"out={tmp_path}/s1")
    assert code == 0, err
    assert len(list((tmp_path / "s1" / "images").glob("*.png"))) == 5
    code, _, err = command(
        sample.main,
        f"run={run}",
        "num=3",
        "first=2",
        "format=npz",
        "sampler=heun",
        "sampler.num_steps=3",
        f"out={tmp_path}/s2",
    )
    assert code == 0, err
    code, _, err = command(sample.main, f"run={run}", "num=3", f"out={tmp_path}/s2")
    assert code == 2 and "already holds samples" in err
    code, out, err = command(evaluate.main, f"run={run}", "num=16", f"out={tmp_path}/e")
    assert code == 0, err
    assert "fd_digits64_" in out and (tmp_path / "e" / "evaluation.json").is_file()
    code, out, err = command(train.main, f"resume={run}", "trainer.max_steps=22")
    assert code == 0, err
    assert "resumed from" in out
    code, _, err = command(train.main, f"resume={run}", "model=score")
    assert code == 2 and "keeps its model" in err
    code, _, err = command(train.main, f"resume={run}", "trainer.max_stepss=22")
    assert code == 2 and "Could not override 'trainer.max_stepss'" in err

    import numpy as np
    from PIL import Image

    from lit_gen.runs import history

    rows = np.load(tmp_path / "s2" / "images.npz")["arr_0"]
    for i, row in zip((2, 3, 4), rows, strict=True):
        single = np.asarray(Image.open(tmp_path / "s1" / "images" / f"{i:06d}.png"))
        assert (
            np.abs(single.astype(int) - row[..., 0].astype(int)).max() <= 1
        )  # image i is the same in any batch
    assert sorted(history(run)["train/loss"]) == list(range(1, 23))


def test_resume_auto_starts_goes_on_and_names_what_is_broken(command, tmp_path, tiny):
    options = [o for o in tiny if not o.startswith("trainer.max_steps")]

    def auto(steps):
        code, out, err = command(
            train.main, "resume=auto", "trainer=cpu", "logger=csv", f"trainer.max_steps={steps}", *options
        )
        assert code == 0, err
        return out, err

    assert "resumed" not in auto(10)[0]  # nothing to go on with: a new run
    (run,) = (tmp_path / "runs" / "digits").iterdir()
    assert f"resumed from {run}/checkpoints/" in auto(15)[0]
    assert checkpoints.read(run / "checkpoints" / "last.ckpt")["batches_seen"] == 15
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    out, err = auto(20)
    assert f"resumed from {run}/checkpoints/" in out
    assert "last.ckpt (1000 bytes) cannot be read" in out + err
    assert checkpoints.read(last)["batches_seen"] == 20
    assert len(list((tmp_path / "runs" / "digits").iterdir())) == 1


def test_what_is_switched_off_stays_off(command, tmp_path, tiny):
    """Without measures a training works, saves what it is, goes on by the same command, and is evaluated."""
    options = [o for o in tiny if not o.startswith(("trainer.max_steps", "callbacks.quality.final"))]
    options += ["metrics=none", "~callbacks.grid", "trainer=cpu", "logger=csv", "resume=auto"]
    options = [o for o in options if not o.startswith("callbacks.grid")]
    for steps in (5, 10):
        code, out, err = command(train.main, *options, f"trainer.max_steps={steps}")
        assert code == 0, err
    assert "resumed from" in out and "fd_" not in out
    (run,) = (tmp_path / "runs" / "digits").iterdir()
    assert not {"quality", "grid"} & set(runs.saved_config(run).callbacks)
    saved = checkpoints.read(run / "checkpoints" / "last.ckpt")
    assert saved["batches_seen"] == 10 and not {"quality", "grid"} & set(saved["config"]["callbacks"])
    assert not any(name.startswith("fd_") for name in runs.history(run))
    code, _, err = command(evaluate.main, f"run={run}", "num=8")
    assert code == 2 and "trained without an extractor" in err
    code, _, err = command(evaluate.main, f"run={run}", "num=8", "extractor=digits64", "measures=[fd]")
    assert code == 0, err


@pytest.mark.parametrize(
    ("signum", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_the_command_with_its_code_and_a_checkpoint(tmp_path, tiny, signum, code):
    run = tmp_path / "run"
    options = [o for o in tiny if not o.startswith(("trainer.max_steps", "callbacks.checkpoint"))]
    command = [
        sys.executable,
        "-m",
        "lit_gen.train",
        f"hydra.run.dir={run}",
        "trainer=cpu",
        "logger=csv",
        *options,
    ]
    process = subprocess.Popen(
        [*command, "trainer.max_steps=1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 1800
    while not list(run.glob("grids/grid_*.png")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signum)
    _, err = process.communicate(timeout=1800)
    assert process.returncode == code, err
    assert f"Stopped by {signum.name} after batch" in err and "Traceback" not in err
    last = checkpoints.read(run / "checkpoints" / "last.ckpt")
    assert last["batches_seen"] == int(re.search(r"after batch (\d+)", err)[1])


def test_commands_after_a_training_can_be_pasted_and_an_unknown_pace_is_no_row(capsys):
    from lit_gen.commands.train import _table
    from lit_gen.module import BaseModule

    folder = Path("my runs/images/1")
    experiment = SimpleNamespace(module=BaseModule(), config={"allow_targets": []})
    _table({"steps": 4, "train_seconds": 1.0, "images_per_second": 0.0}, experiment, folder)
    said = capsys.readouterr().out
    assert f"lit-gen sample run='{folder}' num=64" in said and f"resume='{folder}' trainer" in said
    assert "images/s" not in said
