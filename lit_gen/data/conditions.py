"""What is known of images beside their pixels and their class: numbers in a table, images of another kind in
files, or what is computed from the images themselves.

In a batch they are "vector", float32 (B, V), and "condition_image", (B, C, h, w), uint8 or float32 in
[-1, 1].
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lit_gen.data.archive import Store, open_store
from lit_gen.data.images import pixels_of, rows_of, shape_of
from lit_gen.data.reader import ImageReader, summary
from lit_gen.data.transforms import stacked
from lit_gen.errors import ConfigError

__all__ = ["ConditionedImages", "Downsample", "conditioned", "read_table"]

FILE, FILES = "file", "files"
"""What names the image of each row: a column of a CSV, an array of an npz (np.savez has no array "file")."""


@dataclass(frozen=True)
class Downsample:
    """The mean of each block of `factor` x `factor` pixels, (B, C, H, W) -> (B, C, H/factor, W/factor)."""

    factor: int

    def __post_init__(self):
        if self.factor < 2:
            raise ConfigError(f"data.condition.image.downsample={self.factor}: must be at least 2.")

    def __call__(self, images: Tensor) -> Tensor:
        if any(side % self.factor for side in images.shape[2:]):
            h, w = images.shape[2:]
            raise ConfigError(
                f"data.condition.image.downsample={self.factor} does not divide {h}x{w} pixels."
            )
        return avg_pool2d(images, self.factor)


class ConditionedImages:
    """A data set whose images come with rows of `vectors`, (N, V), and with `images`, the names of (N,) files
    of a reader; each None where there are none. Otherwise it is as `dataset`."""

    def __init__(
        self,
        dataset: Any,
        vectors: Tensor | None = None,
        images: tuple[ImageReader, Sequence[str]] | None = None,
    ):
        self.dataset, self.vectors, self.images = dataset, vectors, images
        self.labels, self.classes = dataset.labels, dataset.classes
        self.pixels, self.shape = pixels_of(dataset), shape_of(dataset)
        looked_up = hasattr(dataset, "batch") and not getattr(dataset, "on_disk", False)
        self.on_disk = images is not None or not looked_up
        if hasattr(dataset, "order"):
            self.order = dataset.order

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.dataset[i] | {name: rows[0] for name, rows in self._conditions([i]).items()}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Rows at once, as `lit_gen.data.images.rows_of`."""
        return rows_of(self.dataset, indices) | self._conditions(indices)

    def fingerprint(self) -> str:
        """That of the images: what is known of them is no part of it."""
        return self.dataset.fingerprint()

    def _conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.vectors is not None:
            found["vector"] = self.vectors[torch.as_tensor(indices)]
        if self.images is not None:
            reader, names = self.images
            pictures = stacked([reader.read(names[i]) for i in indices])
            assert isinstance(pictures, Tensor)  # their sizes were checked
            found["condition_image"] = (
                pictures if reader.pixels.are_bytes else reader.pixels.to_model(pictures)
            )
        return found


def conditioned(
    dataset: Any,
    *,
    vector: str | None = None,
    columns: Sequence[str] | None = None,
    image: str | None = None,
    channels: int = 1,
    image_size: Any = None,
    dtype: str = "uint8",
    range: Sequence[float] | None = None,
) -> Any:
    """The data set with what files tell of its images, or as it is where they tell nothing.

    `vector` is a CSV with a column `file` and columns of numbers, or an npz with an array `files` and arrays
    (N,) or (N, V); without these names row i is of image i of the set's file. An empty cell and NaN are not
    known. `columns` are those taken, in this order; None: all.

    `image` is a folder or zip of images with the names of the data's, endings aside. They have `channels`
    channels, and values of `dtype` and `range` (`lit_gen.images.Pixels`); pictures are cut to `image_size`, a
    number or [height, width], None: as the data's are.

    Raises ConfigError for files that cannot be read, columns that there are not, and images without a row or
    a file.
    """
    vectors = files = None
    reader = getattr(dataset, "reader", None)
    if (vector or image) and reader is not None and reader.on_error == "replace":
        raise ConfigError(
            "on_error=replace shows other images in the place of unreadable ones, of which the condition "
            "does not tell: take on_error=skip or raise."
        )
    if vector is not None:
        vectors = _vectors_of(dataset, vector, columns)
    if image is not None:
        options = {"channels": channels, "dtype": dtype, "range": range}
        files = _files_of(dataset, image, image_size, options)
    return dataset if vectors is None and files is None else ConditionedImages(dataset, vectors, files)


def read_table(
    path: str, columns: Sequence[str] | None = None, store: Store | None = None
) -> tuple[list[str], list[str], Tensor]:
    """What each row is of, the names of the columns, and their numbers, float32 (N, V); see `conditioned`.

    A path that does not exist is looked for in `store`. Raises ConfigError.
    """
    data, where = _content(path, store)
    table = _csv(data, where) if where.lower().endswith(".csv") else _npz(data, where)
    files = table.pop(FILE if where.lower().endswith(".csv") else FILES, None)
    chosen = list(table) if columns is None else list(columns)
    if unknown := [name for name in chosen if name not in table]:
        raise ConfigError(f"{where} has no column {unknown[0]!r}; it has {', '.join(table) or 'none'}.")
    if not chosen:
        raise ConfigError(f"{where} has no columns of numbers.")
    parts = [_numbers(table[name], name, where) for name in chosen]
    if len({len(part) for part in parts}) > 1:
        raise ConfigError(f"{where}: its columns have {sorted({len(part) for part in parts})} rows.")
    values = np.concatenate(parts, 1)
    names = [
        f"{name}_{k}" if p.shape[1] > 1 else name
        for name, p in zip(chosen, parts, strict=True)
        for k in range(p.shape[1])
    ]
    of = [str(i) for i in range(len(values))] if files is None else [str(f).replace("\\", "/") for f in files]
    if len(of) != len(values):
        raise ConfigError(f"{where}: {len(of)} names of files for {len(values)} rows.")
    return of, names, torch.from_numpy(values)


def _vectors_of(dataset: Any, path: str, columns: Sequence[str] | None) -> Tensor:
    store = getattr(getattr(dataset, "reader", None), "store", None)
    files, _, values = read_table(path, columns, store)
    row = {name: i for i, name in enumerate(files)}
    if len(row) < len(files):
        twice = next(name for i, name in enumerate(files) if row[name] != i)
        raise ConfigError(f"{path}: {twice} has more than one row.")
    names = _names(dataset)
    if missing := [name for name in names if name not in row]:
        raise ConfigError(
            f"{path} has no row for {len(missing)} of the {len(names)} images, {missing[0]} for one; its "
            f"first row is of {files[0] if files else 'none'}. Its column file (of an npz: files) must name "
            "each image as its folder or zip does."
        )
    return values[[row[name] for name in names]]


def _files_of(
    dataset: Any, path: str, image_size: Any, options: dict[str, Any]
) -> tuple[ImageReader, list[str]]:
    base = getattr(dataset, "reader", None)
    fitted = {} if base is None else {name: base.options[name] for name in ("image_size", "fit")}
    fitted |= {} if image_size is None else {"image_size": image_size}
    reader = ImageReader(open_store(path), **options, **fitted)
    known = {_stem(name): name for name in reader.form.chosen(reader.store.names)}
    names = _names(dataset)
    if missing := [name for name in names if _stem(name) not in known]:
        raise ConfigError(
            f"{path} has no image for {len(missing)} of the {len(names)} images, {missing[0]} for one. Its "
            "images must have the names of the data's; endings may differ."
        )
    files = [known[_stem(name)] for name in names]
    sizes, bad = reader.scan(files)
    if bad:
        raise ConfigError(summary(list(bad.values()), "unreadable condition image"))
    _, height, width = shape_of(dataset)
    first = reader.form.fitted(sizes[files[0]])
    for name in files:
        h, w = reader.form.fitted(sizes[name])
        if (h, w) != first or h > height or w > width:
            raise ConfigError(
                f"{path}/{name} is {h}x{w} (height x width): condition images are of one size, {first[0]}x"
                f"{first[1]} as the first, and at most as large as the images, {height}x{width}. "
                "data.condition.image_size cuts them to a size."
            )
    return reader, files


def _names(dataset: Any) -> list[str]:
    """What the images of a set are called: by their files, or by their numbers."""
    return list(getattr(dataset, "names", None) or map(str, range(len(dataset))))


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _content(path: str, store: Store | None) -> tuple[bytes, str]:
    if not path.lower().endswith((".csv", ".npz")):
        raise ConfigError(f"{path}: a table of vectors is a csv or an npz file.")
    file = Path(path).expanduser()
    if file.is_file():
        return file.read_bytes(), str(file)
    if store is not None and path in store.names:
        return store.read(path), f"{store.path}/{path}"
    inside = "" if store is None else f", nor is it in {store.path}"
    raise ConfigError(f"{path}: there is no such file{inside}.")


def _csv(data: bytes, where: str) -> dict[str, Any]:
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{where}: no CSV ({error}).") from error
    rows = [row for row in rows if row]
    if not rows:
        raise ConfigError(f"{where}: empty file.")
    header = [name.strip() for name in rows[0]]
    for i, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ConfigError(f"{where}: row {i} has {len(row)} cells, the header {len(header)}.")
    return {name: [row[k].strip() for row in rows[1:]] for k, name in enumerate(header)}


def _npz(data: bytes, where: str) -> dict[str, Any]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays}
    except Exception as error:  # zipfile and numpy raise many kinds
        raise ConfigError(f"{where}: no npz file of numbers and names ({error}).") from error


def _numbers(column: Any, name: str, where: str) -> np.ndarray:
    """float32 (N, V)"""
    if isinstance(column, list):
        values = np.empty(len(column))
        for i, cell in enumerate(column):
            try:
                values[i] = float(cell) if cell else np.nan
            except ValueError as error:
                raise ConfigError(f"{where}: row {i + 2}, column {name!r}: {cell!r} is no number.") from error
    elif column.ndim not in (1, 2) or column.dtype.kind not in "fiub":
        raise ConfigError(
            f"{where}: {name!r} is {column.dtype} of shape {column.shape}, not numbers (N,) or (N, V)."
        )
    else:
        values = column
    values = values.reshape(len(values), -1).astype(np.float32)
    if np.isinf(values).any():
        raise ConfigError(f"{where}: column {name!r} has an infinite number, or one too large for float32.")
    return values
