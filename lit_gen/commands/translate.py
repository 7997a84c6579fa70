"""Images translated into classes that a few images show: pictures, a contact sheet, a record."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lit_gen import __version__
from lit_gen.callbacks.translations import contact_sheet
from lit_gen.cli import check_at_least_1, claim, entry_point
from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.errors import ConfigError
from lit_gen.funit import translator
from lit_gen.images import grid, save_png, to_float
from lit_gen.inputs import read_class_folders, read_pictures
from lit_gen.instantiate import instantiate
from lit_gen.models import content_augment, open_translator, translate_images
from lit_gen.runs import write_json

OFFICIAL_SIZE = 128


def translate(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Translates `cfg.content` into every class of `cfg.classes`; writes `sheet.png` (with the true
    translations below each row where the run's own data know them), `images/<class>/<content>.png`, with
    `cfg.interpolate` also `interpolation.png` and `interpolation/`, and `translation.json`; returns the
    record.

    Raises ConfigError for what does not fit together.
    """
    check_at_least_1(cfg, "num", "batch_size")
    if cfg.k is not None and cfg.k < 1:
        raise ConfigError(f"k={cfg.k}: at least one image must show a class.")
    if cfg.fit not in ("crop", "stretch"):
        raise ConfigError(f"fit={cfg.fit}: the networks take squares; give crop or stretch.")
    if cfg.interpolate < 0 or cfg.interpolate == 1:
        raise ConfigError(f"interpolate={cfg.interpolate}: give 0 for none, or at least 2 steps.")
    claim(out, "translations", "sheet.png", "images", "interpolation", "translation.json")
    generator, run_cfg, path = open_translator(cfg)
    size = cfg.image_size or (OFFICIAL_SIZE if run_cfg is None else run_cfg.data.image_size)
    size = size if isinstance(size, int) else list(size)
    contents, classes, truth = _inputs(cfg, run_cfg, generator.channels, size)
    if cfg.interpolate and len(classes) < 2:
        raise ConfigError(
            f"interpolate={cfg.interpolate} goes from class to class, {cfg.classes} shows one class alone."
        )
    images = torch.stack(list(contents.values()))
    augment = content_augment(run_cfg)
    codes = {
        name: translator.adapted_code(generator, to_float(shown), cfg.adapt, augment)
        for name, shown in classes.items()
    }
    translated = torch.stack(
        [translate_images(generator, images, code, cfg.batch_size) for code in codes.values()], 1
    )
    for content, row in zip(contents, translated, strict=True):
        for name, image in zip(classes, row, strict=True):
            save_png(image, out / "images" / _file_name(name) / f"{_file_name(content)}.png")
    save_png(contact_sheet(images, list(classes.values()), translated, truth), out / "sheet.png")
    if cfg.interpolate:
        _interpolate(generator, contents, codes, cfg.interpolate, out)
    record = {
        "model": str(path),
        "weights": "average" if cfg.ema else "raw",
        "content": str(cfg.content),
        "contents": list(contents),
        "classes": {name: len(shown) for name, shown in classes.items()},
        "image_size": size,
        "fit": cfg.fit,
        "interpolate": cfg.interpolate,
        "adapt": cfg.adapt,
        "guidance": None if cfg.guidance is None else str(cfg.guidance),
        "seed": cfg.seed,
        "version": __version__,
    }
    write_json(out / "translation.json", record)
    print(f"{len(contents)} images into {len(classes)} classes by {path} -> {out / 'sheet.png'}")
    return record


def _inputs(
    cfg: DictConfig, run_cfg: DictConfig | None, channels: int, size: int | Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """What to translate, and into what, by name; the true translations (N, T, C, H, W) where they are
    known."""
    own = [name for name, value in {"content": "source", "classes": "target"}.items() if cfg[name] == value]
    if own and run_cfg is None:
        raise ConfigError(
            f"{own[0]}={cfg[own[0]]} are those of a run; with weights= give {own[0]}=<image or folder>."
        )
    contents, classes = {}, {}
    if "content" not in own:
        contents = read_pictures(Path(cfg.content), cfg.num, channels=channels, image_size=size, fit=cfg.fit)
    if "classes" not in own:
        classes = read_class_folders(Path(cfg.classes), cfg.k, channels, size, cfg.fit)
    if not own or run_cfg is None:
        return contents, classes, None
    if size != run_cfg.data.image_size:
        raise ConfigError(f"image_size={size}: the run's own images have {run_cfg.data.image_size}.")
    data: FewShotDataModule = instantiate(run_cfg.data)
    numbers = data.contents(cfg.num, cfg.seed).tolist() if "content" in own else []
    items = [data.train[i] for i in numbers]
    contents |= {
        f"{data.train.classes[item['label']]}_{i}": item["image"]
        for i, item in zip(numbers, items, strict=True)
    }
    if "classes" in own:
        classes = data.examples(cfg.k or 5, seed=cfg.seed)[0]
    if len(own) < 2 or data.truth(numbers[0], next(iter(classes))) is None:
        return contents, classes, None
    known = [data.truth(i, name) for i in numbers for name in classes]
    truth = torch.stack([image for image in known if image is not None])
    return contents, classes, truth.unflatten(0, (len(numbers), len(classes)))


def _interpolate(
    generator: translator.Generator,
    contents: dict[str, Tensor],
    codes: dict[str, Tensor],
    steps: int,
    out: Path,
) -> None:
    """Every content on its way from each class to the next."""
    names, images = list(codes), torch.stack(list(contents.values()))
    rows = []
    for first, second in itertools.pairwise(names):
        way = translator.interpolate(generator, to_float(images), codes[first], codes[second], steps).cpu()
        for content, frames in zip(contents, way, strict=True):
            folder = out / "interpolation" / f"{_file_name(first)}_to_{_file_name(second)}"
            for i, frame in enumerate(frames):
                save_png(frame, folder / f"{_file_name(content)}_{i:02d}.png")
        rows.append(torch.cat([images[:, None], way], 1))
    sheet = torch.cat(rows).flatten(0, 1)
    save_png(grid(sheet, columns=steps + 1, scale=0), out / "interpolation.png")


def _file_name(name: str) -> str:
    return name.replace("/", "-")


main = entry_point("translate")(lambda cfg: translate(cfg, Path(cfg.out)))

if __name__ == "__main__":
    main()
