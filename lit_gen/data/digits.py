"""The handwritten digits that ship with scikit-learn: 1,797 gray images of 8x8, no download.

Source: UCI Optical Recognition of Handwritten Digits, https://archive.ics.uci.edu/dataset/80
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from lit_gen.data.images import TensorImages
from lit_gen.errors import check_choice


@cache
def _splits() -> dict[str, tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    flat, labels = load_digits(return_X_y=True)
    pixels = np.round(np.asarray(flat) / 16 * 255).astype(np.uint8).reshape(-1, 1, 8, 8)  # levels 0..16
    parts = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in parts)
    return {"train": (train_x, train_y.long()), "test": (test_x, test_y.long())}


def slant(images: Tensor) -> Tensor:
    """How far handwriting leans to the right, (B, 1), of bright strokes on black (B, C, H, W) in [-1, 1]: the
    shift of the ink per unit of height, its covariance of right and up over the variance of up."""
    ink = (images.mean(1) + 1) / 2
    ink = ink / ink.sum((1, 2), keepdim=True).clamp(min=1e-6)
    height, width = ink.shape[1:]
    right = torch.arange(width, device=ink.device, dtype=ink.dtype)[None, None, :]
    up = -torch.arange(height, device=ink.device, dtype=ink.dtype)[None, :, None]
    right, up = (x - (ink * x).sum((1, 2), keepdim=True) for x in (right, up))
    return ((ink * right * up).sum((1, 2)) / (ink * up * up).sum((1, 2)).clamp(min=1e-6))[:, None]


def digits(split: str = "train") -> TensorImages:
    """The fixed stratified split: 1,437 training and 360 test images, uint8 (1, 8, 8), labels 0-9."""
    check_choice("split", split, ("train", "test"))
    images, labels = _splits()[split]
    return TensorImages(images, labels, [str(i) for i in range(10)], f"digits-{split}")
