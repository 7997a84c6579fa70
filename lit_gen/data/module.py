"""ImageDataModule: any data set of images, in the order that (seed, step) says."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader

from lit_gen.data.images import as_images
from lit_gen.data.keyed import KeyedBatches, KeyedDataset, first
from lit_gen.errors import ConfigError
from lit_gen.images import to_float
from lit_gen.rng import keyed_generator

__all__ = ["ImageDataModule"]


class ImageDataModule(pl.LightningDataModule):
    """Training batches without end and a pass over the test images, both the same for any number of workers
    and devices.

    `train` and `test` are data sets (see `lit_gen.data.images`; torchvision's are wrapped) or functions that
    make one, called first on one process alone, so that a download happens once. `batch_size` counts the
    images of all devices together. `image_size`, `channels` and `num_classes` are what the configuration says
    of the data (networks are built by it); `check` holds them against the images. `augment(image, generator)`
    changes training images only; see `lit_gen.data.keyed`.

    Batches arrive as {"image": float32 (B, C, H, W) in [-1, 1], "label", "index"[, "augment_label"]}.
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        batch_size: int = 128,
        num_workers: int = 0,
        augment: Callable | None = None,
        seed: int = 0,
        pin_memory: bool = True,
        image_size: int | None = None,
        channels: int | None = None,
        num_classes: int | None = None,
    ):
        super().__init__()
        if num_workers < 0:
            raise ConfigError(
                f"data.num_workers={num_workers}: must be 0 (load in the main process) or more."
            )
        self._sources = {"train": train, "test": test}
        self._sets: dict[str, Any] = {}
        self.batch_size, self.num_workers, self.augment = batch_size, num_workers, augment
        self.seed, self.pin_memory = seed, pin_memory
        self.said = {"image_size": image_size, "channels": channels, "num_classes": num_classes}

    def prepare_data(self) -> None:
        for split in self._sources:
            self.dataset(split)

    def dataset(self, split: str) -> Any:
        """The "train" or "test" set, made on first use."""
        if split not in self._sets:
            source = self._sources[split]
            self._sets[split] = as_images(source() if callable(source) else source)
        return self._sets[split]

    @property
    def train(self) -> Any:
        return self.dataset("train")

    @property
    def test(self) -> Any:
        return self.dataset("test")

    def check(self, world_size: int = 1) -> None:
        """Raises ConfigError for what would fail later: empty sets, a batch size that does not fit."""
        KeyedBatches(len(self.train), self.batch_size, world_size=world_size)
        a, b = self.train, self.test
        found = {"image_size": a.image_size, "channels": a.channels, "num_classes": len(a.classes) or None}
        for name, said in self.said.items():
            if said is not None and found[name] is not None and said != found[name]:
                raise ConfigError(
                    f"data.{name}={said}, but the training images have {name} {found[name]}: "
                    f"set data.{name}={found[name]}."
                )
        if (a.channels, a.image_size) != (b.channels, b.image_size):
            raise ConfigError(
                f"Training images are {a.channels}x{a.image_size}x{a.image_size}, "
                f"test images {b.channels}x{b.image_size}x{b.image_size}."
            )

    def train_dataloader(self) -> DataLoader:
        # The count of batches seen is restored with the module, before Lightning asks for this loader.
        rank, world_size, start = 0, 1, 0
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            start = getattr(self.trainer.lightning_module, "batches_seen", 0)
        batches = KeyedBatches(
            len(self.train), self.batch_size, self.seed, rank=rank, world_size=world_size, start=start
        )
        return self._loader(KeyedDataset(self.train, self.augment, self.seed), batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        """The test images once, rank r of W taking every W-th; parts may differ in length by one."""
        rank, world_size = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        )
        size = max(self.batch_size // world_size, 1)
        keys = [(0, i) for i in range(rank, len(self.test), world_size)]
        return self._loader(
            KeyedDataset(self.test), batch_sampler=[keys[i : i + size] for i in range(0, len(keys), size)]
        )

    def _loader(self, dataset: KeyedDataset, batch_sampler: Any) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=self.num_workers,
            collate_fn=first,
            pin_memory=self.pin_memory
            and self.trainer is not None
            and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
            generator=keyed_generator(self.seed, "workers"),  # iter() must not draw from the global generator
        )

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        return batch | {"image": to_float(batch["image"])}
