"""Batches as a function of (seed, step): the same data however the work is cut.

Sample p of the endless stream is image `order(epoch)[p mod N]` with `epoch = p div N`; batch s holds samples
`sB ... sB + B - 1`, and rank r of W the r-th of W equal parts of it. A resumed run starts at step s and reads
on; nothing is replayed or left out, and neither workers nor ranks change what step s sees. Random
augmentation is keyed by (seed, epoch, index).
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator

__all__ = ["KeyedBatches", "KeyedDataModule", "KeyedDataset"]

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
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def is_looked_up(self) -> bool:
        """Whether a batch is rows of an array, with nothing to decode and nothing to draw for an image."""
        return self.transform is None and hasattr(self.dataset, "batch")

    def __getitem__(self, k: Key) -> dict[str, Any]:
        return self.__getitems__([k])

    def __getitems__(self, keys: list[Key]) -> dict[str, Tensor]:
        indices = [i for _, i in keys]
        batch = self._read(indices)
        if self.transform is not None:
            batch |= self._transformed(batch["image"], keys)
        return batch | {"index": torch.tensor(indices)}

    def _read(self, indices: list[int]) -> dict[str, Tensor]:
        if hasattr(self.dataset, "batch"):
            return self.dataset.batch(indices)
        return default_collate([self.dataset[i] for i in indices])

    def _transformed(self, images: Tensor, keys: list[Key]) -> dict[str, Tensor]:
        generators = [keyed_generator(self.seed, "augment", *k) for k in keys]
        transform: Any = self.transform
        if getattr(transform, "needs_partner", False):
            partners = self._read([self._partner(k) for k in keys])["image"]
            return {"image": transform.batch(images, generators, partners)}
        if hasattr(transform, "batch"):
            return {"image": transform.batch(images, generators)}
        results = [transform(image, g) for image, g in zip(images, generators, strict=True)]
        if isinstance(results[0], tuple):
            changed, conditions = zip(*results, strict=True)
            return {"image": torch.stack(changed), "augment_label": torch.stack(conditions)}
        return {"image": torch.stack(results)}

    def _partner(self, k: Key) -> int:
        choice = keyed_generator(self.seed, "partner", *k)
        return int(torch.randint(len(self), (), generator=choice))


class KeyedDataModule(pl.LightningDataModule, ABC):
    """Training batches without end and a pass over the test images, both the same for any number of workers
    and devices.

    A data module says what is read by keys (`keyed_train`, `keyed_test`) and what has to hold before training
    time is spent (`check`). `batch_size` counts the images of all devices together. `num_workers` processes
    a device prepare batches; "auto": none where batches are looked up in memory or where the CPU trains and
    needs its cores itself, else all but one of the cores that a device has, 8 at most.
    """

    def __init__(self, batch_size: int, num_workers: int | str, seed: int, pin_memory: bool):
        super().__init__()
        if num_workers != "auto" and not (isinstance(num_workers, int) and num_workers >= 0):
            raise ConfigError(
                f"data.num_workers={num_workers}: must be auto, or 0 (load in the main process) or more."
            )
        self.batch_size, self.num_workers = batch_size, num_workers
        self.seed, self.pin_memory = seed, pin_memory

    @abstractmethod
    def keyed_train(self) -> KeyedDataset:
        """What training batches are read from."""

    @abstractmethod
    def keyed_test(self) -> KeyedDataset:
        """What validation batches are read from."""

    @abstractmethod
    def check(self, world_size: int = 1) -> None:
        """Raises ConfigError for what would fail later: empty sets, a batch size that does not fit."""

    def train_dataloader(self) -> DataLoader:
        # The count of batches seen is restored with the module, before Lightning asks for this loader.
        rank, world_size = self._place()
        start = 0 if self.trainer is None else getattr(self.trainer.lightning_module, "batches_seen", 0)
        dataset = self.keyed_train()
        return self._loader(
            dataset,
            KeyedBatches(
                len(dataset), self.batch_size, self.seed, rank=rank, world_size=world_size, start=start
            ),
        )

    def val_dataloader(self) -> DataLoader:
        """The test images once, rank r of W taking every W-th; parts may differ in length by one."""
        rank, world_size = self._place()
        dataset, size = self.keyed_test(), max(self.batch_size // world_size, 1)
        keys = [(0, i) for i in range(rank, len(dataset), world_size)]
        return self._loader(dataset, [keys[i : i + size] for i in range(0, len(keys), size)])

    def in_order(self, dataset: Any, parts: Iterable[range]) -> DataLoader:
        """Rows of a data set as they are, part by part, read by as many workers as training batches are:
        {"image": uint8 (B, C, H, W), "label", "index": int64 (B,)}.
        """
        return self._loader(KeyedDataset(dataset), [[(0, i) for i in rows] for rows in parts])

    def _place(self) -> tuple[int, int]:
        """(rank, number of processes)"""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, dataset: KeyedDataset, batches: Any) -> DataLoader:
        trainer = self.trainer
        on_cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
        workers = 0
        if isinstance(self.num_workers, int):
            workers = self.num_workers
        elif trainer is not None and on_cuda and not dataset.is_looked_up:
            workers = _spare_cores(trainer.num_devices)
        return DataLoader(
            dataset,  # pyright: ignore[reportArgumentType] (a map-style set need not inherit from Dataset)
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory and on_cuda,
            persistent_workers=workers > 0,
            generator=keyed_generator(self.seed, "workers"),  # iter() must not draw from the global generator
        )


def _spare_cores(num_devices: int) -> int:
    """Cores of this machine for each of its devices but one, from 1 to 8."""
    if own := os.environ.get("SLURM_CPUS_PER_TASK"):  # a task is a device's process
        cores = int(own)
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0)) // num_devices
    else:
        cores = (os.cpu_count() or 1) // num_devices
    return min(max(cores - 1, 1), 8)


def _as_it_is(batch: Any) -> Any:
    """Collates nothing: a KeyedDataset makes whole batches."""
    return batch
