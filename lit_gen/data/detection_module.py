"""DetectionDataModule: any detection set, in the order that (seed, step) says."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lit_gen.data.keyed import KeyedBatches, KeyedDataModule, KeyedDataset
from lit_gen.errors import ConfigError
from lit_gen.images import to_float
from lit_gen.rng import keyed_generator

__all__ = ["DetectionDataModule", "KeyedBoxes", "PolicyAugment"]

Augment = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor]]


@runtime_checkable
class HasPolicy(Protocol):
    policy: Any


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

    def batch(
        self,
        images: Tensor,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """`__call__` of each image of a batch (B, 3, H, W), in fewer calls."""
        draws = [self.policy.sample(len(b), g) for b, g in zip(boxes, generators, strict=True)]
        images, boxes, keeps = self.policy.apply_batch(images, boxes, draws, box_format="xyxy")
        pairs = zip(boxes, labels, keeps, strict=True)
        kept = [(b[keep], row[keep]) for b, row, keep in pairs]
        return images, [b for b, _ in kept], [row for _, row in kept]


class KeyedBoxes(KeyedDataset):
    """A detection set read by (epoch, index) keys; `transform(image, boxes, labels, generator) -> (image,
    boxes, labels)`. One that has a `batch`, as `PolicyAugment`, gets images of one size all at once, each
    with its own generator.

    A batch is {"image": uint8 (B, 3, S, S) if all are of one size, else a list of (3, H, W), "boxes":
    [float32 (N, 4)] and "labels": [int64 (N,)], a list entry for each image, "index": int64 (B,)}.
    """

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        items = [self.dataset[i] for _, i in keys]
        images, boxes, labels = ([item[name] for item in items] for name in ("image", "boxes", "labels"))
        one_size = self.dataset.image_size is not None
        if self.transform is not None:
            generators = [keyed_generator(self.seed, "augment", *k) for k in keys]
            transform: Any = self.transform
            if one_size and hasattr(transform, "batch"):
                images, boxes, labels = transform.batch(torch.stack(images), boxes, labels, generators)
            else:
                rows = zip(images, boxes, labels, generators, strict=True)
                images, boxes, labels = zip(*(transform(*row) for row in rows), strict=True)
        return {
            "image": torch.stack(list(images)) if one_size and not isinstance(images, Tensor) else images,
            "boxes": list(boxes),
            "labels": list(labels),
            "index": torch.tensor([i for _, i in keys]),
        }


class DetectionDataModule(KeyedDataModule):
    """A training and a test set of images with boxes.

    `train` and `test` are detection sets with the same classes, or functions that make one. `augment(image,
    boxes, labels, generator) -> (image, boxes, labels)` changes training images only and keeps their size
    where `image_size` is set; anything with a `policy`, as `lit_gen.augment.AutoAugment`, is applied by
    `PolicyAugment`. Batches are those of `KeyedBoxes`, images as float32 in [-1, 1]. `image_size`,
    `num_classes`: what the configuration says of the data; `check` holds them to it.
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        batch_size: int = 16,
        num_workers: int | str = "auto",
        augment: Augment | HasPolicy | None = None,
        seed: int = 0,
        pin_memory: bool = True,
        image_size: int | None = None,
        num_classes: int | None = None,
    ):
        super().__init__(batch_size, num_workers, seed, pin_memory)
        self._sources = {"train": train, "test": test}
        self._sets: dict[str, Any] = {}
        self.augment = PolicyAugment(augment.policy) if isinstance(augment, HasPolicy) else augment
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
        if self.augment is not None:
            try:
                inspect.signature(self.augment).bind("image", "boxes", "labels", "generator")
            except TypeError as error:
                raise ConfigError(
                    f"{type(self.augment).__name__} changes images alone, boxes would stay behind: take a "
                    "policy, augment=detection_v1 for one."
                ) from error
        _ = self.keyed_train()[0, 0]  # an augmentation that refuses boxes says so

    def keyed_train(self) -> KeyedBoxes:
        return KeyedBoxes(self.train, self.augment, self.seed)

    def keyed_test(self) -> KeyedBoxes:
        return KeyedBoxes(self.test)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        image = batch["image"]
        return batch | {
            "image": to_float(image) if isinstance(image, Tensor) else [to_float(x) for x in image]
        }
