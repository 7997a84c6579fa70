"""One trial of a sweep is one fresh process that could have been typed by hand.

Inside one process, Lightning's DDP launcher would start its other ranks with the whole multirun command, and
each rank would run a sweep of its own.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lit_gen import runs

LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
    # A trial that a SLURM job starts is its own launcher, as on any machine.
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
)
TRAIN = (sys.executable, "-m", "lit_gen.train")
GRACE = 120  # seconds that a stopped trial has for its last batch and its checkpoint


class TrialFailed(RuntimeError):
    """A trial's process ended with an error; the message names its command and its log."""


class TrialStopped(RuntimeError):
    """A trial was ended because its `watch` asked for it."""


def run_trial(
    overrides: Sequence[str],
    folder: Path,
    *,
    objective: str = "objective",
    watch: Callable[[], bool] | None = None,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    interval: float = 1.0,
) -> float | None:
    """Trains with these overrides in `folder`, output in `folder/output.log`; `objective` of the run's
    summary.json, by default the final value of its `metrics.objective`, or None if it has none.

    `watch()` is asked every `interval` seconds; once it is true the trial is sent SIGTERM, upon which a
    training saves itself, and TrialStopped is raised. `environment` is added to this process's own;
    `pass_fds` stay open in the trial.
    """
    command = [*TRAIN, *overrides, f"hydra.run.dir={folder}"]
    inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.log"
    print(f"trial {folder.name}: {shlex.join(command)}", flush=True)
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command,
            env=inherited | dict(environment or {}),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=pass_fds,
        )
        try:
            code = _wait(process, watch, interval)
        except BaseException:
            _end(process)
            raise
    if code:
        raise TrialFailed(
            f"Trial {folder.name} ended with exit code {code}; see {log}. Command: {shlex.join(command)}"
        )
    return result(folder, objective)


def result(folder: Path, objective: str = "objective") -> float | None:
    """`objective` of the summary of a run that has ended; None without one."""
    summary = runs.summary(folder)
    return summary.get(runs.RENAMED.get(objective, objective))


def intermediate(folder: Path, name: str = "fd") -> dict[int, float]:
    """{batches: value} of a score that a run has logged, as `name`, `val/<name>` or `k_shot/<name>_k<K>`, of
    the largest K; "fd" is the Frechet distance that was logged most often."""
    pattern = "(fd_|fid).*" if name == "fd" else rf"(val/|k_shot/)?{re.escape(name)}(_k\d+)?"
    logged = [points for key, points in runs.history(folder).items() if re.fullmatch(pattern, key)]
    return max(reversed(logged), key=len, default={})


def _wait(process: subprocess.Popen, watch: Callable[[], bool] | None, interval: float) -> int:
    if watch is None:
        return process.wait()
    while True:
        try:
            return process.wait(interval)
        except subprocess.TimeoutExpired:
            if watch():
                raise TrialStopped from None


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
