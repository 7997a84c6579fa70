"""Data sets of images and the order in which a training reads them."""

from typing import Any

from lit_gen.data.digits import digits, slant
from lit_gen.data.images import TensorImages
from lit_gen.data.keyed import KeyedBatches, KeyedDataset

__all__ = ["ImageDataModule", "KeyedBatches", "KeyedDataset", "TensorImages", "digits", "slant"]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import, and workers that only read images do without it.
    if name == "ImageDataModule":
        from lit_gen.data.module import ImageDataModule

        return ImageDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
