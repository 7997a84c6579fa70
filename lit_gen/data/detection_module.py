"""DetectionDataModule: any detection set, in the order that (seed, step) says."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_gen.data.keyed import KeyedBatches, KeyedDataset, first
from lit_gen.errors import ConfigError
from lit_gen.images import to_float
from lit_gen.rng import keyed_generator

__all__ = ["DetectionDataModule", "KeyedBoxes", "PolicyAugment"]

Augment = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor]]


class PolicyAugment:
    """An `Augment` of a policy: anything with `sample(num_boxes, generator) -> draws` and `apply(image,
    boxes, draws, box_format="xyxy") -> (image, boxes, keep)`, such as `lit_gen.augment.Policy`. Boxes that
    `keep` (bool (N,)) denies go, and their labels with them."""

    def __init__(self, policy: Any):
        self.policy = policy

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        draws = self.policy.sample(len(boxes), generator)
        image, boxes, keep = self.policy.apply(image, boxes, draws, box_format="xyxy")
        return image, boxes[keep], labels[keep]


class KeyedBoxes(KeyedDataset):
    """A detection set read by (epoch, index) keys; `transform(image, boxes, labels, generator) -> (image,
    boxes, labels)`.

    A batch is {"image": uint8 (B, 3, S, S) if all are of one size, else a list of (3, H, W), "boxes":
    [float32 (N, 4)] and "labels": [int64 (N,)], a list entry for each image, "index": int64 (B,)}.
    """

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        items = [self._item(*k) for k in keys]
        images = [item["image"] for item in items]
        return {
            "image": torch.stack(images) if self.dataset.image_size is not None else images,
            "boxes": [item["boxes"] for item in items],
            "labels": [item["labels"] for item in items],
            "index": torch.tensor([i for _, i in keys]),
        }

    def _item(self, epoch: int, index: int) -> dict[str, Tensor]:
        item = self.dataset[index]
        if self.transform is None:
            return item
        generator = keyed_generator(self.seed, "augment", epoch, index)
        image, boxes, labels = self.transform(item["image"], item["boxes"], item["labels"], generator)
        return {"image": image, "boxes": boxes, "labels": labels}


class DetectionDataModule(pl.LightningDataModule):
    """Training batches without end and a pass over the test images, in the order of `lit_gen.data.keyed`.

    `train` and `test` are detection sets with the same classes, or functions that make one. `augment(image,
    boxes, labels, generator) -> (image, boxes, labels)` changes training images only and keeps their size
    where `image_size` is set. Batches are those of `KeyedBoxes`, images as float32 in [-1, 1]. `image_size`,
    `num_classes`: what the configuration says of the data; `check` holds them to it.
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        batch_size: int = 16,
        num_workers: int = 0,
        augment: Augment | None = None,
        seed: int = 0,
        pin_memory: bool = True,
        image_size: int | None = None,
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
        self.said = {"image_size": image_size, "num_classes": num_classes}

    def dataset(self, split: str) -> Any:
        """The "train" or "test" set, made on first use."""
        if split not in self._sets:
            source = self._sources[split]
            self._sets[split] = source() if callable(source) else source
        return self._sets[split]

    @property
    def train(self) -> Any:
        return self.dataset("train")

    @property
    def test(self) -> Any:
        return self.dataset("test")

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    def check(self, world_size: int = 1) -> None:
        """Raises ConfigError for what would fail later: classes, batch size or a configuration that do not
        fit."""
        KeyedBatches(len(self.train), self.batch_size, world_size=world_size)
        if self.train.classes != self.test.classes:
            raise ConfigError(
                f"Training classes {self.train.classes} and test classes {self.test.classes} differ:"
                " give both sets the same `classes`."
            )
        true = {"image_size": self.train.image_size, "num_classes": len(self.train.classes)}
        for name, value in self.said.items():
            if value is not None and value != true[name]:
                raise ConfigError(f"data.{name}={value}, but the training set has {true[name]}.")

    def train_dataloader(self) -> DataLoader:
        rank, world_size, start = 0, 1, 0
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            start = getattr(self.trainer.lightning_module, "batches_seen", 0)
        batches = KeyedBatches(
            len(self.train), self.batch_size, self.seed, rank=rank, world_size=world_size, start=start
        )
        return self._loader(KeyedBoxes(self.train, self.augment, self.seed), batches)

    def val_dataloader(self) -> DataLoader:
        """The test images once, rank r of W taking every W-th."""
        rank, world_size = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        )
        size = max(self.batch_size // world_size, 1)
        keys = [(0, i) for i in range(rank, len(self.test), world_size)]
        return self._loader(KeyedBoxes(self.test), [keys[i : i + size] for i in range(0, len(keys), size)])

    def _loader(self, dataset: KeyedBoxes, batches: Any) -> DataLoader:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=first,
            pin_memory=self.pin_memory and on_cuda,
            persistent_workers=self.num_workers > 0,
            generator=keyed_generator(self.seed, "workers"),
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        image = batch["image"]
        return batch | {
            "image": to_float(image) if isinstance(image, Tensor) else [to_float(x) for x in image]
        }
