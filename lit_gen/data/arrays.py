"""Arrays in files, kept exactly: npy, npz, TIFF, and PNG of uint8, uint16, or float32, with any number of
channels. A file holds one image, or, as npy or npz, a whole set of them."""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_gen.data.decode import UnreadableImage, unreadable_as
from lit_gen.data.images import TensorImages, part_of
from lit_gen.errors import ConfigError
from lit_gen.images import Pixels

ARRAYS = (".npy", ".npz")
"""Endings of files that hold arrays and never pictures."""

FORMATS = (*ARRAYS, ".tif", ".tiff", ".png")
LIMIT = 256 << 20  # bytes of one image


def read_array(data: bytes, name: str, pixels: Pixels, channels: int) -> Tensor:
    """The image in `data`, (C, H, W) with `channels` channels, of the type of `pixels`, as it is stored.

    An npz holds one array, or its image under "image" or "arr_0". Raises UnreadableImage for another type or
    number of channels, for values that are no numbers, and for values out of the range.
    """
    ending = Path(name).suffix.lower()
    if ending not in FORMATS:
        raise UnreadableImage(
            f"{name}: its format has 8 bits and 1 or 3 channels, the data have {pixels.dtype} and {channels} "
            f"channels. They may be {', '.join(FORMATS)}."
        )
    image = with_channels_first(stored_array(data, name), channels, name)
    try:
        pixels.check(image, name)
    except ConfigError as error:
        raise UnreadableImage(str(error)) from None
    return image


def stored_array(data: bytes, name: str) -> np.ndarray:
    """The array in a file of one of the `FORMATS`, as it is stored. Raises UnreadableImage."""
    ending = Path(name).suffix.lower()
    with unreadable_as(name):
        if ending == ".png":
            return _png(data)
        if ending in ARRAYS:
            return _npy(data) if ending == ".npy" else _npz(data)
        return _tiff(data)


def with_channels_first(array: np.ndarray, channels: int, name: str) -> Tensor:
    """(..., H, W, C), or (..., C, H, W) where the first of the three alone has `channels` entries, or one
    channel as (..., H, W) -> (..., C, H, W)."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim >= 3 and array.shape[-1] == channels:
        native = np.moveaxis(native, -1, -3)
    elif not (array.ndim >= 3 and array.shape[-3] == channels):
        if channels != 1 or array.ndim < 2:
            raise UnreadableImage(
                f"{name}: its shape is {array.shape}, neither (height, width, {channels}) nor ({channels}, "
                "height, width): set data.channels to the number that all images have."
            )
        native = native[..., None, :, :]
    try:
        return torch.from_numpy(np.ascontiguousarray(native))
    except TypeError as error:
        raise UnreadableImage(
            f"{name}: its pixels are {array.dtype}; save them as uint8, uint16, or float32."
        ) from error


def _png(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data), formats=("PNG",))
    array = np.array(picture)
    if data[24] == 16 and array.dtype == np.uint8:  # its header says 16 bits
        raise ValueError("16 bits of several channels; save it as npy or TIFF")
    return array


def _npy(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if np.prod(shape, dtype=np.float64) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"it ends before or after its {shape} {dtype}")
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _npz(data: bytes) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        chosen = [n for n in ("image.npy", "arr_0.npy") if n in names] or (names if len(names) == 1 else [])
        if not chosen or archive.getinfo(chosen[0]).file_size > LIMIT:
            raise ValueError(f"it holds {names}, not one image under 'image' or 'arr_0' of at most 256 MiB")
        return _npy(archive.read(chosen[0]))


def _tiff(data: bytes) -> np.ndarray:
    tifffile = import_tifffile()
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        if series.nbytes > LIMIT:
            raise ValueError(f"it unpacks to {series.nbytes} bytes")
        return series.asarray()


def import_tifffile() -> Any:
    """The package tifffile. Raises ConfigError where it is not installed."""
    try:
        import tifffile
    except ImportError as error:
        raise ConfigError(
            "TIFF files of such pixels need the package tifffile: pip install lit-gen[tiff]."
        ) from error
    return tifffile


def save_tiff(image: Tensor, path: str | Path) -> Path:
    """Writes an image (C, H, W) of any type and number of channels; creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    photometric = "rgb" if image.shape[0] == 3 else "minisblack"
    array = image.permute(1, 2, 0).contiguous().cpu().numpy()
    import_tifffile().imwrite(path, array, photometric=photometric, planarconfig="contig")
    return path


class ArrayImages(TensorImages):
    """A set of images in one file: npy, (N, H, W, C) or (N, C, H, W), or npz with that under "arr_0" and,
    where there are classes, their indices (N,) under "arr_1" or "labels".

    `channels`, `dtype`, `range`, and `shown` say what the images are (`lit_gen.images.Pixels`); all values
    are looked through. `part`: "train" or "test" of a split that depends on `seed` and the image's number
    alone, `test_fraction` of them test. Raises ConfigError for a file that cannot be read, naming it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        channels: int = 3,
        dtype: str = "uint8",
        range: Sequence[float] | None = None,
        shown: Sequence[int] | None = None,
        part: str = "all",
        test_fraction: float = 0.1,
        seed: int = 0,
    ):
        path = Path(path).expanduser()
        images, labels = _read_set(path, channels)
        classes = [] if labels is None else [str(c) for c in torch.arange(int(labels.max()) + 1).tolist()]
        names = [str(i) for i in torch.arange(len(images)).tolist()]
        if part != "all":
            known = None if labels is None else labels.tolist()
            rows = torch.tensor(part_of(names, known, part, test_fraction, seed))
            images, labels = images.index_select(0, rows), None if labels is None else labels[rows]
            names = [names[i] for i in rows.tolist()]
        super().__init__(images, labels, classes, path.name, Pixels(dtype, range, shown))
        self.names = names


def _read_set(path: Path, channels: int) -> tuple[Tensor, Tensor | None]:
    if path.suffix.lower() not in ARRAYS or not path.is_file():
        raise ConfigError(f"{path}: there is no such npy or npz file.")
    labels = None
    with unreadable_as(str(path)):
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        else:
            with np.load(path, allow_pickle=False) as arrays:
                names = [n for n in ("arr_0", "images") if n in arrays]
                if not names:
                    raise ValueError(f"it holds {sorted(arrays)}, no arr_0")
                array = arrays[names[0]]
                found = [arrays[n] for n in ("arr_1", "labels") if n in arrays]
            labels = torch.from_numpy(found[0].astype(np.int64)) if found and found[0].ndim == 1 else None
    if array.ndim not in (3, 4) or (array.ndim == 3 and channels != 1):
        raise ConfigError(f"{path}: its shape is {array.shape}, not (N, height, width, {channels}).")
    if labels is not None and len(labels) != len(array):
        raise ConfigError(f"{path}: {len(labels)} labels for {len(array)} images.")
    return with_channels_first(array, channels, str(path)), labels
