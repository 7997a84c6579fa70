"""ImageReader: the pictures of a store by name; their headers at the start, their pixels when asked for."""

import mmap
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_gen.data.archive import Store
from lit_gen.data.arrays import ARRAYS, FORMATS, read_array
from lit_gen.data.decode import (
    DRAFTED,
    EXTENSIONS,
    FITS,
    MODES,
    ImageSize,
    UnreadableImage,
    decode,
    header_size,
)
from lit_gen.errors import ConfigError, check_choice
from lit_gen.images import BYTES, Pixels, height_and_width
from lit_gen.rng import key

ON_ERROR = ("raise", "skip", "replace")
HEADER = 1 << 14  # bytes; a header that goes on (a thumbnail, a color profile) is read with the whole file
TRIES = 100
T = TypeVar("T")
Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class ImageForm:
    """What files of images are read as: pictures decoded and fitted (`lit_gen.data.decode`), or arrays as
    they are (`lit_gen.data.arrays`), which all files are of uint16, float32, or another number of channels
    than 1 or 3.

    Raises ConfigError for what no image has.
    """

    channels: int = 3
    image_size: ImageSize | None = None
    fit: str = "crop"
    pixels: Pixels = BYTES
    draft: bool = False

    def __post_init__(self):
        check_choice("fit", self.fit, FITS)
        if self.channels < 1:
            raise ConfigError(f"channels={self.channels}: must be at least 1.")
        if self.image_size is None:
            return
        height, width = height_and_width(self.image_size)
        object.__setattr__(self, "image_size", height if height == width else [height, width])
        if self.fit == "shorter" and height != width:
            raise ConfigError(f"fit=shorter brings the shorter side to one number, not to {self.image_size}.")

    @property
    def are_arrays(self) -> bool:
        return self.pixels.dtype != "uint8" or self.channels not in MODES

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the files that may be read."""
        return FORMATS if self.are_arrays else (*EXTENSIONS, *ARRAYS)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """The images among the names: pictures, where there are any that may be read, else arrays."""
        for endings in (FORMATS,) if self.are_arrays else (EXTENSIONS, ARRAYS):
            if found := [name for name in names if name.lower().endswith(endings)]:
                return found
        return []

    def holds_array(self, name: str) -> bool:
        return self.are_arrays or name.lower().endswith(ARRAYS)

    def read(self, data: bytes, name: str) -> Tensor:
        """(C, H, W), as `pixels` says. Raises UnreadableImage."""
        if not self.holds_array(name):
            options: dict[str, Any] = {"channels": self.channels, "image_size": self.image_size}
            image = decode(data, name, fit=self.fit, draft=self.draft, **options)
            self.pixels.check(image, name)
            return image
        image, size = read_array(data, name, self.pixels, self.channels), self.image_size
        if size is not None and tuple(image.shape[1:]) != height_and_width(size):
            raise UnreadableImage(
                f"{name}: its image is {image.shape[1]}x{image.shape[2]} (height x width), not "
                f"image_size={size}. Arrays are never resized."
            )
        return image

    def fitted(self, size: Size) -> Size:
        """What `read` makes of a picture of this (height, width)."""
        if self.image_size is None:
            return size
        target = height_and_width(self.image_size)
        if self.fit != "shorter":
            return target
        height, width = (max(int(target[0] * side / min(size)), target[0]) for side in size)
        return height, width


class ImageReader:
    """Reads the pictures of a store, each decoded when it is asked for, and keeps them if all fit in memory.

    - `channels`: of pictures 1 or 3. `image_size`, a number or [height, width], and `fit`: see
      `lit_gen.data.decode.fit_to` ("shorter" leaves images as oblong as they are: for a random crop); None
      keeps the pictures' own size. Arrays are never resized.
    - `dtype`, `range`, `shown`, `bounded`: see `lit_gen.images.Pixels`.
    - `draft`: a JPEG that a fit of "crop" or "stretch" makes much smaller is decoded smaller at once (see
      `lit_gen.data.decode.decode`); false decodes it whole, as the official tools do.
    - `cache_mib`: what all scanned pictures together may take, decoded, to be kept for every worker process
      forked from this one. `scan` reads the headers, so that what is no picture is found before training.
    - `on_error`: with "replace" `read_or_replace` takes another for what cannot be read; what "skip" leaves
      out is the caller's choice.
    """

    def __init__(
        self,
        store: Store,
        *,
        channels: int = 3,
        image_size: ImageSize | None = None,
        fit: str = "crop",
        dtype: str = "uint8",
        range: Sequence[float] | None = None,
        shown: Sequence[int] | None = None,
        bounded: bool = True,
        draft: bool = True,
        cache_mib: int = 1024,
        on_error: str = "raise",
    ):
        check_choice("on_error", on_error, ON_ERROR)
        drafts = draft and image_size is not None and fit in DRAFTED  # else the pixels are the same
        self.pixels = Pixels(dtype, range, shown, bounded)
        self.form = ImageForm(channels, image_size, fit, self.pixels, drafts)
        self.store, self.cache_mib, self.on_error = store, cache_mib, on_error
        self._kept: _Kept | None = None
        self._bad: set[str] = set()

    def read(self, name: str) -> Tensor:
        """(C, H, W), as `pixels` says. Raises UnreadableImage (ConfigError where the store fails)."""
        image = None if self._kept is None else self._kept.get(name)
        if image is None:
            image = self._decode(name)
            if self._kept is not None:
                self._kept.put(name, image)
        return image

    def _decode(self, name: str) -> Tensor:
        return self.form.read(self.store.read(name), self._where(name))

    @property
    def options(self) -> dict[str, Any]:
        """What the pixels depend on besides the files, as JSON holds it."""
        form = self.form
        options = {"channels": form.channels, "image_size": form.image_size, "fit": form.fit}
        stored = {} if self.pixels.are_bytes else {"dtype": self.pixels.dtype, "range": self.pixels.range}
        return options | {"draft": form.draft} | stored

    def read_or_replace(
        self, names: Sequence[str], i: int, others: Callable[[int], Sequence[int]], seed: int
    ) -> tuple[int, Tensor]:
        """(i, the pixels of names[i]); with `on_error="replace"`, where these cannot be read, (j, those of
        names[j]): j is drawn from `others(i)` by (seed, i), the same in every epoch and process.

        A picture that is replaced is warned about once a process. Raises UnreadableImage where 100 draws
        cannot be read either.
        """
        if self.on_error != "replace":
            return i, self.read(names[i])
        if (image := self._read_or_warn(names[i])) is not None:
            return i, image
        candidates = others(i)
        for attempt in range(TRIES):
            j = candidates[key(seed, "replacement", i, attempt) % len(candidates)]
            if (image := self._read_or_warn(names[j])) is not None:
                return j, image
        raise UnreadableImage(
            f"{self._where(names[i])}: cannot be read, nor can {TRIES} draws from the {len(candidates)} that"
            " may replace it."
        )

    def _read_or_warn(self, name: str) -> Tensor | None:
        if name in self._bad:
            return None
        try:
            return self.read(name)
        except ConfigError as error:
            self._bad.add(name)
            warnings.warn(f"{error} Another image takes its place.", stacklevel=2)
            return None

    def scan(
        self, names: Sequence[str], *, decode_all: bool = False, turned: bool = False
    ) -> tuple[dict[str, Size], dict[str, str]]:
        """The (height, width) of every good picture by its header, and what is wrong with every bad one, both
        by name; `decode_all` also tells what cannot be decoded. With `turned` sizes respect an orientation
        wherever it stands, for which PNGs are read whole."""
        sizes, bad = _each(partial(self._header, turned), names)
        self._make_room(sizes)
        if decode_all:
            _, undecodable = _each(lambda name: self.read(name).shape, list(sizes))
            sizes = {name: size for name, size in sizes.items() if name not in undecodable}
            bad |= undecodable
        return sizes, bad

    @property
    def keeps_shape(self) -> bool:
        """Whether pictures stay as oblong as they are, each fitted to `image_size`."""
        return self.form.fit == "shorter" and self.form.image_size is not None

    @property
    def remedy(self) -> str:
        """What to do about images that differ in size."""
        if self.form.are_arrays:
            return "Bring all arrays to one size."
        return "Set image_size=64 (or [48,64], say) to crop and resize them all."

    def _where(self, name: str) -> str:
        return f"{self.store.path}/{name}"

    def _header(self, turned: bool, name: str) -> Size:
        if self.form.holds_array(name):  # its header does not tell what is wrong with its values
            height, width = self._decode(name).shape[1:]
            return height, width
        if not (turned and name.lower().endswith(".png")):
            data = self.store.read(name, HEADER)
            try:
                return header_size(data, self._where(name))
            except UnreadableImage:
                if len(data) < HEADER:
                    raise
        return header_size(self.store.read(name), self._where(name))

    def _make_room(self, sizes: Mapping[str, Size]) -> None:
        shapes = {name: (self.form.channels, *self.form.fitted(size)) for name, size in sizes.items()}
        # All or nothing: half a cache would make speed depend on the order of names.
        dtype = self.pixels.torch_dtype
        if 0 < sum(c * h * w for c, h, w in shapes.values()) * dtype.itemsize <= self.cache_mib << 20:
            self._kept = _Kept(shapes, dtype)


class _Kept:
    """Decoded pictures of known shapes, in memory that forked processes share: what one decodes, all have.

    The memory is taken up as it is filled. It is one piece, because thousands of small tensors would take a
    file descriptor each on their way to a spawned worker.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]], dtype: torch.dtype):
        self._dtype = dtype
        self._places: dict[str, tuple[int, int, tuple[int, int, int]]] = {}
        start = len(shapes)  # a byte a picture comes first: whether it is there
        for number, (name, shape) in enumerate(shapes.items()):
            self._places[name] = number, start, shape
            start += shape[0] * shape[1] * shape[2] * dtype.itemsize
        self._bytes = torch.frombuffer(mmap.mmap(-1, start), dtype=torch.uint8)

    def get(self, name: str) -> Tensor | None:
        number, start, (c, h, w) = self._places.get(name, (0, 0, (0, 0, 0)))
        if not start or not self._bytes[number]:
            return None
        size = c * h * w * self._dtype.itemsize
        return self._bytes[start : start + size].clone().view(self._dtype).view(c, h, w)

    def put(self, name: str, image: Tensor) -> None:
        number, start, shape = self._places.get(name, (0, 0, ()))
        if start and image.shape == shape:  # an orientation that the header did not tell makes another shape
            content = image.flatten().view(torch.uint8)
            self._bytes[start : start + len(content)] = content
            self._bytes[number] = 1  # last: who sees it finds all the pixels


def _each(function: Callable[[str], T], names: Sequence[str]) -> tuple[dict[str, T], dict[str, str]]:
    """function(name) of every name, and the message of every name for which it raises a ConfigError."""
    good: dict[str, T] = {}
    bad: dict[str, str] = {}

    def attempt(some: Sequence[str]) -> None:
        for name in some:
            try:
                good[name] = function(name)
            except ConfigError as error:
                bad[name] = str(error)

    parts = [names[i : i + 32] for i in range(0, len(names), 32)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # read, and decoded, without the interpreter's lock
        list(pool.map(attempt, parts))  # raises what is no ConfigError
    good = {name: good[name] for name in names if name in good}
    return good, {name: bad[name] for name in names if name in bad}


def summary(messages: Sequence[str], what: str, shown: int = 5) -> str:
    """One message out of many: the first few, how many there are, and the way on."""
    lines = "\n  ".join(messages[:shown])
    rest = f"\n  ... and {len(messages) - shown} more" if len(messages) > shown else ""
    plural = "s" if len(messages) > 1 else ""
    remedy = (
        "Repair or remove them, or set on_error=skip to leave them out, on_error=replace to show others"
        " (of a training data.on_error)."
    )
    return f"{len(messages)} {what}{plural}:\n  {lines}{rest}\n{remedy}"
