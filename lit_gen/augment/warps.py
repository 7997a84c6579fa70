"""Nearest-neighbor affine warps of images and the same maps on boxes.

A map is six float32 numbers `t`, from output to input, on pixel indices (the center of the first pixel is
the origin): in_x = t0 x + t1 y + t2, in_y = t3 x + t4 y + t5. What falls outside the image is filled.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from lit_gen.augment.boxes import cos_sin

TILE = 1 << 16  # output pixels at once on a CPU, so that the indices stay in the cache
REMEMBERED = 1 << 17  # pixels of an image whose index is kept: 64 of them are 32 MiB then
REMEMBERED_LARGE = 1 << 19  # and of a larger one: 16 of them
Floats = ndarray | Tensor  # numpy adds in half of torch's time
LARGE = 1 << 14  # pixels from which on an image by itself, its channels together, takes less time


def _maps(m: Sequence[float], columns: dict[int, ndarray | Sequence[float]]) -> ndarray:
    """float32 (n, 6) from its columns; the others are the identity's."""
    t = np.tile(np.array([1, 0, 0, 0, 1, 0], np.float32), (len(m), 1))
    for i, value in columns.items():
        t[:, i] = value
    return t


def translation_x(pixels: Sequence[float], h: int, w: int) -> ndarray:
    """Content moves left by `pixels`; (n, 6)."""
    return _maps(pixels, {2: pixels})


def translation_y(pixels: Sequence[float], h: int, w: int) -> ndarray:
    """Content moves up by `pixels`; (n, 6)."""
    return _maps(pixels, {5: pixels})


def flip_x(m: Sequence[float], h: int, w: int) -> ndarray:
    """Left and right exchanged; (n, 6)."""
    return _maps(m, {0: [-1] * len(m), 2: [w - 1] * len(m)})


def flip_y(m: Sequence[float], h: int, w: int) -> ndarray:
    """Top and bottom exchanged; (n, 6)."""
    return _maps(m, {4: [-1] * len(m), 5: [h - 1] * len(m)})


def shear_x(s: Sequence[float], h: int, w: int) -> ndarray:
    """in_x = x + s y; (n, 6)."""
    return _maps(s, {1: s})


def shear_y(s: Sequence[float], h: int, w: int) -> ndarray:
    """in_y = y + s x; (n, 6)."""
    return _maps(s, {3: s})


def rotation(degrees: Sequence[float], h: int, w: int) -> ndarray:
    """About the image's center, counter-clockwise on the screen; (n, 6). In float32 like the official one."""
    c, s = cos_sin(degrees)
    x, y = np.float32(w - 1), np.float32(h - 1)
    return _maps(
        degrees, {0: c, 1: -s, 2: (x - (c * x - s * y)) / 2, 3: s, 4: c, 5: (y - (s * x + c * y)) / 2}
    )


def warp(images: Tensor, t: ndarray, fill: int = 128) -> Tensor:
    """`images` (n, C, H, W) of any dtype seen through the maps `t` float32 (n, 6); nearest, half away
    from zero.

    Exact to TensorFlow's ImageProjectiveTransform in float32. Only indices are computed in floats, never the
    image.
    """
    n, c, h, w = images.shape
    if n == 1 and (moved := _shift(images, t[0].tolist(), fill)) is not None:
        return moved
    if images.device.type == "cpu":
        if n == 1 and (h * w <= REMEMBERED_LARGE or _packs(images)):
            return _warp_one(images[0], t, fill)[None]
        if n > 1 and h * w >= LARGE:
            return torch.cat([warp(images[i : i + 1], t[i : i + 1], fill) for i in range(n)])
    framed = _framed(images, fill)
    out = torch.empty_like(images)
    step = max(1, TILE // (n * w)) if images.device.type == "cpu" else h
    for top in range(0, h, step):
        index = _frame_index(t, top, min(step, h - top), h, w, images.device)
        index = index.long().view(n, 1, -1).expand(-1, c, -1)
        out[..., top : top + step, :] = torch.gather(framed, 2, index).view(n, c, -1, w)
    return out


def _framed(images: Tensor, fill: int) -> Tensor:
    """(n, C, (H + 2) (W + 2)): with a frame of one pixel."""
    n, c, h, w = images.shape
    framed = images.new_full((n, c, h + 2, w + 2), fill)
    framed[..., 1:-1, 1:-1] = images
    return framed.view(n, c, -1)


def _packs(images: Tensor) -> bool:
    """Whether images are such that their three channels are best moved at once."""
    return images.dtype == torch.uint8 and images.shape[1] == 3 and images.shape[2:].numel() >= LARGE


def _warp_one(image: Tensor, t: ndarray, fill: int) -> Tensor:
    """`warp` of one image (C, H, W) by one map (1, 6), on a CPU."""
    c, h, w = image.shape
    if h * w > REMEMBERED_LARGE:
        packed, out = _packed(image, fill), torch.empty((c, h, w), dtype=image.dtype)
        packed, step = _framed(packed[:-1].view(1, 1, h, w), fill * 0x010101).view(-1), max(1, 4 * TILE // w)
        for top in range(0, h, step):
            index = _frame_index(t, top, min(step, h - top), h, w, image.device).view(-1)
            _unpack(torch.index_select(packed, 0, index), out[:, top : top + step])
        return out
    index = (_whole_index if h * w <= REMEMBERED else _large_index)(t.tobytes(), h, w)
    if _packs(image[None]):
        out = torch.empty((c, h, w), dtype=image.dtype)
        _unpack(torch.index_select(_packed(image, fill), 0, index), out)
        return out
    channels = image.new_full((c, h * w + 1), fill)
    channels[:, :-1] = image.flatten(1)
    return torch.gather(channels, 1, index.long().expand(c, -1)).view(image.shape)


def _packed(image: Tensor, fill: int) -> Tensor:
    """int32 (H W + 1,): the three bytes of each pixel and of the fill in one number, so that they are looked
    up at once."""
    first, second, third = image.numpy()
    low = second.astype(np.uint16)
    low <<= 8
    low |= first.astype(np.uint16)
    packed = np.empty(low.size + 1, np.uint32)
    packed[-1] = fill * 0x010101
    pixels = packed[:-1].reshape(low.shape)
    pixels[...] = third
    pixels <<= 16
    pixels |= low.astype(np.uint32)
    return torch.from_numpy(packed.view(np.int32))


def _unpack(pixels: Tensor, out: Tensor) -> None:
    """Writes `_packed` pixels to uint8 (3, h, W), and overwrites them."""
    first, second, third = out.numpy()
    numbers = pixels.numpy().view(np.uint32).reshape(first.shape)
    low = numbers.astype(np.uint16)
    first[...] = low  # the lowest byte
    low >>= 8
    second[...] = low
    numbers >>= 16
    third[...] = numbers


def _index(t: bytes, h: int, w: int) -> Tensor:
    """int32 (H W,): where the pixels of a whole image come from in the image, H W for the outside. A policy
    has few levels and a data set one size, so that maps recur; making an index takes as long as using it."""
    rows = np.frombuffer(bytearray(t), np.float32).reshape(1, 6)
    framed = _frame_index(rows, 0, h, h, w, torch.device("cpu"))
    return torch.index_select(_unframed(h, w), 0, framed.view(-1))


_whole_index = lru_cache(maxsize=64)(_index)
_large_index = lru_cache(maxsize=16)(_index)


@lru_cache(maxsize=4)
def _unframed(h: int, w: int) -> Tensor:
    """int32 ((H + 2) (W + 2),): the image's index of each pixel of the framed image, H W on the frame."""
    index = torch.full((h + 2, w + 2), h * w, dtype=torch.int32)
    index[1:-1, 1:-1] = torch.arange(h * w, dtype=torch.int32).view(h, w)
    return index.view(-1)


def _frame_index(t: ndarray, top: int, rows: int, h: int, w: int, device: torch.device) -> Tensor:
    """int32 (n, rows, W): where output rows top, top + 1, ... come from in the image with a frame of one
    pixel.
    """
    needs: list[bool] = (t != 0).any(0).tolist()
    x, y = np.arange(w, dtype=np.float32), np.arange(top, top + rows, dtype=np.float32)[:, None]
    m, x, y = (v if device.type == "cpu" else torch.from_numpy(v).to(device) for v in (t, x, y))
    column, row = (_nearest(m[:, i : i + 3], x, y, needs[i : i + 2], size) for i, size in ((0, w), (3, h)))
    if (h + 2) * (w + 2) > 1 << 24:  # beyond, float32 does not count every pixel
        column, row = column.long(), row.long()
    return torch.add(column, row, alpha=w + 2).add_(w + 3).to(torch.int32)


def _nearest(t: Floats, x: Floats, y: Floats, needs: Sequence[bool], size: int) -> Tensor:
    """Index 0 .. size + 1 into a framed axis: 1 + round(a x + b y + c) of t = (a, b, c), the outside on the
    frame.

    Broadcasts: (n, 1, W) if no b is needed, (n, H, 1) if no a is, else (n, H, W).
    """
    a, b, offset = t.T.reshape(3, -1, 1, 1)
    if all(needs):
        at = a * x + b * y
        at += offset
    else:
        at = (b * y if needs[1] else a * x) + offset
    # floor(v + pred(0.5)) is round-half-up without the double rounding of v + 0.5; below zero only -0.5
    # matters: outside, as it must be.
    at += 0.49999997
    return torch.as_tensor(at).floor_().clamp_(-1, size)


def _shift(images: Tensor, t: list[float], fill: int) -> Tensor | None:
    """The warp as a copy of a rectangle, when the map is a translation by whole pixels along one axis."""
    if t[:2] != [1, 0] or t[3:5] != [0, 1] or t[2] % 1 or t[5] % 1:
        return None
    h, w = images.shape[-2:]
    dx, dy = (max(-s, min(s, int(d))) for d, s in ((t[2], w), (t[5], h)))
    out = torch.full_like(images, fill)
    out[..., max(0, -dy) : h - max(0, dy), max(0, -dx) : w - max(0, dx)] = images[
        ..., max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)
    ]
    return out
