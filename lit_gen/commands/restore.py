"""Images restored from a degraded measurement, beside what they were: pictures, a table, a JSON record."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lit_gen import __version__
from lit_gen.cli import check_at_least_1, claim, entry_point, show, table
from lit_gen.devices import divided
from lit_gen.images import grid, save_png
from lit_gen.inputs import noise_of, pictures
from lit_gen.instantiate import instantiate
from lit_gen.metrics.distributed import from_rank_zero
from lit_gen.metrics.restored import Perceptual, quality
from lit_gen.models import open_model, restore_images
from lit_gen.rng import PerSample, keyed_generator, randn
from lit_gen.runs import write_json
from lit_gen.score.condition import class_of
from lit_gen.score.restoration import Noise, deviation


def restore(cfg: DictConfig, out: Path) -> dict[str, Any] | None:
    """Degrades images by `cfg.operator`, restores each `cfg.samples` times by `cfg.method`; writes
    `sheet.png` (a row an image: original, degraded, restorations), `images/`, of what pictures do not hold
    also `images.npz` (arr_0: images, columns, H, W, C), and `restoration.json`, prints the table and returns
    the record. Of several ranks each restores its share, and rank 0 does the rest.

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
    originals, labels = pictures(cfg, run_cfg, module)
    lpips = Perceptual(cfg.lpips, min(h, w), channels)
    measured = _measure(operator, pixels.to_model(originals), noise_std, cfg.seed)
    restored = restore_images(
        module, operator, measured, method, cfg.samples, cfg.seed, cfg.batch_size, labels, noise_std
    )
    if restored is None:
        return None  # rank 0 has them
    shown = pixels.from_model(
        measured if measured.shape == originals.shape else operator.pseudo_inverse(measured)
    )
    record = {
        "model": str(path),
        "operator": OmegaConf.to_container(cfg.operator, resolve=True),
        "method": OmegaConf.to_container(cfg.method, resolve=True),
        "images": cfg.images,
        "num": len(originals),
        "samples": cfg.samples,
        "noise_std": cfg.noise_std,
        "guidance": None if cfg.guidance is None else str(cfg.guidance),
        "seed": cfg.seed,
        "labels": None if (known := class_of(labels)) is None else known.tolist(),
        "lpips": lpips.name,
        "version": __version__,
    }
    repeated = originals.repeat_interleave(cfg.samples, 0)
    for name, a, b in (
        ("degraded", shown, originals),
        ("restored", restored.flatten(0, 1), repeated),
        ("mean_of_restorations", pixels.from_model(pixels.to_model(restored).mean(1)), originals),
    ):
        perceived = lpips(pixels.to_uint8(a), pixels.to_uint8(b))
        record[name] = quality(a, b, pixels.high - pixels.low) | perceived
    rows = torch.cat([originals[:, None], shown[:, None], restored], 1)
    if not pixels.are_bytes or channels not in (1, 3):  # what pictures do not hold
        np.savez_compressed(out / "images.npz", arr_0=rows.permute(0, 1, 3, 4, 2).numpy())
    _write(out, pixels.picture(rows), record)
    _print(record, out)
    return record


def _measure(operator: Any, x: Tensor, noise_std: Noise, seed: int) -> Tensor:
    """y = A x + noise_std n, the noise n of image i drawn from (seed, i)."""
    y = operator(x)
    std = deviation(noise_std, y[:1])
    if not isinstance(std, Tensor) and std == 0:
        return y
    keyed = PerSample([keyed_generator(seed, "measurement", i) for i in range(len(y))])
    return y + (std * randn(y.shape, keyed)).to(y)


def _write(out: Path, rows: Tensor, record: dict[str, Any]) -> None:
    save_png(grid(rows.flatten(0, 1), columns=rows.shape[1], scale=0), out / "sheet.png")
    for i, row in enumerate(rows):
        names = ["original", "degraded", *(f"restored_{k}" for k in range(rows.shape[1] - 2))]
        for name, image in zip(names, row, strict=True):
            save_png(image, out / "images" / f"{i:04d}_{name}.png")
    write_json(out / "restoration.json", record)


def _print(record: dict[str, Any], out: Path) -> None:
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
