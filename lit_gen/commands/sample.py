"""Images from a trained run, on one device or several: image i depends on the seed and i alone."""

import csv
import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from lit_gen.cli import check_at_least_1, claim, entry_point
from lit_gen.data.arrays import import_tifffile, save_tiff
from lit_gen.data.sound import save_wav, sound_of
from lit_gen.devices import divided
from lit_gen.errors import ConfigError, check_choice
from lit_gen.images import grid, save_png
from lit_gen.instantiate import instantiate
from lit_gen.metrics.distributed import all_gather, from_rank_zero, gather_batches
from lit_gen.models import open_model, sample_batches
from lit_gen.models.conditions import Told
from lit_gen.score.condition import Condition
from lit_gen.score.module import ScoreModule

FORMATS = ("auto", "png", "npz", "tiff", "none")
SAVE = {"png": save_png, "tiff": save_tiff}


def sample(cfg: DictConfig, out: Path) -> None:
    """Writes `grid.png` and the images as the data are stored (`format=png`: `images/<index>.png`, of bytes
    of one or three channels; `tiff`: `images/<index>.tif`; `npz`: `images.npz` with arr_0, NHWC; `auto`: png,
    or npz where that cannot hold them); and `labels.csv`, the seed of each and what it was told. Of pictures
    of sounds also `sounds/<index>.wav`."""
    check_choice("format", cfg.format, FORMATS)
    check_at_least_1(cfg, "num", "batch_size", "grid")
    from_rank_zero(lambda: claim(out, "samples", "grid.png", "images", "images.npz", "labels.csv", "sounds"))
    module, run_cfg, path = open_model(cfg)
    told = Told.of(cfg, run_cfg, module)
    file_format = _format(cfg.format, module)
    sampler = instantiate(cfg.sampler) if cfg.sampler else None
    sound = sound_of(None if run_cfg is None else run_cfg.data)
    indices = range(cfg.first, cfg.first + cfg.num)
    start = time.perf_counter()
    needed = cfg.num if file_format == "npz" else min(cfg.grid, cfg.num)  # by rank 0
    kept, drawn, conditions = [], torch.tensor(0), []
    for rows, images, condition in sample_batches(
        module, indices, cfg.seed, cfg.batch_size, sampler, told, progress=True
    ):
        conditions.append(_numbers(condition, len(rows), module.vector_dim))
        if file_format in SAVE:
            for i, image in zip(indices[rows.start : rows.stop], images, strict=True):
                SAVE[file_format](image, out / "images" / f"{i:06d}.{file_format[:3]}")
        if sound is not None:
            for i, wave in zip(indices[rows.start : rows.stop], sound.wave(images), strict=True):
                save_wav(wave, out / "sounds" / f"{i:06d}.wav", sound.rate)
        if rows.start < needed:
            kept.append(images[: needed - rows.start])
        drawn += len(images)
    total = int(all_gather(drawn).sum())  # waits for the slowest rank
    seconds = time.perf_counter() - start
    images = gather_batches(kept, needed, cfg.batch_size)
    numbers = gather_batches(conditions, cfg.num, cfg.batch_size)
    if images is None or numbers is None:
        return  # rank 0 has them
    _write_labels(out / "labels.csv", indices, cfg.seed, told, numbers.tolist())
    save_png(grid(module.pixels.picture(images[: cfg.grid]), scale=0), out / "grid.png")
    if file_format == "npz":
        np.savez_compressed(out / "images.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    print(f"{total} images of {path} in {seconds:.1f} s ({total / seconds:.1f} images/s) -> {out}")


def _numbers(condition: Condition, n: int, size: int) -> Tensor:
    """The class and the vector of `size` numbers as float64 (n, 1 + size); -1 for no class, NaN for no
    vector."""
    label = torch.full((n,), -1) if condition.label is None else condition.label
    vector = torch.full((n, size), torch.nan) if condition.vector is None else condition.vector
    return torch.cat([label[:, None], vector], 1).to(torch.float64)


def _write_labels(path: Path, indices: range, seed: int, told: Told, numbers: list[list[float]]) -> None:
    """A CSV with a row for each image: its index, its seed, and what it was told."""
    labeled, v = told.module.num_classes > 0, told.module.vector_dim
    columns = told.columns if len(told.columns) == v else [f"vector_{k}" for k in range(v)]
    header = ["index", "seed", *(["label"] if labeled else []), *columns, *(["image"] if told.names else [])]
    partial = path.with_suffix(".part")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for i, (label, *vector) in zip(indices, numbers, strict=True):
            known = [int(label)] if labeled else []
            writer.writerow(
                [i, seed, *known, *(f"{x:.9g}" for x in vector), *([told.name(i)] if told.names else [])]
            )
    partial.replace(path)


def _format(wanted: str, module: ScoreModule) -> str:
    """That of the files. Raises ConfigError for PNG where it would not hold what the model makes."""
    pictures = module.pixels.are_bytes and module.picture_shape[0] in (1, 3)
    if wanted == "png" and not pictures:
        raise ConfigError(
            f"format=png: the model makes {module.pixels.dtype} images of {module.picture_shape[0]} "
            "channels. Take format=npz or format=tiff, which keep them as they are."
        )
    if wanted == "tiff":
        import_tifffile()
    return wanted if wanted != "auto" else "png" if pictures else "npz"


main = entry_point("sample")(lambda cfg: divided(sample, cfg, images=cfg.num))

if __name__ == "__main__":
    main()
