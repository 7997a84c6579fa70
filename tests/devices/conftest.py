"""A CUDA device for tests: the real one where there is one, else an abstract one that needs no driver.

On the abstract device a tensor has a shape, a dtype and the device "cuda:0", but no numbers (torch's
FakeTensorMode). CUDA's own autocast lists act on it, and an operation that mixes CPU and CUDA tensors or
dtypes raises as it would on a GPU. Tensors on the CPU stay real, so code that plans on the CPU (noise levels,
numbers of steps) runs as it is. What makes the host wait for the device is counted with the line that asks
for it. What no such device can show: values, the kernels' own limits, cuDNN, NCCL, speed.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
SOURCE = "/lit_gen/"
DRAWS = "/lit_gen/rng.py"  # keyed noise of images is drawn on the CPU, so that every device draws the same
SYNCHRONOUS = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "bincount",
}


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class AbstractCuda:
    """Tensors without numbers on "cuda:0". `waits` lists what made the host wait, and where."""

    device = torch.device("cuda:0")
    real = False

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []

    # --- what tests use ---

    def put(self, x: Any) -> Any:
        """A module (in place) or any nesting of tensors, moved to the device without being counted."""
        if isinstance(x, nn.Module):
            for module in x.modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        module._parameters[name] = nn.Parameter(self._like(p.detach()), p.requires_grad)
                for name, b in module._buffers.items():
                    if b is not None:
                        module._buffers[name] = self._like(b)
            return x
        return tree_map(lambda t: self._like(t) if isinstance(t, Tensor) else t, x)

    @contextmanager
    def autocast(self, on: bool = True) -> Iterator[None]:
        """bfloat16 by CUDA's lists; torch.autocast itself refuses where there is no driver."""
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_enabled("cuda", on)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
            torch.set_autocast_cache_enabled(cached)

    @contextmanager
    def counting(self) -> Iterator[list[str]]:
        """The waits inside the block, but those for keyed draws."""
        begin = len(self.waits)
        counted: list[str] = []
        yield counted
        counted += [w for w in self.waits[begin:] if " rng.py:" not in w]

    # --- how it works ---

    def _like(self, t: Tensor) -> Tensor:
        with self.mode:
            return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cuda:0")

    def wait(self, kind: str) -> None:
        frame, place = sys._getframe(1), None
        while frame is not None and (place is None or DRAWS not in place):
            file = frame.f_code.co_filename
            if SOURCE in file and "/tests/" not in file and (place is None or DRAWS in file):
                place = f"{file}:{frame.f_lineno}"
            frame = frame.f_back
        self.waits.append(f"{kind} at {place.rpartition(SOURCE)[2]}" if place else kind)

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.split("::")[-1]
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        on_cuda = [t for t in tensors if isinstance(t, FakeTensor)]
        target = kwargs.get("device")
        if name == "_to_copy" and target is not None and is_cuda(target) != bool(on_cuda):
            return self._copied(args[0], kwargs)
        if name == "copy_" and 0 < len(on_cuda) < len(tensors):
            if not (len(args) > 2 and args[2]):
                self.wait("copy_ between the devices")
            return args[0].fill_(1) if not isinstance(args[0], FakeTensor) else args[0]
        if on_cuda and name == "_local_scalar_dense":
            self.wait("a number of the device is read")
            return {"b": True, "f": 0.5}.get("f" if args[0].is_floating_point() else str(args[0].dtype)[6], 1)
        if on_cuda and name == "where" and not isinstance(args[0], FakeTensor):
            self.wait("where copies its condition to the device")
        if on_cuda and name in SYNCHRONOUS:
            return self._data_dependent(name, args)
        if on_cuda and name in ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"):
            args = self._index(name, args)
        if on_cuda and name == "repeat_interleave" and len(on_cuda) and not kwargs.get("output_size"):
            self.wait("repeat_interleave by a tensor")
        if is_cuda(target) or on_cuda:
            with self.mode:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _copied(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        dtype = kwargs.get("dtype") or x.dtype
        if isinstance(x, FakeTensor):
            self.wait("copy to the host")
            return torch.ones(x.shape, dtype=dtype)
        if not kwargs.get("non_blocking"):
            self.wait(f"copy of {'a number' if x.ndim == 0 else tuple(x.shape)} to the device")
        return self._like(x.to(dtype))

    def _data_dependent(self, name: str, args: tuple) -> Any:
        """One hit, wherever the shape depends on values."""
        self.wait(name)
        with self.mode:
            if name == "equal":
                return True
            if name == "nonzero":
                return torch.zeros(1, args[0].ndim, dtype=torch.int64, device="cuda:0")
            if name == "bincount":
                length = args[2] if len(args) > 2 else 1
                return torch.zeros(max(length, 1), dtype=torch.int64, device="cuda:0")
            one = torch.zeros(1, dtype=args[0].dtype, device="cuda:0")
            index = torch.zeros(1, dtype=torch.int64, device="cuda:0")
            return one if name == "masked_select" else (one, index, index)

    def _index(self, name: str, args: tuple) -> tuple:
        indices: list[Tensor | None] = []
        filled = "put" in name and args[2].numel() == 1 and not isinstance(args[2], FakeTensor)
        for i in args[1]:
            if i is not None and not isinstance(i, FakeTensor):
                self.wait("an index on the host")
                i = self._like(i)
            if i is not None and i.dtype in (torch.bool, torch.uint8):
                if not (filled and len(args[1]) == 1):  # which is masked_fill
                    self.wait("a boolean index")
                with self.mode:
                    indices += [torch.zeros(1, dtype=torch.int64, device="cuda:0") for _ in range(i.ndim)]
            else:
                indices.append(i)
        return (args[0], indices, *args[2:])


class _Dispatch(TorchDispatchMode):
    def __init__(self, cuda: AbstractCuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.cuda.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What never reaches the dispatcher: making tensors of Python numbers, and the backward pass, whose
    engine wants a driver; the gradient of a tensor has its shape, dtype and device."""

    def __init__(self, cuda: AbstractCuda):
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            own = func is Tensor.new_tensor and isinstance(args[0], FakeTensor)
            device = kwargs.get("device", "cuda:0" if own else None)
            if is_cuda(device) and not isinstance(args[-1], FakeTensor):
                kwargs.pop("device", None)
                dtype = kwargs.pop("dtype", None) or (args[0].dtype if own else None)
                made = torch.tensor(args[1] if own else args[0], dtype=dtype, **kwargs)
                return made.to(device)
        indexing = func in (Tensor.__getitem__, Tensor.__setitem__)
        if indexing and isinstance(args[0], FakeTensor) and isinstance(args[1], list):
            self.cuda.wait("an index on the host")
            args = (args[0], self.cuda.put(torch.tensor(args[1])), *args[2:])
        if func is torch.autograd.grad:
            inputs = args[1] if isinstance(args[1], list | tuple) else (args[1],)
            if all(isinstance(x, FakeTensor) for x in inputs):
                create = kwargs.get("create_graph", False)
                return tuple(torch.zeros_like(x) + (0 * x if create else 0) for x in inputs)
        if func in (Tensor.backward, torch.autograd.backward) and isinstance(args[0], FakeTensor):
            for leaf in _leaves(args[0]):
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            return None
        return func(*args, **kwargs)


def _leaves(loss: Tensor) -> list[Tensor]:
    found, open_nodes, seen = [], [loss.grad_fn], set()
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        open_nodes += [n for n, _ in node.next_functions]
    return found


class RealCuda:
    """The same interface on the GPU that is there."""

    device = torch.device("cuda:0")
    real = True

    def put(self, x: Any) -> Any:
        if isinstance(x, nn.Module):
            return x.to(self.device)
        return tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) else t, x)

    def autocast(self, on: bool = True) -> Any:
        return torch.autocast("cuda", torch.bfloat16, enabled=on)

    @contextmanager
    def counting(self) -> Iterator[list[str]]:
        torch.cuda.synchronize()
        counted: list[str] = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                yield counted
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)]
        counted += [place for place in places if DRAWS not in place]


@contextmanager
def abstract_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[AbstractCuda]:
    from lit_gen import rng

    torch._C._ensureCUDADeviceGuardSet()
    there = torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)  # asked at every operation, at a file each
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: None)  # of a generator on the host
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: None)
    keyed = rng.keyed_generator

    def generator(*parts: int | str, device: Any = "cpu") -> torch.Generator | None:
        return None if is_cuda(device) else keyed(*parts, device=device)

    for name, module in list(sys.modules.items()):
        if name.startswith("lit_gen") and getattr(module, "keyed_generator", None) is keyed:
            monkeypatch.setattr(module, "keyed_generator", generator)
    device = AbstractCuda()
    with (
        warnings.catch_warnings(),
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.cudnn.flags(enabled=False),
        _Dispatch(device),
        _Functions(device),
    ):
        warnings.filterwarnings("ignore", ".*CUDA is not available.*")
        yield device


DEVICES = ["abstract", *([pytest.param("real", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def cuda(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AbstractCuda | RealCuda]:
    """The device: abstract, and the real one where there is one."""
    if request.param == "real":
        yield RealCuda()
        return
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip("this torch is too old for CUDA tensors without a driver")
    with abstract_cuda(monkeypatch) as device:
        yield device
