"""Sound as pictures: what a log-mel picture says of a sound, and back; words and files."""

import math
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from torch.testing import assert_close

from lit_gen.commands.sample import sample
from lit_gen.data.espeak import english_voices, say, voice_parts
from lit_gen.data.sound import PARTS, LogMel, SoundFiles, placed, resampled, save_wav, spoken_words
from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator

MEL = LogMel()


def noise(*shape, seed="noise"):
    return torch.randn(shape, generator=keyed_generator(seed))


def test_white_noise_has_its_variance_in_every_band():
    power = 10 ** ((MEL.picture(0.1 * noise(400, MEL.samples)) - 1) * 3)  # one unit is 30 dB
    inner = power[..., 1:-1].mean((0, 1, 3))  # the first frame's window begins before the sound
    assert_close(inner, torch.full((32,), 0.01), rtol=0.03, atol=0)


def test_a_picture_says_when_and_how_high():
    wave = torch.zeros(MEL.samples)
    wave[7 * MEL.hop] = 1.0
    columns = MEL.picture(wave)[0].mean(0)
    assert columns.argmax() == 7 and bool((columns[:6] < -2.9).all())
    t = torch.arange(MEL.samples) / MEL.rate
    rows = [
        MEL.picture(torch.sin(2 * math.pi * hz * t))[0, :, 5:-5].mean(1).argmax().item()
        for hz in (150, 1000, 5000)
    ]
    center = [int((MEL.filters[:, round(hz * MEL.window / MEL.rate)]).argmax()) for hz in (150, 1000, 5000)]
    assert rows == center and rows[0] > rows[1] > rows[2]  # the highest band on top


def test_one_unit_is_thirty_decibels():
    wave = noise(2, MEL.samples)
    assert_close(
        MEL.picture(wave) - MEL.picture(wave * 10**-1.5), torch.ones(2, 1, 32, 32), rtol=0, atol=1e-5
    )
    assert math.exp(MEL.unit) == pytest.approx(1000)
    assert_close(MEL.picture(torch.zeros(MEL.samples)), torch.full((1, 32, 32), -3.0))


def test_sounds_of_pictures_have_these_pictures():
    """4.3 dB, measured on words, over the pixels where there is sound."""
    made = spoken_words(["telephone", "vanilla"], "test", takes=1).images[::4]
    again = MEL.picture(MEL.wave(made, iterations=30)).clamp(-1, 1)
    heard = made > -1
    assert 30 * (again - made)[heard].square().mean().sqrt() < 5.5


def test_resampling_keeps_a_tone():
    rate = 22_050
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    made = resampled(tone, rate, 16_000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert len(made) == 16_000 and np.abs(made - expected)[200:-200].max() < 2e-3


@pytest.mark.parametrize("voice", ["en+f2", "en+Reed", "en+caleb"])  # the last two draw random numbers
def test_a_word_is_the_same_whatever_was_said_before(voice):
    first = say("vanilla", voice)
    say("elephant", "en+m3", rate=250, pitch=80)
    again = say("vanilla", voice)
    assert np.array_equal(first.wave, again.wave) and first.phonemes == again.phonemes
    assert [p.name for p in first.phonemes][:2] == ["v", "a#"] or first.phonemes[0].name == "v"


def test_kin_are_in_one_part():
    parts = voice_parts(PARTS)
    stems = {
        name: {v.split("+")[1].rstrip("0123456789").lower() for v in some} for name, some in parts.items()
    }
    assert not stems["train"] & stems["judge"] and not (stems["train"] | stems["judge"]) & stems["test"]
    assert sorted(v for some in parts.values() for v in some) == sorted(english_voices())
    assert "klatt" in stems["train"] and all(len(some) >= 12 for some in parts.values())


def test_words_are_pictures_with_their_labels():
    one = spoken_words(["telephone", "vanilla"], "test", takes=1)
    other = spoken_words(["vanilla", "telephone"], "test", takes=1)
    assert one.pixels.dtype == "float32" and one.images.min() == -1 and one.images.max() <= 1
    i = one.names.index(f"vanilla/{voice_parts(PARTS)['test'][0]}/0")
    j = other.names.index(one.names[i])
    assert torch.equal(one.images[i], other.images[j])
    assert (one.classes[one.labels[i]], other.classes[other.labels[j]]) == ("vanilla", "vanilla")
    with pytest.raises(ConfigError, match=r"'legislatures' does not fit 0.64 s at 80 to 81"):
        spoken_words(["legislatures"], "test", takes=1, rate=(80, 81))


def test_a_word_is_placed_whole_or_not():
    speech = 0.3 * np.sin(np.arange(8820) / 20)
    made = placed(speech, MEL, 400)
    assert made is not None and not made[:400].any() and not made[400 + 6400 :].any()
    assert np.sqrt((made[400:6800] ** 2).mean()) == pytest.approx(0.1, rel=1e-3)
    assert placed(speech, MEL, MEL.samples - 6399) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"high": 9000.0}, "must rise and end at most at 8000 Hz"),
        ({"hop": 1000}, "would leave gaps"),
        ({"bands": 200}, "take fewer bands"),
        ({"frames": 0}, "must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        LogMel(**options)


def test_what_cannot_be_said_is_refused():
    for call, words in (
        (lambda: say("vanilla", "en+nobody"), r"voice=en\+nobody: espeak-ng has no such voice"),
        (lambda: say(""), "espeak-ng says nothing to that"),
        (lambda: say("a", rate=700), "rate=700: must be from 80 to 450"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


@pytest.fixture
def folder(tmp_path):
    for name, n in (("a/x", 3), ("b/y", 2), ("b/z", 2)):
        save_wav(0.2 * noise(n * MEL.samples + 100, seed=name), tmp_path / "sounds" / f"{name}.wav", MEL.rate)
    return tmp_path / "sounds"


def test_windows_of_files(folder, tmp_path):
    files = SoundFiles(folder)
    assert len(files) == 7 and files.classes == ["a", "b"] and files.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    wave, _ = soundfile.read(folder / "b" / "y.wav", dtype="float32")
    expected = MEL.picture(torch.from_numpy(wave[MEL.samples : 2 * MEL.samples])).clamp(-1, 1)
    assert torch.equal(files[4]["image"], expected) and files[4]["label"] == 1
    with zipfile.ZipFile(tmp_path / "sounds.zip", "w") as archive:
        for name in files.files:
            archive.write(folder / name, name)
    zipped = SoundFiles(tmp_path / "sounds.zip")
    assert all(torch.equal(zipped[i]["image"], files[i]["image"]) for i in range(7))
    train, test = (SoundFiles(folder, part=part, test_fraction=0.5) for part in ("train", "test"))
    assert not set(train.files) & set(test.files) and len(train.files) + len(test.files) == 3


def test_other_rates_are_resampled(tmp_path):
    t = np.arange(44_100) / 44_100
    soundfile.write(tmp_path / "tone.flac", 0.5 * np.sin(2 * np.pi * 1000 * t), 44_100)
    t = torch.arange(MEL.samples) / MEL.rate
    expected = MEL.picture(0.5 * torch.sin(2 * math.pi * 1000 * t)).clamp(-1, 1)
    assert (SoundFiles(tmp_path)[0]["image"] - expected)[..., 2:-2].abs().max() < 0.1


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (0.1 * np.ones((16_000, 2)), 16_000, "2 channels; data.mix=true takes their mean"),
        (0.1 * np.ones(4_000), 16_000, "0.250 s, shorter than a window of 0.64 s"),
        (
            0.1 * np.ones(16_000),
            8_000,
            "8000 Hz, which hold no sound above 4000 Hz: set data.sound.high=4000",
        ),
        (np.full(16_000, np.nan), 16_000, "values that are no numbers"),
        (np.sign(np.sin(np.arange(16_000) / 9)), 16_000, "at full scale: it is clipped"),
    ],
    ids=["stereo", "short", "low rate", "NaN", "clipped"],
)
def test_bad_sounds_are_named(tmp_path, samples, rate, words):
    soundfile.write(tmp_path / "bad.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(ConfigError, match=f"bad.wav: .*{words}"):
        SoundFiles(tmp_path)[0]


def test_files_that_are_no_sounds(tmp_path):
    with pytest.raises(ConfigError, match="no sounds"):
        SoundFiles(tmp_path)
    (tmp_path / "text.wav").write_bytes(b"not a sound")
    with pytest.raises(ConfigError, match=r"text.wav: no sound that can be read"):
        SoundFiles(tmp_path)
    soundfile.write(tmp_path / "text.wav", 0.1 * np.ones((16_000, 2)), 16_000)
    assert len(SoundFiles(tmp_path, mix=True)) == 1


def test_a_model_of_sounds_is_heard(fit, folder, compose, tmp_path):
    """Training writes sounds beside its grid, and sampling a WAV for each picture."""
    run = tmp_path / "run"
    given = [
        "experiment=digits",
        "data=sound",
        f"data.path={folder}",
        "data.num_classes=2",
        "data.batch_size=2",
    ]
    given += [
        "trainer.max_steps=1",
        "~callbacks.quality",
        "callbacks.grid.num=4",
        "callbacks.grid.trajectories=0",
    ]
    given += ["model.net.base_channels=8", "sampler.num_steps=2"]
    fit(run, *given)
    assert len(list(run.glob("grids/sound_*.wav"))) == 4
    cfg = compose(
        f"run={next(run.rglob('*.ckpt'))}", "num=2", "device=cpu", f"out={tmp_path}/out", config_name="sample"
    )
    sample(cfg, tmp_path / "out")
    images = np.load(tmp_path / "out" / "images.npz")["arr_0"]
    wave, rate = soundfile.read(tmp_path / "out" / "sounds" / "000001.wav", dtype="float32")
    assert (len(wave), rate) == (MEL.samples, MEL.rate)
    expected = MEL.wave(torch.from_numpy(images[1]).permute(2, 0, 1)).clamp(-1, 1)
    assert (torch.from_numpy(wave) - expected).abs().max() < 1e-4
