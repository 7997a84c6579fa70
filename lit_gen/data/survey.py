"""What the files of a folder or zip say of their images: number, size, channels, type, range, classes."""

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from lit_gen.data.archive import Store, open_store
from lit_gen.data.arrays import ARRAYS, FORMATS, stored_array
from lit_gen.data.folders import Listing, listing
from lit_gen.data.reader import HEADER, ImageForm, ImageReader, summary
from lit_gen.errors import ConfigError

LOOKED_AT = 256  # files, evenly spread over the names
GRAY = ("1", "L", "LA")
RANGES = ((0, 1), (-1, 1), (0, 255))
PER_CLASS = 8  # images; folders of fewer on average are no classes


@dataclass(frozen=True)
class Survey:
    """`num` files, and of some of them the `sizes` (height, width), whether they are `arrays`, their `dtype`
    and `channels`, and for floats `limits`, the lowest and the highest value. `classes`: how many folders
    are classes; 0 where they are too many or too small for that, or there are none."""

    path: Path
    num: int
    sizes: tuple[tuple[int, int], ...]
    arrays: bool
    dtype: str
    channels: int
    classes: int
    limits: tuple[float, float] | None = None

    @cached_property
    def most_common(self) -> tuple[int, int]:
        """The most frequent (height, width)."""
        return Counter(self.sizes).most_common(1)[0][0]

    @property
    def range(self) -> list[int] | None:
        """The range of the values: None for integers, else the narrowest of [0, 1], [-1, 1], and [0, 255].

        Raises ConfigError for floats that leave all of them.
        """
        if self.limits is None:
            return None
        low, high = self.limits
        for a, b in RANGES:
            if a <= low and high <= b:
                return [a, b]
        raise ConfigError(
            f"{self.path}: its values go from {low:g} to {high:g} in the files that were looked at: say "
            f"which range becomes [-1, 1], data.range=[{math.floor(low)},{math.ceil(high)}] for instance."
        )

    def size_for(self, side: int) -> int | list[int]:
        """The size to train at, with about side x side pixels or fewer: one number or [height, width],
        multiples of 4, or of 8 beyond 32. The shape is that of the images if nine in ten share it, else a
        square. Arrays, which nothing resizes, keep theirs, and so do small images of one size."""
        height, width = self.most_common
        if self.arrays or (len(set(self.sizes)) == 1 and height * width <= side**2 and _even(height, width)):
            return height if height == width else [height, width]
        typical = math.exp(median(math.log(h / w) for h, w in self.sizes))
        alike = sum(1 / 1.2 < (h / w) / typical < 1.2 for h, w in self.sizes) >= 0.9 * len(self.sizes)
        shape = typical if alike else 1.0
        smallest = min(median(h for h, _ in self.sizes), median(w for _, w in self.sizes) * shape)
        height = min(side * math.sqrt(shape), smallest)
        exact = (height, height / shape)
        step = 8 if min(exact) > 32 else 4
        sides = [max(round(x / step) * step, step) for x in exact]
        return sides[0] if sides[0] == sides[1] else sides


def survey(path: str | Path) -> Survey:
    """Looks at the headers of some pictures of a folder or zip, or at some arrays.

    Raises ConfigError where there are none, where none of the pictures or one of the arrays cannot be read,
    and where arrays differ in type or channels.
    """
    store = open_store(path)
    names, labels, classes = _listing(store)
    places = np.linspace(0, len(names) - 1, min(len(names), LOOKED_AT)).astype(int).tolist()
    looked_at = [names[i] for i in places]
    known = len(classes) if labels is not None and len(names) >= PER_CLASS * len(classes) else 0
    modes = None if names[0].lower().endswith(ARRAYS) else _modes(store, looked_at)
    if modes is None:
        return _of_arrays(store, len(names), looked_at, known)
    sizes, bad = ImageReader(store, cache_mib=0).scan(looked_at)
    if not sizes:  # some that cannot be read are the data set's to refuse, replace, or skip
        raise ConfigError(summary(list(bad.values()), "unreadable image"))
    channels = 1 if set(modes) <= set(GRAY) else 3
    return Survey(store.path, len(names), tuple(sizes.values()), False, "uint8", channels, known)


def _listing(store: Store) -> Listing:
    try:
        return listing(store, ImageForm())
    except ConfigError:
        if "dataset.json" in store.names:
            raise
        return listing(store, ImageForm(), labeled=False)  # images lie beside the folders of others


def _modes(store: Store, names: Sequence[str]) -> list[str] | None:
    """Pillow's modes of the pictures; None where they are arrays: of more than 8 bits, or TIFFs that Pillow
    does not know."""
    modes = []
    for name in names:
        mode = _mode(store.read(name, HEADER)) or _mode(store.read(name))
        if mode == "" and name.lower().endswith((".tif", ".tiff")):
            return None
        modes += [mode] if mode else []
    return None if modes and all(mode == "F" or mode.startswith("I") for mode in modes) else modes


def _mode(data: bytes) -> str:
    """Pillow's mode of a picture; empty where it cannot tell."""
    try:
        return Image.open(io.BytesIO(data)).mode
    except Exception:  # whatever decoders raise; the scan says what is wrong
        return ""


def _of_arrays(store: Store, num: int, names: Sequence[str], classes: int) -> Survey:
    if other := [name for name in names if not name.lower().endswith(FORMATS)]:
        raise ConfigError(f"{store.path}: {other[0]} has 8 bits, others more: keep one kind.")
    arrays = [stored_array(store.read(name), f"{store.path}/{name}") for name in names]
    for name, array in zip(names, arrays, strict=True):
        if array.ndim not in (2, 3):
            raise ConfigError(
                f"{store.path}/{name} is an array of shape {array.shape}, an image has two or three: keep "
                "images alone there (a set that lit-gen prepare has written goes with other experiments)."
            )
    kinds = [str(a.dtype.newbyteorder("=")) for a in arrays]
    sizes, channels = zip(*map(_shape, arrays), strict=True)
    for what, values in (("pixels of type", kinds), ("channels:", channels)):
        if other := next((i for i, value in enumerate(values) if value != values[0]), 0):
            raise ConfigError(
                f"{store.path}: {names[other]} has {what} {values[other]}, {names[0]} has {values[0]}: "
                "keep images of one kind."
            )
    limits, numbers = None, [a[np.isfinite(a)] for a in arrays if a.dtype.kind == "f"]
    if numbers := [some for some in numbers if some.size]:  # files with others are named by the scan
        limits = float(min(some.min() for some in numbers)), float(max(some.max() for some in numbers))
    return Survey(store.path, num, sizes, True, kinds[0], channels[0], classes, limits)


def _shape(array: np.ndarray) -> tuple[tuple[int, int], int]:
    """((height, width), channels) of one image: the shortest axis at either end counts the channels."""
    if array.ndim == 2:
        return (array.shape[0], array.shape[1]), 1
    last = array.shape[-1] <= array.shape[0]
    height, width = array.shape[:2] if last else array.shape[1:]
    return (height, width), array.shape[-1 if last else 0]


def _even(*sides: int) -> bool:
    return all(side % 4 == 0 for side in sides)
