"""Boxes under the image maps of `warps`: the official arithmetic, and the exact one.

Boxes are few, so they are numpy arrays here (numpy's calls cost a fifth of torch's). Two layouts, (N, 4):
the official code's float32 [ymin, xmin, ymax, xmax] in [0, 1], and float64 [x0, y0, x1, y1] in pixels, where
the pixel (i, j) covers [j, j + 1] x [i, i + 1]. "Official" is tensorflow/tpu's autoaugment_utils.py
(https://arxiv.org/abs/1906.11172).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy import ndarray
from torchvision.ops import box_convert

from lit_gen.errors import check_choice

BOX_FORMATS = ("xyxy", "xywh", "cxcywh", "yxyx_normalized")


def box_format(name: str) -> str:
    """One of `BOX_FORMATS`, by its name of today; earlier versions spelled the last yxyx_normalised. Raises
    ConfigError for any other."""
    name = "yxyx_normalized" if name == "yxyx_normalised" else name
    check_choice("box_format", name, BOX_FORMATS)
    return name


def convert(boxes: ndarray, old: str, new: str, h: int, w: int) -> ndarray:
    """(N, 4) in one of `BOX_FORMATS` -> float64 (N, 4) in another; exact where they are the same."""
    rows = boxes.astype(np.float64)
    if old == new:
        return rows
    if old == "yxyx_normalized":
        rows, old = (rows * (h, w, h, w))[:, [1, 0, 3, 2]], "xyxy"
    if new == "yxyx_normalized":
        return convert(rows, old, "xyxy", h, w)[:, [1, 0, 3, 2]] / (h, w, h, w)
    return box_convert(torch.from_numpy(rows), old, new).numpy()


def usable(boxes: ndarray, h: int, w: int) -> ndarray:
    """bool (N,): which pixel boxes are finite, not inverted, and have area within the image."""
    high = np.minimum(boxes[:, 2:], (w, h))
    inside = high > np.maximum(boxes[:, :2], 0)  # False for NaN
    return np.logical_and(inside.all(1), np.isfinite(boxes).all(1))


def transform_boxes(boxes: ndarray, t: Sequence[float], h: int, w: int) -> tuple[ndarray, ndarray]:
    """Boxes around the warped boxes' corners, clipped to the image, and the share (N,) of each that is left.

    Repair: corners go through the inverse of the image's own map t at pixel centers, unrounded; the official
    code rounds every corner to a whole pixel, outward on two sides, and rotates about (W/2, H/2) where its
    image rotates about ((W-1)/2, (H-1)/2).
    """
    a, b, e, c, d, f = t
    det = a * d - b * c
    x, y = boxes[:, ::2] - (0.5 + e), boxes[:, 1::2] - (0.5 + f)
    out = np.empty((2, 2, len(boxes)))  # (x, y), (low, high): sums of the terms' own extremes
    for k, (u, v) in enumerate(((d / det, -b / det), (-c / det, a / det))):
        np.add((x * u)[:, :: _order(u)], (y * v)[:, :: _order(v)], out=out[k].T)
    out += 0.5
    inner = out.clip(0, np.array([[[w]], [[h]]], np.float64))
    sides, sides_in = out[:, 1] - out[:, 0], inner[:, 1] - inner[:, 0]
    left = sides_in[0] * sides_in[1] / np.maximum(sides[0] * sides[1], 1e-12)
    return inner.transpose(2, 1, 0).reshape(-1, 4), left


def _order(factor: float) -> int:
    return 1 if factor >= 0 else -1


def transform_points(points: ndarray, t: Sequence[float], h: int, w: int) -> ndarray:
    """Points (M, 3) of `layers` under the image's map t."""
    a, b, e, c, d, f = t
    x, y = points[:, 0] - e, points[:, 1] - f
    det = a * d - b * c
    x, y = (d * x - b * y) / det, (a * y - c * x) / det
    inside = (x >= -0.5) & (x < w - 0.5) & (y >= -0.5) & (y < h - 0.5)
    return np.stack([x, y, points[:, 2] * inside], 1)


def _official(y0: ndarray, x0: ndarray, y1: ndarray, x1: ndarray) -> ndarray:
    """Clip to [0, 1]; a side of length exactly 0 on the border becomes a sliver of 5 %."""
    y0, x0, y1, x1 = (v.clip(0, 1) for v in (y0, x0, y1, x1))

    def widen(low: ndarray, high: ndarray) -> tuple[ndarray, ndarray]:
        gone = high - low == 0
        low = np.where(gone, np.minimum(low, np.float32(0.95)), low)
        return low, np.where(gone, np.maximum(high, np.float32(0.05)), high)

    (y0, y1), (x0, x1) = widen(y0, y1), widen(x0, x1)
    return np.stack([y0, x0, y1, x1], 1).astype(np.float32)


def _quantised(boxes: ndarray, h: int, w: int) -> tuple[ndarray, ...]:
    return tuple(np.trunc(boxes * np.array([h, w, h, w], np.float32)).T)


def _translated(boxes: ndarray, right: float, down: float, h: int, w: int) -> ndarray:
    """All four sides are rounded to pixels, and moved by -right and -down as far as the image goes."""
    y0, x0, y1, x1 = _quantised(boxes, h, w)
    top, left = np.maximum(y0 - math.trunc(down), 0), np.maximum(x0 - math.trunc(right), 0)
    bottom, end = np.minimum(y1 - math.trunc(down), h), np.minimum(x1 - math.trunc(right), w)
    return _official(top / h, left / w, bottom / h, end / w)


def translate_x_official(boxes: ndarray, pixels: float, h: int, w: int) -> ndarray:
    """Official boxes under `translation_x`."""
    return _translated(boxes, pixels, 0, h, w)


def translate_y_official(boxes: ndarray, pixels: float, h: int, w: int) -> ndarray:
    """Official boxes under `translation_y`."""
    return _translated(boxes, 0, pixels, h, w)


def _multiply(a0: float, b0: ndarray, a1: float, b1: ndarray) -> ndarray:
    """fma(a1, b1, a0 b0) in float32, as TensorFlow's matrix product sums two terms, then trunc."""
    with np.errstate(invalid="ignore"):  # boxes may be infinite
        product = np.float64(np.float32(a1)) * b1.astype(np.float64)
        return np.trunc((product + np.float32(a0) * b0).astype(np.float32))


def _corners(y0: ndarray, x0: ndarray, y1: ndarray, x1: ndarray) -> tuple[ndarray, ndarray]:
    return np.stack([y0, y0, y1, y1]), np.stack([x0, x1, x0, x1])


def _around(y: ndarray, x: ndarray, h: int, w: int) -> ndarray:
    return _official(y.min(0) / h, x.min(0) / w, y.max(0) / h, x.max(0) / w)


def shear_x_official(boxes: ndarray, s: float, h: int, w: int) -> ndarray:
    """Official boxes under `shear_x`: x' = -s y + x."""
    y, x = _corners(*_quantised(boxes, h, w))
    return _around(y, _multiply(-s, y, 1.0, x), h, w)


def shear_y_official(boxes: ndarray, s: float, h: int, w: int) -> ndarray:
    """Official boxes under `shear_y`: y' = y - s x."""
    y, x = _corners(*_quantised(boxes, h, w))
    return _around(_multiply(1.0, y, -s, x), x, h, w)


def rotate_official(boxes: ndarray, degrees: float, h: int, w: int) -> ndarray:
    """Official boxes under `rotation`, about (W / 2, H / 2)."""
    c, s = cos_sin([degrees])
    size = np.array([-h, w, -h, w], np.float32)
    y, x = _corners(*np.trunc((boxes - np.float32(0.5)) * size).T)
    up, right = _multiply(c[0], y, s[0], x), _multiply(-s[0], y, c[0], x)
    half = np.float32(0.5)
    return _official(
        half - up.max(0) / h, right.min(0) / w + half, half - up.min(0) / h, right.max(0) / w + half
    )


def cos_sin(degrees: Sequence[float]) -> tuple[ndarray, ndarray]:
    """Cosine and sine of the angle in float32, rounded to float32: numpy's own float32 functions depend on
    the processor in the last bit."""
    angle = (np.asarray(degrees, np.float32) * np.float32(math.pi / 180)).astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
