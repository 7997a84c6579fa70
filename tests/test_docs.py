"""The examples of docs/extending.md are complete: its files are written, its checks and its command run."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from lit_gen import runs, train

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder with the files of the page."""
    folder = tmp_path_factory.mktemp("extending")
    for kind, text in BLOCKS:
        if kind in ("python", "yaml") and (name := re.search(r"^# (\S+\.(?:py|yaml))\n", text, re.M)):
            path = folder / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


@pytest.fixture
def there(folder, monkeypatch):
    """Python started in that folder; what it imports from there is forgotten afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


CHECKS = [text for kind, text in BLOCKS if kind == "python" and text.startswith("import ")]


@pytest.mark.parametrize("check", CHECKS, ids=[re.findall(r"from (mine\.\w+)", text)[0] for text in CHECKS])
def test_its_checks_hold(there, tmp_path, check):
    (tmp_path / "check.py").write_text(check)
    runpy.run_path(str(tmp_path / "check.py"))


def test_its_experiment_trains_with_all_of_them(there, monkeypatch):
    (command,) = (text for kind, text in BLOCKS if kind == "bash")
    _, _, _, *arguments = shlex.split(command)
    short = [
        "trainer.max_steps=4",
        "callbacks.sliced_wasserstein.every=2",
        "sampler.num_steps=2",
        "log_every=1",
    ]
    where = [f"hydra.run.dir={there / 'run'}", "trainer=cpu", "logger=csv"]
    monkeypatch.setattr(sys, "argv", ["lit_gen.train", *arguments, *short, *where])
    train.main()
    history, saved = runs.history(there / "run"), runs.saved_config(there / "run")
    assert sorted(history["train/loss"]) == [1, 2, 3, 4]
    assert sorted(history["sliced_wasserstein"]) == [2, 4]
    named = [
        saved.data,
        saved.data.augment,
        saved.model.net,
        saved.sampler,
        saved.callbacks.sliced_wasserstein,
    ]
    assert all(node._target_.startswith("mine.") for node in named)
