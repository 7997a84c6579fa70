"""Batches as a function of (seed, step): the same data however the work is cut.

Sample p of the endless stream is the image at place `p mod N` of `epoch = p div N`; batch s holds samples
`sB ... sB + B - 1`, and rank r of W the r-th of W equal parts of it. A resumed run starts at step s and reads
on; nothing is replayed or left out, and neither workers nor ranks change what step s sees. Random
augmentation is keyed by (seed, epoch, index).

The order of an epoch is a `Permutation` keyed by (seed, "order", epoch): however many images there are, it
takes no memory and begins at once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from lit_gen.data.images import rows_of
from lit_gen.data.transforms import stacked, transform_all
from lit_gen.errors import ConfigError
from lit_gen.rng import Permutation, keyed_generator

Key = tuple[int, int]  # (epoch, index)
Order = Callable[[int, int, int, np.ndarray], np.ndarray]
AHEAD = 8192  # places whose images are computed at once, or fewer, an order's own `at_once`


def permuted(size: int, seed: int, epoch: int, places: np.ndarray) -> np.ndarray:
    """The images at these places of an epoch, int64 of their shape."""
    return Permutation(size, seed, "order", epoch)(places)


def stored(size: int, seed: int, epoch: int, places: np.ndarray) -> np.ndarray:
    """`permuted` of the runs that began before it was: an order that is drawn whole."""
    return torch.randperm(size, generator=keyed_generator(seed, "order", epoch)).numpy()[places]


class KeyedBatches(Sampler[list[Key]]):
    """Endless batches of (epoch, index) keys, beginning at batch `start`.

    `batch_size` counts the images of all ranks together. `order(size, seed, epoch, places)` says which images
    stand at some places of an epoch. Raises ConfigError where the batch size exceeds the data set or cannot
    be divided among the ranks.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        order: Order = permuted,
    ):
        if not 1 <= batch_size <= size:
            raise ConfigError(
                f"data.batch_size={batch_size}: must lie between 1 and the {size} images of the data set."
            )
        if batch_size % world_size:
            raise ConfigError(
                f"data.batch_size={batch_size} counts the images of all {world_size} devices together: "
                f"make it a multiple of {world_size}."
            )
        self.size, self.batch_size, self.seed, self.order = size, batch_size, seed, order
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[Key]]:
        part = self.batch_size // self.world_size
        own = np.arange(self.rank * part, (self.rank + 1) * part)
        at_once = min(AHEAD, self.size, getattr(self.order, "at_once", AHEAD))
        ahead = max(at_once // self.batch_size, 1)  # batches, of two epochs at most
        step = self.start
        while True:
            positions = np.arange(step, step + ahead)[:, None] * self.batch_size + own
            for epochs, images in zip(*self._keys(positions), strict=True):
                yield list(zip(epochs, images, strict=True))
            step += ahead

    def _keys(self, positions: np.ndarray) -> tuple[list[list[int]], list[list[int]]]:
        """The epochs and the images at positions (batches, part) of the stream."""
        epochs, places = np.divmod(positions, self.size)
        images = np.empty_like(places)
        for epoch in np.unique(epochs):
            there = epochs == epoch
            images[there] = self.order(self.size, self.seed, int(epoch), places[there])
        return epochs.tolist(), images.tolist()


class KeyedDataset:
    """A data set read by (epoch, index) keys, a whole batch at a time.

    `transform(image, generator) -> image` or `-> (image, condition)`, uint8 (C, H, W) in and out, gets a
    generator keyed by (seed, epoch, index); one that has `batch(images, generators)` gets them all at once,
    each image with its own generator (see `lit_gen.data.transforms`). To the `batch` of a transform that
    `needs_partner` another image of the set goes with each, drawn by the same key: `batch(images, generators,
    partners)`. A batch is {"image": uint8 (B, C, H, W), "label": int64 (B,), "index": int64 (B,)}, plus
    "augment_label": float32 (B, A) where the transform returns conditions.
    """

    def __init__(self, dataset: Any, transform: Callable[..., Any] | None = None, seed: int = 0):
        self.dataset, self.seed = dataset, seed
        self.transform: Any = transform

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def is_looked_up(self) -> bool:
        """Whether a batch is rows of an array in memory, with nothing to decode and nothing to draw for an
        image."""
        in_memory = hasattr(self.dataset, "batch") and not getattr(self.dataset, "on_disk", False)
        return self.transform is None and in_memory

    @property
    def order(self) -> Order:
        """In which order an epoch shows the images: at random, unless the data set says otherwise."""
        return getattr(self.dataset, "order", permuted)

    def __getitem__(self, k: Key) -> dict[str, Any]:
        return self.__getitems__([k])

    def __getitems__(self, keys: list[Key]) -> dict[str, Tensor]:
        return self.read(keys) | {"index": torch.tensor([i for _, i in keys])}

    def read(self, keys: list[Key], purpose: str = "augment") -> dict[str, Tensor]:
        """The batch of these keys without its "index"; `purpose` is part of what the generators are keyed
        by."""
        rows = self._rows([i for _, i in keys])
        images, transform = rows["image"], self.transform
        if transform is None:
            return rows | {"image": stacked(images)}
        generators = [keyed_generator(self.seed, purpose, *k) for k in keys]
        if getattr(transform, "needs_partner", False):
            partners = stacked(self._rows([self._partner(k) for k in keys])["image"])
            return rows | {"image": transform.batch(stacked(images), generators, partners)}
        changed = transform_all(transform, images, generators)
        if isinstance(changed, Tensor):
            return rows | {"image": changed}
        return rows | dict(zip(("image", "augment_label"), changed, strict=True))

    def _rows(self, indices: list[int]) -> dict[str, Any]:
        """The images, a list of (C, H, W) if they were read one by one, and whatever comes with them."""
        return rows_of(self.dataset, indices)

    def _partner(self, k: Key) -> int:
        choice = keyed_generator(self.seed, "partner", *k)
        return int(torch.randint(len(self), (), generator=choice))
