"""DetectionDataModule: any detection set, in the order that (seed, step) says."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lit_gen.data.keyed import Key, KeyedDataset
from lit_gen.data.module import KeyedDataModule
from lit_gen.data.transforms import stacked
from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator

Augment = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor]]


@runtime_checkable
class HasPolicy(Protocol):
    """What holds a policy in `policy`."""

    policy: Any


class PolicyAugment:
    """An `Augment` of a policy: anything with `sample(num_boxes, generator) -> draws` and
    `apply_batch(images, boxes, draws, box_format="xyxy"[, partners]) -> (images, boxes, keeps)`, such as
    `lit_gen.augment.Policy`. Boxes that their `keep` (bool (N,)) denies go, and their labels with them.

    With each image of a policy that has ops which take others, such as Mosaic, go `partners` other items of
    the data set, {"image", "boxes", "labels"}; their boxes and labels come behind the image's own."""

    def __init__(self, policy: Any):
        self.policy = policy
        self.partners: int = getattr(policy, "partners", 0)

    def __call__(
        self,
        image: Tensor,
        boxes: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        partners: Sequence[Mapping[str, Tensor]] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        images, all_boxes, all_labels = self.batch(image[None], [boxes], [labels], [generator], [partners])
        return images[0], all_boxes[0], all_labels[0]

    def batch(
        self,
        images: Tensor,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        generators: Sequence[torch.Generator],
        partners: Sequence[Sequence[Mapping[str, Tensor]]] = (),
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """`__call__` of each image of a batch (B, 3, H, W), in fewer calls."""
        options: dict[str, Any] = {"box_format": "xyxy"}
        if self.partners:
            options["partners"] = partners
            labels = [
                torch.cat([own, *(x["labels"] for x in p)]) for own, p in zip(labels, partners, strict=True)
            ]
            counts = [len(row) for row in labels]
        else:
            counts = [len(b) for b in boxes]
        draws = [self.policy.sample(n, g) for n, g in zip(counts, generators, strict=True)]
        images, boxes, keeps = self.policy.apply_batch(images, boxes, draws, **options)
        pairs = zip(boxes, labels, keeps, strict=True)
        kept = [(b[keep], row[keep]) for b, row, keep in pairs]
        return images, [b for b, _ in kept], [row for _, row in kept]


class KeyedBoxes(KeyedDataset):
    """A detection set read by (epoch, index) keys; `transform(image, boxes, labels, generator) -> (image,
    boxes, labels)`. A `PolicyAugment` gets images of one size all at once, each with its own generator.

    A batch is {"image": uint8 (B, 3, S, S) if all are of one size, else a list of (3, H, W), "boxes":
    [float32 (N, 4)] and "labels": [int64 (N,)], a list entry for each image, "index": int64 (B,)}.
    """

    def read(self, keys: list[Key], purpose: str = "augment") -> dict[str, Any]:
        items = [self.dataset[i] for _, i in keys]
        rows = [[item[name] for item in items] for name in ("image", "boxes", "labels")]
        one_size, transform = self.dataset.image_size is not None, self.transform
        if transform is not None:
            generators = [keyed_generator(self.seed, purpose, *k) for k in keys]
            given: list[Any] = [*rows, generators]
            if isinstance(transform, PolicyAugment):
                given.append([self._partners(k, transform.partners) for k in keys])
            if one_size and isinstance(transform, PolicyAugment):
                rows = transform.batch(torch.stack(given[0]), *given[1:])
            else:
                changed = [transform(*row) for row in zip(*given, strict=True)]
                rows = [list(column) for column in zip(*changed, strict=True)]
        images, boxes, labels = rows
        return {"image": stacked(images) if one_size else images, "boxes": boxes, "labels": labels}

    def _partners(self, k: Key, n: int) -> list[dict[str, Tensor]]:
        """n items of the set, the same for the key (epoch, index) wherever it is read."""
        if not n:
            return []
        chosen = torch.randint(len(self), (n,), generator=keyed_generator(self.seed, "partner", *k))
        return [self.dataset[i] for i in chosen.tolist()]


class DetectionDataModule(KeyedDataModule):
    """A training and a test set of images with boxes, with the same classes.

    `augment(image, boxes, labels, generator) -> (image, boxes, labels)` changes training images only and
    keeps their size where `image_size` is set; anything with a `policy`, as `lit_gen.augment.AutoAugment`, is
    applied by `PolicyAugment`. Batches are those of `KeyedBoxes`, images as float32 in [-1, 1]. `options`:
    see `KeyedDataModule`.
    """

    keyed = KeyedBoxes

    def __init__(
        self,
        train: Any,
        test: Any,
        batch_size: int = 16,
        *,
        augment: Augment | HasPolicy | None = None,
        **options: Any,
    ):
        changed = PolicyAugment(augment.policy) if isinstance(augment, HasPolicy) else augment
        super().__init__(train, test, batch_size, augment=changed, **options)

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    def check(self, world_size: int = 1) -> None:
        """Raises ConfigError for what would fail later: classes, batch size or a configuration that do not
        fit, an augmentation that moves no boxes."""
        if self.train.classes != self.test.classes:
            raise ConfigError(
                f"Training classes {self.train.classes} and test classes {self.test.classes} differ:"
                " give both sets the same `classes`."
            )
        if self.augment is not None:
            try:
                inspect.signature(self.augment).bind("image", "boxes", "labels", "generator")
            except TypeError as error:
                raise ConfigError(
                    f"{type(self.augment).__name__} changes images alone, boxes would stay behind: take a "
                    "policy, augment=detection_v1 for one."
                ) from error
        super().check(world_size)
