"""Few-shot translation's data: disjoint source and target classes, content and class images drawn
independently.

Liu et al. 2019, section 4 (https://arxiv.org/abs/1905.01723): training sees the source classes alone; at test
time K images of a target class, the same for all methods, say what to translate into.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gen.data.keyed import Key, KeyedDataset
from lit_gen.data.reader import ON_ERROR
from lit_gen.data.transforms import Transform, transform_all
from lit_gen.errors import ConfigError, check_choice
from lit_gen.rng import key, keyed_generator


def split_classes(
    classes: Sequence[str],
    target: int | float | Sequence[str],
    source: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[list[str], list[str]]:
    """(source, target) classes without a common one, both in the order of `classes`.

    `target` is a list of names, a number of classes, or a fraction of them (a float below 1), drawn by
    `seed`; `source` a list, or None for all the others. Raises ConfigError for unknown classes, a class on
    both sides, and an empty side.
    """
    drawn = _drawn(classes, target, seed) if isinstance(target, int | float) else [str(c) for c in target]
    rest = [c for c in classes if c not in drawn] if source is None else [str(c) for c in source]
    if unknown := [c for c in [*drawn, *rest] if c not in classes]:
        raise ConfigError(
            f"Unknown class {unknown[0]!r}; the {len(classes)} there are begin with {', '.join(classes[:5])}."
        )
    if both := [c for c in rest if c in drawn]:
        raise ConfigError(
            f"Class {both[0]!r} is both source and target; a few-shot target must be unseen in training."
        )
    if not drawn or not rest:
        raise ConfigError(
            f"{len(rest)} source and {len(drawn)} target classes: there must be at least one of each."
        )
    return [c for c in classes if c in rest], [c for c in classes if c in drawn]


def _drawn(classes: Sequence[str], target: int | float, seed: int) -> list[str]:
    number = target if isinstance(target, int) else round(target * len(classes))
    if not 0 < number < len(classes) or (isinstance(target, float) and not target < 1):
        raise ConfigError(
            f"target={target}: give a number below the {len(classes)} classes, a fraction, or their names."
        )
    return sorted(classes, key=lambda name: key(seed, "target", name))[:number]


class Selection:
    """Some images of a data set under new class numbers; `indices[i]` is image i's number there.

    `transform(image, None)` (deterministic: a center crop, say) is applied to every image.
    """

    def __init__(
        self,
        base: Any,
        indices: Sequence[int] | Tensor,
        labels: Sequence[int] | Tensor,
        classes: Sequence[str],
        transform: Transform | None = None,
    ):
        if not len(indices):
            raise ConfigError(f"No image is left of the classes {', '.join(classes[:5])}.")
        self.base, self.transform, self.classes = base, transform, list(classes)
        self.indices, self.labels = torch.as_tensor(indices), torch.as_tensor(labels)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = dict(self.base[int(self.indices[i])])
        if self.transform is not None:
            item["image"] = self.transform(item["image"], None)
        return item | {"label": int(self.labels[i])}

    def of_class(self, label: int) -> Tensor:
        """The numbers of the images of a class, int64."""
        return (self.labels == label).nonzero()[:, 0]

    def fingerprint(self) -> str:
        chosen = key(
            *self.indices.tolist(), *self.labels.tolist(), *self.classes, repr(_describe(self.transform))
        )
        return f"{self.base.fingerprint()}-{len(self)}-{chosen:016x}"


def _describe(transform: Any) -> Any:
    """A transform's class and settings, all the way down, for fingerprints."""
    if isinstance(transform, list | tuple):
        return [_describe(t) for t in transform]
    if not hasattr(transform, "__dict__"):
        return transform
    return type(transform).__name__, sorted((k, _describe(v)) for k, v in vars(transform).items())


def select_classes(dataset: Any, classes: Sequence[str], transform: Transform | None = None) -> Selection:
    """The images of these classes, numbered in this order. Raises ConfigError where there are no classes."""
    if dataset.labels is None:
        raise ConfigError("Few-shot data need classes: a folder for each, or a dataset.json with labels.")
    number = torch.full((len(dataset.classes),), -1)
    number[[dataset.classes.index(c) for c in classes]] = torch.arange(len(classes))
    labels = number[dataset.labels]
    return Selection(dataset, (labels >= 0).nonzero()[:, 0], labels[labels >= 0], classes, transform)


def read_list(path: str | os.PathLike) -> list[str]:
    """The image names of an official list file, one "class/image" a line
    (https://github.com/NVlabs/FUNIT)."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable list of images ({error}).") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ConfigError(f"{path}: names no image; write one class/image a line.")
    if bad := [n for n in names if "/" not in n]:
        raise ConfigError(f"{path}: {bad[0]!r} is not of the form class/image.")
    return names


def select_listed(dataset: Any, path: str | os.PathLike, transform: Transform | None = None) -> Selection:
    """The images that a list file names, in its order; classes are the sorted folders of that list, as in the
    official code.

    `dataset` is an `ImageFiles`. Raises ConfigError for an image that is not there.
    """
    names = read_list(path)
    place = {name: i for i, name in enumerate(dataset.names)}
    missing = [n for n in names if n not in place and n not in dataset.skipped]
    if missing:
        raise ConfigError(
            f"{path}: {missing[0]} is not in {dataset.store.path}"
            f" ({len(missing)} of {len(names)} are missing)."
        )
    names = [n for n in names if n in place]
    folders = [n.rsplit("/", 1)[0] for n in names]
    classes = sorted(set(folders))
    number = {c: i for i, c in enumerate(classes)}
    return Selection(dataset, [place[n] for n in names], [number[f] for f in folders], classes, transform)


def examples(
    dataset: Any, k: int, seed: int = 0, on_error: str = "raise"
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """K images of every class that has them, drawn without repetition by (seed, class); those of K are among
    those of K + 1.

    Returns {class: int64 (K,)} and what was left out, {class: its number of images}. Unless
    `on_error="skip"` a class of fewer than K images is a ConfigError.
    """
    check_choice("on_error", on_error, ON_ERROR)
    if k < 1:
        raise ConfigError(f"k={k}: at least one image must show the target class.")
    members = {name: (dataset.labels == i).nonzero()[:, 0] for i, name in enumerate(dataset.classes)}
    left_out = {name: len(some) for name, some in members.items() if len(some) < k}
    if left_out and on_error != "skip":
        name, count = next(iter(left_out.items()))
        raise ConfigError(
            f"Class {name!r} has {count} images, k={k} are asked for:"
            " lower k, or set on_error=skip (of a training data.on_error=skip) to leave it out."
        )
    chosen = {}
    for name in [name for name in members if name not in left_out]:
        generator = keyed_generator(seed, "examples", name)
        chosen[name] = members[name][torch.randperm(len(members[name]), generator=generator)[:k]]
    return chosen, left_out


class KeyedPairs(KeyedDataset):
    """A training batch of FUNIT: content images, and as many class images drawn independently of them from
    the same set.

    In every epoch each image serves once as content and once as class image, in two independent orders: that
    of the sampler, and the permutation keyed by (seed, "class image", epoch). Batches: {"content", "classes":
    uint8 (B, C, H, W), "content_label", "class_label", "index", "class_index": int64 (B,)}. With
    `same_class_target` also "same_class", uint8 (B, C, H, W): of each content image's class another image,
    drawn by (seed, epoch, index). With `content_augment` also "content_view", uint8 (B, C, H, W): the content
    images after it. With `style_images` K also "style", uint8 (B, K, C, H, W): of each content image's
    class K other images, drawn likewise without repetition.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Transform | None = None,
        seed: int = 0,
        same_class_target: bool = False,
        content_augment: Transform | None = None,
        style_images: int = 0,
    ):
        super().__init__(dataset, transform, seed)
        self.content_augment, self.style_images = content_augment, style_images
        self.same_class_target = same_class_target
        self._order: tuple[int, Tensor] | None = None
        self._members: dict[int, list[int]] = {}
        others = max(int(same_class_target), style_images)
        for i, label in enumerate(dataset.labels.tolist() if others else []):
            self._members.setdefault(label, []).append(i)
        if few := [c for c, some in self._members.items() if len(some) <= others]:
            option = f"style_images={others}" if style_images else "same_class_target=true"
            raise ConfigError(
                f"Class {dataset.classes[few[0]]!r} has {len(self._members[few[0]])} images; "
                f"data.{option} needs {others + 1} of each."
            )

    def partner(self, epoch: int, index: int) -> int:
        """The class image that goes with content image `index`: a bijection in each epoch."""
        if self._order is None or self._order[0] != epoch:
            generator = keyed_generator(self.seed, "class image", epoch)
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        return int(self._order[1][index])

    def sibling(self, epoch: int, index: int) -> int:
        """Another image of the class of image `index`."""
        others = [i for i in self._members[int(self.dataset.labels[index])] if i != index]
        return others[key(self.seed, "own class image", epoch, index) % len(others)]

    def style_numbers(self, epoch: int, index: int) -> list[int]:
        """`style_images` other images of the class of image `index`."""
        others = [i for i in self._members[int(self.dataset.labels[index])] if i != index]
        generator = keyed_generator(self.seed, "style images", epoch, index)
        order = torch.randperm(len(others), generator=generator)[: self.style_images]
        return [others[i] for i in order.tolist()]

    def __getitems__(self, keys: list[Key]) -> dict[str, Tensor]:
        # What random numbers are keyed by keeps its words: a run that is resumed draws what it drew before.
        partners = [(epoch, self.partner(epoch, i)) for epoch, i in keys]
        content, classes = self.read(keys), self.read(partners, "augment class image")
        batch = {
            "content": content["image"],
            "content_label": content["label"],
            "classes": classes["image"],
            "class_label": classes["label"],
            "index": torch.tensor([i for _, i in keys]),
            "class_index": torch.tensor([i for _, i in partners]),
        }
        if self.style_images:
            own = [(epoch, j) for epoch, i in keys for j in self.style_numbers(epoch, i)]
            images = self.read(own, "augment style images")["image"]
            batch["style"] = images.unflatten(0, (len(keys), -1))
        if self.same_class_target:
            siblings = [(epoch, self.sibling(epoch, i)) for epoch, i in keys]
            batch["same_class"] = self.read(siblings, "augment own class image")["image"]
        if self.content_augment is not None:
            generators = [keyed_generator(self.seed, "restyle", *k) for k in keys]
            batch["content_view"] = transform_all(self.content_augment, batch["content"], generators)
        return batch
