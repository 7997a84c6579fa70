"""Checkpoint files: written whole or not at all, read without executing code, found again after a crash."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch.utils._pytree import tree_leaves

from lit_gen.errors import ConfigError, Exit


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames: a kill at any moment leaves the previous file
    intact."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part{os.getpid()}")
        try:
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            tensors = [x for x in tree_leaves(checkpoint) if isinstance(x, torch.Tensor)]
            needed = sum(x.nbytes for x in tensors) / 2**20  # nearly all of its size
            raise Exit(
                1,
                f"{error.strerror}: could not write {path}, which needs {needed:.1f} MiB. The previous "
                "checkpoint is untouched: free space there, then resume=<run folder>.",
            ) from error
        finally:
            part.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # makes the rename itself durable
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint as plain containers and tensors on the CPU (`weights_only=True`: nothing in it is
    executed).

    Raises ConfigError if the file is missing, truncated, damaged or no checkpoint of lit_gen.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no checkpoint {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ConfigError(f"The checkpoint {path} is damaged (checksum of {damaged}).")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # torch raises half a dozen types here; all mean the same to the user
        raise ConfigError(
            f"The checkpoint {path} ({path.stat().st_size} bytes) "
            f"cannot be read: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(checkpoint, dict) or "config" not in checkpoint or "state_dict" not in checkpoint:
        raise ConfigError(
            f"{path} is not a checkpoint of lit_gen: it holds no config. "
            "Official weights go to weights=, not run=."
        )
    return checkpoint


def folder(run: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run) / "checkpoints"


def newest_good(run: str | Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint of the run with the most batches seen that can be read: (path, checkpoint, what was
    wrong with others).

    Raises ConfigError if there is none.
    """
    where = folder(run)
    paths = sorted(where.glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    if not paths:
        raise ConfigError(f"{run} has no checkpoints (looked for {where}/*.ckpt).")
    good, bad = [], []
    for path in paths:
        try:
            checkpoint = read(path)
        except ConfigError as error:
            bad.append(str(error))
            continue
        good.append((checkpoint.get("batches_seen", 0), path, checkpoint))
        if path.stem == "last" or path.stem.startswith("interrupted"):
            break  # these are written last: older ones cannot be ahead
    if not good:
        raise ConfigError("No checkpoint can be read. " + " ".join(bad))
    _, path, checkpoint = max(good, key=lambda g: g[0])
    return path, checkpoint, bad
