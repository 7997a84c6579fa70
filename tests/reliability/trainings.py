"""Tiny trainings in processes of their own, to be killed."""

import subprocess
import sys
import time
from pathlib import Path

import torch

from lit_gen import checkpoints

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "batches_seen", "global_step")


def start(folder: Path, *overrides: str, environment: dict | None = None, out: Path | None = None):
    """A training in `folder`, begun or gone on with; its output in `folder`.log."""
    command = [sys.executable, "-m", "lit_gen.train", f"hydra.run.dir={folder}", "resume=auto", *overrides]
    log = open(out or folder.with_suffix(".log"), "ab")  # noqa: SIM115 (the process has it)
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def said(folder: Path) -> str:
    return folder.with_suffix(".log").read_text()


def wait_for(what, seconds: float = 1800.0, process: subprocess.Popen | None = None):
    """The first true value of `what()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come true")


def state(folder: Path) -> dict:
    checkpoint = checkpoints.read(folder / "checkpoints" / "last.ckpt")
    return {name: checkpoint[name] for name in PARTS}


def assert_same(a, b, at="checkpoint"):
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for k in a:
            assert_same(a[k], b[k], f"{at}.{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    else:
        assert a == b or (a != a and b != b), f"{at}: {a} != {b}"
