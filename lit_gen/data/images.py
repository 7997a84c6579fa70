"""What a data set of images is, and how any other data set becomes one.

`ds[i] -> {"image": (C, H, W) as it is stored, "label": int}`, without randomness; `ds.pixels`, the type and
range of the values (`lit_gen.images.Pixels`; without it they are bytes), and `ds.shape`, (C, H, W) (without
it that of the first image); `ds.labels` (int64 (N,)) or None, `ds.classes`, and `ds.fingerprint()`, a name
for caches that changes when the content does.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lit_gen.errors import ConfigError, check_choice
from lit_gen.images import BYTES, Pixels
from lit_gen.rng import key

PARTS = ("all", "train", "test")


def pixels_of(dataset: Any) -> Pixels:
    """The type and range of a data set's values."""
    return getattr(dataset, "pixels", BYTES)


def shape_of(dataset: Any) -> tuple[int, int, int]:
    """(C, H, W) of a data set's images."""
    return tuple(getattr(dataset, "shape", None) or dataset[0]["image"].shape)


class TensorImages:
    """Images that live in memory, (N, C, H, W) of the type of `pixels`, which are looked through for values
    that are no numbers or out of its range."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        name: str = "tensor",
        pixels: Pixels = BYTES,
    ):
        if images.dtype != pixels.torch_dtype or images.ndim != 4:
            raise ConfigError(
                f"images must be {pixels.dtype} (N, C, H, W), got {images.dtype} {tuple(images.shape)}."
            )
        for some in images.split(4096):
            pixels.check(some, name)
        self.images, self.labels, self.classes, self.name = images, labels, list(classes), name
        self.pixels, self.shape = pixels, tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": self.images[i], "label": 0 if self.labels is None else int(self.labels[i])}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Rows at once: {"image": (B, C, H, W), "label": int64 (B,)}."""
        i = torch.as_tensor(indices)
        label = torch.zeros(len(i), dtype=torch.int64) if self.labels is None else self.labels[i]
        return {"image": self.images.index_select(0, i), "label": label}  # of bytes 20 times faster than [i]

    def fingerprint(self) -> str:
        extra = [] if self.pixels.are_bytes else [f"{self.shape} {self.pixels}"]
        return fingerprint(self.name, len(self), [self.images.numpy().tobytes(), *extra])


class WrappedImages:
    """Any data set of (picture, class index), such as torchvision's, under our contract.

    Pictures may be PIL images, uint8 arrays (H, W[, C]) or uint8 tensors (C, H, W).
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        targets = getattr(dataset, "targets", getattr(dataset, "labels", None))
        self.labels = None if targets is None else torch.as_tensor(targets).to(torch.int64)
        self.classes = [str(c) for c in getattr(dataset, "classes", [])]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        picture, label = self.dataset[i]
        return {"image": _to_chw(picture), "label": int(label)}

    def fingerprint(self) -> str:
        probe = np.linspace(0, len(self) - 1, min(len(self), 64)).astype(int).tolist()
        pixels = (self[i]["image"].numpy().tobytes() for i in probe)
        return fingerprint(type(self.dataset).__name__, len(self), pixels)


def fingerprint(name: str, size: int, content: Iterable[bytes | str]) -> str:
    """A name for caches of a data set of `size` images, that changes with its content."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
    return f"{name}-{size}-{digest.hexdigest()[:16]}"


def as_images(dataset: Any) -> Any:
    """The data set itself if it keeps the contract, else wrapped; an empty one is refused."""
    if len(dataset) == 0:
        raise ConfigError(f"{type(dataset).__name__} has no images.")
    return dataset if isinstance(dataset[0], dict) else WrappedImages(dataset)


def rows_of(dataset: Any, indices: Sequence[int]) -> dict[str, Any]:
    """The images of a data set, (B, C, H, W), or a list of (C, H, W) if they were read one by one, and
    whatever comes with them."""
    if hasattr(dataset, "batch"):
        return dataset.batch(indices)
    items = [dataset[i] for i in indices]
    others = [{name: value for name, value in item.items() if name != "image"} for item in items]
    return default_collate(others) | {"image": [item["image"] for item in items]}


def batches(dataset: Any, parts: Iterable[range]) -> Iterator[tuple[range, Tensor, Tensor | None]]:
    """A data set's images by parts: the rows, their images, (B, C, H, W), and their labels, int64 (B,), if it
    has any."""
    for rows in parts:
        images = rows_of(dataset, rows)["image"]
        images = images if isinstance(images, Tensor) else torch.stack(images)
        yield rows, images, None if dataset.labels is None else dataset.labels[rows.start : rows.stop]


def _to_chw(picture: Any) -> Tensor:
    image = picture
    if not isinstance(picture, Tensor):
        array = np.asarray(picture)
        image = torch.from_numpy(np.array(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)))
    if image.dtype != torch.uint8:
        raise ConfigError(
            f"A data set gave {image.dtype} pixels; "
            "lit_gen wants uint8 (leave ToTensor and Normalize out of its transform)."
        )
    return image


def part_of(
    names: Sequence[str], labels: Sequence[int] | None, part: str, fraction: float, seed: int
) -> list[int]:
    """The rows of `names` in a part, "all", "train", or "test", of a split per class that depends on `seed`
    and the name alone, `fraction` of it test."""
    check_choice("part", part, PARTS)
    if part == "all":
        return list(range(len(names)))
    if not 0 < fraction < 1:
        raise ConfigError(f"test_fraction={fraction}: must lie between 0 and 1.")
    by_class: dict[int, list[int]] = {}
    for i, label in enumerate(labels or [0] * len(names)):
        by_class.setdefault(label, []).append(i)
    test: set[int] = set()
    for members in by_class.values():
        drawn = sorted(members, key=lambda i: key(seed, "test", names[i]))
        test.update(drawn[: max(1, round(fraction * len(members)))] if len(members) > 1 else [])
    return [i for i in range(len(names)) if (i in test) == (part == "test")]
