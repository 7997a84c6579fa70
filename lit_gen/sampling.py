"""Images from a trained run, on one device or several: image i depends on the seed and i alone."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.images import grid, save_png
from lit_gen.instantiate import instantiate
from lit_gen.official import open_model

__all__ = ["sample", "sample_images"]


def sample(cfg: DictConfig, out: Path) -> None:
    """Writes `grid.png` and the images (`format=png`: `images/<index>.png`; `npz`: `images.npz` with arr_0,
    uint8 NHWC)."""
    if cfg.format not in ("png", "npz", "none"):
        raise ConfigError(f"format={cfg.format}: must be png, npz or none (the grid alone).")
    if cfg.num < 1 or cfg.batch_size < 1:
        raise ConfigError(f"num={cfg.num} and batch_size={cfg.batch_size} must be at least 1.")
    _claim(out)
    module, _, path = open_model(cfg)
    sampler = instantiate(cfg.sampler, list(cfg.allow_targets)) if cfg.sampler else None
    indices = range(cfg.first, cfg.first + cfg.num)
    start = time.perf_counter()
    images = sample_images(module, indices, cfg.seed, cfg.batch_size, sampler, cfg.label, progress=True)
    seconds = time.perf_counter() - start
    save_png(grid(images[: cfg.grid], scale=max(1, 64 // images.shape[-1])), out / "grid.png")
    if cfg.format == "png":
        for i, image in zip(indices, images, strict=True):
            save_png(image, out / "images" / f"{i:06d}.png")
    elif cfg.format == "npz":
        np.savez_compressed(out / "images.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    print(
        f"{len(images)} images of {path} in {seconds:.1f} s ({len(images) / seconds:.1f} images/s) -> {out}"
    )


def sample_images(
    module: Any,
    indices: Any,
    seed: int,
    batch_size: int,
    sampler: Any = None,
    label: int | None = None,
    progress: bool = False,
) -> Tensor:
    """uint8 (N, C, H, W) on the CPU, in batches. `label`: one class for all of a conditional model's
    images."""
    if label is not None and not 0 <= label < module.num_classes:
        classes = (
            f"0 to {module.num_classes - 1}" if module.num_classes else "none: the model is unconditional"
        )
        raise ConfigError(f"label={label}: the model's classes are {classes}.")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    parts = []
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("sampling", total=len(indices))
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            classes = None if label is None else torch.full((len(part),), label)
            parts.append(module.sample(part, seed, sampler, classes).cpu())
            bar.advance(task, len(part))
    return torch.cat(parts)


def _claim(out: Path) -> None:
    """Results are never written over earlier ones."""
    if any((out / name).exists() for name in ("grid.png", "images", "images.npz")):
        raise ConfigError(f"{out} already holds samples: choose another out=.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be made: {error.strerror}.") from error
