"""Pixel operations of AutoAugment on uint8 batches, exact to the last bit.

Contract: `images` is uint8 (n, C, H, W) with C = 1 or 3; every image has its own magnitude, `m`, a sequence
of n floats; a new tensor comes back. "Official" is tensorflow/tpu's autoaugment_utils.py
(https://arxiv.org/abs/1906.11172): float32 arithmetic and a truncating cast to uint8. Functions that differ
from it are the repairs of docs/augment.md and say so.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

__all__ = [
    "autocontrast",
    "brightness",
    "color",
    "contrast",
    "contrast_official",
    "equalize",
    "flip",
    "identity",
    "invert",
    "lookup",
    "posterize",
    "sharpness",
    "sharpness_official",
    "solarize",
    "solarize_add",
    "solarize_official",
]

Magnitudes = Sequence[float]
TILE = (
    1 << 16
)  # elements worked on at once on a CPU: temporaries that stay in the cache, and off the page tables


def _column(m: Magnitudes, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, 1, 1, 1)."""
    return torch.tensor(m, dtype=dtype).view(-1, 1, 1, 1).to(like.device)


def _bytes(t: Tensor) -> Tensor:
    """Clip to 0..255 and truncate; overwrites t."""
    t.clamp_(0, 255)
    if t.device.type == "cpu":  # torch converts floats to bytes one by one: 6 times slower
        return torch.from_numpy(t.numpy().astype(np.uint8))
    return t.to(torch.uint8)


def _blend(a: Tensor, b: Tensor, f: Tensor) -> Tensor:
    """a + f (b - a) in float32, in this order and without fma; overwrites b."""
    return b.sub_(a).mul_(f).add_(a)


def _tiles(count: int, size: int, device: torch.device) -> list[slice]:
    """0..count in slices of about TILE elements, `size` an item, on a CPU; a GPU takes all at once."""
    step = max(1, TILE // max(1, size)) if device.type == "cpu" else max(1, count)
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]


def lookup(images: Tensor, table: ndarray) -> Tensor:
    """table[..., v] for every byte v of the image.

    `table` is uint8 (n, C, 256), or (n, 1, 256) for all channels alike; tables are made on the CPU, by numpy,
    whose calls on 256 numbers cost a fifth of torch's.
    """
    rows = table.shape[0] * table.shape[1]
    pixels, table = images.reshape(rows, -1), np.ascontiguousarray(table).reshape(rows, 256)
    if images.device.type != "cpu" or pixels.shape[1] < 4096:
        return torch.gather(torch.from_numpy(table).to(images.device), 1, pixels.long()).view(images.shape)
    out = torch.empty_like(pixels)
    for row, t, o in zip(pixels.numpy(), table, out.numpy(), strict=True):
        # A loop in C over bytes: a third of the time of a gather, which wants 64-bit indices. That of bytes,
        # unlike bytearray's, also compares what it reads with what it writes, in twice the time.
        o[:] = np.frombuffer(bytearray(row).translate(t.tobytes()), np.uint8)
    return out.view(images.shape)


RAMP = np.arange(256, dtype=np.float32)


def _table(values: ndarray) -> ndarray:
    """Clip to 0..255 and truncate; (n, 256) becomes (n, 1, 256)."""
    table = values.clip(0, 255).astype(np.uint8)
    return table[:, None] if table.ndim == 2 else table


def identity(images: Tensor, m: Magnitudes) -> Tensor:
    """A copy of the images."""
    return images.clone()


def flip(images: Tensor, m: Magnitudes) -> Tensor:
    """Left-right."""
    return images.flip(-1)


def invert(images: Tensor, m: Magnitudes) -> Tensor:
    """255 - v."""
    return images ^ 255


def posterize(images: Tensor, m: Magnitudes) -> Tensor:
    """Keeps the m highest bits, at least one: TensorFlow clamps its shift to 7, so officially 0 bits is 1
    bit as well.
    """
    masks = [(0xFF << (8 - max(1, int(bits)))) & 0xFF for bits in m]
    return images & _column(masks, images, torch.uint8)


def solarize(images: Tensor, m: Magnitudes) -> Tensor:
    """v < m ? v : 255 - v; a threshold of 256 changes nothing (repair: officially it wraps to 0 and inverts
    the image).
    """
    # The sign bit of v - m, spread over the byte, is all ones where v < m; comparisons of bytes are ten
    # times slower.
    below = (images.to(torch.int16) - _column([int(t) for t in m], images, torch.int16)) >> 15
    return below.to(torch.uint8).bitwise_not_().bitwise_xor_(images)


def solarize_official(images: Tensor, m: Magnitudes) -> Tensor:
    """v < (m mod 256) ? v : 255 - v: the official threshold is a uint8."""
    return solarize(images, [int(t) % 256 for t in m])


def solarize_add(images: Tensor, m: Magnitudes) -> Tensor:
    """v < 128 ? min(255, v + m) : v."""
    added = RAMP + np.array([int(v) for v in m], np.float32)[:, None]
    return lookup(images, _table(np.where(RAMP < 128, added, RAMP)))


def _grey(images: Tensor) -> Tensor:
    """tf.image.rgb_to_grayscale: float32 v / 255, weights .2989 .5870 .1140 summed left to right, 255.5,
    truncated; whole numbers as float32 (n, 1, H, W).
    """
    if images.shape[1] == 1:
        return images.float()
    grey = images[:, 0:1].float().mul_(1 / 255).mul_(0.2989)
    grey += images[:, 1:2].float().mul_(1 / 255).mul_(0.5870)
    grey += images[:, 2:3].float().mul_(1 / 255).mul_(0.1140)
    return grey.mul_(255.5).floor_()  # nothing is negative, and trunc_ takes ten times as long


def color(images: Tensor, m: Magnitudes) -> Tensor:
    """Blend of the grey image (m = 0) and the image (m = 1)."""
    if images.shape[1] == 1:
        return images.clone()
    f = _column(m, images)
    out = torch.empty_like(images)
    n, _, h, w = images.shape
    for rows in _tiles(h, n * w, images.device):
        part = images[..., rows, :]
        grey = _grey(part)
        for c in range(3):
            out[:, c : c + 1, rows] = _bytes(_blend(grey, part[:, c : c + 1].float(), f))
    return out


def _blend_to(images: Tensor, target: ndarray, m: Magnitudes) -> Tensor:
    """Blend of a flat image of value `target` (n,) and the image, by table."""
    a, f = target.astype(np.float32)[:, None], np.array(m, np.float32)[:, None]
    return lookup(images, _table((RAMP - a) * f + a))


def brightness(images: Tensor, m: Magnitudes) -> Tensor:
    """Blend of black and the image."""
    return _blend_to(images, np.zeros(len(m)), m)


def contrast(images: Tensor, m: Magnitudes) -> Tensor:
    """Blend of the mean grey, trunc(mean(grey)), and the image (repair: see `contrast_official`)."""
    n, _, h, w = images.shape
    tiles = _tiles(h, n * w, images.device)
    # Sums of a tile's bytes are whole numbers below 2^24: exact in float32.
    wide = torch.float32 if images.device.type == "cpu" and w <= TILE else torch.float64
    sums = [_grey(images[..., rows, :]).flatten(1).sum(1, dtype=wide).double() for rows in tiles]
    return _blend_to(images, sum(sums).cpu().numpy() // (h * w), m)


def contrast_official(images: Tensor, m: Magnitudes) -> Tensor:
    """Blend of grey min(255, trunc(H W / 256)) and the image.

    Officially the mean is taken over the histogram's counts.
    """
    h, w = images.shape[-2:]
    return _blend_to(images, np.full(len(m), min(255, h * w // 256)), m)


def autocontrast(images: Tensor, m: Magnitudes) -> Tensor:
    """Each channel stretched to 0..255 without cut-off; a flat channel stays as it is."""
    flat = images.flatten(2)  # amin and amax: aminmax is ten times slower on bytes
    low, high = torch.stack([flat.amin(2), flat.amax(2)]).cpu().numpy().astype(np.float32)[..., None]
    scale = np.float32(255) / np.maximum(high - low, 1)
    return lookup(images, _table(np.where(high > low, RAMP * scale + (-low * scale), RAMP)))


def equalize(images: Tensor, m: Magnitudes) -> Tensor:
    """Histogram equalisation of each channel in integers, as PIL's."""
    n, c, h, w = images.shape
    histogram = _histogram(images.reshape(n * c, -1)).cpu().numpy()
    brightest = 255 - (histogram[:, ::-1] > 0).argmax(1)
    step = (h * w - histogram[np.arange(n * c), brightest])[:, None] // 255
    table = (histogram.cumsum(1) - histogram + step // 2) // np.maximum(step, 1)
    return lookup(images, _table(np.where(step > 0, table, np.arange(256)).reshape(n, c, 256)))


def _histogram(rows: Tensor) -> Tensor:
    """int64 (r, 256) of uint8 (r, k)."""
    if rows.device.type == "cpu" and rows.shape[1] >= 4096:
        return torch.stack([torch.bincount(row, minlength=256) for row in rows])
    offset = 256 * torch.arange(rows.shape[0], device=rows.device)[:, None]
    return torch.bincount((rows.long() + offset).reshape(-1), minlength=256 * rows.shape[0]).view(-1, 256)


def sharpness(images: Tensor, m: Magnitudes) -> Tensor:
    """Blend of the image smoothed by [[1,1,1],[1,5,1],[1,1,1]]/13, rounded to nearest, and the image; the
    border of 1 pixel stays.

    Repair: officially the smoothed image is truncated after nine float32 additions, so that flat areas of 52
    of the 256 values lose 1.
    """
    return _by_rows(images, m, _smooth)


def _smooth(images: Tensor) -> Tensor:
    wide = images.to(torch.int16)
    columns = wide[..., :-2] + wide[..., 1:-1]
    columns += wide[..., 2:]
    total = columns[..., :-2, :] + columns[..., 1:-1, :]
    total += columns[..., 2:, :]
    total += wide[..., 1:-1, 1:-1] << 2
    return total.float().add_(6.5).mul_(1 / 13).floor_()  # (k + 6) // 13 for all k <= 3315, as tests check


def sharpness_official(images: Tensor, m: Magnitudes) -> Tensor:
    """As `sharpness`, with the official smoothing: nine float32 multiply-adds row by row, truncated."""
    return _by_rows(images, m, _smooth_official)


def _smooth_official(images: Tensor) -> Tensor:
    h, w = images.shape[-2:]
    side = images.float()
    centre = side[..., 1:-1, 1:-1] * (torch.tensor(5.0) / 13).item()
    side = side.mul_((torch.tensor(1.0) / 13).item())
    total = side[..., :-2, :-2].clone()
    for y, x in ((0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)):
        total += centre if (y, x) == (1, 1) else side[..., y : h - 2 + y, x : w - 2 + x]
    return total.clamp_(0, 255).floor_()


def _by_rows(images: Tensor, m: Magnitudes, smooth: Callable[[Tensor], Tensor]) -> Tensor:
    """Blend of `smooth(images)`, one pixel smaller on each side, and the image; the border stays."""
    out = images.clone()
    n, c, h, w = images.shape
    if min(h, w) < 3:
        return out
    f = _column(m, images)
    for rows in _tiles(h - 2, n * c * w, images.device):
        part = images[..., rows.start : rows.stop + 2, :]
        inner = part[..., 1:-1, 1:-1].float()
        out[..., rows.start + 1 : rows.stop + 1, 1:-1] = _bytes(_blend(smooth(part), inner, f))
    return out
