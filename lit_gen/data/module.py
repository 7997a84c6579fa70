"""KeyedDataModule: a training and a test set, read in the order that (seed, step) says."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_gen.data.conditions import ConditionedImages, Downsample, conditioned
from lit_gen.data.images import as_images, pixels_of
from lit_gen.data.keyed import KeyedBatches, KeyedDataset, Order, stored
from lit_gen.errors import ConfigError
from lit_gen.images import BYTES, Pixels
from lit_gen.rng import keyed_generator

if TYPE_CHECKING:
    from lit_gen.data.sound import LogMel


class KeyedDataModule(pl.LightningDataModule):
    """Training batches without end and a pass over the test images, both the same for any number of workers
    and devices.

    `train` and `test` are data sets (see `lit_gen.data.images`; torchvision's are wrapped) or functions that
    make one, called first on one process alone, so that a download happens once. `augment` changes training
    images only; see `lit_gen.data.keyed`. `image_size` (a number, or [height, width]), `channels`,
    `num_classes`, `dtype`, `range`, and `shown` (`lit_gen.images.Pixels`) are what the configuration says of
    the data, by which networks are built; `check` holds the batches to it.

    `batch_size` counts the images of all devices together. `num_workers` processes a device prepare batches;
    "auto": none where batches are looked up in memory or where the CPU trains and needs its cores itself,
    else all but one of the cores that a device has, 8 at most.

    A subclass says in `keyed` how a batch is made, and in `image_key` which of its entries has the format
    that the network is built for. "image" arrives on the device as float32 in [-1, 1] by the data set's
    pixels, every other uint8 entry by those of bytes.
    """

    keyed: ClassVar[type[KeyedDataset]] = KeyedDataset
    image_key: ClassVar[str] = "image"
    sound: "LogMel | None" = None  # of images that are pictures of sounds

    def __init__(
        self,
        train: Any,
        test: Any,
        batch_size: int = 128,
        num_workers: int | str = "auto",
        augment: Callable[..., Any] | None = None,
        seed: int = 0,
        pin_memory: bool = True,
        image_size: int | Sequence[int] | None = None,
        channels: int | None = None,
        num_classes: int | None = None,
        dtype: str = "uint8",
        range: Sequence[float] | None = None,
        shown: Sequence[int] | None = None,
    ):
        super().__init__()
        if num_workers != "auto" and not (isinstance(num_workers, int) and num_workers >= 0):
            raise ConfigError(
                f"data.num_workers={num_workers}: must be auto, or 0 (load in the main process) or more."
            )
        self.batch_size, self.num_workers, self.augment = batch_size, num_workers, augment
        self.seed, self.pin_memory = seed, pin_memory
        size = image_size if image_size is None or isinstance(image_size, int) else list(image_size)
        size = size[0] if isinstance(size, list) and len(set(size)) == 1 else size
        self.expected = {"image_size": size, "channels": channels, "num_classes": num_classes}
        self.pixels = Pixels(dtype, range, shown)
        self._sources = {"train": train, "test": test}
        self._sets: dict[str, Any] = {}
        self._order: str | None = None  # of the training images, once they are read

    def prepare_data(self) -> None:
        for split in self._sources:
            self.dataset(split)

    def dataset(self, split: str) -> Any:
        """The "train" or "test" set, made on first use."""
        if split not in self._sets:
            try:
                self._sets |= self.make(split)
            except (OSError, RuntimeError) as error:  # no network, no package to download with, broken files
                raise ConfigError(
                    f"data.{split}: the images could not be found or downloaded: {error}"
                ) from error
        return self._sets[split]

    def make(self, split: str) -> dict[str, Any]:
        """The sets by split: this one, and others that are made along with it."""
        source = self._sources[split]
        return {split: as_images(source() if callable(source) else source)}

    @property
    def train(self) -> Any:
        return self.dataset("train")

    @property
    def test(self) -> Any:
        return self.dataset("test")

    def keyed_train(self) -> KeyedDataset:
        """What training batches are read from."""
        return self.keyed(self.train, self.augment, self.seed)

    def keyed_test(self) -> KeyedDataset:
        """What validation batches are read from."""
        return self.keyed(self.test)

    def check(self, world_size: int = 1) -> None:
        """Raises ConfigError for what would fail later: empty sets, a batch size that does not fit, images
        or classes other than the configuration says."""
        KeyedBatches(len(self.train), self.batch_size, world_size=world_size)
        train = _format(self.keyed_train()[0, 0][self.image_key])
        true = train | ({"num_classes": len(self.train.classes)} if self.train.classes else {})
        for name, value in true.items():
            if self.expected[name] not in (None, value):
                raise ConfigError(
                    f"data.{name}={self.expected[name]}, but the training images have {name} {value}: "
                    f"set data.{name}={str(value).replace(' ', '')}."
                )
        if (test := _format(self.keyed_test()[0, 0]["image"])) != train:
            raise ConfigError(f"Training images have {_words(train)}, test images {_words(test)}.")
        for split in ("train", "test"):
            self.check_pixels(split)

    def check_pixels(self, split: str) -> None:
        """Raises ConfigError for images that are stored in another way than the configuration says."""
        found = pixels_of(self.dataset(split))
        if (found.dtype, found.range) != (self.pixels.dtype, self.pixels.range):
            raise ConfigError(
                f"The {split} images are {found.dtype} of [{found.low:g},{found.high:g}], not "
                f"{self.pixels.dtype} of [{self.pixels.low:g},{self.pixels.high:g}] as the configuration "
                f"says: set data.dtype={found.dtype} data.range=[{found.low:g},{found.high:g}]."
            )

    def train_dataloader(self) -> DataLoader:
        # The count of batches seen is restored with the module, before Lightning asks for this loader.
        rank, world_size = self._place()
        start = 0 if self.trainer is None else getattr(self.trainer.lightning_module, "batches_seen", 0)
        dataset = self.keyed_train()
        order = self._resumed_order(dataset) if start else dataset.order
        self._order = order.__name__
        batches = KeyedBatches(
            len(dataset),
            self.batch_size,
            self.seed,
            rank=rank,
            world_size=world_size,
            start=start,
            order=order,
        )
        return self._loader(dataset, batches)

    def _resumed_order(self, dataset: KeyedDataset) -> Order:
        """The order in which the run has read its images so far. Raises ConfigError where the data are no
        longer read in it."""
        if self._order in (None, stored.__name__):  # runs of before the permutation do not say
            return stored
        if self._order != dataset.order.__name__:
            raise ConfigError(
                f"The run has read its images in the order {self._order!r}, and these are read in the order "
                f"{dataset.order.__name__!r}: resume it with data.path and data.window as they were."
            )
        return dataset.order

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._order = state_dict["order"]

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

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return {name: _floats(x, self.pixels if name == "image" else BYTES) for name, x in batch.items()}

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
            collate_fn=as_it_is,
            pin_memory=self.pin_memory and on_cuda,
            persistent_workers=workers > 0,
            generator=keyed_generator(self.seed, "workers"),  # iter() must not draw from the global generator
        )


class ImageDataModule(KeyedDataModule):
    """Images with their labels: {"image": float32 (B, C, H, W) in [-1, 1], "label", "index"[,
    "augment_label", "vector", "condition_image"]}.

    `condition` says what else is known of the images: options of `lit_gen.data.conditions.conditioned`,
    which reads it from files. Where `vector` or `image` is no path it is computed from a batch as the model
    gets it, augmented: a function of float32 (B, C, H, W) in [-1, 1], to (B, V) or (B, c, h, w);
    `image={downsample: k}` is the means of k x k pixels.
    """

    def __init__(self, *args: Any, condition: Mapping[str, Any] | None = None, **options: Any):
        super().__init__(*args, **options)
        self._read, self._computed = dict(condition or {}), {}
        for name, key in (("vector", "vector"), ("image", "condition_image")):
            source = self._read.get(name)
            if source is not None and not isinstance(source, str):
                del self._read[name]
                self._computed[key] = _downsample(source) if isinstance(source, Mapping) else source
        if self.augment is not None and self._read.get("image"):
            raise ConfigError(
                "data.augment changes images and not their condition images, which are files: leave it out."
            )

    def make(self, split: str) -> dict[str, Any]:
        return {name: conditioned(some, **self._read) for name, some in super().make(split).items()}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return batch | {name: function(batch["image"]) for name, function in self._computed.items()}

    def vectors(self) -> Tensor | None:
        """Of the training images, (N, V), where there are any: of all if a table has them, else of at most
        10,000, evenly spread."""
        if isinstance(self.train, ConditionedImages) and self.train.vectors is not None:
            return self.train.vectors
        first = self._at("train", [0])
        if "vector" not in first:
            return None
        chosen = torch.linspace(0, len(self.train) - 1, min(len(self.train), 10_000)).round().long()
        return torch.cat([self._at("train", part.tolist())["vector"] for part in chosen.split(256)])

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What is known of the test images of these numbers, modulo how many there are: {"label": int64 (B,)}
        and, where there are any, "vector" (B, V) and "condition_image" (B, C, h, w) in [-1, 1]."""
        batch = self._at("test", [i % len(self.test) for i in indices])
        return {name: batch[name] for name in ("label", "vector", "condition_image") if name in batch}

    def _at(self, split: str, indices: Sequence[int]) -> dict[str, Tensor]:
        """Images of a split as a model gets them, on the CPU."""
        batch = self.keyed(self.dataset(split)).read([(0, int(i)) for i in indices])
        return self.on_after_batch_transfer(batch, 0)


def _downsample(source: Mapping[str, Any]) -> Downsample:
    if set(source) != {"downsample"}:
        raise ConfigError(f"data.condition={dict(source)}: give a path, {{downsample: 2}}, or a _target_.")
    return Downsample(source["downsample"])


def _format(image: Tensor | list[Tensor]) -> dict[str, Any]:
    """What a network has to know of a batch's images; images that differ in size (a list) have none."""
    size = None
    if isinstance(image, Tensor):
        h, w = image.shape[-2:]
        size = h if h == w else [h, w]
    return {"image_size": size, "channels": image[0].shape[0]}


def _words(image_format: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in image_format.items())


def _floats(value: Any, pixels: Pixels) -> Any:
    if isinstance(value, list):
        return [_floats(item, pixels) for item in value]
    return pixels.to_model(value) if value.dtype == pixels.torch_dtype else value


def _spare_cores(num_devices: int) -> int:
    """Cores of this machine for each of its devices but one, from 1 to 8."""
    if own := os.environ.get("SLURM_CPUS_PER_TASK"):  # a task is a device's process
        cores = int(own)
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0)) // num_devices
    else:
        cores = (os.cpu_count() or 1) // num_devices
    return min(max(cores - 1, 1), 8)


def as_it_is(batch: Any) -> Any:
    """Collates nothing: a KeyedDataset makes whole batches."""
    return batch
