"""Models as objects: of a run folder or checkpoint, of an official file, with guidance; and what they
generate."""

from lit_gen.models.generation import restore_images, sample_batches, sample_images, translate_images
from lit_gen.models.loading import (
    FAMILIES,
    autoguidance,
    classifier,
    classifier_free,
    funit_run,
    guide,
    load,
    open_model,
    open_translator,
    sample_in,
)

__all__ = [
    "FAMILIES",
    "autoguidance",
    "classifier",
    "classifier_free",
    "funit_run",
    "guide",
    "load",
    "open_model",
    "open_translator",
    "restore_images",
    "sample_batches",
    "sample_images",
    "sample_in",
    "translate_images",
]
