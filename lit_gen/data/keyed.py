"""Batches as a function of (seed, step): the same data however the work is cut.

Sample p of the endless stream is image `order(epoch)[p mod N]` with `epoch = p div N`; batch s holds samples
`sB ... sB + B - 1`, and rank r of W the r-th of W equal parts of it. A resumed run starts at step s and reads
on; nothing is replayed or left out, and neither workers nor ranks change what step s sees. Random
augmentation is keyed by (seed, epoch, index).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler, default_collate

from lit_gen.data.transforms import stacked, transform_all
from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator

Key = tuple[int, int]  # (epoch, index)


class KeyedBatches(Sampler[list[Key]]):
    """Endless batches of (epoch, index) keys, beginning at batch `start`.

    `batch_size` counts the images of all ranks together. Raises ConfigError where it exceeds the data set or
    cannot be divided among the ranks.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1, start: int = 0
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
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def order(self, epoch: int) -> list[int]:
        return torch.randperm(self.size, generator=keyed_generator(self.seed, "order", epoch)).tolist()

    def __iter__(self) -> Iterator[list[Key]]:
        part = self.batch_size // self.world_size
        position = self.start * self.batch_size + self.rank * part
        known: dict[int, list[int]] = {}
        while True:
            batch = []
            for p in range(position, position + part):
                epoch, place = divmod(p, self.size)
                if epoch not in known:
                    known = {e: o for e, o in known.items() if e >= epoch - 1} | {epoch: self.order(epoch)}
                batch.append((epoch, known[epoch][place]))
            yield batch
            position += self.batch_size


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
        """Whether a batch is rows of an array, with nothing to decode and nothing to draw for an image."""
        return self.transform is None and hasattr(self.dataset, "batch")

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
        if hasattr(self.dataset, "batch"):
            return self.dataset.batch(indices)
        items = [self.dataset[i] for i in indices]
        others = [{name: value for name, value in item.items() if name != "image"} for item in items]
        return default_collate(others) | {"image": [item["image"] for item in items]}

    def _partner(self, k: Key) -> int:
        choice = keyed_generator(self.seed, "partner", *k)
        return int(torch.randint(len(self), (), generator=choice))
