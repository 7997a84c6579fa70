"""Random numbers keyed by what they are for, not by when they are drawn.

A training that is resumed, sharded or loaded by more workers draws the same numbers, because every draw comes
from a generator seeded with a hash of its purpose: `(seed, "noise", step)`, `(seed, "augment", epoch,
index)`, `(seed, "sample", i)`.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """A 63-bit seed from the parts; different parts give independent seeds, on every machine the same."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded with `key(*parts)`."""
    return torch.Generator(device).manual_seed(key(*parts))


class PerSample:
    """One random stream per row of a batch: row i's numbers do not depend on which other rows are in the
    batch.

    `PerSample.keyed(seed, indices)` gives image `indices[i]` the stream `(seed, "sample", indices[i])`.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = list(generators)

    @classmethod
    def keyed(cls, seed: int, indices: Sequence[int]) -> "PerSample":
        # Always on the CPU: a CUDA generator would give other numbers for the same image.
        return cls([keyed_generator(seed, "sample", int(i)) for i in indices])

    def __len__(self) -> int:
        return len(self.generators)

    def _stack(self, fill, shape: Sequence[int], device, dtype) -> Tensor:
        """`fill(row, generator)` draws a row of float32 or int64; the rows are converted on `device`.

        The copy to a GPU is from pinned memory and waits for nothing, so that the next rows are drawn while
        the GPU works with these.
        """
        if shape[0] != len(self.generators):
            raise ValueError(
                f"PerSample has {len(self.generators)} streams "
                f"but a draw of batch size {shape[0]} was asked for."
            )
        cuda = torch.device(device).type == "cuda"
        drawn = torch.float32 if dtype.is_floating_point else dtype
        rows = torch.empty(tuple(shape), dtype=drawn, pin_memory=cuda and torch.cuda.is_available())
        for row, generator in zip(rows.unbind(0), self.generators, strict=True):
            fill(row, generator)
        return rows.to(device, non_blocking=cuda).to(dtype)


Generator = torch.Generator | PerSample | None


def randn(
    shape: Sequence[int],
    generator: Generator = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers of `shape`, whose first axis is the batch if `generator` is a `PerSample`."""
    return _draw(lambda x, g: x.normal_(generator=g), shape, generator, device, dtype)


def rand(
    shape: Sequence[int],
    generator: Generator = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1); see `randn`."""
    return _draw(lambda x, g: x.uniform_(generator=g), shape, generator, device, dtype)


def randint(
    low: int,
    high: int,
    shape: Sequence[int],
    generator: Generator = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Integers in [low, high); see `randn`."""
    return _draw(lambda x, g: x.random_(low, high, generator=g), shape, generator, device, torch.int64)


def _draw(fill, shape: Sequence[int], generator: Generator, device, dtype: torch.dtype) -> Tensor:
    """`fill(x, generator)` fills a tensor of one generator, or each row of a `PerSample`."""
    if isinstance(generator, PerSample):
        return generator._stack(fill, shape, device, dtype)
    at = generator.device if generator is not None else device
    return fill(torch.empty(tuple(shape), device=at, dtype=dtype), generator).to(device)
