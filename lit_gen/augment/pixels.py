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

Magnitudes = Sequence[float]
Floats = ndarray | Tensor  # float32; on a CPU numpy's loops over them take two thirds of torch's time
TILE = 1 << 16  # pixels worked on at once on a CPU: temporaries that stay in the cache


def _column(m: Magnitudes, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 1, 1, 1)."""
    return torch.tensor(m, dtype=dtype).view(-1, 1, 1, 1).to(like.device)


def _floats(images: Tensor | ndarray) -> Floats:
    """A new array on a CPU, a new tensor elsewhere."""
    if isinstance(images, Tensor) and images.device.type != "cpu":
        return images.float()
    return np.asarray(images).astype(np.float32)


def _blend(a: Floats, b: Floats, m: Magnitudes) -> Floats:
    """a + m (b - a) in float32, in this order and without fma, clipped to 0..255; overwrites b."""
    f = np.array(m, np.float32).reshape(-1, *[1] * (b.ndim - 1))
    b -= a
    b *= f if isinstance(b, ndarray) else torch.from_numpy(f).to(b.device)
    b += a
    if all(0 <= v <= 1 for v in m):  # between bytes already
        return b
    torch.as_tensor(b).clamp_(0, 255)  # np.clip takes half as long again
    return b


def _write(values: Floats, out: Tensor) -> None:
    """Truncates values 0..255 into bytes."""
    if isinstance(values, Tensor) and out.device.type != "cpu":
        out.copy_(torch.as_tensor(values))
    else:  # torch converts floats to bytes one by one: 6 times slower
        out.numpy()[...] = values


def _tiles(count: int, size: int, device: torch.device) -> list[slice]:
    """0..count in slices of about TILE pixels, `size` an item, on a CPU; a GPU takes all at once."""
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
    # A loop in C over bytes: a third of the time of a gather, which wants 64-bit indices. That of bytes,
    # unlike bytearray's, also compares what it reads with what it writes, in twice the time.
    looked_up = [bytearray(row).translate(t) for row, t in zip(pixels.numpy(), table, strict=True)]
    return torch.frombuffer(bytearray().join(looked_up), dtype=torch.uint8).view(images.shape)


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
    least = _column([min(max(int(t), 0), 255) for t in m], images, torch.uint8)
    change = _column([0 if t >= 256 else 255 for t in m], images, torch.uint8)
    if images.device.type != "cpu":
        return images ^ (images >= least) * change
    # numpy compares bytes many at once, torch one by one.
    flipped = (images.numpy() >= least.numpy()).view(np.uint8)
    flipped *= change.numpy()
    flipped ^= images.numpy()
    return torch.from_numpy(flipped)


def solarize_official(images: Tensor, m: Magnitudes) -> Tensor:
    """v < (m mod 256) ? v : 255 - v: the official threshold is a uint8."""
    return solarize(images, [int(t) % 256 for t in m])


def solarize_add(images: Tensor, m: Magnitudes) -> Tensor:
    """v < 128 ? min(255, v + m) : v."""
    added = RAMP + np.array([int(v) for v in m], np.float32)[:, None]
    return lookup(images, _table(np.where(RAMP < 128, added, RAMP)))


def _gray(values: Floats) -> Floats:
    """tf.image.rgb_to_grayscale: float32 v / 255, weights .2989 .5870 .1140 summed left to right, 255.5,
    truncated; whole numbers (n, 1, H, W).
    """
    if values.shape[1] == 1:
        return values
    gray = values[:, 0:1] * (1 / 255)
    gray *= 0.2989
    for channel, weight in ((1, 0.5870), (2, 0.1140)):
        term = values[:, channel : channel + 1] * (1 / 255)
        term *= weight
        gray += term
    gray *= 255.5
    # Nothing is negative, and torch's trunc_ takes ten times as long.
    return np.floor(gray, out=gray) if isinstance(gray, ndarray) else gray.floor_()


def color(images: Tensor, m: Magnitudes) -> Tensor:
    """Blend of the gray image (m = 0) and the image (m = 1)."""
    if images.shape[1] == 1:
        return images.clone()
    out = torch.empty_like(images)
    n, _, h, w = images.shape
    for rows in _tiles(h, n * w, images.device):
        values = _floats(images[..., rows, :])
        _write(_blend(_gray(values), values, m), out[..., rows, :])
    return out


def _blend_to(images: Tensor, target: ndarray, m: Magnitudes) -> Tensor:
    """Blend of a flat image of value `target` (n,) and the image, by table."""
    a, f = target.astype(np.float32)[:, None], np.array(m, np.float32)[:, None]
    return lookup(images, _table((RAMP - a) * f + a))


def brightness(images: Tensor, m: Magnitudes) -> Tensor:
    """Blend of black and the image."""
    return _blend_to(images, np.zeros(len(m)), m)


def contrast(images: Tensor, m: Magnitudes) -> Tensor:
    """Blend of the mean gray, trunc(mean(gray)), and the image (repair: see `contrast_official`)."""
    n, _, h, w = images.shape
    parts = [_sums(_gray(_floats(images[..., rows, :]))) for rows in _tiles(h, n * w, images.device)]
    return _blend_to(images, np.sum(parts, 0) // (h * w), m)


def _sums(values: Floats) -> ndarray:
    """float64 (n,): exact of whole numbers 0..255."""
    if not isinstance(values, ndarray):
        return values.flatten(1).sum(1, dtype=torch.float64).cpu().numpy()
    rows = values.reshape(len(values), -1)
    # Up to there they stay below 2^24: exact in float32, and faster.
    return rows.sum(1, dtype=np.float32 if rows.shape[1] <= TILE else np.float64).astype(np.float64)


def contrast_official(images: Tensor, m: Magnitudes) -> Tensor:
    """Blend of gray min(255, trunc(H W / 256)) and the image.

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
    histogram = _histogram(images.reshape(n * c, -1))
    cumulative = histogram.cumsum(1)
    # All pixels but those of the brightest value that occurs.
    step = np.where(cumulative < h * w, cumulative, 0).max(1, keepdims=True) // 255
    table = (cumulative - histogram + step // 2) // np.maximum(step, 1)
    table = np.where(step > 0, np.minimum(table, 255), np.arange(256)).astype(np.uint8)
    return lookup(images, table.reshape(n, c, 256))


def _histogram(rows: Tensor) -> ndarray:
    """int64 (r, 256) of uint8 (r, k)."""
    if rows.device.type == "cpu" and rows.shape[1] >= 4096:
        return np.stack([torch.bincount(row, minlength=256).numpy() for row in rows])
    offset = 256 * torch.arange(rows.shape[0], device=rows.device)[:, None]
    counts = torch.bincount((rows.long() + offset).reshape(-1), minlength=256 * rows.shape[0])
    return counts.view(-1, 256).cpu().numpy()


def sharpness(images: Tensor, m: Magnitudes) -> Tensor:
    """Blend of the image smoothed by [[1,1,1],[1,5,1],[1,1,1]]/13, rounded to nearest, and the image; the
    border of 1 pixel stays.

    Repair: officially the smoothed image is truncated after nine float32 additions, so that flat areas of 52
    of the 256 values lose 1.
    """
    return _by_rows(images, m, _smooth)


def _smooth(lines: Floats, w: int) -> Floats:
    wide = lines.astype(np.int16) if isinstance(lines, ndarray) else lines.to(torch.int16)
    total = wide[..., : -2 * w] + wide[..., w:-w]
    total += wide[..., 2 * w :]
    total, columns = total[..., :-2] + total[..., 1:-1], total
    total += columns[..., 2:]
    total += wide[..., w + 1 : -w - 1] << 2
    total += 6
    total //= 13
    return _floats(total)


def sharpness_official(images: Tensor, m: Magnitudes) -> Tensor:
    """As `sharpness`, with the official smoothing: nine float32 multiply-adds row by row, truncated."""
    return _by_rows(images, m, _smooth_official)


def _smooth_official(lines: Floats, w: int) -> Floats:
    size = lines.shape[-1] - 2 * w - 2
    side = _floats(lines)
    center = side * (np.float32(5) / np.float32(13)).item()
    side *= (np.float32(1) / np.float32(13)).item()
    total = side[..., :size] + side[..., 1 : size + 1]
    for y, x in ((0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)):
        total += (center if (y, x) == (1, 1) else side)[..., y * w + x : y * w + x + size]
    total = torch.as_tensor(total).clamp_(0, 255).floor_()
    return total.numpy() if isinstance(lines, ndarray) else total


def _by_rows(images: Tensor, m: Magnitudes, smooth: Callable[[Floats, int], Floats]) -> Tensor:
    """Blend of the smoothed and the given image; the border of one pixel stays.

    `smooth` gets rows as one line (n, C, k W), so that every pass is over consecutive numbers, and returns
    the line without a row and a pixel at both ends; its outer columns, which are wrong, are put back.
    """
    out = images.clone(memory_format=torch.contiguous_format)
    n, c, h, w = images.shape
    if min(h, w) < 3:
        return out
    given, lines = images.flatten(2), out.view(n, c, -1)
    for rows in _tiles(h - 2, n * c * w, images.device):
        part = given[..., rows.start * w : (rows.stop + 2) * w]
        part = part.numpy() if images.device.type == "cpu" else part
        blended = _blend(smooth(part, w), _floats(part[..., w + 1 : -w - 1]), m)
        _write(blended, lines[..., (rows.start + 1) * w + 1 : (rows.stop + 1) * w - 1])
    out[..., :: w - 1] = images[..., :: w - 1]
    return out
