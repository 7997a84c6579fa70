"""Pixels: the one conversion between a model's floats and the bytes that are shown, saved and measured."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["boxed_picture", "grid", "one_size", "save_png", "to_float", "to_uint8"]


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] floats -> uint8 by EDM's rounding, floor(clamp(127.5 x + 128, 0, 255)); shape unchanged."""
    return (x.to(torch.float32) * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_float(x: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], x / 127.5 - 1; shape unchanged."""
    return x.to(torch.float32) / 127.5 - 1


def grid(images: Tensor, columns: int | None = None, pad: int = 1, scale: int = 1) -> Tensor:
    """uint8 (N, C, H, W) -> one RGB picture (3, H', W'), rows filled first, `scale` times enlarged without
    smoothing."""
    n, c = images.shape[:2]
    if c not in (1, 3):
        raise ValueError(f"A grid takes images of 1 or 3 channels, got {c}.")
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
    colours: Sequence[tuple[int, int, int]],
    texts: Sequence[str] = (),
    scale: int = 1,
) -> Tensor:
    """uint8 (C, H, W) and boxes (N, 4), xyxy in its pixels -> uint8 (3, scale H, scale W), enlarged without
    smoothing, with outlines of width 1 in the colours and a text in each box's upper left corner.

    Boxes without area are left out.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    enlarged = image.expand(3, -1, -1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    picture = Image.fromarray(enlarged.permute(1, 2, 0).cpu().contiguous().numpy())
    pen = ImageDraw.Draw(picture)
    for i, (x0, y0, x1, y1) in enumerate((boxes * scale).tolist()):
        if x1 > x0 and y1 > y0:
            pen.rectangle([x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)], outline=colours[i])
            if texts and texts[i]:
                left, top, right, bottom = pen.textbbox((x0 + 2, y0), texts[i])
                pen.rectangle([left - 1, top - 1, right, bottom], fill=(0, 0, 0))
                pen.text((x0 + 2, y0), texts[i], fill=colours[i])
    return torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy())


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
