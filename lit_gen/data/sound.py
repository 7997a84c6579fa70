"""Sound as pictures: log-mel spectrograms, words that espeak-ng speaks, and folders of WAV and FLAC files.

A picture is float32 (1, bands, frames): rows are bands, the highest on top, columns are frames in time. Its
values are decibels, a linear map of [-`range_db`, 0] dB to [-1, 1], where 0 dB is the mean power of a sound
whose samples are 1. Data sets clamp pictures to [-1, 1]; `LogMel.picture` itself does not.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor
from tqdm import tqdm

from lit_gen.data.archive import open_store
from lit_gen.data.espeak import RATE_HZ, Speech, say, voice_parts
from lit_gen.data.images import TensorImages, fingerprint, part_of
from lit_gen.errors import ConfigError, check_choice
from lit_gen.images import Pixels
from lit_gen.rng import keyed_generator

ENDINGS = (".wav", ".flac", ".ogg", ".aif", ".aiff")
PIXELS = Pixels("float32", (-1.0, 1.0))
CLIPPED = 0.001  # the part of samples at full scale from which a sound counts as clipped
PARTS = {"train": 0.5, "judge": 0.3, "test": 0.2}  # of the voices


@dataclass(frozen=True)
class LogMel:
    """The map between sounds (..., T) of `rate` Hz and pictures (..., 1, `bands`, `frames`).

    Frame k is a Hann window of `window` samples around sample k `hop`, with zeros beyond the ends; its power
    spectrum, divided by the sum of the window's squares, is averaged by triangles that are even on the mel
    scale 2595 log10(1 + f / 700) between `low` and `high` Hz, each with the sum 1: white noise of variance v
    has the power v in every band. T is `samples` = `frames` `hop`. Raises ConfigError for sizes that do not
    fit together.
    """

    rate: int = 16_000
    window: int = 640
    hop: int = 320
    bands: int = 32
    frames: int = 32
    low: float = 60.0
    high: float = 7_800.0
    range_db: float = 60.0

    def __post_init__(self):
        if min(self.rate, self.window, self.hop, self.bands, self.frames) < 1 or self.range_db <= 0:
            raise ConfigError(f"{self}: sizes and range_db must be positive.")
        if not 0 <= self.low < self.high <= self.rate / 2:
            raise ConfigError(
                f"sound.low={self.low:g}, sound.high={self.high:g}: must rise and end at most at "
                f"{self.rate / 2:g} Hz, half of sound.rate."
            )
        if self.hop > self.window:
            raise ConfigError(f"sound.hop={self.hop}: windows of {self.window} samples would leave gaps.")
        if not bool((self.filters.sum(1) > 0.5).all()):
            raise ConfigError(
                f"sound.bands={self.bands}: the lowest lie between two frequencies of a window of "
                f"{self.window} samples; take fewer bands, a longer window, or a higher sound.low."
            )

    @property
    def samples(self) -> int:
        """The length of the sound of a picture."""
        return self.frames * self.hop

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    @property
    def unit(self) -> float:
        """The natural logarithm of the power that one unit of a picture stands for."""
        return self.range_db / 20 * math.log(10)

    @cached_property
    def filters(self) -> Tensor:
        """The triangles, float32 (bands, window // 2 + 1), the highest band first; rows have the sum 1."""
        edges = torch.linspace(_mel(self.low), _mel(self.high), self.bands + 2, dtype=torch.float64)
        hz = 700 * (10 ** (edges / 2595) - 1)
        f = torch.linspace(0, self.rate / 2, self.window // 2 + 1, dtype=torch.float64)
        left, center, right = (hz[i : i + self.bands, None] for i in range(3))
        rows = torch.minimum((f - left) / (center - left), (right - f) / (right - center)).clamp(min=0)
        return (rows / rows.sum(1, keepdim=True).clamp(min=1e-12)).flip(0).float()

    def picture(self, wave: Tensor) -> Tensor:
        """Sounds float (..., samples) -> pictures float32 (..., 1, bands, frames), not clamped. Digital
        silence is -120 dB. Raises ConfigError for another length."""
        if wave.shape[-1] != self.samples:
            raise ConfigError(f"A sound of {wave.shape[-1]} samples; pictures are of {self.samples}.")
        spectrum = self._stft(wave.reshape(-1, self.samples).float(), self.hop)[..., : self.frames]
        power = spectrum.abs().square() / self._window(wave).square().sum()
        bands = self.filters.to(wave.device) @ power
        decibels = 10 * (bands + 1e-12).log10()
        return (decibels / (self.range_db / 2) + 1).reshape(*wave.shape[:-1], 1, self.bands, self.frames)

    def wave(self, picture: Tensor, iterations: int = 60, seed: int = 0) -> Tensor:
        """Pictures (..., 1, bands, frames) -> sounds float32 (..., samples) whose pictures they nearly are,
        where they lie in [-3, 3].

        The power of each band is spread over its frequencies, frames are interpolated in decibels to a
        quarter of the hop, and the phases are those of Griffin and Lim, accelerated (Perraudin et al. 2013,
        https://doi.org/10.1109/WASPAA.2013.6701851, momentum 0.99), from random ones that `seed` draws.
        """
        flat = picture.float().reshape(-1, self.bands, self.frames).clamp(-3, 3)
        hop = max(self.hop // 4, 1)
        count = self.samples // hop + 1
        at = (torch.arange(count, device=flat.device) * hop / self.hop).clamp(max=self.frames - 1)
        below = at.floor().long().clamp(max=max(self.frames - 2, 0))
        part = at - below
        above = (below + 1).clamp(max=self.frames - 1)
        decibels = (flat[..., below] * (1 - part) + flat[..., above] * part - 1) * (self.range_db / 2)
        spread = self.filters.to(flat.device).T
        power = spread @ (10 ** (decibels / 10)) / spread.sum(1, keepdim=True).clamp(min=1e-12)
        magnitude = (power * self._window(flat).square().sum()).sqrt()
        turns = torch.rand(magnitude.shape[1:], generator=keyed_generator(seed, "phases"))
        phases, before = torch.polar(torch.ones_like(magnitude), turns.to(flat) * math.tau), 0.0
        wave = flat.new_zeros(())
        for _ in range(iterations):
            wave = self._istft(magnitude * phases, hop)
            now = self._stft(wave, hop)
            ahead = now + 0.99 * (now - before)
            phases, before = ahead / ahead.abs().clamp(min=1e-12), now
        return wave.reshape(*picture.shape[:-3], self.samples)

    def _window(self, like: Tensor) -> Tensor:
        return torch.hann_window(self.window, device=like.device)

    def _stft(self, wave: Tensor, hop: int) -> Tensor:
        """(N, samples) -> complex (N, window // 2 + 1, 1 + samples // hop)."""
        window = self._window(wave)
        return torch.stft(wave, self.window, hop, window=window, pad_mode="constant", return_complex=True)

    def _istft(self, spectrum: Tensor, hop: int) -> Tensor:
        return torch.istft(
            spectrum, self.window, hop, window=self._window(spectrum.real), length=self.samples
        )


def sound_of(data: Mapping[str, Any] | None) -> LogMel | None:
    """The map of the sounds that a configuration of data has pictures of; None for other images."""
    options = None if data is None else data.get("sound")
    return None if options is None else LogMel(**options)


def _mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)


def resampled(wave: np.ndarray, rate: int, to: int) -> np.ndarray:
    """float32 (T,) of `rate` Hz at `to` Hz, by a polyphase filter."""
    if rate == to:
        return wave.astype(np.float32)
    common = math.gcd(rate, to)
    return resample_poly(wave, to // common, rate // common).astype(np.float32)


def save_wav(wave: Tensor, path: Path, rate: int) -> Path:
    """Writes a sound (T,) as 16-bit PCM, values beyond [-1, 1] clipped; creates the folder."""
    from scipy.io import wavfile

    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, (wave.cpu().numpy().clip(-1, 1) * 32767).round().astype(np.int16))
    return path


def spoken(word: str, voice: str, take: int, *, seed: int = 0, rate: tuple[int, int] = (180, 250)) -> Speech:
    """A word in a voice: its speed in `rate` words a minute, its pitch (15 to 85) and its range (30 to 70)
    are drawn by (seed, word, voice, take)."""
    generator = keyed_generator(seed, "speech", word, voice, take)
    limits = (rate, (15, 85), (30, 70))
    speed, pitch, pitch_range = (int(torch.randint(a, b + 1, (), generator=generator)) for a, b in limits)
    return say(word, voice, rate=speed, pitch=pitch, pitch_range=pitch_range)


def placed(speech: np.ndarray, sound: LogMel, start: int, rms: float = 0.1) -> np.ndarray | None:
    """float32 (samples,): a word at 22,050 Hz as it begins at sample `start` of `sound`, with the root mean
    square `rms` over its length; None where its end does not fit."""
    wave = resampled(speech, RATE_HZ, sound.rate)
    if start + len(wave) > sound.samples:
        return None
    out = np.zeros(sound.samples, np.float32)
    out[start : start + len(wave)] = wave * (rms / max(float(np.sqrt(np.mean(wave**2))), 1e-9))
    return out


class WordImages(TensorImages):
    """Pictures of words, and the `names` of the takes: "word/voice/take"."""

    names: list[str]


def spoken_words(
    words: Sequence[str],
    part: str = "train",
    *,
    takes: int = 8,
    sound: LogMel | None = None,
    rate: tuple[int, int] = (180, 250),
    seed: int = 0,
) -> WordImages:
    """Pictures of the words, class = word, spoken `takes` times by each voice of a part: "train", "judge", or
    "test", which share no voice and no kin of one (`lit_gen.data.espeak.voice_parts`).

    A word begins 20 to 80 ms after the start; takes whose end does not fit are left out. Pictures are clamped
    to [-1, 1]. Made at the start: 5 ms of CPU time each. Raises ConfigError for a word that no voice can say
    in the time there is.
    """
    check_choice("part", part, tuple(PARTS))
    if not words or takes < 1:
        raise ConfigError(f"words={list(words)}, takes={takes}: there must be at least one of each.")
    sound = sound or LogMel()
    voices = voice_parts(PARTS, seed)[part]
    waves, labels, names = [], [], []
    rows = [(i, w, v, k) for i, w in enumerate(words) for v in voices for k in range(takes)]
    for i, word, voice, take in tqdm(rows, f"speaking {part} words", unit="word", leave=False):
        generator = keyed_generator(seed, "start", word, voice, take)
        start = int(torch.randint(sound.rate // 50, sound.rate * 2 // 25 + 1, (), generator=generator))
        wave = placed(spoken(word, voice, take, seed=seed, rate=rate).wave, sound, start)
        if wave is not None:
            waves.append(wave)
            labels.append(i)
            names.append(f"{word}/{voice}/{take}")
    counts = torch.tensor(labels, dtype=torch.int64).bincount(minlength=len(words))
    if not bool(counts.all()):
        raise ConfigError(
            f"{words[int(counts.argmin())]!r} does not fit {sound.seconds:g} s at {rate[0]} to {rate[1]} "
            "words a minute: speak faster (data.rate), or raise data.sound.frames."
        )
    parts = [waves[i : i + 256] for i in range(0, len(waves), 256)]
    pictures = [sound.picture(torch.from_numpy(np.stack(part))) for part in parts]
    made = WordImages(
        torch.cat(pictures).clamp(-1, 1), torch.tensor(labels), list(words), f"words-{part}", PIXELS
    )
    made.names = names
    return made


class SoundFiles:
    """The pictures of sounds in files, WAV or FLAC, below a folder or in a zip, each cut into windows of
    `sound.samples`: `ds[i] -> {"image": float32 (1, bands, frames) clamped to [-1, 1], "label": int}`.

    Classes are the folders that hold the files, where there are several. Sounds are resampled to
    `sound.rate`; `mix` takes the mean of several channels. `part`: "train" or "test" of a split of the files
    per class that depends on `seed` and the file's name alone, `test_fraction` of them test. What is left at
    the end of a file and is shorter than a window is not used. Files are opened at the start, for their
    lengths, and read when a window is.

    Raises ConfigError, naming the file, for one that is no sound, has several channels without `mix`, is
    shorter than a window, has too low a rate for `sound.high`, holds values that are no numbers, or is
    clipped: at full scale in more than 1 of 1,000 samples.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sound: LogMel | None = None,
        mix: bool = False,
        part: str = "all",
        test_fraction: float = 0.1,
        seed: int = 0,
    ):
        self.sound, self.mix = sound or LogMel(), mix
        self.store = open_store(path)
        files = [name for name in self.store.names if name.lower().endswith(ENDINGS)]
        if not files:
            raise ConfigError(f"{path}: no sounds ({', '.join(ENDINGS)}) among its files.")
        folders = [name.rpartition("/")[0] for name in files]
        self.classes = sorted(set(folders)) if len(set(folders)) > 1 else []
        labels = [self.classes.index(f) for f in folders] if self.classes else None
        self.files = [files[i] for i in part_of(files, labels, part, test_fraction, seed)]
        counts = [self._windows(name) for name in self.files]
        self.windows = [(i, k) for i, count in enumerate(counts) for k in range(count)]
        of = dict(zip(files, labels or [], strict=False))
        self.labels = torch.tensor([of[self.files[i]] for i, _ in self.windows]) if labels else None
        self.pixels, self.shape = PIXELS, (1, self.sound.bands, self.sound.frames)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        file, k = self.windows[i]
        image = self.sound.picture(torch.from_numpy(self._read(self.files[file], k))).clamp(-1, 1)
        return {"image": image, "label": 0 if self.labels is None else int(self.labels[i])}

    def fingerprint(self) -> str:
        """A name that changes with the files' sizes and times, and with the settings."""
        files = (f"{name}\0{self.store.signature(name)}\0" for name in self.files)
        return fingerprint(self.store.path.stem, len(self), [f"{self.sound} {self.mix}", *files])

    def _windows(self, name: str) -> int:
        with self._open(name) as file:
            place, sound = f"{self.store.path}/{name}", self.sound
            if file.channels > 1 and not self.mix:
                raise ConfigError(
                    f"{place}: {file.channels} channels; data.mix=true takes their mean, or save one of them."
                )
            if file.samplerate < 2 * sound.high:
                raise ConfigError(
                    f"{place}: {file.samplerate} Hz, which hold no sound above {file.samplerate // 2} Hz: "
                    f"set data.sound.high={file.samplerate // 2} or lower."
                )
            count = int(file.frames * sound.rate / file.samplerate) // sound.samples
            if not count:
                raise ConfigError(
                    f"{place}: {file.frames / file.samplerate:.3f} s, shorter than a window of "
                    f"{sound.seconds:g} s: leave it out, or lower data.sound.frames."
                )
            return count

    def _read(self, name: str, k: int) -> np.ndarray:
        """Window k of a file, float32 (samples,)."""
        place, n = f"{self.store.path}/{name}", self.sound.samples
        with self._open(name) as file:
            first = round(k * n * file.samplerate / self.sound.rate)
            file.seek(first)
            count = math.ceil(n * file.samplerate / self.sound.rate)
            wave = file.read(count, dtype="float32", always_2d=True).mean(1)
            rate = file.samplerate
        if not np.isfinite(wave).all():
            raise ConfigError(f"{place}: holds values that are no numbers.")
        if (clipped := float((np.abs(wave) >= 1 - 2**-15).mean())) > CLIPPED:
            raise ConfigError(
                f"{place}: {100 * clipped:.1f} % of its samples from {first / rate:.2f} s on are at full "
                "scale: it is clipped. Record it at a lower level, or leave it out."
            )
        wave = resampled(wave, rate, self.sound.rate)[:n]
        return np.pad(wave, (0, n - len(wave)))

    def _open(self, name: str) -> Any:
        try:
            import soundfile
        except ImportError as error:
            raise ConfigError(
                "Sound files need the package soundfile: pip install lit-gen[sound]."
            ) from error
        source: Any = self.store.path / name
        if not self.store.path.is_dir():
            source = io.BytesIO(self.store.read(name))
        try:
            return soundfile.SoundFile(source)
        except soundfile.LibsndfileError as error:
            raise ConfigError(f"{self.store.path}/{name}: no sound that can be read ({error}).") from error


def words_module(
    words: Sequence[str],
    takes: int = 8,
    rate: Sequence[int] = (180, 250),
    sound: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """The `ImageDataModule` of `spoken_words`: the voices "train" to train on, "test" to test on."""
    made, (slow, fast) = LogMel(**sound or {}), rate
    settings = {"takes": takes, "rate": (slow, fast), "sound": made, "seed": seed}
    return _module(partial(spoken_words, list(words), **settings), made, seed=seed, **options)


def sounds_module(
    path: str,
    mix: bool = False,
    test_fraction: float = 0.1,
    sound: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """The `ImageDataModule` of a folder or zip of sounds (see `SoundFiles`)."""
    made = LogMel(**sound or {})
    settings = {"mix": mix, "test_fraction": test_fraction, "sound": made, "seed": seed}
    return _module(partial(SoundFiles, path, **settings), made, seed=seed, **options)


def _module(source: Callable[..., Any], sound: LogMel, **options: Any) -> Any:
    from lit_gen.data.module import ImageDataModule  # Lightning takes seconds

    train, test = (partial(source, part=part) for part in ("train", "test"))
    size = sound.bands if sound.bands == sound.frames else [sound.bands, sound.frames]
    formats = {"image_size": size, "channels": 1, "dtype": "float32", "range": (-1.0, 1.0)}
    module = ImageDataModule(train, test, **formats | options)
    module.sound = sound
    return module
