"""Scenes: handwritten digits in cluttered color pictures, with boxes; a detection set without a download.

Scene i depends on (seed, split, i) alone. Training scenes show scikit-learn's training digits, test scenes
its test digits.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_gen.data.digits import digits
from lit_gen.data.images import fingerprint
from lit_gen.errors import ConfigError
from lit_gen.rng import key

SIZES = (0.2, 0.42)  # a digit's height, in parts of the image's side
COVER = 0.15  # part of a digit's box that another may cover
CONTRAST = 70  # gray levels between a digit and what lies below it
Box = tuple[int, int, int, int]


class Scenes:
    """`ds[i] -> {"image": uint8 (3, S, S), "boxes": float32 (N, 4) xyxy pixels, "labels": int64 (N,)}`, 1 <=
    N <= `most`.

    Scenes are drawn on first use, in 1 to 2 ms, and kept. Boxes are tight: they touch the digit's ink on all
    four sides. `clutter` is the number of digit fragments and strokes that are no objects.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 2000,
        image_size: int = 64,
        most: int = 4,
        clutter: int = 6,
        seed: int = 0,
    ):
        if size < 1 or most < 1 or clutter < 0:
            raise ConfigError(f"size={size}, most={most}, clutter={clutter}: at least 1, 1 and 0.")
        if image_size < 32:
            raise ConfigError(f"image_size={image_size}: digits need scenes of at least 32 pixels.")
        source = digits(split)
        assert source.labels is not None
        self._digits, self._labels = source.images[:, 0].numpy(), source.labels.numpy()
        self.split, self.size, self.image_size = split, size, image_size
        self.most, self.clutter, self.seed = most, clutter, seed
        self.classes = source.classes
        self._made: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < self.size:
            raise IndexError(i)
        if i not in self._made:
            self._made[i] = self._make(i)
        return {name: value.clone() for name, value in self._made[i].items()}

    def _make(self, i: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(key(self.seed, "scene", self.split, i))
        canvas = _background(rng, self.image_size)
        for _ in range(self.clutter):
            _fragment(rng, canvas, self._digits)
        boxes: list[Box] = []
        labels = []
        for _ in range(rng.integers(1, self.most + 1)):
            which = rng.integers(len(self._digits))
            ink = _scaled(rng, self._digits[which], self.image_size)
            box = _free_place(rng, ink.shape, self.image_size, boxes)
            if box is not None:
                _paint(rng, canvas, ink, box)
                boxes.append(box)
                labels.append(int(self._labels[which]))
        pixels = np.rint(canvas.clip(0, 255)).astype(np.uint8).transpose(2, 0, 1)
        return {
            "image": torch.from_numpy(pixels.copy()),
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.tensor(labels),
        }

    def fingerprint(self) -> str:
        settings = f"{self.split}-{self.image_size}-{self.most}-{self.clutter}-{self.seed}"
        first = (self[i]["image"].numpy().tobytes() for i in range(min(self.size, 8)))
        return fingerprint(f"scenes-{settings}", self.size, first)


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """A smooth color field with grain, float32 (S, S, 3), darker or lighter than the middle."""
    coarse = rng.integers(20, 150, (4, 4, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    field = smooth if rng.random() < 0.5 else 255 - smooth
    return field + rng.normal(0, 8, field.shape).astype(np.float32)


def _fragment(rng: np.random.Generator, canvas: np.ndarray, pictures: np.ndarray) -> None:
    """A corner of a digit, or a stroke: what a detector must not take for a digit."""
    side = len(canvas)
    if rng.random() < 0.5:
        picture = pictures[rng.integers(len(pictures))]
        y, x = rng.integers(0, 2, 2) * 4
        ink = _scaled(rng, picture[y : y + 4, x : x + 4], side, 0.5)
    else:
        thick, long = int(rng.integers(1, 3)), int(rng.integers(side // 8, side // 3))
        ink = np.ones((thick, long) if rng.random() < 0.5 else (long, thick), np.float32)
    height, width = ink.shape
    top, left = int(rng.integers(0, side - height + 1)), int(rng.integers(0, side - width + 1))
    _paint(rng, canvas, ink, (left, top, left + width, top + height))


def _scaled(rng: np.random.Generator, picture: np.ndarray, side: int, part: float = 1.0) -> np.ndarray:
    """The picture's ink in [0, 1] at a random size, trimmed, so that its box is tight."""
    height = rng.uniform(*SIZES) * side * part
    size = (max(round(height * rng.uniform(0.8, 1.1)), 3), max(round(height), 3))
    ink = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    rows, columns = np.flatnonzero((ink > 0.3).any(1)), np.flatnonzero((ink > 0.3).any(0))
    if not len(rows):
        return np.ones((2, 2), np.float32)  # an empty corner of a digit
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _free_place(rng: np.random.Generator, shape: tuple[int, int], side: int, taken: list[Box]) -> Box | None:
    """A box of this (height, width) that covers no other by more than COVER, nor is so covered; None after 20
    tries."""
    height, width = shape
    for _ in range(20):
        top, left = int(rng.integers(0, side - height + 1)), int(rng.integers(0, side - width + 1))
        box = (left, top, left + width, top + height)
        if all(_shared(box, other) <= COVER * min(_area(box), _area(other)) for other in taken):
            return box
    return None


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(a: Box, b: Box) -> int:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def _paint(rng: np.random.Generator, canvas: np.ndarray, ink: np.ndarray, box: Box) -> None:
    """Lays a color over the canvas where there is ink, CONTRAST or more lighter or darker than what lies
    there."""
    x0, y0, x1, y1 = box
    below = canvas[y0:y1, x0:x1]
    level = below.mean()
    low, high = (min(level + CONTRAST, 235), 255) if level < 128 else (0, max(level - CONTRAST, 20))
    color = rng.uniform(low, high, 3)
    canvas[y0:y1, x0:x1] = below + ink[..., None] * (color.astype(np.float32) - below)
