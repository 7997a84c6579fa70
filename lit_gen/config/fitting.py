"""What experiment=images takes from the data and from the device: resolvers of its configuration.

    ${found:<path>,<accelerator>,<what>}       of the images in a folder or zip
    ${fitting:<image_size>,<accelerator>,<what>}  of a model and a training that the device can bear
    ${with_inception:<channels>,<dtype>,<weights>,<a>,<b>}  a if FID can be measured, else b
    ${introduction:<path>,<image_size>,<channels>,<dtype>,<accelerator>}  what is said of all this

A configuration that a run saves holds the values.
"""

import logging
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lit_gen.errors import ConfigError

log = logging.getLogger(__name__)

CPU_SIDE, GPU_SIDE = 32, 64  # pixels
GIB_PER_IMAGE = 0.25  # at 64 x 64 pixels, base_channels=128, in bfloat16; the backward pass keeps 0.14 of it
PLANS: dict[str, dict[str, Any]] = {
    "cpu": {"base_channels": 32, "num_blocks": 1, "halvings": 2, "max_steps": 1000, "lr": 1e-3, "ema": 0.995}
    | {"every": 250, "num_images": 128, "final_images": 256, "num_steps": 18},
    "gpu": {"base_channels": 128, "num_blocks": 3, "halvings": 3, "max_steps": 100_000, "lr": 2e-4}
    | {"ema": 0.9995, "every": 5000, "num_images": 2000, "final_images": 10_000, "num_steps": 18},
}


def register_resolvers() -> None:
    """Makes the resolvers known to OmegaConf."""
    for function in (found, fitting, with_inception, introduction):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)


def found(path: str, accelerator: str, what: str) -> Any:
    """What the files say of the images: image_size, channels, dtype, range, num_classes, or labeled; and
    batch_size, at most what they allow."""
    images = _survey(path)
    if what == "image_size":
        return images.size_for(GPU_SIDE if _gpu_gib(accelerator) else CPU_SIDE)
    if what == "batch_size":
        size = images.size_for(GPU_SIDE if _gpu_gib(accelerator) else CPU_SIDE)
        return _batch_size(size, accelerator, int(0.85 * images.num))  # a tenth or more is the test set's
    values = {"channels": images.channels, "dtype": images.dtype, "num_classes": images.classes}
    return values[what] if what in values else images.range if what == "range" else bool(images.classes)


def fitting(image_size: Any, accelerator: str, what: str) -> Any:
    """A value of the plan of the device, or what the image size makes of it: channel_mult and
    attention_resolutions."""
    from lit_gen.images import height_and_width

    plan = PLANS["gpu" if _gpu_gib(accelerator) else "cpu"]
    sides = height_and_width(image_size)
    levels = 1
    while levels <= plan["halvings"] and not any(s % 2**levels or s < 4 * 2**levels for s in sides):
        levels += 1
    if what == "channel_mult":
        return [1, 2, 2, 2][:levels]
    if what == "attention_resolutions":
        return [side for side in (sides[0] >> i for i in range(levels)) if 8 <= side <= 16]
    return plan[what]


def with_inception(channels: int, dtype: str, weights: str | None, yes: Any, no: Any) -> Any:
    """`yes` if the images are pictures and the Inception weights are there (`weights`, or where they are
    sought) or can be downloaded; else `no`, and one line that says so."""
    return no if _no_inception(channels, dtype, weights) else yes


def introduction(path: str | None, image_size: Any, channels: int, dtype: str, accelerator: str) -> str:
    """One line of the data, if they are files that were surveyed, and one of the device."""
    from lit_gen.data.prepared import DESCRIPTION, is_remote
    from lit_gen.images import height_and_width

    shape = "{}x{}".format(*height_and_width(image_size))
    lines = []
    if path is not None and not is_remote(path) and not Path(path, "train", DESCRIPTION).exists():
        images = _survey(path)
        kind = {(1, "uint8"): "gray", (3, "uint8"): "color"}.get(
            (channels, dtype), f"{channels}-channel {dtype}"
        )
        classes = f" in {images.classes} classes" if images.classes else ""
        common = "{}x{}".format(*images.most_common)
        lines.append(
            f"{images.path.name}: {images.num:,} {kind} images{classes}, most of them {common} (height x "
            "width)."
        )
    gib = _gpu_gib(accelerator)
    device = f"a GPU of {gib:.0f} GiB" if gib else "a CPU, so that the model is small"
    lines.append(
        f"Images of {shape} are trained on {device}. Other choices: data.image_size, data.batch_size, "
        "model.net.base_channels, trainer.max_steps."
    )
    return "\n".join(lines)


@cache
def _survey(path: str) -> Any:
    from lit_gen.data.survey import survey

    return survey(path)


@cache
def _gpu_gib(accelerator: str) -> float:
    """Memory of the GPU that trains; 0 where a CPU does."""
    import torch

    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return 0.0
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def _batch_size(image_size: Any, accelerator: str, num: int) -> int:
    """A power of two that the memory bears and the number of training images allows."""
    from lit_gen.images import height_and_width

    height, width = height_and_width(image_size)
    bearable = 32.0
    if gib := _gpu_gib(accelerator):
        bearable = min(0.8 * gib / (GIB_PER_IMAGE * height * width / 64**2), 256)
    return 1 << max(int(min(bearable, num)), 1).bit_length() - 1


@cache
def _no_inception(channels: int, dtype: str, weights: str | None) -> str:
    """Why FID cannot be measured; empty where it can."""
    from lit_gen.cli import is_main_process
    from lit_gen.metrics.inception import WEIGHTS
    from lit_gen.metrics.weights_files import find_weights

    problem = ""
    if dtype != "uint8" or channels not in (1, 3):
        problem = (
            "its network takes pictures of 8 bits and 1 or 3 channels. lit-gen evaluate extractor=pixels "
            f"extractor.channels={channels} compares means of pixels."
        )
    else:
        try:
            find_weights(WEIGHTS, weights)
        except ConfigError as error:
            if not isinstance(error.__cause__, OSError):  # not for want of a network
                raise
            problem = (
                f"{WEIGHTS.what} ({WEIGHTS.size}) are neither in $LITGEN_WEIGHTS nor in torch's cache, and "
                f"could not be downloaded ({error.__cause__})."
            )
    if problem and is_main_process():
        log.warning("No FID is measured, the loss on the test images chooses checkpoints: %s", problem)
    return problem
