"""Images restored from a degraded measurement, beside what they were: pictures, a table, a JSON record."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from lit_gen import __version__
from lit_gen.data.decode import decode
from lit_gen.data.folders import ImageFiles
from lit_gen.errors import ConfigError
from lit_gen.images import grid, save_png, to_float, to_uint8
from lit_gen.instantiate import instantiate
from lit_gen.official import open_model
from lit_gen.rng import PerSample, keyed_generator
from lit_gen.score.restoration import Inpainting, box_mask

__all__ = ["inpainting", "mask_of", "quality", "restore", "restore_images"]

MASKS = ("center", "left", "right", "top", "bottom", "random")


def restore(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Degrades images by `cfg.operator`, restores each `cfg.samples` times by `cfg.method`; writes
    `sheet.png` (a row an
    image: original, degraded, restorations), `images/` and `restoration.json`, prints the table and returns
    the record.

    Restoration k of image i depends on (seed, i, k) alone. Raises ConfigError for what does not fit together.
    """
    for name in ("num", "samples", "batch_size"):
        if cfg[name] < 1:
            raise ConfigError(f"{name}={cfg[name]}: must be at least 1.")
    if cfg.noise < 0:
        raise ConfigError(f"noise={cfg.noise}: a deviation is not negative.")
    if any((out / name).exists() for name in ("sheet.png", "images", "restoration.json")):
        raise ConfigError(f"{out} already holds restorations: choose another out=.")
    module, run_cfg, path = open_model(cfg)
    OmegaConf.update(cfg, "image_size", module.image_shape[-1])
    allow = list(cfg.allow_targets)
    operator, method = instantiate(cfg.operator, allow), instantiate(cfg.method, allow)
    originals = _images(cfg, run_cfg, module.image_shape, allow)
    measured = _measure(operator, to_float(originals), cfg.noise, cfg.seed)
    label = None if cfg.label is None else int(cfg.label)
    restored = restore_images(
        module, operator, measured, method, cfg.samples, cfg.seed, cfg.batch_size, label
    )
    shown = to_uint8(measured if measured.shape == originals.shape else operator.pseudo_inverse(measured))
    record = {
        "model": str(path),
        "operator": OmegaConf.to_container(cfg.operator, resolve=True),
        "method": OmegaConf.to_container(cfg.method, resolve=True),
        "images": cfg.images,
        "num": len(originals),
        "samples": cfg.samples,
        "noise": cfg.noise,
        "seed": cfg.seed,
        "degraded": quality(shown, originals),
        "restored": quality(restored.flatten(0, 1), originals.repeat_interleave(cfg.samples, 0)),
        "mean_of_restorations": quality(to_uint8(to_float(restored).mean(1)), originals),
        "version": __version__,
    }
    _write(out, originals, shown, restored, record)
    _print(record, out)
    return record


@torch.no_grad()
def restore_images(
    module: Any,
    operator: Any,
    measured: Tensor,
    method: Callable[..., Tensor],
    samples: int,
    seed: int = 0,
    batch_size: int = 64,
    label: int | None = None,
) -> Tensor:
    """uint8 (N, K, C, H, W): K = `samples` restorations of each of the N measurements `measured` (N, ...)."""
    if label is not None and not 0 <= label < module.num_classes:
        raise ConfigError(f"label={label}: the model has {module.num_classes} classes.")
    rows = [(i, k) for i in range(len(measured)) for k in range(samples)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("eta"))
    parts = []
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("restoring", total=len(rows))
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            generator = PerSample([keyed_generator(seed, "restore", i, k) for i, k in part])
            x = module.denoiser.process.prior_sample(
                (len(part), *module.image_shape), generator, device=module.device
            )
            y = measured[[i for i, _ in part]].to(module.device)
            classes = None if label is None else torch.full((len(part),), label, device=module.device)
            x_0 = method(module.denoiser, x, operator, y, label=classes, generator=generator)
            parts.append(to_uint8(x_0).cpu())
            bar.advance(task, len(part))
    return torch.cat(parts).unflatten(0, (len(measured), samples))


def quality(images: Tensor, originals: Tensor) -> dict[str, float]:
    """Means over the images, uint8 (N, C, H, W), of PSNR in dB and SSIM with a Gaussian window, of 11
    pixels or, below
    16 pixels of image, of 5.
    """
    a, b = images.to(torch.float64), originals.to(torch.float64)
    small = min(originals.shape[-2:]) < 16
    ssim = structural_similarity_index_measure(a, b, data_range=255.0, sigma=0.5 if small else 1.5)
    psnr = peak_signal_noise_ratio(a, b, data_range=255.0, reduction="elementwise_mean", dim=(1, 2, 3))
    return {"psnr": float(psnr), "ssim": float(ssim), "ssim_window": 5 if small else 11}


def inpainting(mask: str, image_size: int) -> Inpainting:
    """The operator of a mask that is named or drawn, see `mask_of`."""
    return Inpainting(mask_of(mask, image_size))


def mask_of(spec: str, size: int) -> Tensor:
    """bool (1, size, size), true where the pixel is known.

    `spec`: center (the middle half of each side is unknown), left, right, top, bottom (that half is
    unknown), random (half of
    the pixels, always the same ones), or a picture whose pixels above half brightness are known.
    """
    half, quarter = size // 2, size // 4
    boxes = {
        "center": (quarter, quarter, half, half),
        "left": (0, 0, size, half),
        "right": (0, half, size, size - half),
        "top": (0, 0, half, size),
        "bottom": (half, 0, size - half, size),
    }
    if spec in boxes:
        return box_mask(size, size, *boxes[spec])
    if spec == "random":
        return torch.rand((1, size, size), generator=keyed_generator(0, "mask")) < 0.5
    if not Path(spec).is_file():
        raise ConfigError(f"mask={spec}: must be one of {', '.join(MASKS)}, or a picture.")
    return decode(Path(spec).read_bytes(), spec, channels=1, image_size=size) > 127


def _images(cfg: DictConfig, run_cfg: DictConfig | None, shape: tuple[int, ...], allow: list[str]) -> Tensor:
    """uint8 (N, C, H, W), the first `num` of what `cfg.images` names."""
    channels, size = shape[0], shape[-1]
    path = Path(cfg.images)
    if cfg.images == "test":
        if run_cfg is None:
            raise ConfigError(
                "images=test are those of a run; with weights= give images=<picture, folder or zip>."
            )
        dataset = instantiate(run_cfg.data, allow).dataset("test")
    elif path.is_file() and path.suffix != ".zip":
        return decode(path.read_bytes(), str(path), channels=channels, image_size=size)[None]
    else:
        dataset = ImageFiles(path, image_size=size, channels=channels, scan=False)
    return torch.stack([dataset[i]["image"] for i in range(min(cfg.num, len(dataset)))])


def _measure(operator: Any, x: Tensor, noise: float, seed: int) -> Tensor:
    """y = A x + noise n, the noise of image i drawn from (seed, i)."""
    y = operator(x)
    if noise == 0:
        return y
    rows = [
        torch.randn(y.shape[1:], generator=keyed_generator(seed, "measurement", i)) for i in range(len(y))
    ]
    return y + noise * torch.stack(rows)


def _write(out: Path, originals: Tensor, shown: Tensor, restored: Tensor, record: dict[str, Any]) -> None:
    rows = torch.cat([originals[:, None], shown[:, None], restored], 1)
    scale = max(1, 64 // originals.shape[-1])
    save_png(grid(rows.flatten(0, 1), columns=rows.shape[1], scale=scale), out / "sheet.png")
    for i, row in enumerate(rows):
        names = ["original", "degraded", *(f"restored_{k}" for k in range(restored.shape[1]))]
        for name, image in zip(names, row, strict=True):
            save_png(image, out / "images" / f"{i:04d}_{name}.png")
    (out / "restoration.json").write_text(json.dumps(record, indent=2) + "\n")


def _print(record: dict[str, Any], out: Path) -> None:
    table = Table(title=f"{record['num']} images, {record['samples']} restorations of each")
    for column in ("", "PSNR (dB)", "SSIM"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("degraded", "restored", "mean_of_restorations"):
        values = record[name]
        table.add_row(name.replace("_", " "), f"{values['psnr']:.2f}", f"{values['ssim']:.4f}")
    console = Console()
    console.print(table)
    console.print(f"written to {out}", soft_wrap=True, highlight=False)
