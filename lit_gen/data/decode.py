"""Bytes of any picture -> uint8 (C, H, W), or one error that names the file and what is wrong with it.

What is decoded and how: the format told by the content, never by the extension; the EXIF rotation applied;
palettes and CMYK converted to RGB; transparency laid over white; 16-bit samples cut to their high byte; the
first picture of an animation; color profiles ignored. Refused: corrupt, truncated and empty files, float and
32-bit samples, and pictures of more than 64 million pixels, which are told by their header and never unpacked
(decompression bombs).
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_gen.errors import ConfigError, check_choice
from lit_gen.images import height_and_width

ImageSize = int | Sequence[int]
"""The side of square images, or (height, width)."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no EPS: it would run Ghostscript
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
MAX_PIXELS = 64_000_000
MODES = {1: "L", 3: "RGB"}
FITS = ("crop", "stretch", "adm", "shorter")
DRAFTED = ("crop", "stretch")  # the fits for which a JPEG may be decoded smaller
_T = Image.Transpose
UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE, 6: _T.ROTATE_270,
    7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # EXIF orientation -> what undoes it  # fmt: skip
PNG_METADATA = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type")  # where an orientation may stand


class UnreadableImage(ConfigError):
    """A picture that cannot be used; the message names it."""


def decode(
    data: bytes,
    name: str,
    *,
    channels: int = 3,
    image_size: ImageSize | None = None,
    fit: str = "crop",
    draft: bool = False,
) -> Tensor:
    """The picture in `data` as uint8 (C, H, W), C = `channels` = 1 or 3.

    `image_size` and `fit` as in `fit_to`. With `draft` a JPEG whose fit is "crop" or "stretch" is decoded at
    1/2, 1/4 or 1/8 of its size as long as it then has 2 `image_size` pixels at least in both directions: in
    less than half the time, with a PSNR of at least 40 dB to what the whole picture gives, as tests check.
    Raises UnreadableImage, whatever is wrong with the bytes.
    """
    with unreadable_as(name):
        picture = _open(data, name)
        size, orientation = image_size, _orientation(picture, data)
        stored = None if size is None else height_and_width(size)[:: 1 if orientation >= 5 else -1]
        extent = _drafted(picture, stored) if stored is not None and draft and fit in DRAFTED else None
        picture = _to_8_bit(picture, name, MODES[channels])
        if (
            stored is not None and extent is not None
        ):  # before it is turned: it is the extent of what is stored
            picture, size = _fit_drafted(picture, stored, fit, extent), None
        if orientation in UPRIGHT:
            picture = picture.transpose(UPRIGHT[orientation])
        if size is not None:
            picture = fit_to(picture, size, fit)
        array = np.array(picture)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def header_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) after the EXIF rotation, of a picture of which `data` has the header at least.

    Refuses what a header tells: no picture, too many pixels, 32-bit samples. A PNG that is turned by metadata
    behind its pixels takes the whole file. Raises UnreadableImage.
    """
    with unreadable_as(name):
        picture = _open(data, name)
        _refuse_32_bit(picture, name)
        turned = _orientation(picture, data) >= 5
    width, height = picture.size
    return (width, height) if turned else (height, width)


@contextmanager
def unreadable_as(name: str) -> Iterator[None]:
    """Turns whatever decoders raise on hostile bytes, from SyntaxError to struct.error, into one
    error that names the picture."""
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        raise UnreadableImage(f"{name}: cannot be decoded ({type(error).__name__}: {error}).") from error


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise UnreadableImage(f"{name}: empty file.")
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{name}: {width}x{height} pixels, more than the {MAX_PIXELS // 10**6} million allowed: a bomb?"
        )
    return picture


def _orientation(picture: Image.Image, data: bytes) -> int:
    # What getexif would find, without its cost: it decodes a PNG to see the metadata behind the pixels.
    if picture.format == "JPEG" and not {"exif", "xmp"} & picture.info.keys():
        return 1
    if picture.format == "PNG" and "exif" not in picture.info and not any(m in data for m in PNG_METADATA):
        return 1
    try:
        return picture.getexif().get(0x0112, 1)
    except Exception:  # broken metadata spoil no picture: viewers ignore them too
        return 1


def _refuse_32_bit(picture: Image.Image, name: str) -> None:
    if picture.mode in ("I", "F") and not _is_16_bit(picture):
        raise UnreadableImage(f"{name}: 32-bit samples, whose range nobody knows. Save it with 8 or 16 bits.")


def _to_8_bit(picture: Image.Image, name: str, mode: str) -> Image.Image:
    picture.load()
    if _is_16_bit(picture):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    _refuse_32_bit(picture, name)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == mode else picture.convert(mode)


def _is_16_bit(picture: Image.Image) -> bool:
    # Older Pillows open these two formats as 32-bit integers.
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))


def fit_to(picture: Image.Image, image_size: ImageSize, fit: str) -> Image.Image:
    """The picture at `image_size`, a number or (height, width), in one of the ways of the official data-set
    tools.

    - "crop": the largest window of that shape in the center, then Lanczos (center-crop of
      https://github.com/NVlabs/edm, dataset_tool.py);
    - "stretch": Lanczos of the whole, aspect ratio lost (the same tool without --transform);
    - "adm": halved by box filter while it has 2 `image_size` pixels in both directions, then bicubic, then
      the center (https://arxiv.org/abs/2105.05233, guided-diffusion; "center-crop-dhariwal" of EDM2);
    - "shorter": the short side to `image_size`, one number, bilinear, aspect ratio kept (FUNIT,
      https://github.com/NVlabs/FUNIT).
    """
    check_choice("fit", fit, FITS)
    height, width = height_and_width(image_size)
    if fit in ("crop", "stretch"):
        picture = _center(picture, *_window(picture.size, (width, height))) if fit == "crop" else picture
        same = picture.size == (width, height)
        return picture if same else picture.resize((width, height), Image.Resampling.LANCZOS)
    if fit == "shorter":
        size = [max(int(height * side / min(picture.size)), height) for side in picture.size]
        return picture.resize(size, Image.Resampling.BILINEAR)
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    size = (round(picture.width * scale), round(picture.height * scale))
    return _center(picture.resize(size, Image.Resampling.BICUBIC), width, height)


Extent = tuple[float, float]


def _window(size: Extent, shape: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) in `size` with the aspect ratio of `shape`, both (width, height)."""
    scale = min(size[0] / shape[0], size[1] / shape[1])
    return round(shape[0] * scale), round(shape[1] * scale)


def _drafted(picture: Image.Image, target: tuple[int, ...]) -> Extent | None:
    """Has a JPEG decoded smaller, with twice the `target` (width, height) at least, and returns the (width,
    height) that the whole picture then covers, the last pixels perhaps in part; None where nothing was
    changed."""
    size = picture.size
    if picture.format not in ("JPEG", "MPO") or any(a < 4 * b for a, b in zip(size, target, strict=True)):
        return None
    drafted = picture.draft(None, (2 * target[0], 2 * target[1]))
    return None if drafted is None or picture.size == size else drafted[1][2:]


def _fit_drafted(picture: Image.Image, target: tuple[int, ...], fit: str, extent: Extent) -> Image.Image:
    """`fit_to` of a picture that was decoded smaller: the window is placed to a fraction of its pixels."""
    width, height = extent
    scale = min(width / target[0], height / target[1])
    w, h = (target[0] * scale, target[1] * scale) if fit == "crop" else extent
    left, top = (width - w) / 2, (height - h) / 2
    box = (left, top, left + w, top + h)
    return picture.resize((target[0], target[1]), Image.Resampling.LANCZOS, box=box)


def _center(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
