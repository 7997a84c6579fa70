"""ImageDataModule: any data set of images, in the order that (seed, step) says."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lit_gen.data.images import as_images
from lit_gen.data.keyed import KeyedBatches, KeyedDataModule, KeyedDataset
from lit_gen.errors import ConfigError
from lit_gen.images import to_float

__all__ = ["ImageDataModule"]


class ImageDataModule(KeyedDataModule):
    """A training and a test set of images.

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
        num_workers: int | str = "auto",
        augment: Callable | None = None,
        seed: int = 0,
        pin_memory: bool = True,
        image_size: int | None = None,
        channels: int | None = None,
        num_classes: int | None = None,
    ):
        super().__init__(batch_size, num_workers, seed, pin_memory)
        self._sources = {"train": train, "test": test}
        self._sets: dict[str, Any] = {}
        self.augment = augment
        self.said = {"image_size": image_size, "channels": channels, "num_classes": num_classes}

    def prepare_data(self) -> None:
        for split in self._sources:
            self.dataset(split)

    def dataset(self, split: str) -> Any:
        """The "train" or "test" set, made on first use."""
        if split not in self._sets:
            source = self._sources[split]
            try:
                self._sets[split] = as_images(source() if callable(source) else source)
            except (
                OSError,
                RuntimeError,
            ) as error:  # no network, no package to download with, a broken archive
                raise ConfigError(
                    f"data.{split}: the images could not be found or downloaded: {error}"
                ) from error
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

    def keyed_train(self) -> KeyedDataset:
        return KeyedDataset(self.train, self.augment, self.seed)

    def keyed_test(self) -> KeyedDataset:
        return KeyedDataset(self.test)

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        return batch | {"image": to_float(batch["image"])}
