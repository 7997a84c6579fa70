"""The handwritten digits that ship with scikit-learn: 1,797 gray images of 8x8, no download.

Source: UCI Optical Recognition of Handwritten Digits, https://archive.ics.uci.edu/dataset/80
"""

from functools import cache

import numpy as np
import torch

from lit_gen.data.images import TensorImages
from lit_gen.errors import check_choice

__all__ = ["digits"]


@cache
def _arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    flat, labels = load_digits(return_X_y=True)
    pixels = np.round(np.asarray(flat) / 16 * 255).astype(np.uint8).reshape(-1, 1, 8, 8)  # levels 0..16
    split = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = map(np.asarray, split)
    return train_x, test_x, train_y, test_y


def digits(split: str = "train") -> TensorImages:
    """The fixed stratified split: 1,437 training and 360 test images, uint8 (1, 8, 8), labels 0-9."""
    check_choice("split", split, ("train", "test"))
    train_x, test_x, train_y, test_y = _arrays()
    x, y = (train_x, train_y) if split == "train" else (test_x, test_y)
    return TensorImages(
        torch.from_numpy(x),
        torch.from_numpy(y.astype(np.int64)),
        [str(i) for i in range(10)],
        f"digits-{split}",
    )
