"""Spoken words with a piece cut out of the waveform, and filled with silence or with noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.signal import welch
from torch import Tensor

from lit_gen.data.espeak import RATE_HZ, Phoneme, voice_parts
from lit_gen.data.sound import PARTS, LogMel, placed, spoken
from lit_gen.errors import ConfigError, check_choice
from lit_gen.rng import keyed_generator

NOISES = ("white", "pink", "speech", "tone")
PIECE = 0.3  # of a word's length that is cut out
FADE = 0.005  # seconds over which the word gives way
TONE_HZ = 1000.0
VOWELS = "aeiouAEIOUV@03"


@dataclass(frozen=True)
class Trial:
    """A word: its number, its voice, the sound float32 (samples,), and from which sample to which its middle
    consonant is cut out."""

    word: int
    voice: str
    wave: np.ndarray
    gap: tuple[int, int]
    name: str

    @property
    def level(self) -> float:
        """The root mean square of the word where it sounds."""
        return float(np.sqrt(np.mean(self.wave[self.wave != 0] ** 2)))


def middle_consonant(phonemes: Sequence[Phoneme], length: int) -> tuple[int, int]:
    """From which sample to which the consonant nearest the middle of a word of `length` samples lasts, of
    those between two others. Raises ConfigError where there is none."""
    found = []
    for (name, start), (_, end) in pairwise(phonemes[1:]):
        sound = name.lstrip("',")
        if sound and not sound.startswith("_") and sound[0] not in VOWELS and end < length:
            found.append((abs(start + end - length), start, end))
    if not found:
        raise ConfigError(
            f"{' '.join(p.name for p in phonemes)}: a word without a consonant in its middle cannot lose it."
        )
    return min(found)[1:]


def trials(
    words: Sequence[str],
    part: str,
    *,
    sound: LogMel,
    rate: tuple[int, int],
    takes: int = 1,
    seed: int = 0,
) -> list[Trial]:
    """The words by the voices of a part ("train", "judge", "test"), each `takes` times, with the piece that
    will be cut out: `PIECE` of the word's length around its middle consonant. Words that lose their end are
    left out."""
    check_choice("part", part, tuple(PARTS))
    made = []
    for number, word in enumerate(words):
        for voice in voice_parts(PARTS, seed)[part]:
            for take in range(takes):
                speech = spoken(word, voice, take, seed=seed, rate=rate)
                start = sound.rate // 20
                wave = placed(speech.wave, sound, start)
                if wave is None:
                    continue
                first, last = middle_consonant(speech.phonemes, len(speech.wave))
                center = start + (first + last) / 2 * sound.rate / RATE_HZ
                half = PIECE / 2 * len(speech.wave) * sound.rate / RATE_HZ
                gap = (max(round(center - half), 0), min(round(center + half), sound.samples))
                made.append(Trial(number, voice, wave, gap, f"{word}/{voice}/{take}"))
    return made


def speech_spectrum(waves: Sequence[np.ndarray], sound: LogMel) -> np.ndarray:
    """The mean power spectrum of sounds, (samples // 2 + 1,)."""
    f, power = welch(np.concatenate(waves), sound.rate, nperseg=sound.window)
    return np.interp(np.fft.rfftfreq(sound.samples, 1 / sound.rate), f, power)


def noise(kind: str, sound: LogMel, seed: int, speech: np.ndarray | None = None) -> np.ndarray:
    """float32 (samples,) of the mean power 1: white, pink (power falls as 1 / f), shaped as `speech` (see
    `speech_spectrum`), or a tone of 1 kHz, drawn by the seed."""
    check_choice("noise", kind, NOISES)
    if kind == "tone":
        t = np.arange(sound.samples) / sound.rate
        return (math.sqrt(2) * np.sin(2 * np.pi * TONE_HZ * t)).astype(np.float32)
    white = torch.randn(sound.samples, generator=keyed_generator(seed, "noise")).double().numpy()
    if kind != "white":
        f = np.fft.rfftfreq(sound.samples, 1 / sound.rate)
        power = 1 / np.maximum(f, 20.0) if kind == "pink" else speech
        assert power is not None
        white = np.fft.irfft(np.fft.rfft(white) * np.sqrt(power), sound.samples)
    return (white / np.sqrt(np.mean(white**2))).astype(np.float32)


def interrupted(
    trial: Trial, sound: LogMel, filling: np.ndarray | None = None, level_db: float = 0.0
) -> np.ndarray:
    """float32 (samples,): the word with its piece cut out, fading within 5 ms, and the `filling` (a noise of
    power 1, None: silence) in its place at `level_db` beside the word's own level."""
    ramp = np.clip(
        np.minimum(np.arange(sound.samples) - trial.gap[0], trial.gap[1] - np.arange(sound.samples))
        / (FADE * sound.rate),
        0,
        1,
    )
    cut = 0.5 - 0.5 * np.cos(np.pi * ramp)
    heard = trial.wave * (1 - cut)
    if filling is not None:
        heard = heard + cut * filling * trial.level * 10 ** (level_db / 20)
    return heard.astype(np.float32)


def frames_of(gap: tuple[int, int], sound: LogMel, touched: bool = False) -> Tensor:
    """bool (frames,): frames whose center lies in the gap, or, with `touched`, whose window reaches it."""
    center = torch.arange(sound.frames) * sound.hop
    reach = sound.window // 2 if touched else 0
    return (center + reach > gap[0]) & (center - reach < gap[1])
