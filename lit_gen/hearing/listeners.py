"""Listeners: what each believes of a picture y of what it heard, as an observation of the word's picture.

All are told nothing of the gap but the one that is a bound. `masking` is the listener of the experiment: it
takes the noise that it hears in each frame as a power that adds, in silence as in noise. What it knows of the
noise, of white noise or of another, is its `Ears`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gen.data.sound import LogMel
from lit_gen.errors import check_choice
from lit_gen.rng import keyed_generator
from lit_gen.score.restoration import Masked, NoisyPixels, Observation

LISTENERS = ("naive", "masking", "map", "told")
EXACT = 0.07  # the deviation of what is heard, 2 dB
SILENCE = -0.9  # a noise floor below this value of a pixel is none
QUANTILE = 0.25  # of the bands of a frame, which speech leaves free


@dataclass(frozen=True)
class Ears:
    """What is known of a kind of noise in pictures of `sound`: mean and deviation of its picture in each band
    at power 1, the bands in which it is heard (within 30 dB of its loudest), and their quantile in a frame
    beside their mean."""

    sound: LogMel
    bias: Tensor  # (bands, 1)
    spread: Tensor  # (bands, 1)
    bands: Tensor  # bool (bands,)
    quantile: float

    @classmethod
    def of(cls, sound: LogMel, waves: Tensor | None = None) -> "Ears":
        """Measured on waves (N, samples) of power 1; None: 400 of white noise."""
        if waves is None:
            waves = torch.randn(400, sound.samples, generator=keyed_generator("ears"))
        frames = sound.picture(waves)[:, 0, :, 2:-2].transpose(0, 1).flatten(1)  # bands, frames of all
        bias, spread = frames.mean(1, keepdim=True), frames.std(1, keepdim=True).clamp(min=0.03)
        bands = bias[:, 0] > bias.max() - 60 / sound.range_db
        quantile = (frames - bias)[bands].quantile(QUANTILE, 0).mean()
        return cls(sound, bias, spread, bands, float(quantile))

    def floor(self, y: Tensor) -> Tensor:
        """The level of the noise in pictures y (B, 1, bands, frames), told from y alone: frame by frame what
        a quarter of its bands lie below, if that were noise; -inf where it is silence. (B, 1, bands,
        frames)."""
        bias = self.bias[self.bands]
        level = (y[..., self.bands, :] - bias).quantile(QUANTILE, -2, keepdim=True) - self.quantile
        return torch.where(level + bias.mean() > SILENCE, level + self.bias, -torch.inf)

    def hear(self, y: Tensor, listener: str, gap: Tensor) -> Observation:
        """What the listener believes: pictures y (B, 1, bands, frames), and `gap` (B, 1, 1, frames), true
        where a window touches the gap, of which only "told" makes use.

        "naive" takes all of y for the word. "map" takes y for the word where it is louder than the noise, and
        gives it a deviation of up to 2 (60 dB) where it is not. "told" leaves the gap out.
        """
        check_choice("listener", listener, LISTENERS)
        if listener == "naive":
            return NoisyPixels(EXACT)
        if listener == "told":
            return NoisyPixels(EXACT, ~gap)
        if listener == "masking":
            return Masked(self.floor(y), rate=self.sound.unit, std=EXACT, floor_std=self.spread)
        above = (self.sound.unit * (y - self.floor(y)).double()).clamp(min=0)
        return NoisyPixels(EXACT + 2 * (-above).exp())
