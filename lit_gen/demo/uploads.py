"""What a browser sends: pictures and boxes, from people who may mean harm."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_gen.data.decode import FORMATS, ImageSize, decode, header_size, unreadable_as
from lit_gen.errors import ConfigError

MAX_BYTES = 8 * 2**20
MAX_PIXELS = 4_000_000
MAX_FILES = 32
MAX_BOXES = 100


def read_upload(
    path: str | Path, folder: Path, *, channels: int = 3, image_size: ImageSize | None = None
) -> Tensor:
    """The picture that was uploaded to `path` as uint8 (`channels`, H, W), 1 or 3 of them, its center at
    `image_size`, a number or (height, width), where that is given.

    The formats are those of `lit_gen.data.decode`, told by the content. Raises ConfigError for a path that
    leads out of the `folder` of uploads, by `..` or a link, for more than 8 MiB, for more than 4 million
    pixels, which the header tells before any is decoded, and for what is no picture, or not a whole one.
    """
    data, shown = file_bytes(path, folder), Path(path).name
    check_pixels(*header_size(data, shown), shown)
    return decode(data, shown, channels=channels, image_size=image_size)


def file_bytes(path: str | Path, folder: Path) -> bytes:
    """What was uploaded. Raises ConfigError for a path that leads out of the folder, and for large files."""
    file, shown = Path(path).resolve(), Path(path).name
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        raise ConfigError(f"{shown} is not among the uploaded files: upload it again.")
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{shown} has {size / 2**20:.1f} MiB: at most {MAX_BYTES // 2**20} are taken.")
    return file.read_bytes()


def read_uploads(
    paths: Sequence[str | Path] | None, folder: Path, *, channels: int = 3, image_size: ImageSize
) -> Tensor:
    """Several pictures by `read_upload`, uint8 (N, C, H, W). Raises ConfigError for none or more than 32."""
    if not paths or len(paths) > MAX_FILES:
        raise ConfigError(f"{len(paths or ())} pictures: give between 1 and {MAX_FILES}.")
    return torch.stack([read_upload(p, folder, channels=channels, image_size=image_size) for p in paths])


def check_pixels(height: int, width: int, name: str) -> None:
    """Raises ConfigError for a picture that is too large for the page."""
    if height * width > MAX_PIXELS:
        raise ConfigError(
            f"{name}: {width} x {height} pixels, more than the {MAX_PIXELS // 10**6} million allowed."
        )


def read_drawing(data: bytes) -> np.ndarray:
    """What is on the canvas, a layer or the picture below, as uint8 (H, W, 4), within the same limits."""
    shown = "The drawing"
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{shown} has {len(data) / 2**20:.1f} MiB: at most {MAX_BYTES // 2**20} are taken.")
    check_pixels(*header_size(data, shown), shown)
    with unreadable_as(shown):
        return np.asarray(Image.open(io.BytesIO(data), formats=FORMATS).convert("RGBA"))


def boxes_of(text: str) -> Tensor | None:
    """float32 (N, 4) of boxes written as x0, y0, x1, y1 in pixels, one a line; None without any.

    Raises ConfigError for lines that are not four such numbers with x0 < x1 and y0 < y1, and for more than
    100.
    """
    rows = []
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            row = [float(part) for part in line.replace(",", " ").split()]
        except ValueError:
            row = []
        if len(row) != 4 or not (0 <= row[0] < row[2] < 1e5 and 0 <= row[1] < row[3] < 1e5):
            raise ConfigError(f"Box {line[:60]!r}: write x0, y0, x1, y1 in pixels, with x0 < x1 and y0 < y1.")
        rows.append(row)
    if len(rows) > MAX_BOXES:
        raise ConfigError(f"{len(rows)} boxes: at most {MAX_BOXES} are taken.")
    return torch.tensor(rows) if rows else None
