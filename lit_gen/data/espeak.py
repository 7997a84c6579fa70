"""Words spoken by espeak-ng (https://github.com/espeak-ng/espeak-ng), by the library and the data of the
package espeakng-loader; nothing is installed on the system, and nothing that it speaks is shipped.

espeak-ng is under the GPL, version 3 or later, and is loaded only when something is to be spoken.
"""

import _ctypes
import ctypes
import sys
from ctypes import CFUNCTYPE, POINTER, Structure, Union, c_char, c_char_p, c_int, c_short, c_uint, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_gen.errors import ConfigError
from lit_gen.rng import key

RATE_HZ = 22_050
NO_WORDS = frozenset(  # voices that whisper, croak, or sing
    ["AnxiousAndy", "Demonic", "Mr_serious", "UniRobot", "anikaRobot", "croak", "whisper", "whisperf"]
)
PHONEME, END = 7, 0
RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER


class Phoneme(NamedTuple):
    """A phoneme of espeak's, and the sample at which it starts; "_" is a pause."""

    name: str
    start: int


class Speech(NamedTuple):
    """float32 (T,) in [-1, 1] at 22,050 Hz, without the silence around it, and its phonemes."""

    wave: np.ndarray
    phonemes: list[Phoneme]


class _Identity(Union):
    _fields_ = (("number", c_int), ("name", c_char_p), ("string", c_char * 8))


class _Event(Structure):
    _fields_ = (
        ("type", c_int), ("unique_identifier", c_uint), ("text_position", c_int), ("length", c_int),
        ("audio_position", c_int), ("sample", c_int), ("user_data", c_void_p), ("id", _Identity),
    )  # fmt: skip


CALLBACK = CFUNCTYPE(c_int, POINTER(c_short), c_int, POINTER(_Event))


@cache
def _files() -> tuple[str, Path]:
    """The library and its folder of data."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ConfigError(
            "Words are spoken by espeak-ng: pip install lit-gen[sound] (espeakng-loader). Or train on "
            "sounds of your own: data=sound data.path=FOLDER."
        ) from error
    return str(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())


class _Espeak:
    """The library, loaded afresh: its flutter and its noise go on from what was said before, and only a new
    one with a seed of its own says the same again. 4 ms of the 5 ms of a word."""

    def __enter__(self) -> "_Espeak":
        path, data = _files()
        try:
            self.lib = ctypes.CDLL(path)
        except OSError as error:
            raise ConfigError(
                f"{path}: espeak-ng does not load on this platform ({error}). Train on sounds of your own: "
                "data=sound data.path=FOLDER."
            ) from error
        if (rate := self.lib.espeak_Initialize(2, 0, str(data).encode(), 1)) != RATE_HZ:
            raise ConfigError(
                f"{path}: espeak-ng does not start (espeak_Initialize gives {rate}, not {RATE_HZ})."
            )
        self.lib.espeak_ng_SetRandSeed(ctypes.c_long(0))
        libc = ctypes.cdll.ucrtbase if sys.platform == "win32" else ctypes.CDLL(None)
        libc.srand(0)  # the voices Reed and caleb draw from the C library
        self.parts: list[np.ndarray] = []
        self.phonemes: list[Phoneme] = []
        self._callback = CALLBACK(self._receive)  # espeak keeps no reference
        self.lib.espeak_SetSynthCallback(self._callback)
        return self

    def __exit__(self, *error: object) -> None:
        self.lib.espeak_Terminate()
        close = _ctypes.FreeLibrary if sys.platform == "win32" else _ctypes.dlclose
        close(self.lib._handle)

    def _receive(self, wave: Any, n: int, events: Any) -> int:
        if wave and n:
            self.parts.append(np.ctypeslib.as_array(wave, (n,)).copy())
        i = 0
        while events[i].type != END:
            if events[i].type == PHONEME:
                name = bytes(events[i].id.string).split(b"\0")[0].decode()
                self.phonemes.append(Phoneme(name, events[i].sample))
            i += 1
        return 0


def say(text: str, voice: str = "en", *, rate: int = 175, pitch: int = 50, pitch_range: int = 50) -> Speech:
    """`text`, spoken: the same for the same arguments. `rate` is in words a minute, 80 to 450; `pitch` and
    `pitch_range` are 0 to 99. Not for several threads at once.

    Raises ConfigError for numbers out of their range, an unknown voice, a text that says nothing, and where
    espeak-ng is not to be had.
    """
    for name, value, low, high in (
        ("rate", rate, 80, 450),
        ("pitch", pitch, 0, 99),
        ("pitch_range", pitch_range, 0, 99),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name}={value}: must be from {low} to {high}.")
    with _Espeak() as espeak:
        variant = voice.partition("+")[2]  # espeak leaves out one that it does not know
        known = not variant or (_files()[1] / "voices" / "!v" / variant).is_file()
        if not known or espeak.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ConfigError(f"voice={voice}: espeak-ng has no such voice; en and en+m3 are two of them.")
        for parameter, value in ((RATE, rate), (PITCH, pitch), (RANGE, pitch_range)):
            espeak.lib.espeak_SetParameter(parameter, value, 0)
        spoken = text.encode()
        espeak.lib.espeak_Synth(spoken, len(spoken) + 1, 0, 0, 0, 1, None, None)
        espeak.lib.espeak_Synchronize()
    wave = np.concatenate([np.zeros(0, np.int16), *espeak.parts]).astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(wave) > 1e-3)
    if not len(loud):
        raise ConfigError(f"{text!r}: espeak-ng says nothing to that; give words of letters.")
    first, last = int(loud[0]), int(loud[-1]) + 1
    return Speech(wave[first:last], [Phoneme(name, start - first) for name, start in espeak.phonemes])


def english_voices() -> list[str]:
    """The names of the English voices that speak plainly, "en+m3" and so on, in alphabetical order."""
    names = sorted(p.name for p in (_files()[1] / "voices" / "!v").iterdir())
    plain = (n for n in names if n.replace(" ", "_") not in NO_WORDS and not n.startswith("robosoft"))
    return [f"en+{name}" for name in plain]


def voice_parts(shares: dict[str, float], seed: int = 0) -> dict[str, list[str]]:
    """The English voices in parts, by the share of each: voices whose names differ in a number only, m1 and
    m2, are kin and in one part. The synthesizer klatt, which sounds unlike the others, is in the first."""
    kin: dict[str, list[str]] = {}
    for voice in english_voices():
        kin.setdefault(voice.split("+")[1].rstrip("0123456789").lower(), []).append(voice)
    stems = sorted(kin, key=lambda stem: (stem != "klatt", key(seed, "voice", stem)))
    total, parts, part = sum(map(len, kin.values())), {name: [] for name in shares}, iter(shares)
    name, goal = next(part), 0.0
    limits = {}
    for each, share in shares.items():
        goal += share * total / sum(shares.values())
        limits[each] = goal
    count = 0
    for stem in stems:
        while count >= limits[name] - 1e-9:
            name = next(part)
        parts[name] += kin[stem]
        count += len(kin[stem])
    return {name: sorted(voices) for name, voices in parts.items()}
