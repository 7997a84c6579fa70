"""Pixels: the one conversion between a model's floats and the values that are stored, shown, and measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_gen.errors import ConfigError

DTYPES = {
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Pixels:
    """How the values of images are stored, and what a model makes of them: [low, high] <-> [-1, 1], linearly.

    `dtype` is uint8, uint16, float16, or float32. `range` is [low, high]; None is the whole range of an
    integer type, and floats need one. `shown` names the one or three channels that a picture shows, in the
    order red, green, blue; None: all of one or three, the first of two, the first three of more. `bounded`
    says whether `check` refuses values out of the range, which a model's own floats may have. Raises
    ConfigError for any other type or range.
    """

    dtype: str = "uint8"
    range: Sequence[float] | None = None
    shown: Sequence[int] | None = None
    bounded: bool = True
    low: float = field(init=False, repr=False)
    high: float = field(init=False, repr=False)

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ConfigError(f"data.dtype={self.dtype}: pixels are uint8, uint16, float16, or float32.")
        if self.range is None and self.is_float:
            raise ConfigError(
                f"data.dtype={self.dtype} needs the range of the values, data.range=[0,1] for instance: it "
                "becomes [-1, 1] in the model."
            )
        largest = float(np.finfo(self.dtype).max if self.is_float else np.iinfo(self.dtype).max)
        limits = (-largest if self.is_float else 0, largest)
        given = limits if self.range is None else tuple(self.range)
        if (
            len(given) != 2
            or not limits[0] <= given[0] < given[1] <= limits[1]
            or not all(math.isfinite(x) and (self.is_float or float(x).is_integer()) for x in given)
        ):
            raise ConfigError(
                f"data.range={list(given)}: give the lowest and the highest value of {self.dtype} pixels, "
                "[0,1] for instance."
            )
        if self.shown is not None and len(self.shown) not in (1, 3):
            raise ConfigError(f"data.shown={list(self.shown)}: a picture shows one channel or three.")
        shown = None if self.shown is None else tuple(self.shown)
        for name, value in (("range", given), ("shown", shown), ("low", given[0]), ("high", given[1])):
            object.__setattr__(self, name, value)

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("float")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def levels(self) -> int | None:
        """The number of values that a pixel may have; None for floats."""
        return None if self.is_float else int(self.high - self.low) + 1

    @property
    def are_bytes(self) -> bool:
        """Whether they are those of pictures: uint8, all of 0 to 255."""
        return self.dtype == "uint8" and self.levels == 256

    def to_model(self, x: Tensor) -> Tensor:
        """Stored values -> float32 in [-1, 1]: (x - low) / half - 1, for bytes x / 127.5 - 1; shape
        unchanged."""
        x = x.to(torch.float32)
        return (x - self.low if self.low else x) / ((self.high - self.low) / 2) - 1

    def from_model(self, x: Tensor) -> Tensor:
        """[-1, 1] floats -> stored values; shape unchanged. Integers are rounded as EDM rounds bytes,
        floor(clamp(127.5 x + 128, 0, 255)); floats are not clamped."""
        half = (self.high - self.low) / 2
        x = x.to(torch.float32) * half
        if self.is_float:
            return (x + (self.low + half)).to(self.torch_dtype)
        return (x + (self.low + half + 0.5)).clamp(self.low, self.high).to(self.torch_dtype)

    def to_uint8(self, x: Tensor) -> Tensor:
        """Stored values -> uint8 of the same shape, for pictures and for networks that take bytes: bytes as
        they are, others with the range stretched over 0 to 255 and what leaves it clamped."""
        return x if self.are_bytes else to_uint8(self.to_model(x))

    def picture(self, x: Tensor) -> Tensor:
        """Stored images (..., C, H, W) -> what a person looks at, uint8 (..., 1 or 3, H, W)."""
        return shown_channels(self.to_uint8(x), self.shown)

    def check(self, x: Tensor, name: str) -> None:
        """Raises ConfigError for stored values of another type, that are no numbers, or that leave the range;
        `name` says whose. `x` has any shape."""
        if x.dtype != self.torch_dtype:
            found = str(x.dtype).removeprefix("torch.")
            raise ConfigError(f"{name}: its pixels are {found}, not {self.dtype}: set data.dtype={found}.")
        whole = not self.is_float and self.levels == np.iinfo(self.dtype).max + 1
        if whole or x.numel() == 0:
            return
        values = x.to(torch.float32)
        if bad := int((~values.isfinite()).sum()):
            raise ConfigError(f"{name}: {bad} of its {x.numel()} values are NaN or infinite.")
        low, high = float(values.min()), float(values.max())
        if self.bounded and (low < self.low or high > self.high):
            raise ConfigError(
                f"{name}: its values go from {low:g} to {high:g} and leave data.range=[{self.low:g},"
                f"{self.high:g}]. Widen the range or correct the data."
            )


BYTES = Pixels()
"""What pictures have: uint8, all of 0 to 255."""


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] floats -> uint8 by EDM's rounding, floor(clamp(127.5 x + 128, 0, 255)); shape unchanged."""
    return BYTES.from_model(x)


def to_float(x: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], x / 127.5 - 1; shape unchanged."""
    return BYTES.to_model(x)


def height_and_width(image_size: Any, name: str = "image_size") -> tuple[int, int]:
    """(H, W) of `image_size`, a number for squares or [height, width]. Raises ConfigError for anything
    else."""
    sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ConfigError(f"{name}={image_size}: give one number of pixels, or [height,width].")
    return sides[0], sides[1]


def shown_channels(images: Tensor, channels: Sequence[int] | None = None) -> Tensor:
    """The channels of (..., C, H, W) that a picture shows, see `Pixels`. Raises ConfigError for a channel
    that there is not."""
    c = images.shape[-3]
    if channels is None:
        channels = range(3 if c >= 3 else 1)
    if max(channels) >= c or min(channels) < 0:
        raise ConfigError(f"data.shown={list(channels)}: the images have the channels 0 to {c - 1}.")
    return images if list(channels) == [*range(c)] else images[..., list(channels), :, :]


def grid(images: Tensor, columns: int | None = None, pad: int = 1, scale: int = 1) -> Tensor:
    """uint8 (N, C, H, W) -> one RGB picture (3, H', W') of the channels that `shown_channels` chooses, rows
    filled first, `scale` times enlarged without smoothing; 0: to about 64 pixels."""
    n, images = len(images), shown_channels(images)
    scale = scale or max(1, 64 // max(images.shape[-2:]))
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    images = images.expand(-1, 3, -1, -1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    h, w = images.shape[-2:]
    sheet = torch.full((3, rows * (h + pad) + pad, columns * (w + pad) + pad), 32, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        y, x = (i // columns) * (h + pad) + pad, (i % columns) * (w + pad) + pad
        sheet[:, y : y + h, x : x + w] = image
    return sheet


def boxed_picture(
    image: Tensor,
    boxes: Tensor,
    colors: Sequence[tuple[int, int, int]],
    texts: Sequence[str] = (),
    scale: int = 1,
) -> Tensor:
    """uint8 (C, H, W) and boxes (N, 4), xyxy in its pixels -> uint8 (3, scale H, scale W), enlarged without
    smoothing, with outlines of width 1 in the colors and a text in each box's upper left corner.

    Boxes without area are left out.
    """
    from torchvision.utils import draw_bounding_boxes

    enlarged = image.cpu().expand(3, -1, -1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    corners = boxes.cpu() * scale
    kept = (corners[:, 2:] > corners[:, :2]).all(1).nonzero()[:, 0].tolist()
    if not kept:
        return enlarged
    corners = corners[kept]
    corners[:, 2:] = torch.maximum(corners[:, :2], corners[:, 2:] - 1)  # the last pixel of each box
    labels = [str(texts[i]) for i in kept] if texts else None
    colors = [colors[i] for i in kept]
    return draw_bounding_boxes(enlarged, corners, labels, colors, fill_labels=True)


def one_size(pictures: Sequence[Tensor]) -> Tensor:
    """uint8 (N, C, H, W) of pictures (C, h, w) of any sizes, each in the upper left corner of its cell, black
    around it."""
    h, w = (max(p.shape[i] for p in pictures) for i in (-2, -1))
    cells = pictures[0].new_zeros(len(pictures), pictures[0].shape[0], h, w)
    for cell, picture in zip(cells, pictures, strict=True):
        cell[:, : picture.shape[1], : picture.shape[2]] = picture
    return cells


def save_png(picture: Tensor, path: str | Path) -> Path:
    """Writes a uint8 (C, H, W) picture of 1 or 3 channels; creates the folder."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = picture.permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path)
    return path
