"""Glyphs: letters in more than a hundred typefaces, rendered from the fonts that come with matplotlib; no
download.

Class = typeface, content = letter, and every letter exists in every face: a few-shot translation has a true
answer to be measured against. The fonts (DejaVu, STIX, Computer Modern) are free; STIX holds further
alphabets (script, fraktur, sans-serif ...) at Unicode's mathematical letters. Slant, width and weight make
more faces of these.
"""

import string
import unicodedata
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from lit_gen.data.images import TensorImages, part_of
from lit_gen.errors import ConfigError

LETTERS = string.ascii_uppercase + string.ascii_lowercase
OVERSAMPLING = 3  # the canvas is drawn this much larger, so that sheared edges come out smooth
TRIAL_SIZE = 100  # points at which a font is measured
CAP_HEIGHT, BASELINE, MARGIN = 0.5, 0.69, 0.05  # parts of the image's side


class Face(NamedTuple):
    """A typeface: a font file, the Unicode alphabet to take from it ("" for plain letters), and how it is
    deformed.

    `width` stretches, `slant` shifts right by this much per unit of height, `weight` thickens strokes by this
    part of the image's side, and `outline` leaves nothing but what was added.
    """

    name: str
    file: str
    alphabet: str = ""
    width: float = 1.0
    slant: float = 0.0
    weight: float = 0.0
    outline: bool = False


# Typeface -> Unicode alphabet; what stands before a slash is the font file.
UPRIGHT = {
    "DejaVuSans": "", "DejaVuSans-Bold": "", "DejaVuSansMono": "", "DejaVuSansMono-Bold": "",
    "DejaVuSerif": "", "DejaVuSerif-Bold": "", "STIXGeneral": "", "STIXGeneralBol": "",
    "cmr10": "", "cmb10": "", "cmss10": "", "cmtt10": "",
    "STIXGeneral/sans": "SANS-SERIF", "STIXGeneral/sans-bold": "SANS-SERIF BOLD",
    "STIXGeneral/mono": "MONOSPACE", "STIXGeneral/double": "DOUBLE-STRUCK",
    "STIXGeneral/fraktur": "FRAKTUR", "STIXGeneral/fraktur-bold": "BOLD FRAKTUR",
}  # fmt: skip
ITALIC = {
    "DejaVuSans-Oblique": "", "DejaVuSans-BoldOblique": "", "DejaVuSansMono-Oblique": "",
    "DejaVuSansMono-BoldOblique": "", "DejaVuSerif-Italic": "", "DejaVuSerif-BoldItalic": "",
    "STIXGeneralItalic": "", "STIXGeneralBolIta": "", "cmti10": "",
    "STIXGeneral/sans-italic": "SANS-SERIF ITALIC",
    "STIXGeneral/script": "SCRIPT", "STIXGeneral/script-bold": "BOLD SCRIPT",
}  # fmt: skip
LIGHT = (
    "DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "cmr10", "cmss10", "cmtt10",
    "STIXGeneral/mono",
)  # fmt: skip
VARIANTS = {"": {}, "condensed": {"width": 0.65}, "wide": {"width": 1.45}}


def embedded_faces() -> list[Face]:
    """All 124: 30 as designed, all of them condensed and wide, upright ones slanting backward, light ones
    heavy and in outline."""
    folder = Path(get_data_path()) / "fonts" / "ttf"
    faces = []
    for name, alphabet in (UPRIGHT | ITALIC).items():
        variants = dict(VARIANTS)
        if name in UPRIGHT:
            variants["backslant"] = {"slant": -0.35}
        if name in LIGHT:
            variants |= {"heavy": {"weight": 0.02}, "outline": {"weight": 0.02, "outline": True}}
        file = str(folder / f"{name.split('/')[0]}.ttf")
        faces += [
            Face(f"{name}/{v}".rstrip("/"), file, alphabet, **deformation)
            for v, deformation in variants.items()
        ]
    return faces


class Glyphs(TensorImages):
    """Black letters on white; `ds[i] -> {"image": uint8 (C, S, S), "label": face, "content": letter}`.

    Image i shows letter `i % len(characters)` in face `i // len(characters)`. `classes` restricts and orders
    the faces by name. All are rendered at the start, in a second or two. `paired(i, name)` is the true
    translation of image i into a face. Raises ConfigError for unknown faces and characters that a face does
    not have.
    """

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 1,
        characters: str = LETTERS,
        classes: Sequence[str] | None = None,
    ):
        if image_size < 8:
            raise ConfigError(f"image_size={image_size}: no letter can be read in fewer than 8 pixels.")
        if channels not in (1, 3):
            raise ConfigError(f"channels={channels}: glyphs come with 1 or 3 channels.")
        if not characters or len(set(characters)) != len(characters):
            raise ConfigError(f"characters={characters!r}: must be a string of different characters.")
        known = {face.name: face for face in embedded_faces()}
        names = list(known) if classes is None else list(classes)
        if unknown := [n for n in names if n not in known]:
            raise ConfigError(
                f"Unknown face {unknown[0]!r}; the {len(known)} known begin with "
                f"{', '.join(list(known)[:5])}."
            )
        self.faces, self.characters = [known[n] for n in names], characters
        ink = np.concatenate([_render(face, characters, image_size) for face in self.faces])
        images = torch.from_numpy(255 - ink)[:, None].expand(-1, channels, -1, -1)
        labels = torch.arange(len(names)).repeat_interleave(len(characters))
        super().__init__(images, labels, names, "glyphs")

    def __getitem__(self, i: int) -> dict[str, Any]:
        return super().__getitem__(i) | {"content": i % len(self.characters)}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return super().batch(indices) | {"content": torch.as_tensor(indices) % len(self.characters)}

    def paired(self, i: int, face: str) -> Tensor:
        """The letter of image i in the named face, uint8 (C, S, S)."""
        if face not in self.classes:
            raise ConfigError(
                f"{face!r} is none of the {len(self.classes)} faces, e.g. {', '.join(self.classes[:4])}."
            )
        n = len(self.characters)
        return self.images[self.classes.index(face) * n + i % n]


def letters(
    part: str = "all", image_size: int = 32, channels: int = 1, test_fraction: float = 0.1, seed: int = 0
) -> TensorImages:
    """Glyphs of all faces with the letter as the class, for models that generate images; `part` is "all",
    "train", or "test", the latter `test_fraction` of the faces of each letter, drawn by `seed`."""
    glyphs = Glyphs(image_size, channels)
    content = torch.arange(len(glyphs)) % len(LETTERS)
    names = [f"{glyphs.classes[i // len(LETTERS)]}/{LETTERS[i % len(LETTERS)]}" for i in range(len(glyphs))]
    rows = part_of(names, content.tolist(), part, test_fraction, seed)
    return TensorImages(glyphs.images[rows].contiguous(), content[rows], list(LETTERS), f"letters-{part}")


def letters_module(
    image_size: int = 32, channels: int = 1, test_fraction: float = 0.1, seed: int = 0, **options: Any
) -> Any:
    """The `ImageDataModule` of `letters`; `options` are its other arguments."""
    from lit_gen.data.module import ImageDataModule  # Lightning takes seconds

    train, test = (partial(letters, p, image_size, channels, test_fraction, seed) for p in ("train", "test"))
    return ImageDataModule(train, test, image_size=image_size, channels=channels, seed=seed, **options)


def _code_point(character: str, alphabet: str) -> str:
    """The character of a mathematical alphabet; Unicode keeps some of them ("BLACK-LETTER CAPITAL C")
    elsewhere."""
    if not alphabet:
        return character
    kind = "CAPITAL" if character.isupper() else "SMALL" if character.islower() else "DIGIT"
    name = f"{alphabet} {kind} {unicodedata.name(character).split()[-1]}"
    for candidate in (f"MATHEMATICAL {name}", name.replace("FRAKTUR", "BLACK-LETTER")):
        try:
            return unicodedata.lookup(candidate)
        except KeyError:
            continue
    raise ConfigError(
        f"Unicode has no {alphabet.lower()} form of {character!r}; leave it out of characters, or that face."
    )


@lru_cache(maxsize=256)  # a run and its evaluation make the same faces
def _render(face: Face, characters: str, image_size: int) -> np.ndarray:
    """Ink 0..255, uint8 (len(characters), S, S): one scale and one baseline per face, every letter centered
    by its ink."""
    side = image_size * OVERSAMPLING
    codes = tuple(_code_point(c, face.alphabet) for c in characters)
    cap, rise, fall, sizes = _extent(face.file, _code_point("H", face.alphabet), codes)
    widest = max(w * face.width + h * abs(face.slant) for h, w in sizes)
    # Cap height first; then the widest letter must fit as well, and whatever rises or falls farthest.
    scale = min(CAP_HEIGHT / cap, (1 - 2 * MARGIN) / widest, BASELINE / rise, (1 - BASELINE) / fall)
    font = _font(face.file, TRIAL_SIZE * side * scale)
    return np.stack([_draw(font, code, face, side) for code in codes])


def _font(file: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=256)  # a font's variants share it
def _extent(file: str, capital: str, codes: tuple[str, ...]) -> tuple[int, int, int, list[tuple[int, int]]]:
    """At TRIAL_SIZE: height of a capital, farthest ink above and below the baseline (at least 1), (height,
    width) of every letter's ink. Raises ConfigError for a letter that the font lacks."""
    font = _font(file, TRIAL_SIZE)
    charmap = FT2Font(file).get_charmap()
    if missing := [c for c in codes if ord(c) not in charmap]:
        raise ConfigError(f"{file} has no {missing[0]!r}; leave it out of characters, or that face.")
    inks = [_plain(font, code) for code in codes]
    rise = max(1, *(-top for _, top in inks))
    fall = max(1, *(top + len(ink) for ink, top in inks))
    cap = max(1, -_plain(font, capital)[1]) if ord(capital) in charmap else rise
    return cap, rise, fall, [ink.shape for ink, _ in inks]


def _plain(font: ImageFont.FreeTypeFont, code: str) -> tuple[np.ndarray, int]:
    """The letter's ink, trimmed, and where its first row lies: negative above the baseline."""
    left, top, right, bottom = map(int, font.getbbox(code, anchor="ls"))  # whole pixels
    glyph = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(glyph).text((-left, -top), code, fill=255, font=font, anchor="ls")
    box = glyph.getbbox() or (0, 0, 1, 1)  # Pillow's box of a text reaches to the pen's next position
    return np.asarray(glyph.crop(box)), top + box[1]


def _draw(font: ImageFont.FreeTypeFont, code: str, face: Face, side: int) -> np.ndarray:
    """One letter's ink, uint8 (S, S), drawn on a canvas of side S OVERSAMPLING."""
    ink, top = _plain(font, code)
    if face.width != 1:
        size = (max(round(ink.shape[1] * face.width), 1), ink.shape[0])
        ink = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BILINEAR))
    grown = round(face.weight * side)
    ink = _thickened(_sheared(ink, face.slant), grown, face.outline)
    canvas = Image.new("L", (side, side))
    canvas.paste(Image.fromarray(ink), ((side - ink.shape[1]) // 2, round(BASELINE * side) + top - grown))
    return np.asarray(canvas.reduce(OVERSAMPLING))


def _thickened(ink: np.ndarray, grown: int, outline: bool) -> np.ndarray:
    # Not Pillow's stroke_width: whether that fills the letter depends on Pillow's version.
    if grown == 0:
        return ink
    ink = np.pad(ink, grown)
    heavy = np.asarray(Image.fromarray(ink).filter(ImageFilter.MaxFilter(2 * grown + 1)))
    return heavy - ink if outline else heavy


def _sheared(ink: np.ndarray, slant: float) -> np.ndarray:
    """Every row moved right by `slant` times its height above the last one, trimmed to the ink."""
    if slant == 0:
        return ink
    height, width = ink.shape
    shift = np.rint(slant * np.arange(height - 1, -1, -1)).astype(int)
    shift -= shift.min()
    sheared = np.zeros((height, width + shift.max()), ink.dtype)
    np.put_along_axis(sheared, shift[:, None] + np.arange(width), ink, axis=1)
    columns = np.flatnonzero(sheared.any(0))
    return sheared[:, columns[0] : columns[-1] + 1] if len(columns) else sheared
