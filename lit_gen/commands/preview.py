"""Pictures of an augmentation: its policy sheet, and what a data module feeds to a model."""

import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lit_gen.augment.sheet import policy_sheet
from lit_gen.cli import check_at_least_1, claim, entry_point
from lit_gen.data.images import pixels_of
from lit_gen.errors import ConfigError
from lit_gen.images import boxed_picture, grid, one_size, save_png, shown_channels, to_uint8
from lit_gen.inputs import read_pictures
from lit_gen.instantiate import config_dict, instantiate
from lit_gen.loggers import close, wandb
from lit_gen.rng import keyed_generator

SIDE, BOXED_SIDE = 96, 160  # pixels that a small image is enlarged to at least, without and with boxes
LARGEST = 320  # pixels that a picture of a policy sheet has at most
COLORS = [(255, 96, 32), (64, 255, 64), (64, 160, 255), (255, 255, 64), (255, 64, 255)]  # of classes in turn


def preview(cfg: DictConfig, out: Path) -> dict[str, Path]:
    """Writes `policy_<i>.png` of images, where the augmentation has a policy, and with `data=` also
    `training_*.png`, the first training batch; sends them to W&B and returns name -> file.

    Raises ConfigError for settings that do not fit and if `out` holds a preview already.
    """
    check_at_least_1(cfg, "num", "columns", "rows", "batch_images")
    claim(out, "a preview", "policy_*.png", "training_*.png")
    data, shown = None, {}
    node = config_dict(cfg.data) if cfg.data else {}
    augmentation = instantiate(node["augment"]) if node.get("augment") else None
    if "_target_" in node:
        data = instantiate(node)
        data.check()
    if cfg.images is None and data is None:
        raise ConfigError("Give images=<picture, folder or zip>, or data=<a data set>.")
    if augmentation is None and data is None:
        raise ConfigError("augment=<name> says what to draw: one of conf/augment, or file with its source.")
    policy = getattr(augmentation, "policy", None)
    if policy is None and data is None:
        raise ConfigError(
            f"{type(augmentation).__name__} has no policy to draw: give data=, to see its training batches."
        )
    if policy is not None:
        for i, (image, boxes) in enumerate(_examples(cfg, data)):
            sheet = policy_sheet(
                policy,
                image,
                boxes,
                columns=cfg.columns,
                rows=cfg.rows,
                scale=cfg.scale or _scale(image, boxes is not None),
                largest=None if cfg.scale else LARGEST,
                generator=keyed_generator(cfg.seed, "preview", i),
            )
            shown[f"policy_{i}"] = sheet
    if data is not None:
        shown |= batch_sheets(data, cfg.batch_images, cfg.scale)
    files = {name: save_png(picture, out / f"{name}.png") for name, picture in shown.items()}
    _to_wandb(cfg, out, files)
    for file in files.values():
        print(file)
    return files


def batch_sheets(data: Any, num: int = 32, scale: int = 0) -> dict[str, Tensor]:
    """What the first training batch of a data module brings, name -> uint8 (3, H, W): its first `num` images,
    boxes and the names of their classes drawn in; few-shot batches have content and class images."""
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    sheets = {}
    for key, name in (
        ("image", "training_batch"),
        ("content", "training_content"),
        ("classes", "training_classes"),
    ):
        if key in batch:
            shown = pixels_of(data).shown
            images = [shown_channels(to_uint8(image), shown) for image in batch[key][:num]]
            factor = scale or _scale(images[0], "boxes" in batch)
            boxes = batch.get("boxes", [torch.zeros(0, 4)] * num)
            labels = batch.get("labels", [torch.zeros(0)] * num)
            drawn = []
            for image, corners, classes in zip(images, boxes, labels, strict=False):
                kinds = classes.long().tolist()
                colors = [COLORS[k % len(COLORS)] for k in kinds]
                texts = [data.classes[k] for k in kinds]
                drawn.append(boxed_picture(image, corners, colors, texts, factor))
            sheets[name] = grid(one_size(drawn), columns=min(8, len(drawn)))
    return sheets


def _examples(cfg: DictConfig, data: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Images and, where there are any, their boxes."""
    if cfg.images is not None:
        boxes = torch.tensor([list(box) for box in cfg.boxes], dtype=torch.float32) if cfg.boxes else None
        if boxes is not None and (boxes.ndim != 2 or boxes.shape[1] != 4):
            raise ConfigError(f"boxes={list(cfg.boxes)}: give [[x0, y0, x1, y1], ...] in pixels.")
        images = read_pictures(Path(cfg.images), cfg.num, image_size=cfg.image_size, fit="shorter")
        return [(image, boxes) for image in images.values()]
    items = [data.train[i] for i in range(min(cfg.num, len(data.train)))]
    return [(pixels_of(data.train).picture(item["image"]), item.get("boxes")) for item in items]


def _scale(image: Tensor, boxed: bool) -> int:
    return math.ceil((BOXED_SIDE if boxed else SIDE) / max(image.shape[-2:]))


def _to_wandb(cfg: DictConfig, out: Path, files: dict[str, Path]) -> None:
    logger = wandb(str(out), name=f"preview {out.name}", mode=cfg.wandb)
    try:
        for name, file in files.items():
            logger.log_image(f"preview/{name}", [str(file)], caption=[f"seed {cfg.seed}"])
    finally:
        close([logger])


main = entry_point("preview")(lambda cfg: preview(cfg, Path(cfg.out)))

if __name__ == "__main__":
    main()
