"""Checkpoint files: written whole or not at all, read without executing code, found again after a crash.

That of a sharded training (`trainer=fsdp`) is a folder: the sharded tensors in the format of
torch.distributed.checkpoint, a file of each process, and `rest.pt`, which is what a single file would be, but
with tensors without data in their places. Everything here takes either.
"""

import io
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, distributed
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_sharded
from torch.utils._pytree import keystr, tree_leaves, tree_map_with_path

from lit_gen.errors import ConfigError, Exit
from lit_gen.sharding import mixing

REST = "rest.pt"


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
            put_in_place(part, path)
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

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read(path) if Path(path).is_dir() else super().load_checkpoint(path, *args, **kwargs)


def put_in_place(part: Path, path: Path) -> None:
    """Renames a finished checkpoint. A file takes another file's place in one step; where a folder is
    replaced, the path is missing for an instant, and `previous.ckpt` is there."""
    old = path.with_name(f".{path.name}.old")
    if path.is_dir() or (part.is_dir() and path.exists()):
        path.replace(old)
    os.replace(part, path)
    _sync_folder(path.parent)
    if old.is_dir():
        shutil.rmtree(old)
    old.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # makes the rename itself durable
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_checkpoint(path: str | Path) -> bool:
    """Whether the path is a checkpoint, a file or a folder, rather than a run folder or nothing."""
    return Path(path).is_file() or (Path(path) / REST).is_file()


def read(path: str | Path, sharded: bool = True) -> dict[str, Any]:
    """A checkpoint as plain containers and tensors on the CPU (`weights_only=True`: nothing in it is
    executed). A sharded checkpoint is put together; `sharded=False` leaves the sharded tensors without data
    (on the device "meta").

    Raises ConfigError if the file is missing, truncated, damaged or no checkpoint of lit_gen.
    """
    path = Path(path)
    if not is_checkpoint(path):
        raise ConfigError(f"There is no checkpoint {path}.")
    file = path / REST if path.is_dir() else path
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ConfigError(f"The checkpoint {path} is damaged (checksum of {damaged}).")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if path.is_dir():
            _check_parts(path, deep=sharded)
            if sharded:
                checkpoint = _filled(checkpoint, path, torch.empty, no_dist=True)
    except ConfigError:
        raise
    except Exception as error:  # torch raises half a dozen types here; all mean the same to the user
        raise ConfigError(
            f"The checkpoint {path} ({file.stat().st_size} bytes) "
            f"cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}"
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


def of_run(run: str | Path, name: str) -> tuple[Path, dict[str, Any]]:
    """(path, checkpoint) of a run folder: its "best" or "last" one, the newest that can be read where the run
    has no such file, or the file of that path."""
    if name not in ("best", "last"):
        return Path(name), read(name)
    path = folder(run) / f"{name}.ckpt"
    return (path, read(path)) if is_checkpoint(path) else newest_good(run)[:2]


def newest_good(run: str | Path, sharded: bool = True) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint of the run with the most batches seen that can be read: (path, checkpoint, what was
    wrong with others); `sharded` as in `read`.

    Raises ConfigError if there is none.
    """
    where = folder(run)
    paths = sorted(where.glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    if not paths:
        raise ConfigError(f"{run} has no checkpoints (looked for {where}/*.ckpt).")
    good, bad = [], []
    for path in paths:
        try:
            checkpoint = read(path, sharded)
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


# --- sharded checkpoints ---


class FullySharded(ModelParallelStrategy):
    """The strategy of `trainer=fsdp`: weights, gradients, averages and optimizer states are sharded over all
    processes (`lit_gen.sharding`), and so are the checkpoints, which are written while the training goes on.

    The run folder must be one that all processes see. A checkpoint is read again by any number of processes;
    by the same number, the training goes on bit for bit.
    """

    def __init__(self, process_group_backend: str | None = None):
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)
        self._pending: Future | None = None

    # A checkpoint has the entries of one that is not sharded.
    lightning_module_state_dict = ParallelStrategy.lightning_module_state_dict
    load_model_state_dict = ParallelStrategy.load_model_state_dict
    optimizer_state = ParallelStrategy.optimizer_state
    load_optimizer_state_dict = ParallelStrategy.load_optimizer_state_dict

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        group = distributed.new_group(backend="gloo")  # saves beside what the training exchanges
        assert isinstance(group, distributed.ProcessGroup)
        self._files = group
        self._check_shared(Path(trainer.default_root_dir))
        super().setup(trainer)

    def _check_shared(self, run: Path) -> None:
        """Raises ConfigError on every process if one does not see the run folder of the first."""
        probe = Path(self.broadcast(str(run.resolve() / f".shared-test-{uuid4().hex}")))
        if self.is_global_zero:
            probe.touch()
        self.barrier()
        missing = torch.tensor(float(not probe.exists()))
        distributed.all_reduce(missing, group=self._files)
        if self.is_global_zero:
            probe.unlink()
        if missing:
            raise ConfigError(
                f"{int(missing)} of {self.world_size} processes do not see the run folder {probe.parent}, "
                "into which each writes its part of a checkpoint: set hydra.run.dir to a folder that all "
                "machines share."
            )

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:

            def then_mix() -> Any:
                loss = closure()  # the step, without the update
                stack.enter_context(mixing(p for group in optimizer.param_groups for p in group["params"]))
                return loss

            return super().optimizer_step(optimizer, then_mix, *args, **kwargs)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Copies what is to be saved and returns; the files are written in the background (`wait`)."""
        self.wait()
        path = Path(self.broadcast(str(filepath)))
        part = path.with_name(f".{path.name}.part")
        tensors: dict[str, Tensor] = {}
        rest = tree_map_with_path(lambda at, leaf: _taken(keystr(at), leaf, tensors), checkpoint)
        if self.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.barrier()
        written = async_save(tensors, storage_writer=FileSystemWriter(part), process_group=self._files)
        assert isinstance(written, Future)  # this writer stages at once
        if not self.is_global_zero:
            self._pending = written
            return
        AtomicCheckpointIO().save_checkpoint(rest, part / REST)
        thread = ThreadPoolExecutor(1)
        # The first process is told when all have written.
        self._pending = thread.submit(lambda: (written.result(), put_in_place(part, path)))
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Returns when the last checkpoint is on disk. Raises Exit if it could not be written."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:
            raise Exit(
                1,
                f"The checkpoint could not be written: {error}. The previous one is untouched: "
                "free space there, then resume=<run folder>.",
            ) from error

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_file():
            raise ConfigError(
                f"{path} is one file, of a training that was not sharded: continue it with the trainer that "
                "it had. trainer=fsdp continues its own."
            )
        mesh = self.device_mesh["data_parallel"]

        def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
            return empty_sharded(shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])

        return _filled(read(path, sharded=False), path, empty, process_group=self._files)

    def teardown(self) -> None:
        self.wait()
        super().teardown()


def _taken(key: str, leaf: Any, tensors: dict[str, Tensor]) -> Any:
    """A sharded tensor goes into `tensors`, and one without data takes its place."""
    if not isinstance(leaf, DTensor):
        return leaf
    tensors[key] = leaf.detach()
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")


def _filled(rest: Any, path: Path, empty: Callable[..., Tensor], **options: Any) -> Any:
    """`rest` with the tensors of a sharded checkpoint, read into what `empty(shape, dtype=...)` makes."""
    tensors: dict[str, Tensor] = {}

    def change(at: Any, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_meta:
            leaf = tensors[keystr(at)] = empty(leaf.shape, dtype=leaf.dtype)
        return leaf

    whole = tree_map_with_path(change, rest)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*intent is to load in a single process.*")
        load(tensors, storage_reader=_Reader(path), **options)
    return whole


def _check_parts(path: Path, deep: bool) -> None:
    """Raises ConfigError where a process's file is missing or too short, with `deep` also where a checksum is
    wrong."""
    for entry in _Reader(path).read_metadata().storage_data.values():
        file = path / entry.relative_path
        if not file.is_file() or file.stat().st_size < entry.offset + entry.length:
            raise ConfigError(f"The checkpoint {path} is damaged: {file.name} is missing or truncated.")
        if deep:
            with open(file, "rb") as stream:
                stream.seek(entry.offset)
                if zipfile.ZipFile(io.BytesIO(stream.read(entry.length))).testzip():
                    raise ConfigError(f"The checkpoint {path} is damaged (checksum of {file.name}).")


class _Reader(FileSystemReader):
    """torch's, which would run what is in the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


_METADATA = "torch.distributed.checkpoint.metadata"
INDEX_NAMES = (
    {(_METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")}
    | {(_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")}
    | {(_METADATA, "_MEM_FORMAT_ENCODING"), ("torch.serialization", "_get_layout"), ("torch", "Size")}
    | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
    | {(module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")}
)


class _Unpickler(pickle.Unpickler):
    """Takes the names that torch writes into an index, each as it stands: one with a dot would reach what the
    modules import."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in INDEX_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which was refused, not run")
        return super().find_class(module, name)
