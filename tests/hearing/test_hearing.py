"""Phonemic restoration: what is cut out, what is heard, what a listener believes, and the measures."""

import math

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from lit_gen.commands import restore_speech as command
from lit_gen.data.espeak import Phoneme
from lit_gen.data.sound import LogMel
from lit_gen.errors import ConfigError
from lit_gen.hearing.judges import Judges
from lit_gen.hearing.listeners import EXACT, Ears
from lit_gen.hearing.study import ARMS, Arm, Study, summarized
from lit_gen.hearing.trials import (
    Trial,
    frames_of,
    interrupted,
    middle_consonant,
    noise,
    speech_spectrum,
    trials,
)
from lit_gen.score.restoration import Masked

MEL = LogMel()
EARS = Ears.of(MEL)


def tone(hz, level=0.1):
    return (level * math.sqrt(2) * np.sin(2 * np.pi * hz * np.arange(MEL.samples) / MEL.rate)).astype(
        np.float32
    )


def trial(word, hz, gap=(4000, 6000)):
    wave = tone(hz)
    wave[:800] = wave[9000:] = 0
    return Trial(word, f"voice{word}", wave, gap, f"{word}")


TRIALS = [trial(0, 300), trial(1, 1200), trial(2, 3000)]


def test_the_consonant_in_the_middle_is_found():
    names = [("v", 0), ("a#", 900), ("n", 2000), ("'I", 3000), ("l", 5000), ("@", 6000), ("_:", 7000)]
    assert middle_consonant([Phoneme(*p) for p in names], 7000) == (2000, 3000)
    with pytest.raises(ConfigError, match="a a: a word without a consonant in its middle"):
        middle_consonant([Phoneme("a", 0), Phoneme("a", 100)], 200)


def test_only_the_gap_changes():
    cut = interrupted(TRIALS[0], MEL)
    outside = np.r_[:4000, 6000 : MEL.samples]
    assert np.array_equal(cut[outside], TRIALS[0].wave[outside])
    assert not cut[4000 + 80 : 6000 - 80].any()  # 5 ms fades
    loud = interrupted(TRIALS[0], MEL, noise("white", MEL, 0), 20.0)
    assert np.array_equal(loud[outside], TRIALS[0].wave[outside])
    inside = loud[4000 + 80 : 6000 - 80]
    assert 10 * np.log10(np.mean(inside**2) / 0.01) == pytest.approx(20, abs=0.5)


@pytest.mark.parametrize("kind", ["white", "pink", "speech", "tone"])
def test_noises_have_power_one_and_their_spectrum(kind):
    speech = speech_spectrum([tone(500)], MEL)
    made = [noise(kind, MEL, seed, speech) for seed in range(20)]
    assert all(np.mean(x**2) == pytest.approx(1, rel=1e-3) for x in made)
    power = np.mean([np.abs(np.fft.rfft(x)) ** 2 for x in made], 0)
    hz = np.fft.rfftfreq(MEL.samples, 1 / MEL.rate)
    low, high = (power[(hz > a) & (hz < 2 * a)].mean() for a in (200, 2000))
    if kind in ("white", "pink"):
        assert low / high == pytest.approx({"white": 1, "pink": 10}[kind], rel=0.2)
    else:
        assert hz[power.argmax()] == pytest.approx({"speech": 500, "tone": 1000}[kind], abs=20)


def test_frames_of_a_gap():
    assert frames_of((640, 1281), MEL).nonzero()[:, 0].tolist() == [3, 4]
    assert frames_of((640, 1281), MEL, touched=True).nonzero()[:, 0].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("level_db", [-50, -40, -20, 0])
def test_the_floor_of_noise_is_found_and_silence_has_none(level_db):
    waves = np.stack([noise("white", MEL, s) for s in range(8)])
    y = MEL.picture(torch.from_numpy(waves * 10 ** (level_db / 20))).clamp(min=-1)
    found = EARS.floor(y)[..., 2:-2] - EARS.bias
    assert abs(float(found.mean()) - level_db / 30) < 0.02 and float(found.std()) < 0.05
    assert bool((EARS.floor(torch.full((1, 1, 32, 32), -1.0)) == -math.inf).all())


@pytest.mark.parametrize("kind", ["pink", "speech", "tone"])
@pytest.mark.parametrize("level_db", [-20, 0])
def test_the_floor_of_a_noise_whose_spectrum_is_known(kind, level_db):
    falling = speech_spectrum([np.cumsum(noise("white", MEL, 0))], MEL)  # 6 dB an octave

    def pictures(seeds):
        return torch.from_numpy(np.stack([noise(kind, MEL, s, falling) for s in seeds]))

    ears = Ears.of(MEL, pictures(range(100, 200)))
    y = MEL.picture(pictures(range(8)) * 10 ** (level_db / 20)).clamp(min=-1)
    found = (ears.floor(y)[..., 2:-2] - ears.bias)[..., ears.bands, :]
    assert abs(float(found.mean()) - level_db / 30) < 0.02 and float(found.std()) < 0.05
    if kind == "tone":  # masks the bands around 1 kHz alone, and nothing where it is not
        slope = ears.hear(y, "masking", torch.zeros(1, 1, 1, 32, dtype=torch.bool)).at(y.double()).slope
        assert ears.bands.sum() <= 4 and bool((slope[..., ~ears.bands, 2:-2] > 0.9).all())
    assert bool((ears.floor(torch.full((1, 1, 32, 32), -1.0)) == -math.inf).all())


def test_what_listeners_believe():
    y, gap = (
        MEL.picture(torch.from_numpy(tone(1000)))[None].clamp(min=-1),
        torch.zeros(1, 1, 1, 32, dtype=torch.bool),
    )
    gap[..., 10:14] = True
    x = y.double()
    told = EARS.hear(y, "told", gap).at(x)
    assert not told.slope[..., 10:14].any() and bool(told.slope[..., :10].all())
    assert bool((EARS.hear(y, "naive", gap).at(x).slope == 1).all())
    noisy = MEL.picture(torch.from_numpy(noise("white", MEL, 3)))[None]
    masking = EARS.hear(noisy, "masking", gap)
    assert isinstance(masking, Masked) and float(masking.at(x).slope[..., 2:-2].max()) < 0.5
    deviation = EARS.hear(noisy, "map", gap).at(x).deviation
    assert float(deviation.min()) >= EXACT and float(deviation.median()) > 0.5


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    torch.manual_seed(0)
    prior = MEL.picture(torch.from_numpy(np.stack([t.wave for t in TRIALS]))).clamp(-1, 1)
    judging = [
        Trial(t.word, f"v{k}", t.wave * 10 ** (k / 60), t.gap, f"{t.word}{k}")
        for t in TRIALS
        for k in range(-8, 9)
    ]
    judges = Judges.trained(judging, MEL, 3)
    words, families = ["stop", "other", "whole"], [["stop", "other"]]
    out = tmp_path_factory.mktemp("speech")
    speech = speech_spectrum([t.wave for t in TRIALS], MEL)
    return Study(words, families, TRIALS, (prior, torch.arange(3)), judges, MEL, speech, out)


def test_originals_are_recognized_and_silence_is_not(study):
    exact = study.measures(study.original[:, None].expand(-1, 2, -1, -1, -1))
    assert exact["piece"] == exact["word"] == [1.0, 1.0, 1.0]
    assert exact["error_db"] == exact["level_db"] == exact["differ_db"] == [0.0, 0.0, 0.0]
    assert exact["as_stop"] == [None, 0.0, None]
    quiet = torch.where(study.gap, study.original - 0.1, study.original)[:, None].expand(-1, 2, -1, -1, -1)
    assert study.measures(quiet)["level_db"] == pytest.approx([-3.0] * 3, abs=1e-4)


def test_baselines(study):
    assert torch.equal(
        study.restored(None, Arm(listener="nearest"))[:, 0], study.original
    )  # the prior has them
    bridged = study.restored(None, Arm(listener="interpolation"))[:, 0]
    outside = ~study.touched.expand_as(bridged)
    assert torch.equal(bridged[outside], study.heard(Arm()).clamp(max=1)[outside])
    steady = bridged[1, 0][:, study.touched[1, 0, 0]]
    assert float((steady - study.original[1, 0][:, study.touched[1, 0, 0]]).abs().max()) < 0.15  # a tone


def test_the_exact_posterior_hears_a_stop_in_silence_and_not_in_noise(study):
    """Without a network: the prior has a word with a silence at this place, and one without."""
    silence, told = study.heard(Arm())[:2], study.original[:2]
    study.prior, before = (torch.stack([silence[1], told[1]]), torch.tensor([0, 1])), study.prior
    try:
        assert study.posterior_of_stop(Arm()) > 0.99
        assert study.posterior_of_stop(Arm("white", 20)) < 0.9
        assert study.posterior_of_stop(Arm(listener="told")) == pytest.approx(0.5, abs=0.2)
    finally:
        study.prior = before


def test_cells_are_kept_and_summed_up(study):
    arm = Arm(listener="nearest")
    first = study.cell(arm, 0, lambda: None)
    again = study.cell(arm, 0, lambda: pytest.fail("it is measured once"))
    assert first == again
    assert study.cells() == [first]
    found = summarized([first, again | {"seed": 1}], study)["nearest"]
    assert found["piece"]["completable"] == {"mean": 1.0, "se_words": None, "se_voices": None, "n": 1}
    assert found["as_stop"]["all"]["n"] == 1 and found["piece"]["by_model"] == [1.0, 1.0]


def test_names_of_arms_are_different():
    assert len({arm.name for arm in ARMS}) == len(ARMS) == 33
    assert Arm("white", 10).name == "white +10 dB, masking" and Arm().name == "silence, masking"
    with pytest.raises(ConfigError, match="conditions: there is no 'quiet'; they are original"):
        command._arms(["quiet"])


def test_models_are_added_to_a_study_and_not_changed(tmp_path):
    settings = dict.fromkeys(command.DEPENDS, 1)
    for runs in (["a"], ["a", "b"], ["a"]):
        command._check_same(settings | {"runs": runs}, tmp_path)
    with pytest.raises(ConfigError, match=r"holds what runs=\['a', 'b'\] gave, and runs is now \['b'\]"):
        command._check_same(settings | {"runs": ["b"]}, tmp_path)


def test_of_how_many_samples_the_judge_is_sure(study, monkeypatch):
    """Logits 0 and 10 c for samples of the value c: p > 0.9 for |c| > 0.22, of the word 0 or 1."""
    values = torch.tensor([0.9, 0.0, -0.8, 0.2, 0.3])

    class Model:
        def sample(self, indices, sampler):
            return values[indices][:, None, None, None].expand(-1, 1, 32, 32)

    zero = torch.zeros(())
    monkeypatch.setattr(
        study.judges, "whole", lambda x: torch.stack([x[:, 0, 0, 0] * 10, zero.expand(len(x))], 1)
    )
    assert study.unconditional(0, Model, 5) == {"n": 5, "confident_fraction": 3 / 5, "words": 2}
    assert study.unconditional(0, lambda: pytest.fail("it is drawn once"), 5)["words"] == 2
    assert study.unconditional(0, Model, 2) == {"n": 2, "confident_fraction": 1 / 2, "words": 1}


def test_words_lose_the_consonant_in_their_middle():
    made = trials(["vanilla"], "test", sound=MEL, rate=(220, 290))
    assert len(made) >= 12
    for t in made:
        sounding = np.flatnonzero(t.wave)
        length = sounding[-1] - sounding[0]
        assert 0.28 < (t.gap[1] - t.gap[0]) / length < 0.32
        assert sounding[0] < t.gap[0] < t.gap[1] < sounding[-1]


def test_the_command_from_a_run_to_its_results(fit, compose, tmp_path):
    """A step of training, two arms, two words: every file is there, and a second call measures nothing."""
    given = [
        "experiment=words",
        "data.words=[batter,banner]",
        "data.num_classes=2",
        "data.takes=1",
        "data.batch_size=8",
    ]
    given += ["trainer.max_steps=1", "~callbacks.grid", "~callbacks.quality", "metrics.objective=null"]
    fit(tmp_path / "run", *given)
    checkpoint = next((tmp_path / "run").rglob("*.ckpt"))
    out = tmp_path / "out"
    options = [f"runs=[{checkpoint}]", f"out={out}", "families=[[batter,banner]]", "samples=1", "num_steps=2"]
    options += [
        "conditions=['silence, masking',told]",
        "unconditional=3",
        "judge_takes=1",
        "sounds=[batter]",
        "wandb=disabled",
        "device=cpu",
    ]
    cfg = compose(*options, "sounds=[banana]", config_name="restore_speech")
    with pytest.raises(ConfigError, match="'banana'; its words are batter, banner"):
        command.restore_speech(cfg, tmp_path / "unsaid")
    cfg = compose(*options, config_name="restore_speech")
    result = command.restore_speech(cfg, out)
    assert list(result["arms"]) == ["told", "silence, masking"] and result["voices"] >= 12
    assert result["arms"]["told"]["piece"]["completable"] is None  # both words are of a family
    assert result["arms"]["told"]["as_stop"]["all"]["n"] == result["trials"] / 2
    cells = sorted((out / "cells").iterdir())
    made = {cell: cell.stat().st_mtime_ns for cell in cells}
    assert {p.name for p in (out / "sounds").iterdir()} == {
        f"batter_{name}.wav"
        for name in (
            "original",
            "silence",
            "silence_restored_0",
            "noise",
            "noise_restored_0",
            "told_restored_0",
        )
    }
    sounds = {p.stem: wavfile.read(p)[1] / 32767 for p in (out / "sounds").iterdir()}
    assert max(np.abs(wave).max() for wave in sounds.values()) <= 0.9 + 1e-4  # nothing is clipped
    word = sounds["batter_original"]
    kept = (word != 0) & (sounds["batter_silence"] == word)  # before and after the gap, at the same level
    same = sounds["batter_noise"][kept] == word[kept]
    assert kept.mean() > 0.2 and same.mean() > 0.97  # the rest is where the fades begin
    again = command.restore_speech(cfg, out)
    assert again["arms"] == result["arms"]
    assert {cell: cell.stat().st_mtime_ns for cell in cells} == made
    assert all((out / f"{name}.png").is_file() for name in ("curve", "sheet", "examples"))
    assert result["samples"][0]["n"] == 3 and 0 <= result["samples"][0]["confident_fraction"] <= 1
    more = compose(*options, "samples=2", config_name="restore_speech")
    with pytest.raises(ConfigError, match="holds what samples=1 gave, and samples is now 2: choose another"):
        command.restore_speech(more, out)
    other = compose(*options, "families=[[batter,badger]]", config_name="restore_speech")
    with pytest.raises(ConfigError, match="the model has not learned 'badger'"):
        command.restore_speech(other, tmp_path / "other")
