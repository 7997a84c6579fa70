"""Random numbers keyed by what they are for, not by when they are drawn.

A training that is resumed, sharded or loaded by more workers draws the same numbers, because every draw comes
from a generator seeded with a hash of its purpose: `(seed, "noise", step)`, `(seed, "augment", epoch,
index)`, `(seed, "sample", i)`.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """A 63-bit seed from the parts; different parts give independent seeds, on every machine the same."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded with `key(*parts)`."""
    return torch.Generator(device).manual_seed(key(*parts))


class Permutation:
    """A random order of `range(size)`, drawn by a key and never stored: any number of positions is permuted
    at once, with memory for these alone, and the same on every machine.

    `Permutation(size, *parts)(positions)` gives the elements at these positions, and `inverse` the positions
    of elements, both int64 arrays of one shape with values in [0, size). An alternating Feistel network
    (Luby & Rackoff 1988, https://doi.org/10.1137/0217022) permutes the next power of two, with splitmix64
    (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195) for its keys and round function; what falls
    outside [0, size) goes through it again until it is inside (cycle walking, Black & Rogaway 2002,
    https://doi.org/10.1007/3-540-45760-7_9), fewer than two times on average from a size of 9.
    """

    ROUNDS = 12  # fewer do not mix the 16 numbers that the smallest sets are permuted among

    def __init__(self, size: int, *parts: int | str):
        if not 1 <= size <= 2**62:
            raise ValueError(f"size={size}: a permutation has between 1 and 2^62 elements.")
        self.size = size
        bits = max((size - 1).bit_length(), 4)
        self._low = bits // 2
        self._masks = [np.uint64((1 << n) - 1) for n in (self._low, bits - self._low)]
        steps = np.arange(1, self.ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._keys = _mixed(np.uint64(key(*parts)) + steps)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return self._walk(positions, range(self.ROUNDS))

    def inverse(self, elements: np.ndarray) -> np.ndarray:
        return self._walk(elements, range(self.ROUNDS)[::-1])

    def _walk(self, numbers: np.ndarray, rounds: range) -> np.ndarray:
        x = np.atleast_1d(np.asarray(numbers)).astype(np.uint64)
        outside = np.ones(x.shape, bool)
        while outside.any():
            x[outside] = self._once(x[outside], rounds)
            outside = x >= self.size
        return x.astype(np.int64).reshape(np.shape(numbers))

    def _once(self, x: np.ndarray, rounds: range) -> np.ndarray:
        halves = [x & self._masks[0], x >> np.uint64(self._low)]
        for r in rounds:
            halves[r % 2] ^= _mixed(halves[1 - r % 2] + self._keys[r]) & self._masks[r % 2]
        return halves[0] | halves[1] << np.uint64(self._low)


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: uint64 in and out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
