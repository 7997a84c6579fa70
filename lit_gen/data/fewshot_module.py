"""FewShotDataModule: pairs of source images to train on, target classes to translate into."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_gen.data.fewshot import KeyedPairs, Selection, examples, select_classes, select_listed, split_classes
from lit_gen.data.images import as_images
from lit_gen.data.keyed import KeyedBatches, KeyedDataModule, KeyedDataset
from lit_gen.data.reader import check_on_error
from lit_gen.data.transforms import Transform
from lit_gen.errors import ConfigError
from lit_gen.images import to_float
from lit_gen.rng import keyed_generator

__all__ = ["FewShotDataModule"]


class FewShotDataModule(KeyedDataModule):
    """Source classes to train on, target classes to translate into.

    - `images`: a data set with classes (see `lit_gen.data.images`), or a function that makes one.
    - `target`, `source`: see `split_classes`; or `train_list`, `test_list`: official list files (`images` an
      `ImageFiles`).
    - `image_size`, `channels`, `num_classes` (of the source): what the configuration says of the data;
      `check` holds them to it.
    - `split_seed` draws the target classes, their examples and the content images, so that runs of other
      `seed` can be compared.
    - `augment(image, generator)`: training images only (official: flip, crop of 128 out of 140). `view(image,
      None)`: what makes every other use of an image of its size (official: the center crop).
    - `own_class_image`: training batches hold another image of each content image's class, "own", from
      which the reconstruction then takes the class (see `lit_gen.funit.step.run_generator`; paper: false).
    - `restyle(image, generator)`: makes "seen", what the content encoder sees in place of a training
      batch's content image (paper: null).

    - `on_error`: "skip" leaves out target classes of fewer than K images; those, and images that a folder
      has left out, are counted in a warning. Otherwise such a class is a ConfigError.

    `train` and `test` are the source and the target images under `view`, each with its own class numbers from
    0; `classes` names all, sources first, so that source class s is class s of all and target class t is
    class `len(train.classes) + t`. Training batches are those of `KeyedPairs` in [-1, 1]; validation batches
    the target images, {"image", "label", "index"}.
    """

    def __init__(
        self,
        images: Any,
        target: int | float | Sequence[str] = 0.2,
        source: Sequence[str] | None = None,
        train_list: str | None = None,
        test_list: str | None = None,
        batch_size: int = 64,  # the paper's, over 8 devices
        num_workers: int | str = "auto",
        augment: Transform | None = None,
        view: Transform | None = None,
        seed: int = 0,
        split_seed: int = 0,
        pin_memory: bool = True,
        image_size: int | None = None,
        channels: int | None = None,
        num_classes: int | None = None,
        own_class_image: bool = False,
        restyle: Transform | None = None,
        on_error: str = "raise",
    ):
        super().__init__(batch_size, num_workers, seed, pin_memory)
        check_on_error(on_error)
        self.on_error = on_error
        if (train_list is None) != (test_list is None):
            raise ConfigError("train_list and test_list go together: give both, or neither and say target=.")
        self._images = images
        self._lists = None if train_list is None or test_list is None else (train_list, test_list)
        self._target, self._source = target, source
        self._sets: tuple[Selection, Selection] | None = None
        self.augment, self.view, self.split_seed = augment, view, split_seed
        self.own_class_image, self.restyle = own_class_image, restyle
        self.said = {"image_size": image_size, "channels": channels, "num_classes": num_classes}

    def prepare_data(self) -> None:
        self._split()

    def _split(self) -> tuple[Selection, Selection]:
        if self._sets is None:
            images = as_images(self._images() if callable(self._images) else self._images)
            if self._lists is not None:
                train, test = (select_listed(images, path, self.view) for path in self._lists)
                if both := set(train.classes) & set(test.classes):
                    raise ConfigError(f"Class {min(both)!r} is in both {' and '.join(self._lists)}.")
            else:
                names = split_classes(images.classes, self._target, self._source, self.split_seed)
                train, test = (select_classes(images, some, self.view) for some in names)
            self._sets = train, test
        return self._sets

    @property
    def train(self) -> Selection:
        return self._split()[0]

    @property
    def test(self) -> Selection:
        return self._split()[1]

    @property
    def classes(self) -> list[str]:
        return self.train.classes + self.test.classes

    def check(self, world_size: int = 1) -> None:
        """Raises ConfigError for what would fail later: empty sides, a batch size or a configuration that
        does not fit."""
        if skipped := getattr(self.train.base, "skipped", None):
            rank_zero_warn(f"{len(skipped)} unreadable images are left out, {next(iter(skipped))} for one.")
        KeyedBatches(len(self.train), self.batch_size, world_size=world_size)
        image = self.keyed_train()[0, 0]["content"]
        true = {
            "image_size": image.shape[-1],
            "channels": image.shape[1],
            "num_classes": len(self.train.classes),
        }
        for name, value in self.said.items():
            if value is not None and value != true[name]:
                raise ConfigError(f"data.{name}={value}: the source images have {true[name]}.")

    def examples(
        self, k: int, on_error: str | None = None, seed: int | None = None
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """K images of every target class, uint8 (K, C, H, W), and the classes left out; see the function
        `examples`. Another `seed` than `split_seed` draws others."""
        seed = self.split_seed if seed is None else seed
        chosen, left_out = examples(self.test, k, seed, on_error or self.on_error)
        if not chosen:
            raise ConfigError(f"No target class has k={k} images; the largest has {max(left_out.values())}.")
        if left_out:
            some = ", ".join(f"{name} ({n})" for name, n in list(left_out.items())[:3])
            rank_zero_warn(f"{len(left_out)} target classes have fewer than {k} images: {some} are left out.")
        return {
            c: torch.stack([self.test[int(i)]["image"] for i in some]) for c, some in chosen.items()
        }, left_out

    def example_numbers(self, k: int, seed: int | None = None) -> dict[str, Tensor]:
        """The numbers in `test` of what `examples` shows: {class: int64 (K,)}."""
        return examples(self.test, k, self.split_seed if seed is None else seed)[0]

    def contents(self, n: int, seed: int | None = None) -> Tensor:
        """The numbers in `train` of n content images drawn by `seed` (default: `split_seed`), without
        repetition as long as there are enough."""
        rounds = -(-n // len(self.train))
        seed = self.split_seed if seed is None else seed
        orders = [
            torch.randperm(len(self.train), generator=keyed_generator(seed, "contents", r))
            for r in range(rounds)
        ]
        return torch.cat(orders)[:n] if orders else torch.empty(0, dtype=torch.int64)

    def truth(self, content: int, target: str) -> Tensor | None:
        """The true translation of source image `content` into a class, uint8 (C, H, W), where the data know
        it (glyphs)."""
        base = self.train.base
        if not hasattr(base, "paired"):
            return None
        image = base.paired(int(self.train.indices[content]), target)
        return image if self.view is None else self.view(image, None)

    def keyed_train(self) -> KeyedPairs:
        source = self.train
        if self.augment is None:
            return KeyedPairs(source, seed=self.seed, own=self.own_class_image, restyle=self.restyle)
        whole = Selection(
            source.base, source.indices, source.labels, source.classes
        )  # `augment` crops, not `view`
        return KeyedPairs(whole, self.augment, self.seed, self.own_class_image, self.restyle)

    def keyed_test(self) -> KeyedDataset:
        return KeyedDataset(self.test)

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        return {
            name: to_float(value) if value.dtype == torch.uint8 else value for name, value in batch.items()
        }
