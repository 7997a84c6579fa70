"""The published op tables: which ops there are and what their levels mean.

`DETECTION_OFFICIAL` (https://arxiv.org/abs/1906.11172, tensorflow/tpu) and its repaired twin `DETECTION`,
levels 0..10; `MIXING`, the ops of `mixing` and flips with boxes, which policies of detection ops may name
too; `CLASSIFICATION` (https://arxiv.org/abs/1805.09501), levels 0..9 as torchvision bins them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeGuard

from torch import Tensor

from lit_gen.augment import boxes, mixing, pixels, warps
from lit_gen.augment.ops import (
    BoxCutoutOp,
    CropOp,
    CutoutOp,
    Length,
    OnlyBoxesOp,
    Op,
    PairOp,
    PixelOp,
    WarpOp,
    regions,
    regions_official,
)
from lit_gen.errors import ConfigError

OpTable = dict[str, Op]

CUTOUT, TRANSLATE, CUTOUT_BOX, TRANSLATE_BOX = 100, 250, 50, 120  # pixels at level 10
REFERENCE_SIDE = 640  # of the COCO images these constants were made for


def absolute(m: float, side: int, longer: int) -> float:
    """Lengths are pixels, whatever the image's size."""
    return m


def _relative(m: float, side: int, longer: int) -> int:
    """Repair: lengths are pixels of an image whose longer side is 640; whole, so that boxes and image move
    alike.
    """
    return round(m * longer / REFERENCE_SIDE)


def fraction(m: float, side: int, longer: int) -> int:
    """Classification: lengths are shares of the image's side."""
    return int(m * side)


def _table(ops: Iterable[Op]) -> OpTable:
    return {op.name: op for op in ops}


def _enhance(level: float) -> float:
    return level / 10 * 1.8 + 0.1


# Functions of a module and partials of them, so that a table can be pickled.
def _times(full: float) -> Callable[[float], float]:
    return partial(_linear, full, 10)


def _steps(full: float) -> Callable[[float], int]:
    return partial(_whole, full)


def _linear(full: float, levels: float, level: float) -> float:
    return level / levels * full


def _falling(full: float, level: float) -> float:
    return 1 - level / 10 * full


def _whole(full: float, level: float) -> int:
    return int(level / 10 * full)


def _bits(full: float, levels: float, level: float) -> int:
    return 8 - round(full * level / levels)


def _threshold(levels: float, level: float) -> int:
    return 256 - int(256 * level / levels)


def _around_one(function: Callable, images: Tensor, m: Sequence[float]) -> Tensor:
    return function(images, [1 + v for v in m])


def _pixel_ops(official: bool) -> list[PixelOp]:
    """The nine that change values alone."""
    solarize = pixels.solarize_official if official else pixels.solarize
    contrast = pixels.contrast_official if official else pixels.contrast
    sharpness = pixels.sharpness_official if official else pixels.sharpness
    return [
        PixelOp("AutoContrast", apply=pixels.autocontrast),
        PixelOp("Equalize", apply=pixels.equalize),
        PixelOp("Posterize", _steps(4), apply=pixels.posterize),
        PixelOp("Solarize", _steps(256), apply=solarize),
        PixelOp("SolarizeAdd", _steps(110), apply=pixels.solarize_add),
        PixelOp("Color", _enhance, apply=pixels.color),
        PixelOp("Contrast", _enhance, apply=contrast),
        PixelOp("Brightness", _enhance, apply=pixels.brightness),
        PixelOp("Sharpness", _enhance, apply=sharpness),
    ]


def _warp_ops(official: bool, translate: float) -> dict[str, WarpOp]:
    """The five geometric ones; `translate` is in pixels at level 10."""
    length = absolute if official else _relative

    def warp(name: str, full: float, maps: Callable, box_map: Callable, **more: Any) -> WarpOp:
        more |= {"maps": maps, "official": box_map if official else None}
        return WarpOp(f"{name}_BBox", _times(full), True, **more)

    x, y = {"length": length}, {"length": length, "axis": -2}
    return {
        "Rotate": warp("Rotate", 30, warps.rotation, boxes.rotate_official),
        "ShearX": warp("ShearX", 0.3, warps.shear_x, boxes.shear_x_official),
        "ShearY": warp("ShearY", 0.3, warps.shear_y, boxes.shear_y_official),
        "TranslateX": warp("TranslateX", translate, warps.translation_x, boxes.translate_x_official, **x),
        "TranslateY": warp("TranslateY", translate, warps.translation_y, boxes.translate_y_official, **y),
    }


def _detection(official: bool) -> OpTable:
    """The 25 ops; the official and the repaired table differ in pixel functions, lengths and box
    arithmetic."""
    length, areas = (absolute, regions_official) if official else (_relative, regions)
    in_box = partial(regions_official, clip=False) if official else regions  # its center may lie outside
    changing = _pixel_ops(official)
    inside: dict[str, CropOp] = {
        **_warp_ops(official, TRANSLATE_BOX),
        "Flip": PixelOp("Flip", apply=pixels.flip),
        **{op.name: op for op in changing if op.name in ("Solarize", "Equalize")},
        "Cutout": CutoutOp("Cutout", _steps(CUTOUT_BOX), length=length),
    }
    only = [
        OnlyBoxesOp(f"{name}_Only_BBoxes", op.magnitude, op.signed, inner=op, regions=areas)
        for name, op in inside.items()
    ]
    return _table(
        [
            *changing,
            CutoutOp("Cutout", _steps(CUTOUT), length=length),
            BoxCutoutOp("BBox_Cutout", _times(0.75), regions=in_box, all_rows=official),
            *_warp_ops(official, TRANSLATE).values(),
            *only,
        ]
    )


def classification_table(
    *,
    shear: float = 0.3,
    translate: float = 150 / 331,
    rotate: float = 30,
    enhance: float = 0.9,
    posterize: float = 4,
    levels: float = 9,
    length: Length = fraction,
) -> OpTable:
    """The classification ops for levels 0..`levels`; the arguments are the magnitudes at the highest level.

    torchvision's ranges and signs (enhancing ops are 1 +- `enhance`), but `Solarize`'s threshold runs from
    256, which changes nothing, where torchvision's runs from 255. Translations and cut-outs are shares of
    the image's side.
    """

    def times(full: float) -> Callable[[float], float]:
        return partial(_linear, full, levels)

    vertical: dict[str, Any] = {"length": length, "axis": -2}

    def enhancing(name: str, function: Callable) -> PixelOp:
        return PixelOp(name, times(enhance), signed=True, apply=partial(_around_one, function))

    return _table(
        [
            WarpOp("ShearX", times(shear), signed=True, maps=warps.shear_x),
            WarpOp("ShearY", times(shear), signed=True, maps=warps.shear_y),
            WarpOp("TranslateX", times(translate), signed=True, maps=warps.translation_x, length=length),
            WarpOp("TranslateY", times(translate), signed=True, maps=warps.translation_y, **vertical),
            WarpOp("Rotate", times(rotate), signed=True, maps=warps.rotation),
            enhancing("Brightness", pixels.brightness),
            enhancing("Color", pixels.color),
            enhancing("Contrast", pixels.contrast),
            enhancing("Sharpness", pixels.sharpness),
            PixelOp("Posterize", partial(_bits, posterize, levels), apply=pixels.posterize),
            PixelOp("Solarize", partial(_threshold, levels), apply=pixels.solarize),
            PixelOp("AutoContrast", apply=pixels.autocontrast),
            PixelOp("Equalize", apply=pixels.equalize),
            PixelOp("Invert", apply=pixels.invert),
            PixelOp("Identity", apply=pixels.identity),
            CutoutOp("Cutout", times(30 / 331), length=fraction),  # half the side: 60 pixels of 331
            PairOp("SamplePairing", times(0.4)),
        ]
    )


DETECTION_OFFICIAL = _detection(official=True)
DETECTION = _detection(official=False)
CLASSIFICATION = classification_table()
MIXING = _table(
    [
        mixing.Mosaic("Mosaic", partial(_falling, 0.5)),
        mixing.CopyPaste("CopyPaste", _times(1)),
        mixing.MixUp("MixUp", _times(1.5)),  # Beta(1.5, 1.5) at level 10, as the paper with boxes
        mixing.CutMix("CutMix", _times(1)),  # uniform at level 10, as the paper
        mixing.ResizedCrop("ResizedCrop", partial(_falling, 0.92)),  # from .08 of the area at level 10
        WarpOp("FlipX_BBox", maps=warps.flip_x),
        WarpOp("FlipY_BBox", maps=warps.flip_y),
    ]
)
TABLES = {"detection": DETECTION | MIXING, "classification": CLASSIFICATION}


def checked(
    sub_policies: Any, ops: str, source: str
) -> tuple[tuple[tuple[str, float, float | None], ...], ...]:
    """The sub-policies of a policy, or a ConfigError that names `source`, the sub-policy and the op."""
    if ops not in TABLES:
        raise ConfigError(f"{source}: ops: {ops!r} is unknown; choose {' or '.join(TABLES)}.")
    if not _is_list(sub_policies) or not sub_policies:
        raise ConfigError(
            f"{source}: sub_policies must be a list of at least one sub-policy, got {sub_policies!r}."
        )
    out = []
    for k, sub in enumerate(sub_policies):
        if not _is_list(sub) or not sub:
            raise ConfigError(f"{source}, sub-policy {k}: a list of [op, probability, level], got {sub!r}.")
        where = f"{source}, sub-policy {k}, op"
        out.append(tuple(_checked_op(op, ops, f"{where} {j}") for j, op in enumerate(sub)))
    return tuple(out)


def _checked_op(op: Any, ops: str, where: str) -> tuple[str, float, float | None]:
    table, top = TABLES[ops], 9 if ops == "classification" else 10
    if not _is_list(op) or len(op) != 3:
        raise ConfigError(f"{where}: [op, probability, level], got {op!r}.")
    name, probability, level = op
    if name not in table:
        raise ConfigError(f"{where}: {name!r} is no {ops} op; choose one of {', '.join(table)}.")
    if not _is_number(probability) or not 0 <= probability <= 1:
        raise ConfigError(f"{where} ({name}): probability {probability!r} is not a number in [0, 1].")
    if level is None and table[name].magnitude is None:
        return name, probability, None
    if not _is_number(level) or not 0 <= level <= top:
        raise ConfigError(f"{where} ({name}): level {level!r} is not a number in [0, {top}].")
    return name, probability, level


def _is_list(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str)


def _is_number(x: Any) -> TypeGuard[float]:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
