"""The handwritten digits that ship with scikit-learn: 1,797 grey images of 8x8, no download.

Source: UCI Optical Recognition of Handwritten Digits, https://archive.ics.uci.edu/dataset/80
"""

from functools import cache

import numpy as np
import torch

from lit_gen.data.images import TensorImages
from lit_gen.errors import ConfigError

__all__ = ["digits"]

SPLITS = ("train", "test")


@cache
def _arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.round(bunch.images / 16 * 255).astype(np.uint8)[:, None]  # grey levels 0..16 -> 0..255
    return train_test_split(pixels, bunch.target, test_size=360, stratify=bunch.target, random_state=0)


def digits(split: str = "train") -> TensorImages:
    """The fixed stratified split: 1,437 training and 360 test images, uint8 (1, 8, 8), labels 0-9."""
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: the digits have the splits {', '.join(SPLITS)}.")
    train_x, test_x, train_y, test_y = _arrays()
    x, y = (train_x, train_y) if split == "train" else (test_x, test_y)
    return TensorImages(
        torch.from_numpy(x),
        torch.from_numpy(y.astype(np.int64)),
        [str(i) for i in range(10)],
        f"digits-{split}",
    )
