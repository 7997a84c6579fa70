"""Writes a data set once, in a form that any run reads by index: litdata's chunks, or zips of PNGs."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from lit_gen.callbacks.contracts import ImageData
from lit_gen.cli import entry_point, show
from lit_gen.data.images import pixels_of, shape_of
from lit_gen.data.prepared import is_remote
from lit_gen.data.shards import write_shards, write_zip
from lit_gen.errors import ConfigError
from lit_gen.instantiate import instantiate

SPLITS = ("train", "test")


def prepare(cfg: DictConfig) -> None:
    """Writes both splits of `cfg.data` into `cfg.out`, or what an interrupted command left to be written.
    Raises ConfigError for options out of range, data whose items differ in format, and a place that holds
    something else, or all of it already."""
    if cfg.format not in ("litdata", "zip"):
        raise ConfigError(f"format={cfg.format}: must be litdata or zip.")
    workers = _cores() if cfg.workers == "auto" else cfg.workers
    if not isinstance(workers, int) or workers < 0:
        raise ConfigError(f"workers={cfg.workers}: must be auto, or 0 (this process alone) or more.")
    if cfg.format == "zip" and is_remote(cfg.out):
        raise ConfigError(f"out={cfg.out}: format=zip is written to a local folder; copy it from there.")
    data = instantiate(cfg.data)
    if not isinstance(data, ImageData):
        raise ConfigError(f"data: a {type(data).__name__} has no data sets of images to prepare.")
    wrote = False
    for split in SPLITS:
        place, dataset = f"{cfg.out.rstrip('/')}/{split}", data.dataset(split)

        def bar(results: Iterator[Any], total: int, split: str = split) -> Iterator[Any]:
            yield from track(results, f"preparing {split}", total=total, console=Console(stderr=True))

        if cfg.format == "zip":
            write_zip(dataset, Path(f"{place}.zip"), workers=workers, bar=bar)
            wrote = True
        else:
            wrote |= write_shards(dataset, place, workers=workers, shard_mib=cfg.shard_mib, bar=bar)
        show(f"{split}: {len(dataset):,} images, {len(dataset.classes) or 'no'} classes")
    if not wrote:
        raise ConfigError(f"out={cfg.out} holds these data already: train on them with data=prepared.")
    _advise(cfg, data.dataset("train"))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _advise(cfg: DictConfig, dataset: Any) -> None:
    channels, height, width = shape_of(dataset)
    size = height if height == width else f"[{height},{width}]"
    options = [f"data.image_size={size}", f"data.channels={channels}"]
    options += [f"data.num_classes={len(dataset.classes)}"] * bool(dataset.classes)
    pixels = pixels_of(dataset)
    if not pixels.are_bytes:
        options += [f"data.dtype={pixels.dtype}", f"data.range=[{pixels.low:g},{pixels.high:g}]"]
    where = f"data=prepared {shlex.quote(f'data.path={cfg.out}')}"
    if cfg.format == "zip":
        files = [f"data.{split}.path={cfg.out}/{split}.zip" for split in ("train", "test")]
        where = f"data=zip {shlex.join(files)}"
    show(f"train on it: python -m lit_gen.train {where} {' '.join(options)}")


main = entry_point("prepare")(prepare)

if __name__ == "__main__":
    main()
