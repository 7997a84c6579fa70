"""Images restored from a degraded measurement, beside what they were: pictures, a table, a JSON record."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from lit_gen import __version__
from lit_gen.data.decode import decode
from lit_gen.data.folders import ImageFiles
from lit_gen.errors import ConfigError
from lit_gen.images import grid, save_png, to_float, to_uint8
from lit_gen.instantiate import instantiate
from lit_gen.metrics.distributed import from_rank_zero, gather_batches, own_batches, rank
from lit_gen.official import open_model
from lit_gen.rng import PerSample, keyed_generator
from lit_gen.score.denoiser import network_precision
from lit_gen.score.restoration import Inpainting, box_mask, repaint, replacement

__all__ = ["Perceptual", "inpainting", "mask_of", "pictures", "quality", "restore", "restore_images"]

ALEXNET, SMALLEST_FOR_ALEXNET = "alexnet-owt-7be5be79.pth", 31
LARGEST_GAIN = 2.0  # of noise on a measurement that is taken as exact
MASKS = ("center", "left", "right", "top", "bottom", "random")


def restore(cfg: DictConfig, out: Path) -> dict[str, Any] | None:
    """Degrades images by `cfg.operator`, restores each `cfg.samples` times by `cfg.method`; writes
    `sheet.png` (a row an image: original, degraded, restorations), `images/` and `restoration.json`, prints
    the table and returns the record. Of several ranks each restores its share, and rank 0 does the rest.

    Restoration k of image i depends on (seed, i, k) alone. Raises ConfigError for what does not fit together.
    """
    for name in ("num", "samples", "batch_size"):
        if cfg[name] < 1:
            raise ConfigError(f"{name}={cfg[name]}: must be at least 1.")
    if cfg.noise < 0:
        raise ConfigError(f"noise={cfg.noise}: a deviation is not negative.")
    from_rank_zero(lambda: _claim(out))
    module, run_cfg, path = open_model(cfg)
    OmegaConf.update(cfg, "image_size", module.image_shape[-1])
    allow = list(cfg.allow_targets)
    operator, method = instantiate(cfg.operator, allow), instantiate(cfg.method, allow)
    originals, labels = pictures(cfg, run_cfg, module)
    _check_noise(cfg, operator, method, module.image_shape)
    judge = Perceptual(cfg.lpips, originals.shape[-1])
    measured = _measure(operator, to_float(originals), cfg.noise, cfg.seed)
    restored = restore_images(
        module, operator, measured, method, cfg.samples, cfg.seed, cfg.batch_size, labels
    )
    if restored is None:
        return None  # rank 0 has them
    shown = to_uint8(measured if measured.shape == originals.shape else operator.pseudo_inverse(measured))
    record = {
        "model": str(path),
        "operator": OmegaConf.to_container(cfg.operator, resolve=True),
        "method": OmegaConf.to_container(cfg.method, resolve=True),
        "images": cfg.images,
        "num": len(originals),
        "samples": cfg.samples,
        "noise": cfg.noise,
        "guidance": None if cfg.guidance is None else str(cfg.guidance),
        "seed": cfg.seed,
        "labels": None if labels is None else labels.tolist(),
        "lpips": judge.name,
        "version": __version__,
    }
    repeated = originals.repeat_interleave(cfg.samples, 0)
    for name, a, b in (
        ("degraded", shown, originals),
        ("restored", restored.flatten(0, 1), repeated),
        ("mean_of_restorations", to_uint8(to_float(restored).mean(1)), originals),
    ):
        record[name] = quality(a, b) | judge(a, b)
    _write(out, originals, shown, restored, record)
    _print(record, out)
    return record


def _claim(out: Path) -> None:
    if any((out / name).exists() for name in ("sheet.png", "images", "restoration.json")):
        raise ConfigError(f"{out} already holds restorations: choose another out=.")


@torch.no_grad()
def restore_images(
    module: Any,
    operator: Any,
    measured: Tensor,
    method: Callable[..., Tensor],
    samples: int,
    seed: int = 0,
    batch_size: int = 64,
    labels: Tensor | None = None,
) -> Tensor | None:
    """uint8 (N, K, C, H, W): K = `samples` restorations of each of the N measurements `measured` (N, ...).

    `labels`, int64 (N,), are the classes that a conditional model is told. Of several ranks each restores
    whole batches, and rank 0 has all; the others get None.
    """
    rows = [(i, k) for i in range(len(measured)) for k in range(samples)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("eta"))
    parts = []
    with Progress(*columns, TimeRemainingColumn(), disable=rank() > 0) as bar:
        task = bar.add_task("restoring", total=len(rows))
        for own in own_batches(len(rows), batch_size):
            part = rows[own.start : own.stop]
            generator = PerSample([keyed_generator(seed, "restore", i, k) for i, k in part])
            x = module.denoiser.process.prior_sample(
                (len(part), *module.image_shape), generator, device=module.device
            )
            which = [i for i, _ in part]
            y = measured[which].to(module.device)
            classes = None if labels is None else labels[which].to(module.device)
            with network_precision(module.denoiser, module.sampling_precision):
                x_0 = method(module.denoiser, x, operator, y, label=classes, generator=generator)
            parts.append(to_uint8(x_0).cpu())
            bar.update(task, completed=own.stop)  # the other ranks are about as far
    restored = gather_batches(parts, len(rows), batch_size)
    return None if restored is None else restored.unflatten(0, (len(measured), samples))


def quality(images: Tensor, originals: Tensor) -> dict[str, float]:
    """Means over the images, uint8 (N, C, H, W), of PSNR in dB and SSIM with a Gaussian window, of 11 pixels
    or, below 16 pixels of image, of 5.
    """
    a, b = images.to(torch.float64), originals.to(torch.float64)
    small = min(originals.shape[-2:]) < 16
    ssim = structural_similarity_index_measure(a, b, data_range=255.0, sigma=0.5 if small else 1.5)
    psnr = peak_signal_noise_ratio(a, b, data_range=255.0, reduction="elementwise_mean", dim=(1, 2, 3))
    return {"psnr": float(psnr), "ssim": float(ssim), "ssim_window": 5 if small else 11}


class Perceptual:
    """LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924) with AlexNet, the mean over the images:
    {"lpips": value}, or {} where it cannot be had.

    `weights` is torchvision's file alexnet-owt-7be5be79.pth; None: from torch's cache if it is there. Nothing
    is downloaded. `name` is the file, or why there is none. Raises ConfigError for a file that is missing.
    """

    def __init__(self, weights: str | None, image_size: int):
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        path = folder / ALEXNET if weights is None else Path(weights)
        self.metric, self.name = None, str(path)
        if weights is not None and not path.is_file():
            raise ConfigError(f"lpips={weights}: there is no such file.")
        if not path.is_file():
            self.name = f"left out, for it needs torchvision's {ALEXNET}: give lpips=<that file>"
        elif image_size < SMALLEST_FOR_ALEXNET:
            self.name = f"left out, for AlexNet needs images of {SMALLEST_FOR_ALEXNET} pixels"
        else:
            self.metric = _lpips(path)

    @torch.no_grad()
    def __call__(self, images: Tensor, originals: Tensor) -> dict[str, float]:
        """Of uint8 (N, C, H, W); grey ones count as colour."""
        if self.metric is None:
            return {}
        self.metric.reset()
        for a, b in zip(images.split(64), originals.split(64), strict=True):
            pair = (to_float(x).clamp(-1, 1).expand(-1, 3, -1, -1) for x in (a, b))
            self.metric.update(*pair)
        return {"lpips": float(self.metric.compute())}


def _lpips(alexnet: Path) -> LearnedPerceptualImagePatchSimilarity:
    """torchmetrics' LPIPS, which looks for its backbone in torch's cache alone."""
    before = torch.hub.get_dir()
    with TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        (Path(folder) / "checkpoints" / ALEXNET).symlink_to(alexnet.resolve())
        torch.hub.set_dir(folder)
        try:
            return LearnedPerceptualImagePatchSimilarity(net_type="alex")
        finally:
            torch.hub.set_dir(before)


def inpainting(mask: str, image_size: int) -> Inpainting:
    """The operator of a mask that is named or drawn, see `mask_of`."""
    return Inpainting(mask_of(mask, image_size))


def mask_of(spec: str, size: int) -> Tensor:
    """bool (1, size, size), true where the pixel is known.

    `spec`: center (the middle half of each side is unknown), left, right, top, bottom (that half is
    unknown), random (half of the pixels, always the same ones), or a picture whose pixels above half
    brightness are known.
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


def pictures(cfg: DictConfig, run_cfg: DictConfig | None, module: Any) -> tuple[Tensor, Tensor | None]:
    """The first `cfg.num` images of what `cfg.images` names, uint8 (N, C, H, W), and what a conditional
    model is told about them, int64 (N,).

    That is `cfg.label`, else the class of each of the run's own images. Other images have no class, which
    only a model trained with `label_dropout` knows: for any other one a ConfigError is raised.
    """
    channels, size = module.image_shape[0], module.image_shape[-1]
    path, own = Path(cfg.images), cfg.images == "test"
    if own and run_cfg is None:
        raise ConfigError(
            "images=test are those of a run; with weights= give images=<picture, folder or zip>."
        )
    if own:
        dataset = instantiate(run_cfg.data, list(cfg.allow_targets)).dataset("test")
    elif path.is_file() and path.suffix != ".zip":
        dataset = [{"image": decode(path.read_bytes(), str(path), channels=channels, image_size=size)}]
    else:
        dataset = ImageFiles(path, image_size=size, channels=channels, scan=False, draft=False)
    rows = [dataset[i] for i in range(min(cfg.num, len(dataset)))]
    return torch.stack([row["image"] for row in rows]), _labels(cfg, module, rows if own else len(rows))


def _labels(cfg: DictConfig, module: Any, rows: list[dict[str, Any]] | int) -> Tensor | None:
    """The classes of `rows`, or of so many images without one."""
    if cfg.label is not None:
        if not 0 <= cfg.label < module.num_classes:
            raise ConfigError(f"label={cfg.label}: the model has {module.num_classes} classes.")
        return torch.full((rows if isinstance(rows, int) else len(rows),), cfg.label)
    if not module.num_classes:
        return None
    if not isinstance(rows, int):
        return torch.tensor([row["label"] for row in rows])
    if not module.label_dropout:
        raise ConfigError(
            f"The model was always told a class in training: give label=<0 to {module.num_classes - 1}>."
        )
    return None


def _measure(operator: Any, x: Tensor, noise: float, seed: int) -> Tensor:
    """y = A x + noise n, the noise of image i drawn from (seed, i)."""
    y = operator(x)
    if noise == 0:
        return y
    rows = [
        torch.randn(y.shape[1:], generator=keyed_generator(seed, "measurement", i)) for i in range(len(y))
    ]
    return y + noise * torch.stack(rows)


def _check_noise(cfg: DictConfig, operator: Any, method: Any, image_shape: tuple[int, ...]) -> None:
    """Raises ConfigError for a method that takes the measurement as exact, where undoing the operator would
    blow its noise up."""
    if cfg.noise == 0 or getattr(method, "func", method) not in (repaint, replacement):
        return
    noise = torch.randn(operator(torch.zeros(1, *image_shape)).shape, generator=keyed_generator(0, "gain"))
    gain = float(operator.pseudo_inverse(noise).square().mean().sqrt())
    if gain > LARGEST_GAIN:
        raise ConfigError(
            f"noise={cfg.noise}: method={method.func.__name__} takes what was measured as exact, and undoing "
            f"this operator would make the noise {gain:.0f} times larger. Take method=dps or method=pigdm, "
            "which know of noise."
        )


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
    columns = {"psnr": ("PSNR (dB)", ".2f"), "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f")}
    columns = {name: column for name, column in columns.items() if name in record["restored"]}
    table.add_column("")
    for title, _ in columns.values():
        table.add_column(title, justify="right")
    for name in ("degraded", "restored", "mean_of_restorations"):
        values = [format(record[name][column], spec) for column, (_, spec) in columns.items()]
        table.add_row(name.replace("_", " "), *values)
    console = Console()
    console.print(table)
    if "lpips" not in columns:
        console.print(f"LPIPS {record['lpips']}", soft_wrap=True, highlight=False)
    console.print(f"written to {out}", soft_wrap=True, highlight=False)
