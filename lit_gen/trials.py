"""One trial of a sweep is one fresh process that could have been typed by hand.

Inside one process, Lightning's DDP launcher would start its other ranks with the whole multirun command, and
each rank would run a sweep of its own.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

__all__ = ["TrialFailed", "run_trial"]

LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
)


class TrialFailed(RuntimeError):
    """A trial's process ended with an error; the message names its command and its log."""


def run_trial(overrides: list[str], folder: Path) -> float | None:
    """Trains with these overrides in `folder`, output in `folder/output.log`; the run's final Frechet
    distance, if it has one."""
    command = [sys.executable, "-m", "lit_gen.train", *overrides, f"hydra.run.dir={folder}"]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.log"
    print(f"trial {folder.name}: {shlex.join(command)}", flush=True)
    with open(log, "ab") as out:
        code = subprocess.run(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        ).returncode
    if code:
        raise TrialFailed(
            f"Trial {folder.name} ended with exit code {code}; see {log}. Command: {shlex.join(command)}"
        )
    summary = folder / "summary.json"
    return json.loads(summary.read_text()).get("fd") if summary.is_file() else None
