"""Images restored from a degraded measurement, beside what they were: pictures, a table, a JSON record."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lit_gen import __version__
from lit_gen.cli import check_at_least_1, claim, entry_point, show, table
from lit_gen.devices import divided
from lit_gen.images import Pixels, grid, save_png
from lit_gen.inputs import noise_of, observed_of, pictures, told_of
from lit_gen.instantiate import instantiate
from lit_gen.metrics.distributed import from_rank_zero
from lit_gen.metrics.restored import Perceptual, quality
from lit_gen.models import open_model, restore_images
from lit_gen.rng import PerSample, keyed_generator, randn
from lit_gen.runs import write_json
from lit_gen.score.condition import class_of
from lit_gen.score.restoration import Noise, Observation, deviation


def restore(cfg: DictConfig, out: Path) -> dict[str, Any] | None:
    """Degrades images by `cfg.operator`, restores each `cfg.samples` times by `cfg.method`; writes
    `sheet.png` (a row an image: original, degraded, restorations), `images/`, of what pictures do not hold
    also `images.npz` (arr_0: images, columns, H, W, C), and `restoration.json`, prints the table and returns
    the record. Of several ranks each restores its share, and rank 0 does the rest.

    With `cfg.observed` the measurements are those of an npz file, and there are no originals: the columns
    begin with what was measured, and nothing is compared.

    Restoration k of image i depends on (seed, i, k) alone. Raises ConfigError for what does not fit together.
    """
    check_at_least_1(cfg, "num", "samples", "batch_size")
    noise_std = noise_of(cfg.noise_std)
    from_rank_zero(
        lambda: claim(out, "restorations", "sheet.png", "images", "images.npz", "restoration.json")
    )
    module, run_cfg, path = open_model(cfg)
    pixels, (channels, h, w) = module.pixels, module.image_shape
    OmegaConf.update(cfg, "image_size", h if h == w else [h, w])
    operator, method = instantiate(cfg.operator), instantiate(cfg.method)
    if cfg.observed is None:
        originals, labels = pictures(cfg, run_cfg, module)
        measured = _measure(operator, pixels.to_model(originals), noise_std, cfg.seed)
    else:
        shape = tuple(operator(torch.zeros(1, channels, h, w)).shape[1:])
        originals, measured = None, observed_of(cfg.observed, cfg.num, shape)
        labels = told_of(cfg, run_cfg, module, len(measured))
    lpips = Perceptual(cfg.lpips, min(h, w), channels)
    restored = restore_images(
        module, operator, measured, method, cfg.samples, cfg.seed, cfg.batch_size, labels, noise_std
    )
    if restored is None:
        return None  # rank 0 has them
    same = measured.shape[1:] == restored.shape[2:]
    shown = pixels.from_model(measured if same else operator.pseudo_inverse(measured))
    record = {
        "model": str(path),
        "operator": OmegaConf.to_container(cfg.operator, resolve=True),
        "method": OmegaConf.to_container(cfg.method, resolve=True),
        "images": cfg.images if cfg.observed is None else None,
        "observed": cfg.observed,
        "num": len(measured),
        "samples": cfg.samples,
        "noise_std": cfg.noise_std,
        "guidance": None if cfg.guidance is None else str(cfg.guidance),
        "seed": cfg.seed,
        "labels": None if (known := class_of(labels)) is None else known.tolist(),
        "lpips": lpips.name,
        "version": __version__,
    }
    columns = {"degraded": shown[:, None]} | {f"restored_{k}": x for k, x in _columns(restored)}
    if originals is not None:
        record |= _compared(originals, shown, restored, pixels, lpips)
        columns = {"original": originals[:, None]} | columns
    rows = torch.cat(list(columns.values()), 1)
    if not pixels.are_bytes or channels not in (1, 3):  # what pictures do not hold
        np.savez_compressed(out / "images.npz", arr_0=rows.permute(0, 1, 3, 4, 2).numpy())
    _write(out, pixels.picture(rows), list(columns), record)
    _print(record, out)
    return record


def _columns(restored: Tensor) -> Iterator[tuple[int, Tensor]]:
    return enumerate(restored.split(1, dim=1))


def _compared(
    originals: Tensor, shown: Tensor, restored: Tensor, pixels: Pixels, lpips: Perceptual
) -> dict[str, Any]:
    """The measures of what was degraded, of each restoration, and of the mean of an image's restorations."""
    repeated = originals.repeat_interleave(restored.shape[1], 0)
    record = {}
    for name, a, b in (
        ("degraded", shown, originals),
        ("restored", restored.flatten(0, 1), repeated),
        ("mean_of_restorations", pixels.from_model(pixels.to_model(restored).mean(1)), originals),
    ):
        perceived = lpips(pixels.to_uint8(a), pixels.to_uint8(b))
        record[name] = quality(a, b, pixels.high - pixels.low) | perceived
    return record


def _measure(operator: Any, x: Tensor, noise_std: Noise, seed: int) -> Tensor:
    """y = A x + noise_std n, the noise n of image i drawn from (seed, i)."""
    y = operator(x)
    std = operator.at(x).deviation if isinstance(operator, Observation) else deviation(noise_std, y[:1])
    if not isinstance(std, Tensor) and std == 0:
        return y
    keyed = PerSample([keyed_generator(seed, "measurement", i) for i in range(len(y))])
    return y + (std * randn(y.shape, keyed)).to(y)


def _write(out: Path, rows: Tensor, names: Sequence[str], record: dict[str, Any]) -> None:
    save_png(grid(rows.flatten(0, 1), columns=rows.shape[1], scale=0), out / "sheet.png")
    for i, row in enumerate(rows):
        for name, image in zip(names, row, strict=True):
            save_png(image, out / "images" / f"{i:04d}_{name}.png")
    write_json(out / "restoration.json", record)


def _print(record: dict[str, Any], out: Path) -> None:
    if "restored" not in record:
        show(f"{record['num']} measurements, {record['samples']} restorations of each, written to {out}")
        return
    columns = {"psnr": ("PSNR (dB)", ".2f"), "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f")}
    columns = {name: column for name, column in columns.items() if name in record["restored"]}
    rows = [
        [name.replace("_", " "), *(format(record[name][key], spec) for key, (_, spec) in columns.items())]
        for name in ("degraded", "restored", "mean_of_restorations")
    ]
    without_lpips = [] if "lpips" in columns else [f"LPIPS {record['lpips']}"]
    title = f"{record['num']} images, {record['samples']} restorations of each"
    made = table(title, ["", *(name for name, _ in columns.values())], rows)
    show(made, *without_lpips, f"written to {out}")


main = entry_point("restore")(lambda cfg: divided(restore, cfg, images=cfg.num * cfg.samples))

if __name__ == "__main__":
    main()
