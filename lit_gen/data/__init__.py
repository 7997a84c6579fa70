"""Data sets of images and the order in which a training reads them."""

from typing import Any

from lit_gen.data.digits import digits
from lit_gen.data.images import TensorImages, WrappedImages, as_images
from lit_gen.data.keyed import KeyedBatches, KeyedDataset

__all__ = [
    "ImageDataModule",
    "KeyedBatches",
    "KeyedDataModule",
    "KeyedDataset",
    "TensorImages",
    "WrappedImages",
    "as_images",
    "digits",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import, and workers that only read images do without it.
    if name in ("ImageDataModule", "KeyedDataModule"):
        from lit_gen.data import module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
