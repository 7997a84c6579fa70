"""A picture of what an augmentation does: rows are its sub-policies, columns are draws."""

import PIL.Image
import PIL.ImageDraw
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lit_gen.augment.policy import Augmentation, Draws, Policy
from lit_gen.errors import ConfigError
from lit_gen.images import boxed_picture

KEPT, LOST, INK, PAPER = (64, 255, 64), (96, 96, 96), (235, 235, 235), (24, 24, 24)
GAP, LINE = 4, 12


def policy_sheet(
    policy: Augmentation,
    image: Tensor,
    boxes: Tensor | None = None,
    *,
    columns: int = 8,
    rows: int = 8,
    scale: int = 1,
    largest: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """uint8 (3, H', W'): the image, and below it `columns` draws of each sub-policy under the sub-policy's
    text.

    `image` is uint8 (C, H, W), `boxes` (N, 4) in the policy's format; kept boxes are drawn in green, lost
    ones in gray; SamplePairing mixes in the mirrored image, and partners of other ops are the image itself.
    Augmentations without sub-policies show `rows`
    rows of draws. `scale` enlarges the images without smoothing; `largest` is how many pixels the longer side
    of a picture has at most in the sheet.
    """
    if columns < 1 or rows < 1 or scale < 1:
        raise ConfigError(
            f"A sheet needs columns, rows and scale of at least 1, got {columns}, {rows}, {scale}."
        )
    titles = _titles(policy, rows)
    mixing = "SamplePairing" not in policy.table
    others = [{"image": image, "boxes": boxes}] * policy.partners if mixing else []
    keep = None if boxes is None else torch.ones(len(boxes), dtype=torch.bool)
    original = _picture(policy, image, boxes, keep, scale, largest)
    w, h = original.size
    pen = PIL.ImageDraw.Draw(original)  # for the length of a text alone
    width = max([GAP + columns * (w + GAP), *(2 * GAP + int(pen.textlength(t)) for t in titles)])
    sheet = PIL.Image.new("RGB", (width, GAP + h + len(titles) * (LINE + h + GAP) + GAP), PAPER)
    sheet.paste(original, (GAP, GAP))
    pen = PIL.ImageDraw.Draw(sheet)
    for r, title in enumerate(titles):
        top = 2 * GAP + h + r * (LINE + h + GAP)
        pen.text((GAP, top), title, INK)
        for c in range(columns):
            count = 0 if boxes is None else len(boxes) * (1 + len(others))
            draws = _draws(policy, r, count, generator)
            changed, moved, keep = policy.apply(image, boxes, draws, partner=others or image.flip(-1))
            picture = _picture(policy, changed, moved, keep, scale, largest)
            sheet.paste(picture, (GAP + c * (w + GAP), top + LINE))
    return F.pil_to_tensor(sheet)


def _titles(policy: Augmentation, rows: int) -> list[str]:
    if not isinstance(policy, Policy):
        return [f"{type(policy).__name__}" if r == 0 else "" for r in range(rows)]
    return [f"{k}:  " + "   ".join(_words(*op) for op in sub) for k, sub in enumerate(policy.sub_policies)]


def _words(name: str, probability: float, level: float | None) -> str:
    return f"{name} {probability:g}" + ("" if level is None else f" {level:g}")


def _draws(policy: Augmentation, row: int, num_boxes: int, generator: torch.Generator | None) -> Draws:
    if isinstance(policy, Policy):
        return policy.sample_sub_policy(row, num_boxes, generator)
    return policy.sample(num_boxes, generator)


def _picture(
    policy: Augmentation,
    image: Tensor,
    boxes: Tensor | None,
    keep: Tensor | None,
    scale: int,
    largest: int | None,
) -> PIL.Image.Image:
    corners, colors = torch.zeros(0, 4), []
    if boxes is not None and keep is not None:
        corners = policy.pixel_boxes(boxes, *image.shape[-2:])
        colors = [KEPT if kept else LOST for kept in keep.tolist()]
    if largest and scale * max(image.shape[-2:]) > largest:
        image, corners, scale = *_shrunk(image, corners, largest), 1
    return F.to_pil_image(boxed_picture(image, corners, colors, scale=scale))


def _shrunk(image: Tensor, corners: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Before boxes are drawn, so that their lines stay whole."""
    h, w = image.shape[-2:]
    new_h, new_w = (max(1, round(side * largest / max(h, w))) for side in (h, w))
    across, down = new_w / w, new_h / h
    return F.resize(image, [new_h, new_w], antialias=True), corners * corners.new_tensor(
        [across, down, across, down]
    )
