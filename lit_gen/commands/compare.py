"""Runs side by side: a table with error bars, their Frechet distances while they trained, the same seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from lit_gen import __version__, runs
from lit_gen.cli import check_at_least_1, claim, entry_point, show, table
from lit_gen.data.images import pixels_of, shape_of
from lit_gen.devices import divided
from lit_gen.errors import ConfigError
from lit_gen.evaluation.samples import (
    Measurement,
    check_options,
    data_and_num,
    extractor_of,
    open_run,
    with_error,
)
from lit_gen.figures import distance_curves, save
from lit_gen.images import grid, save_png
from lit_gen.instantiate import instantiate
from lit_gen.loggers import close, wandb
from lit_gen.metrics import Estimate, records
from lit_gen.metrics.distributed import from_rank_zero, own_batches, rank
from lit_gen.models import sample_in


@dataclass
class _Run:
    name: str
    folder: Path
    config: DictConfig
    file: Path
    module: Any


def compare_runs(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Samples every run from the same seeds and measures all with one extractor against one reference, the
    first run's test images; writes `comparison.json`, `curves.png`, `grids.png` and a W&B run into `out`,
    prints the table and returns the record. Of several ranks each measures its share, and rank 0 writes.

    Raises ConfigError for runs that cannot be compared: other test images, other image sizes, no samples.
    """
    from_rank_zero(lambda: check_options(cfg, out, "a comparison", "comparison.json"))
    if "fdclass" in cfg.measures:
        raise ConfigError("fdclass is measured by lit-gen evaluate per_class=true.")
    check_at_least_1(cfg, "grid")
    opened = _open(cfg)
    data, n = data_and_num(cfg, opened[0].config)
    _check_same_reference(opened, data)
    extractor = extractor_of(cfg, opened[0].config, opened[0].name)
    extractor = extractor.reading(pixels_of(data.test), shape_of(data.test)[0])
    measurement = Measurement.of(cfg, extractor)
    results, shown = _measured(cfg, opened, data, measurement, n)
    fingerprint = data.test.fingerprint()
    sizes = {"n_real": len(data.test), "n_fake": n, "reference": fingerprint, "seed": cfg.seed}
    record = {
        "runs": {run.name: str(run.file) for run in opened},
        "differences": runs.differences({run.name: run.config for run in opened}),
        "n_fake": n,
        "seed": cfg.seed,
        "reference": fingerprint,
        "results": {name: records(found, measurement.extractor, **sizes) for name, found in results.items()},
        "version": __version__,
    }
    if rank() > 0:
        return record
    claim(out, "a comparison", "comparison.json")
    pictures = {name: grid(extractor.pixels.picture(images), scale=0) for name, images in shown.items()}
    grids = save_png(side_by_side(pictures), out / "grids.png")
    histories = {run.name: runs.history(run.folder) for run in opened if run.folder.is_dir()}
    figure = distance_curves(histories)
    curves = figure and save(figure, out / "curves.png")
    runs.write_json(out / "comparison.json", record)
    _to_wandb(cfg, out, results, grids, curves)
    _print(results, record["differences"], out)
    return record


def _measured(
    cfg: DictConfig, opened: Sequence[_Run], data: Any, measurement: Measurement, n: int
) -> tuple[dict[str, dict[str, Estimate]], dict[str, Tensor]]:
    """The metrics of n samples of each run, and, on rank 0, the first `cfg.grid` samples."""
    sampler = instantiate(cfg.sampler) if cfg.sampler else None
    reference = measurement.summarize_dataset(data.test, "reference")
    training = measurement.summarize_dataset(data.train, "training images")
    results, shown = {}, {}
    for run in opened:
        parts = (
            (indices, run.module.sample(indices, cfg.seed, sampler), None)
            for indices in own_batches(n, cfg.batch_size)
        )
        summary = measurement.summarize(parts, n, run.name)
        results[run.name] = measurement.compare(reference, summary, training)
        if rank() == 0:
            shown[run.name] = run.module.sample(range(cfg.grid), cfg.seed, sampler).cpu()
    return results, shown


def _open(cfg: DictConfig) -> list[_Run]:
    if len(cfg.runs) < 2:
        raise ConfigError(f"runs={list(cfg.runs)}: give two run folders or more, runs=[A,B].")
    folders = [Path(run) for run in cfg.runs]
    if cfg.names is not None and (len(cfg.names) != len(folders) or len(set(cfg.names)) < len(folders)):
        raise ConfigError(f"names={list(cfg.names)}: {len(folders)} different names are needed, one a run.")
    names = list(cfg.names) if cfg.names is not None else names_of(folders)
    opened = []
    for name, folder in zip(names, folders, strict=True):
        module, config, file = open_run(cfg, folder)
        sample_in(module, cfg.precision)
        opened.append(_Run(name, folder, config, file, module))
    return opened


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    resolved = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, resolved)) + 1):
        names = ["/".join(parts[-depth:]) for parts in resolved]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"runs={[str(f) for f in folders]}: a run is named twice.")


def _shape(run: _Run) -> tuple[int, ...]:
    """(C, H, W) of its samples."""
    return getattr(run.module, "picture_shape", None) or run.module.image_shape


def _check_same_reference(opened: Sequence[_Run], data: Any) -> None:
    shape, fingerprint = _shape(opened[0]), data.test.fingerprint()
    for run in opened[1:]:
        if _shape(run) != shape:
            raise ConfigError(f"{run.name} draws images of {_shape(run)}, {opened[0].name} of {shape}.")
        if instantiate(run.config.data).test.fingerprint() != fingerprint:
            raise ConfigError(
                f"{run.name} was trained on other data than {opened[0].name}: their distances to different "
                "test images do not compare. Measure each against one set by lit-gen evaluate reference=..."
            )


def sigmas(first: Estimate, other: Estimate) -> float | None:
    """How many standard errors of their difference `other` lies above `first`; None without errors."""
    if not first.se or not other.se:
        return None
    return (other.value - first.value) / math.hypot(first.se, other.se)


def side_by_side(pictures: dict[str, Tensor], pad: int = 12) -> Tensor:
    """uint8 (3, H, W) pictures next to one another, each under its name."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    height = max(p.shape[1] for p in pictures.values())
    widths = [max(p.shape[2], math.ceil(font.getlength(name))) for name, p in pictures.items()]
    canvas = Image.new("RGB", (sum(widths) + pad * (len(widths) + 1), height + 24 + pad), "white")
    draw, left = ImageDraw.Draw(canvas), pad
    for (name, picture), width in zip(pictures.items(), widths, strict=True):
        draw.text((left, 4), name, fill="black", font=font)
        canvas.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (left, 24))
        left += width + pad
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _to_wandb(
    cfg: DictConfig,
    out: Path,
    results: dict[str, dict[str, Estimate]],
    grids: Path,
    curves: Path | None,
) -> None:
    logger = wandb(str(out), name="comparison of " + " and ".join(results), mode=cfg.wandb)
    try:
        rows = [
            [name, key, estimate.value, estimate.se]
            for name, found in results.items()
            for key, estimate in found.items()
        ]
        logger.log_table("comparison", columns=["run", "measure", "value", "standard error"], data=rows)
        logger.log_image("comparison/grids", [str(grids)], caption=[f"seeds {cfg.seed}:0-{cfg.grid - 1}"])
        if curves is not None:
            logger.log_image("comparison/curves", [str(curves)])
    finally:
        close([logger])


def _print(results: dict[str, dict[str, Estimate]], different: dict[str, dict[str, Any]], out: Path) -> None:
    first, *others = results
    rows = []
    for key, estimate in results[first].items():
        row = [key, with_error(estimate)]
        for name in others:
            far = sigmas(estimate, results[name][key])
            row.append(with_error(results[name][key]) + ("" if far is None else f" ({far:+.1f})"))
        rows.append(row)
    title = "value ± standard error (difference from the first run in standard errors)"
    show(table(title, ["", *results], rows))
    if different:
        rows = [[key, *(str(values[name]) for name in results)] for key, values in different.items()]
        show(table("what differs", ["", *results], rows))
    show(f"written to {out}")


main = entry_point("compare")(lambda cfg: divided(compare_runs, cfg))

if __name__ == "__main__":
    main()
