"""FewShotDataModule: pairs of source images to train on, target classes to translate into."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_gen.data.fewshot import KeyedPairs, Selection, examples, select_classes, select_listed, split_classes
from lit_gen.data.images import pixels_of
from lit_gen.data.module import KeyedDataModule
from lit_gen.data.reader import ON_ERROR
from lit_gen.data.transforms import Transform
from lit_gen.errors import ConfigError, check_choice
from lit_gen.rng import keyed_generator


class FewShotDataModule(KeyedDataModule):
    """Source classes to train on, target classes to translate into.

    - `images`: a data set with classes (see `lit_gen.data.images`), or a function that makes one.
    - `target`, `source`: see `split_classes`; or `train_list`, `test_list`: official list files (`images` an
      `ImageFiles`).
    - `split_seed` draws the target classes, their examples and the content images, so that runs of other
      `seed` can be compared.
    - `view(image, None)`: what makes every use of an image of its size but in training (official: the center
      crop; `augment` of the training images: flip, crop of 128 out of 140).
    - `same_class_target`: training batches hold another image of each content image's class, "same_class",
      from which the reconstruction then takes the class (see `lit_gen.funit.step.run_generator`; paper:
      false).
    - `content_augment(image, generator)`: makes "content_view", what the content encoder sees in place of a
      training batch's content image (paper: null).
    - `style_images`: training batches hold so many other images of each content image's class,
      "style", which a score model takes the style from (`lit_gen.score.translation`).
    - `on_error`: "skip" leaves out target classes of fewer than K images; those, and images that a folder
      has left out, are counted in a warning. Otherwise such a class is a ConfigError.
    - `options`: see `KeyedDataModule`; `num_classes` is that of the source.

    `train` and `test` are the source and the target images under `view`, each with its own class numbers from
    0; `classes` names all, sources first, so that source class s is class s of all and target class t is
    class `len(train.classes) + t`. Training batches are those of `KeyedPairs` in [-1, 1]; validation batches
    the target images, {"image", "label", "index"}.
    """

    image_key = "content"

    def __init__(
        self,
        images: Any,
        target: int | float | Sequence[str] = 0.2,
        source: Sequence[str] | None = None,
        train_list: str | None = None,
        test_list: str | None = None,
        batch_size: int = 64,  # the paper's, over 8 devices
        view: Transform | None = None,
        split_seed: int = 0,
        same_class_target: bool = False,
        content_augment: Transform | None = None,
        style_images: int = 0,
        on_error: str = "raise",
        **options: Any,
    ):
        super().__init__(images, images, batch_size, **options)
        check_choice("on_error", on_error, ON_ERROR)
        if (train_list is None) != (test_list is None):
            raise ConfigError("train_list and test_list go together: give both, or neither and say target=.")
        self._lists = None if train_list is None or test_list is None else (train_list, test_list)
        self._target, self._source, self.split_seed = target, source, split_seed
        self.view, self.on_error = view, on_error
        self.pair_options = {
            "same_class_target": same_class_target,
            "content_augment": content_augment,
            "style_images": style_images,
        }

    def make(self, split: str) -> dict[str, Selection]:
        images = super().make(split)[split]
        if self._lists is not None:
            train, test = (select_listed(images, path, self.view) for path in self._lists)
            if both := set(train.classes) & set(test.classes):
                raise ConfigError(f"Class {min(both)!r} is in both {' and '.join(self._lists)}.")
        else:
            names = split_classes(images.classes, self._target, self._source, self.split_seed)
            train, test = (select_classes(images, some, self.view) for some in names)
        return {"train": train, "test": test}

    @property
    def classes(self) -> list[str]:
        return self.train.classes + self.test.classes

    def check(self, world_size: int = 1) -> None:
        """Raises ConfigError for what would fail later: empty sides, a batch size or a configuration that
        does not fit."""
        if skipped := getattr(self.train.base, "skipped", None):
            rank_zero_warn(f"{len(skipped)} unreadable images are left out, {next(iter(skipped))} for one.")
        if not (stored := pixels_of(self.train.base)).are_bytes:
            raise ConfigError(
                f"data.images are {stored.dtype} of [{stored.low:g},{stored.high:g}]; few-shot translation "
                "takes pictures, uint8 of all of 0 to 255."
            )
        super().check(world_size)

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
        seed, size = self.split_seed if seed is None else seed, len(self.train)
        rounds = [keyed_generator(seed, "contents", r) for r in range(n // size + 1)]
        return torch.cat([torch.randperm(size, generator=g) for g in rounds])[:n]

    def truth(self, content: int, target: str) -> Tensor | None:
        """The true translation of source image `content` into a class, uint8 (C, H, W), where the data know
        it (glyphs)."""
        base = self.train.base
        if not hasattr(base, "paired"):
            return None
        image = base.paired(int(self.train.indices[content]), target)
        return image if self.view is None else self.view(image, None)

    def keyed_train(self) -> KeyedPairs:
        images = self.train
        if self.augment is not None:  # which crops, not `view`
            images = Selection(images.base, images.indices, images.labels, images.classes)
        return KeyedPairs(images, self.augment, self.seed, **self.pair_options)
