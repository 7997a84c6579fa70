"""Bytes of anybody's picture -> uint8 (C, H, W), or one error that names the file and what is wrong with it.

What is decoded and how: the format told by the content, never by the extension; the EXIF rotation applied;
palettes and CMYK converted to RGB; transparency laid over white; 16-bit samples cut to their high byte; the
first picture of an animation; colour profiles ignored. Refused: corrupt, truncated and empty files, float and
32-bit samples, and pictures of more than 64 million pixels, which are told by their header and never unpacked
(decompression bombs).
"""

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_gen.data.archive import Store
from lit_gen.errors import ConfigError

__all__ = [
    "EXTENSIONS",
    "FITS",
    "ImageReader",
    "UnreadableImage",
    "decode",
    "fit_to",
    "peculiarities",
    "size_of",
]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no EPS: it would run Ghostscript
EXTENSIONS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF",
    ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM",
}  # fmt: skip
MAX_PIXELS = 64_000_000
MODES = {1: "L", 3: "RGB"}
FITS = ("crop", "stretch", "adm", "shorter")
ON_ERROR = ("raise", "skip")
_T = Image.Transpose
UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE, 6: _T.ROTATE_270,
    7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # EXIF orientation -> what undoes it  # fmt: skip


class UnreadableImage(ConfigError):
    """A picture that cannot be used; the message names it."""


def decode(
    data: bytes,
    name: str,
    *,
    channels: int = 3,
    image_size: int | None = None,
    fit: str = "crop",
    strict: bool = False,
) -> Tensor:
    """The picture in `data` as uint8 (C, H, W), C = `channels` = 1 or 3.

    `image_size` and `fit` as in `fit_to`. `strict` refuses what would have to be converted (see
    `peculiarities`). Raises UnreadableImage, whatever is wrong with the bytes.
    """
    if not data:
        raise UnreadableImage(f"{name}: empty file.")
    try:
        picture = _open(data, name)
        if strict and (odd := peculiarities(picture, name)):
            raise UnreadableImage(f"{name}: {', '.join(odd)} (refused because of strict=true).")
        picture = _to_8_bit(picture, name, MODES[channels])
        if image_size is not None:
            picture = fit_to(picture, image_size, fit)
        array = np.array(picture)
    except (ConfigError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise anything from SyntaxError to struct.error on hostile bytes
        raise UnreadableImage(f"{name}: cannot be decoded ({type(error).__name__}: {error}).") from error
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def size_of(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) after the EXIF rotation, read from the header alone. Raises UnreadableImage."""
    try:
        picture = _open(data, name)
        turned = _orientation(picture) >= 5
    except ConfigError:
        raise
    except Exception as error:
        raise UnreadableImage(f"{name}: cannot be decoded ({type(error).__name__}: {error}).") from error
    return picture.size if turned else picture.size[::-1]


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


def _orientation(picture: Image.Image) -> int:
    if picture.format == "JPEG" and not {"exif", "xmp"} & picture.info.keys():
        return 1  # what getexif would find, without its cost
    try:
        return picture.getexif().get(0x0112, 1)
    except Exception:  # broken metadata spoil no picture: viewers ignore them too
        return 1


def _to_8_bit(picture: Image.Image, name: str, mode: str) -> Image.Image:
    orientation = _orientation(picture)
    picture.load()
    if _is_16_bit(picture):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise UnreadableImage(f"{name}: 32-bit samples, whose range nobody knows. Save it with 8 or 16 bits.")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode != mode:
        picture = picture.convert(mode)
    return picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture


def _is_16_bit(picture: Image.Image) -> bool:
    # Older Pillows open these two formats as 32-bit integers.
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))


def peculiarities(picture: Image.Image, name: str) -> list[str]:
    """What `decode` would have to convert or pass over in an opened picture."""
    mode, info = picture.mode, picture.info
    expected = EXTENSIONS.get(os.path.splitext(name)[1].lower())
    actual = "JPEG" if picture.format == "MPO" else picture.format  # MPO: what phones write under .jpg
    found = {
        "CMYK colours": mode == "CMYK",
        "16-bit samples": _is_16_bit(picture) or "16" in _raw_mode(picture),
        "an animation": getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO",
        "a palette": mode in ("P", "PA"),
        "transparency": "A" in picture.getbands() or "transparency" in info,
        "an EXIF rotation": _orientation(picture) in UPRIGHT,
        f"{actual} content under another extension": expected is not None and expected != actual,
    }
    return [what for what, holds in found.items() if holds]


def _raw_mode(picture: Image.Image) -> str:
    # Pillow opens 16-bit RGB as RGB; only its decoder's arguments tell ("RGB;16B").
    arguments = picture.tile[0][3] if getattr(picture, "tile", None) else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def fit_to(picture: Image.Image, image_size: int, fit: str) -> Image.Image:
    """The picture at `image_size`, in one of the ways of the official data-set tools; square but for the
    last.

    - "crop": the centre square, then Lanczos (center-crop of https://github.com/NVlabs/edm, dataset_tool.py);
    - "stretch": Lanczos of the whole, aspect ratio lost (the same tool without --transform);
    - "adm": halved by box filter while the short side is >= 2 `image_size`, then bicubic, then the centre
      square (https://arxiv.org/abs/2105.05233, guided-diffusion; "center-crop-dhariwal" of EDM2);
    - "shorter": the short side to `image_size`, bilinear, aspect ratio kept (FUNIT,
      https://github.com/NVlabs/FUNIT).
    """
    if fit == "stretch":
        return (
            picture
            if picture.size == (image_size, image_size)
            else _resize(picture, (image_size, image_size))
        )
    if fit == "crop":
        picture = _centre(picture, min(picture.size))
        return picture if picture.width == image_size else _resize(picture, (image_size, image_size))
    if fit == "shorter":
        size = [max(int(image_size * side / min(picture.size)), image_size) for side in picture.size]
        return picture.resize(size, Image.Resampling.BILINEAR)
    if fit != "adm":
        raise ConfigError(f"fit={fit!r}: must be one of {', '.join(FITS)}.")
    while min(picture.size) >= 2 * image_size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = image_size / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return _centre(picture.resize(size, Image.Resampling.BICUBIC), image_size)


def _resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture.resize(size, Image.Resampling.LANCZOS)


def _centre(picture: Image.Image, side: int) -> Image.Image:
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


class ImageReader:
    """Decodes the pictures of a store, all of them up front if asked, and keeps them if they fit in memory.

    `scan` reads every picture once, so that a bad one is found before training; `cache_mib` is what all
    decoded pictures together may take to be kept. With `on_error="raise"` a scan ends with one ConfigError
    that names the bad ones, with "skip" they are left out and counted.
    """

    def __init__(
        self,
        store: Store,
        *,
        channels: int = 3,
        image_size: int | None = None,
        fit: str = "crop",
        strict: bool = False,
        cache_mib: int = 1024,
    ):
        if channels not in MODES:
            raise ConfigError(f"channels={channels}: pictures are decoded to 1 (grey) or 3 (RGB) channels.")
        if fit not in FITS:
            raise ConfigError(f"fit={fit!r}: must be one of {', '.join(FITS)}.")
        if image_size is not None and image_size < 1:
            raise ConfigError(
                f"image_size={image_size}: must be at least 1, or null to keep the pictures' own size."
            )
        self.store, self.cache_mib = store, cache_mib
        self.options = {"channels": channels, "image_size": image_size, "fit": fit, "strict": strict}
        # One tensor for all: thousands of small ones would take a file descriptor each on their way to a
        # spawned worker.
        self._pixels = torch.empty(0, dtype=torch.uint8)
        self._places: dict[str, tuple[int, torch.Size]] = {}

    def read(self, name: str) -> Tensor:
        """uint8 (C, H, W). Raises UnreadableImage (ConfigError where the store fails)."""
        if name not in self._places:
            return self._decode(name)
        start, shape = self._places[name]
        return self._pixels[start : start + shape.numel()].clone().view(shape)

    def _decode(self, name: str) -> Tensor:
        return decode(self.store.read(name), f"{self.store.path}/{name}", **self.options)

    def scan(
        self, names: Sequence[str], on_error: str = "raise"
    ) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        """Decodes all: the (height, width) of every good picture, and what is wrong with every bad one, both
        by name."""
        check_on_error(on_error)
        sizes: dict[str, tuple[int, int]] = {}
        bad: dict[str, str] = {}
        room, kept = self.cache_mib << 20, {}
        for name, result in self._decode_all(names):
            if isinstance(result, ConfigError):
                bad[name] = str(result)
                continue
            sizes[name] = (result.shape[1], result.shape[2])
            room -= result.numel()
            if room >= 0:
                kept[name] = result
            else:
                kept.clear()  # all or nothing: half a cache would make speed depend on the order of names
        self._keep(kept)
        if bad and on_error == "raise":
            raise ConfigError(summary(list(bad.values()), "unreadable image"))
        return sizes, bad

    def _keep(self, images: dict[str, Tensor]) -> None:
        starts = np.cumsum([0, *(image.numel() for image in images.values())]).tolist()
        self._places = {
            name: (s, image.shape) for (name, image), s in zip(images.items(), starts, strict=False)
        }
        self._pixels = torch.cat([self._pixels[:0], *(image.flatten() for image in images.values())])

    def _decode_all(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor | ConfigError]]:
        def attempt(some: Sequence[str]) -> list[Tensor | ConfigError]:
            results: list[Tensor | ConfigError] = []
            for name in some:
                try:
                    results.append(self._decode(name))
                except ConfigError as error:
                    results.append(error)
            return results

        workers = os.cpu_count() or 1  # Pillow decodes without holding the interpreter's lock
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(names), 16 * workers):  # in rounds: a bound on what is decoded ahead
                parts = [names[i : i + 16] for i in range(start, min(start + 16 * workers, len(names)), 16)]
                for some, results in zip(parts, pool.map(attempt, parts), strict=True):
                    yield from zip(some, results, strict=True)


def check_on_error(on_error: str) -> None:
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error={on_error!r}: must be one of {', '.join(ON_ERROR)}.")


def summary(messages: Sequence[str], what: str, shown: int = 5) -> str:
    """One message out of many: the first few, how many there are, and the way on."""
    lines = "\n  ".join(messages[:shown])
    rest = f"\n  ... and {len(messages) - shown} more" if len(messages) > shown else ""
    plural = "s" if len(messages) > 1 else ""
    remedy = "Repair or remove them, or set on_error=skip to leave them out."
    return f"{len(messages)} {what}{plural}:\n  {lines}{rest}\n{remedy}"
