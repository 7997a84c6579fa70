"""Writes a data set once, or its latents, in a form that any run reads by index: litdata's chunks, or zips of
PNGs."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from lit_gen.callbacks.contracts import ImageData
from lit_gen.cli import check_at_least_1, entry_point, show
from lit_gen.data.images import pixels_of, shape_of
from lit_gen.data.latents import EncodedImages
from lit_gen.data.prepared import is_remote
from lit_gen.data.shards import Bar, write_shards, write_zip
from lit_gen.errors import ConfigError
from lit_gen.instantiate import instantiate
from lit_gen.models.encoding import Encoder, open_encoder

SPLITS = ("train", "test")


def prepare(cfg: DictConfig) -> None:
    """Writes both splits of `cfg.data` into `cfg.out`, or what an interrupted command left to be written;
    with `cfg.encoder` their latents, and the pictures in the folder `images` of it. Raises ConfigError for
    options out of range, data whose items differ in format, and a place that holds something else, or all of
    it already."""
    if cfg.format not in ("litdata", "zip"):
        raise ConfigError(f"format={cfg.format}: must be litdata or zip.")
    workers = _cores() if cfg.workers == "auto" else cfg.workers
    if not isinstance(workers, int) or workers < 0:
        raise ConfigError(f"workers={cfg.workers}: must be auto, or 0 (this process alone) or more.")
    if cfg.format == "zip" and is_remote(cfg.out):
        raise ConfigError(f"out={cfg.out}: format=zip is written to a local folder; copy it from there.")
    data, out = instantiate(cfg.data), cfg.out.rstrip("/")
    if not isinstance(data, ImageData):
        raise ConfigError(f"data: a {type(data).__name__} has no data sets of images to prepare.")
    encoder = None
    if cfg.encoder is None and (cfg.dtype != "float32" or not cfg.images):
        raise ConfigError(
            f"dtype={cfg.dtype}, images={cfg.images}: these are of latents and go with encoder=... Pixels "
            "are stored as data.dtype says."
        )
    if cfg.encoder is not None:
        check_at_least_1(cfg, "batch_size")
        if cfg.format == "zip":
            raise ConfigError("format=zip holds pictures, not latents: take format=litdata.")
        encoder = open_encoder(cfg.encoder, cfg.checkpoint, ema=cfg.ema, device=cfg.device)
        wrote = _encode(cfg, encoder, data, out, workers)
    elif cfg.format == "zip":
        for split in SPLITS:
            bar = _bar(f"preparing {split}")
            write_zip(data.dataset(split), Path(f"{out}/{split}.zip"), workers=workers, bar=bar)
            _say(split, data)
        wrote = True
    else:
        wrote = _write(cfg, data, out, workers)
    if not wrote:
        name = "prepared" if encoder is None else "latents"
        raise ConfigError(f"out={cfg.out} holds these data already: train on them with data={name}.")
    _advise(cfg, data.dataset("train"), encoder)


def _write(cfg: DictConfig, data: ImageData, out: str, workers: int) -> bool:
    """Both splits as shards; whether anything was left to be written."""
    wrote = False
    for split in SPLITS:
        options = {"workers": workers, "shard_mib": cfg.shard_mib, "bar": _bar(f"preparing {split}")}
        wrote |= write_shards(data.dataset(split), f"{out}/{split}", **options)
        _say(split, data)
    return wrote


def _encode(cfg: DictConfig, encoder: Encoder, data: ImageData, out: str, workers: int) -> bool:
    """The latents of both splits, what decodes them, and the pictures; whether anything was left to be
    written."""
    wrote = False
    for split in SPLITS:
        dataset = data.dataset(split)
        encoder.check(dataset)
        latents = EncodedImages(dataset, encoder, encoder.fingerprint, cfg.dtype, cfg.batch_size, workers)
        bar = _bar(f"encoding {split}")
        wrote |= write_shards(latents, f"{out}/{split}", workers=0, shard_mib=cfg.shard_mib, bar=bar)
    wrote |= encoder.write(data.dataset("train"), out, _bar("measuring the latents' mean and deviation"))
    if cfg.images:
        wrote |= _write(cfg, data, f"{out}/images", workers)
    return wrote


def _bar(what: str) -> Bar:
    def bar(results: Iterator[Any], total: int) -> Iterator[Any]:
        yield from track(results, what, total=total, console=Console(stderr=True))

    return bar


def _say(split: str, data: ImageData) -> None:
    dataset = data.dataset(split)
    show(f"{split}: {len(dataset):,} images, {len(dataset.classes) or 'no'} classes")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _advise(cfg: DictConfig, dataset: Any, encoder: Encoder | None) -> None:
    channels, height, width = shape_of(dataset) if encoder is None else encoder.latent_shape(dataset)
    size = height if height == width else f"[{height},{width}]"
    options = [f"data.image_size={size}", f"data.channels={channels}"]
    options += [f"data.num_classes={len(dataset.classes)}"] * bool(dataset.classes)
    pixels = pixels_of(dataset)
    if not pixels.are_bytes:
        options += [f"data.dtype={pixels.dtype}", f"data.range=[{pixels.low:g},{pixels.high:g}]"]
    options += ["data.images=null"] * (encoder is not None and not cfg.images)
    name = "prepared" if encoder is None else "latents"
    where = f"data={name} {shlex.quote(f'data.path={cfg.out}')}"
    if cfg.format == "zip":
        files = [f"data.{split}.path={cfg.out}/{split}.zip" for split in ("train", "test")]
        where = f"data=zip {shlex.join(files)}"
    show(f"train on it: python -m lit_gen.train {where} {' '.join(options)}")


main = entry_point("prepare")(prepare)

if __name__ == "__main__":
    main()
