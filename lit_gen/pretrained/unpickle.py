"""Files that others wrote, read without running anything in them.

torch's own reader in its `weights_only` mode takes `.pth` and `.pt`; EDM's `.pkl` snapshots, which carry the
Python source of their classes and would execute it, are read into inert records of class name, constructor
arguments and state. Whatever else a file asks for is refused.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from lit_gen.errors import ConfigError

# Old optimizer states hold the learning rate as a numpy scalar.
_scalar: Any = np.float64(0).__reduce__()[0]
_SCALARS = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")},
]
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that opens a torch file before 1.6
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # how protocols 0 to 2 write them
_INERT = ("numpy", "torch", "torch_utils", "dnnlib", "training")  # packages whose names become empty records


class Record:
    """What a pickle said about an object that was not made: its class, arguments and state."""

    name = ""
    args: tuple[Any, ...]
    state: dict[str, Any]
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Record":
        record = object.__new__(cls)
        record.args, record.state, record.items = args, {}, {}
        return record

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"state": state}

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    def extend(self, values: list) -> None:
        for value in values:
            self.append(value)


def load(path: str | Path) -> Any:
    """The containers, numbers, strings and tensors (on the CPU) of a .pth, .pt, .safetensors or .pkl file.

    Objects of an EDM snapshot become `Record`s. Raises ConfigError for a missing, truncated or foreign file,
    and for one that names code outside what official checkpoints need; nothing of it has run by then.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"checkpoint {path} does not exist.")
    with path.open("rb") as file:
        head = file.read(32)
    try:
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path) or head.startswith((b"PK", _TORCH_MAGIC)):
            with torch.serialization.safe_globals(_SCALARS):
                return torch.load(path, map_location="cpu", weights_only=True)
        with path.open("rb") as file:
            return _SnapshotUnpickler(file).load()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}): it is truncated, of "
            "another kind, or holds no tensors but objects. Take a .pth, .pt, .safetensors or EDM .pkl."
        ) from error


def tensors(record: Record, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all parameters and buffers of a recorded module, with the names of its state_dict."""
    for group in ("_parameters", "_buffers"):
        for name, value in record.state.get(group, {}).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
    for name, module in record.state.get("_modules", {}).items():
        if isinstance(module, Record):
            yield from tensors(module, f"{prefix}{name}.")


class _SnapshotUnpickler(pickle.Unpickler):
    """Resolves few names to harmless functions, those of known packages to records, and refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        module = _PYTHON_2.get(module, module)
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        if module.split(".")[0] in _INERT:
            return type("Record", (Record,), {"name": f"{module}.{name}"})
        raise ConfigError(
            f"it asks for {module}.{name}, which no official checkpoint needs; it was refused, not run."
        )

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to data outside the file")


def _persistent_object(meta: Any) -> Record:
    """EDM's `persistence` objects: the class name and state are kept, the source is not looked at."""
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise ConfigError("one of its persistent objects has no state.")
    record = Record()
    record.name, record.state = str(meta.get("class_name")), meta["state"]
    return record


def _storage(data: Any) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _without_constructor(cls: type, base: type, state: Any) -> Record:
    if not (isinstance(cls, type) and issubclass(cls, Record)):
        raise ConfigError("it reconstructs an object of an unknown class.")
    return cls()


_HARMLESS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("dnnlib.util", "EasyDict"): dict,
    ("builtins", "object"): object,
    ("builtins", "set"): set,
    ("copyreg", "_reconstructor"): _without_constructor,
    ("torch", "device"): torch.device,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
}
