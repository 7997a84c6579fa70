"""The study: every model hears every trial in every arm; a cell, one model in one arm, is measured once."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_gen.data.sound import LogMel
from lit_gen.hearing.judges import Judges, gaps, pictures
from lit_gen.hearing.listeners import Ears
from lit_gen.hearing.trials import Trial, interrupted, noise
from lit_gen.rng import PerSample, key, keyed_generator
from lit_gen.runs import read_json, write_json
from lit_gen.score.module import ScoreModule
from lit_gen.score.restoration import Observation, pigdm
from lit_gen.score.samplers import ddim, geometric

SAMPLER = partial(ddim, eta=1.0, grid=geometric)
CONFIDENT = 0.9
LEVELS = (-20, -10, 0, 10, 20)
KERNEL, TEMPERATURE = (
    0.35,
    12.0,
)  # of the exact posterior: how far a word is from one like it, and how alike pixels are


@dataclass(frozen=True)
class Arm:
    """What fills the gap (None: silence), how loud in dB beside the word, and who listens. `listener` may
    also be "matched" (as "masking", by one who knows the filling's spectrum), "original" (nothing is cut
    out), "interpolation" (the gap is bridged from frame to frame), or "nearest" (the gap of the training
    picture that is most alike elsewhere)."""

    filling: str | None = None
    level: float = 0.0
    listener: str = "masking"

    @property
    def name(self) -> str:
        heard = "silence" if self.filling is None else f"{self.filling} {self.level:+g} dB"
        return self.listener if self.listener in BOUNDS else f"{heard}, {self.listener}"


BOUNDS = ("original", "told", "interpolation", "nearest")
ARMS = [
    *(Arm(listener=name) for name in ("original", "told", "interpolation", "nearest", "naive", "masking")),
    *(Arm("white", level) for level in LEVELS),
    *(Arm("white", level, listener) for level in (-20, 20) for listener in ("naive", "map")),
    *(Arm(kind) for kind in ("pink", "speech", "tone")),
    *(Arm(kind, level, "matched") for kind in ("pink", "speech", "tone") for level in LEVELS),
]


@dataclass
class Study:
    """`trials` are the test's; `prior` the training pictures (N, 1, bands, frames) and their words;
    `families`: words that differ in their middle consonant, the voiceless stop first. `sigma_data` is that of
    PiGDM."""

    words: Sequence[str]
    families: Sequence[Sequence[str]]
    trials: Sequence[Trial]
    prior: tuple[Tensor, Tensor]
    judges: Judges
    sound: LogMel
    speech: np.ndarray
    out: Path
    sigma_data: float = 0.56
    num_steps: int = 30
    samples: int = 2
    batch_size: int = 64

    def __post_init__(self):
        self.ears = {"white": Ears.of(self.sound)}
        self.original = pictures(self.trials, self.sound)
        self.gap, self.touched = gaps(self.trials, self.sound), gaps(self.trials, self.sound, touched=True)

    def heard(self, arm: Arm) -> Tensor:
        """What the listener gets: pictures (N, 1, bands, frames), not clamped above."""
        return self.sound.picture(torch.from_numpy(np.stack(self.sounds(arm)))).clamp(min=-1)

    def believed(self, arm: Arm, y: Tensor, touched: Tensor) -> Observation:
        """What the listener of an arm makes of pictures y, whose gaps are `touched` (see `Ears.hear`)."""
        if arm.listener != "matched":
            return self.ears["white"].hear(y, arm.listener, touched)
        kind = arm.filling or "white"
        if kind not in self.ears:
            waves = [noise(kind, self.sound, key("ears", i), self.speech) for i in range(400)]
            self.ears[kind] = Ears.of(self.sound, torch.from_numpy(np.stack(waves)))
        return self.ears[kind].hear(y, "masking", touched)

    def sounds(self, arm: Arm) -> list[np.ndarray]:
        """The waveforms of the trials in an arm, float32 (samples,) each."""
        if arm.listener == "original":
            return [trial.wave for trial in self.trials]
        kind, sound = arm.filling, self.sound
        fillings = (
            None if kind is None else noise(kind, sound, key("filling", trial.name), self.speech)
            for trial in self.trials
        )
        return [
            interrupted(trial, sound, filling, arm.level)
            for trial, filling in zip(self.trials, fillings, strict=True)
        ]

    def restored(self, module: ScoreModule, arm: Arm, only: Sequence[int] | None = None) -> Tensor:
        """(N, K, 1, bands, frames) in [-1, 1]: K = `samples` of what the listener makes of each trial;
        restoration k of trial i depends on (i, k) alone. `only`: these trials."""
        y = self.heard(arm)
        chosen = list(range(len(y))) if only is None else list(only)
        if arm.listener in ("original", "interpolation", "nearest"):
            made = {"original": y, "interpolation": self._bridged(y), "nearest": self._nearest(y)}[
                arm.listener
            ]
            return made[chosen, None].expand(-1, self.samples, -1, -1, -1).clamp(-1, 1)
        device, process = module.device, module.denoiser.process
        rows = [(i, k) for i in chosen for k in range(self.samples)]
        parts = []
        for start in tqdm(range(0, len(rows), self.batch_size), arm.name, unit="batch", leave=False):
            part = rows[start : start + self.batch_size]
            generator = PerSample([keyed_generator("hearing", i, k) for i, k in part])
            which = [i for i, _ in part]
            observed = y[which].to(device)
            belief = self.believed(arm, y[which], self.touched[which])
            x = process.prior_sample(observed.shape, generator, device=device)
            options = {"sigma_data": self.sigma_data, "num_steps": self.num_steps, "sampler": SAMPLER}
            parts.append(pigdm(module.denoiser, x, belief, observed, generator=generator, **options).cpu())
        return torch.cat(parts).clamp(-1, 1).float().unflatten(0, (len(chosen), self.samples))

    def unconditional(self, seed: int, module: Callable[[], ScoreModule], count: int) -> dict[str, Any]:
        """Of `count` samples of a model that hears nothing, in twice the steps of a restoration: the part of
        which the judge of whole words is sure (p > 0.9), and how many words these are. Kept in `out`."""
        file = self.out / f"samples_{seed}.json"
        if (found := read_json(file)) and found["n"] == count:
            return found
        sampler, parts = (
            partial(SAMPLER, num_steps=2 * self.num_steps),
            torch.arange(count).split(self.batch_size),
        )
        model = module()
        drawn = [model.sample(part.tolist(), sampler=sampler).cpu() for part in parts]
        with torch.no_grad():
            p, word = self.judges.whole(torch.cat(drawn).clamp(-1, 1).float()).softmax(1).max(1)
        sure = word[p > CONFIDENT]
        found = {"n": count, "confident_fraction": len(sure) / count, "words": len(sure.unique())}
        write_json(file, found)
        return found

    def cells(self) -> list[dict[str, Any]]:
        """All that were measured, in the order of `ARMS` and of the models."""
        order = {arm.name: i for i, arm in enumerate(ARMS)}
        found = [read_json(file) for file in (self.out / "cells").glob("*.json")]
        return sorted(
            filter(None, found),
            key=lambda cell: (order.get(Arm(**cell["arm"]).name, len(order)), cell["seed"]),
        )

    def cell(self, arm: Arm, seed: int, module: Callable[[], ScoreModule]) -> dict[str, Any]:
        """The measures of each trial, from `cells/` if they are there."""
        file = self.out / "cells" / f"{seed}_{arm.name.replace(' ', '_').replace(',', '')}.json"
        if found := read_json(file):
            return found
        measured = {"arm": asdict(arm), "seed": seed} | self.measures(self.restored(module(), arm))
        measured["posterior_stop"] = self.posterior_of_stop(arm) if seed == 0 else None
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, measured)
        return measured

    def measures(self, x: Tensor) -> dict[str, list[float | None]]:
        """Of each trial, the mean over the samples x (N, K, 1, bands, frames): whether piece and word are
        recognized, the error and the level's error in the gap in dB, by how many dB two samples differ there,
        and, of families but their stop, whether the piece is heard as the stop."""
        samples, decibels = x.shape[1], self.sound.range_db / 2
        flat, gap = x.flatten(0, 1), self.gap.repeat_interleave(samples, 0)
        whole, piece = self.judges.say(flat, gap)
        words = torch.tensor([t.word for t in self.trials])
        inside = self.gap[:, None].expand_as(x)
        difference = torch.where(inside, (x - self.original[:, None]) * decibels, 0.0)
        count = inside.flatten(2).sum(2)
        rms = (difference.square().flatten(2).sum(2) / count).sqrt().mean(1)
        level = (difference.flatten(2).sum(2) / count).mean(1)
        apart = torch.where(inside, (x - x.roll(1, 1)) * decibels, 0.0).square().flatten(2).sum(2)
        hits = [
            (p.argmax(1).unflatten(0, (-1, samples)) == words[:, None]).float().mean(1)
            for p in (piece, whole)
        ]
        return {
            "piece": hits[0].tolist(),
            "word": hits[1].tolist(),
            "error_db": rms.tolist(),
            "level_db": level.tolist(),
            "differ_db": (apart / count).sqrt().mean(1).tolist(),
            "as_stop": self._as_stop(piece.unflatten(0, (-1, samples))),
        }

    def posterior_of_stop(self, arm: Arm) -> float | None:
        """The exact posterior without a network, with the training pictures as the prior: the mean
        probability of the stop for words of families that are not the stop. None for arms that believe
        nothing."""
        if arm.listener in ("original", "interpolation", "nearest"):
            return None
        y, (x, labels), found = self.heard(arm), self.prior, []
        for i, stop in self._not_stops().items():
            belief = self.believed(arm, y[i : i + 1], self.touched[i : i + 1])
            value, slope, std = belief.at(x.double())
            variance = std.square() + (slope * KERNEL).square()
            rest = torch.where(slope > 0, (y[i : i + 1] - value).square() / variance + variance.log(), 0.0)
            weights = (-0.5 * rest.flatten(1).sum(1) / TEMPERATURE).softmax(0)
            found.append(float(weights[labels == stop].sum()))
        return statistics.fmean(found) if found else None

    def _not_stops(self) -> dict[int, int]:
        """Trial -> the stop of its family, for words that are not the stop."""
        stops = {w: family[0] for family in self.families for w in family[1:]}
        named = {i: stops.get(self.words[t.word]) for i, t in enumerate(self.trials)}
        return {i: list(self.words).index(stop) for i, stop in named.items() if stop is not None}

    def _as_stop(self, piece: Tensor) -> list[float | None]:
        found: list[float | None] = [None] * len(self.trials)
        for i, stop in self._not_stops().items():
            family = next(f for f in self.families if self.words[stop] in f)
            numbers = torch.tensor([list(self.words).index(w) for w in family])
            found[i] = float((piece[i][:, numbers].argmax(1) == 0).float().mean())
        return found

    def _bridged(self, y: Tensor) -> Tensor:
        """Frames whose window reaches the gap, from the last before it to the first after it, linearly."""
        made = y.clone()
        for i, touched in enumerate(self.touched[:, 0, 0]):
            inside = touched.nonzero()[:, 0]
            first, last = max(int(inside[0]) - 1, 0), min(int(inside[-1]) + 1, self.sound.frames - 1)
            part = torch.linspace(0, 1, last - first + 1)
            made[i, ..., first : last + 1] = torch.lerp(y[i, ..., first, None], y[i, ..., last, None], part)
        return made

    def _nearest(self, y: Tensor) -> Tensor:
        """In the gap, the training picture that is nearest elsewhere."""
        x, made = self.prior[0], []
        for picture, touched in zip(y, self.touched, strict=True):
            known = (~touched).float()
            distance = ((x - picture) * known).square().flatten(1).sum(1)
            made.append(torch.where(touched, x[distance.argmin()], picture))
        return torch.stack(made)


def summarized(cells: Sequence[Mapping[str, Any]], study: Study) -> dict[str, dict[str, Any]]:
    """Arm -> measure -> {"completable", "all": mean, standard error over words and over voices, n}: of each
    trial the mean over the models first; and "by_model", the means of completable words for each model."""
    names = [study.words[t.word] for t in study.trials]
    inside = {word for family in study.families for word in family}
    groups = {
        "completable": [i for i, name in enumerate(names) if name not in inside],
        "all": list(range(len(names))),
    }
    result: dict[str, dict[str, Any]] = {}
    for arm in {Arm(**cell["arm"]).name: None for cell in cells}:
        own = [cell for cell in cells if Arm(**cell["arm"]).name == arm]
        result[arm] = {"posterior_stop": next((c["posterior_stop"] for c in own if c["seed"] == 0), None)}
        for measure in ("piece", "word", "error_db", "level_db", "differ_db", "as_stop"):
            rows = list(zip(*(cell[measure] for cell in own), strict=True))
            values = {i: statistics.fmean(row) for i, row in enumerate(rows) if None not in row}
            result[arm][measure] = {
                group: _estimate(
                    {i: values[i] for i in members if i in values},
                    names,
                    [t.voice for t in study.trials],
                )
                for group, members in groups.items()
            } | {"by_model": [_mean(cell[measure], groups["completable"]) for cell in own]}
    return result


def _mean(values: Sequence[float | None], members: Sequence[int]) -> float | None:
    known = [v for i in members if (v := values[i]) is not None]
    return statistics.fmean(known) if known else None


def _estimate(
    values: Mapping[int, float], words: Sequence[str], voices: Sequence[str]
) -> dict[str, Any] | None:
    if not values:
        return None
    errors = {}
    for name, of in (("se_words", words), ("se_voices", voices)):
        by: dict[str, list[float]] = {}
        for i, value in values.items():
            by.setdefault(of[i], []).append(value)
        means = [statistics.fmean(some) for some in by.values()]
        errors[name] = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
    return {"mean": statistics.fmean(values.values()), **errors, "n": len(values)}
