"""Weights & Biases that never asks, waits or stops a training, and a CSV file that survives a kill."""

import csv as csv_format
import io
import netrc
import os
import platform
import shlex
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_gen.rng import key


def csv(save_dir: str) -> "AppendedCSV":
    """Every logged number as a line `step,name,value` of `metrics.csv` in the run folder `save_dir`."""
    return AppendedCSV(save_dir)


class AppendedCSV(Logger):
    """A file that only grows: each call appends its numbers with one write, and all launches of a run go on
    in one file. A kill leaves at most one line torn, the last; `lit_gen.runs.history` leaves it out, and the
    next launch cuts it off before it writes.
    """

    def __init__(self, save_dir: str):
        super().__init__()
        self._path, self._begun = Path(save_dir) / "metrics.csv", False

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> None:
        return None

    @property
    def save_dir(self) -> str:
        return str(self._path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has them in config.yaml and environment.json."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Appends the numbers. `step` counts batches; None is 0."""
        lines = io.StringIO()
        writer = csv_format.writer(lines, lineterminator="\n")
        if not self._begun:
            self._begun = True
            if not _whole_lines(self._path):
                writer.writerow(("step", "name", "value"))
        writer.writerows((int(step or 0), name, float(value)) for name, value in metrics.items())
        with open(self._path, "ab", buffering=0) as file:
            left = memoryview(lines.getvalue().encode())
            while left:
                left = left[file.write(left) :]


def _whole_lines(path: Path) -> int:
    """Cuts a torn last line off, and returns the bytes that are left: 0 of a file that is not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**16))  # far more than a line
        torn = file.read().rpartition(b"\n")[2]
        if torn:
            file.truncate(size - len(torn))
        return size - len(torn)


def wandb(
    save_dir: str,
    project: str = "lit_gen",
    name: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    mode: str = "auto",
    init_timeout: float = 20.0,
    finish_timeout: float = 60.0,
    checkpoints: bool = False,
) -> WandbLogger:
    """A W&B logger whose run id follows from the run folder, so that a resumed run continues the same W&B
    run.

    `mode` is "online", "offline", "disabled" or "auto": $WANDB_MODE if set; offline if there is no account
    (no $WANDB_API_KEY, nothing in ~/.netrc) or the server cannot be reached within seconds; else online. If
    the server fails during `wandb.init` the run is logged offline; `wandb sync` sends it later.
    `init_timeout` and `finish_timeout` are seconds. `checkpoints` sends best.ckpt and last.ckpt as an
    artifact `run-<id>` when the run ends.
    """
    # Its banner and hints: Settings(silent=True) comes too late for some.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb as w

    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or (
            "online" if has_account() and reachable(_server()) else "offline"
        )
    settings = w.Settings(
        init_timeout=init_timeout, finish_timeout=finish_timeout, silent=True, disable_git=False
    )
    folder = Path(save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    own_id = format(key("wandb", str(folder.resolve())), "x")[:12]
    options: dict[str, Any] = {"name": name, "save_dir": str(folder), "project": project, "group": group}
    options |= {"tags": tags, "settings": settings, "checkpoints": checkpoints}
    options["id"] = None if "WANDB_SWEEP_ID" in os.environ else own_id  # a sweep's agent has given one
    if mode == "online" and (logger := _online(options)) is not None:
        return logger
    if mode == "disabled":
        settings.mode = "disabled"
        return _Logger(**options)
    return _Logger(**options, offline=True)


class _Logger(WandbLogger):
    """Lightning's; `checkpoints` says whether `close` sends them."""

    def __init__(self, checkpoints: bool, **options: Any):
        super().__init__(**options)
        self.sends_checkpoints = checkpoints
        self._wandb_init.pop("anonymous", None)  # always handed on by Lightning, warned about by wandb


def _online(options: dict[str, Any]) -> WandbLogger | None:
    """A logger that has reached the server; None, with a warning, where that fails."""
    import wandb as w

    # Said again in the settings: an earlier run of this process may have left another mode behind.
    settings = options["settings"].model_copy(update={"mode": "online"})
    logger = _Logger(**options | {"settings": settings}, resume="allow")
    try:
        _ = logger.experiment
        return logger
    except Exception as error:  # wandb's own type, a socket's or a time-out's: the training goes on
        warnings.warn(
            f"W&B cannot be reached ({error}); logging offline, `wandb sync` sends it later.", stacklevel=3
        )
        w.teardown()  # the service keeps the failed run's id
        return None


def close(loggers: Iterable[Logger], status: str = "success") -> None:
    """Ends the loggers' runs, so that another run in this process does not go on in their files."""
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger) and sys.modules["wandb"].run is not None:
            if isinstance(logger, _Logger) and logger.sends_checkpoints:
                _send_checkpoints(logger)
            sys.modules["wandb"].finish()


def _send_checkpoints(logger: WandbLogger) -> None:
    import wandb as w

    files = [Path(logger.save_dir or ".") / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    if files := [path for path in files if path.exists()]:
        artifact = w.Artifact(f"run-{logger.experiment.id}", type="model")
        for path in files:  # a sharded checkpoint is a folder
            (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path), name=path.name)
        logger.experiment.log_artifact(artifact)


def environment() -> dict[str, Any]:
    """Where a run comes from: command, commit of the working folder (with + if files differ from it),
    versions, devices. No environment variables: they hold secrets."""
    import torch

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    names = ("lit-gen", "torch", "torchvision", "lightning", "numpy", "hydra-core", "wandb")
    return {
        "command": shlex.join([sys.executable, *sys.orig_argv[1:]]),
        "commit": commit or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in names},
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def has_account() -> bool:
    """Whether a W&B API key can be found without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlparse(_server()).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reachable(url: str, seconds: float = 3.0) -> bool:
    """Whether something listens at the address."""
    address = urlparse(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=seconds):
            return True
    except OSError:
        return False
