"""From images to latents to samples, by commands: an autoencoder, what it encodes, a model of that."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from official import invert
from PIL import Image
from safetensors.torch import save_file
from test_resume import assert_same, state

import lit_gen
from lit_gen import checkpoints, models, runs
from lit_gen.autoencoder import Codec
from lit_gen.commands import evaluate as evaluating
from lit_gen.commands import train as training
from lit_gen.commands.prepare import prepare
from lit_gen.commands.sample import sample
from lit_gen.data.latents import data_module
from lit_gen.errors import ConfigError
from lit_gen.instantiate import instantiate
from lit_gen.pretrained import diffusers
from lit_gen.rng import PerSample

pytest.importorskip("litdata")

SHORT = [
    "logger=csv", "trainer=cpu", "log_every=1", "trainer.max_steps=4", "data.batch_size=32",
    "callbacks.validation.every=4", "callbacks.quality.every=4", "callbacks.quality.num_images=24",
    "callbacks.quality.final_images=24", "callbacks.grid.every=4", "callbacks.grid.num=4",
    "callbacks.grid.trajectories=2", "callbacks.checkpoint.every=2",
]  # fmt: skip
AUTOENCODER = [
    "experiment=glyphs_autoencoder", "data=digits", "model.network.widths=[8,16]", "model.network.groups=4",
    "model.network.latent_channels=2", "+model.discriminator._target_=lit_gen.autoencoder.PatchDiscriminator",
    "+model.discriminator.channels=1", "+model.discriminator.width=8", "+model.discriminator.layers=1",
    *SHORT,
]  # fmt: skip


def value(record, name):
    """Of a measured number, by its name."""
    return next(row["value"] for row in record["results"] if name in row.values())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("latents")


@pytest.fixture
def train(compose):
    def run(folder, *overrides):
        cfg = compose(*overrides, f"logger.csv.save_dir={folder}")
        training.train(cfg, folder, list(overrides))
        return folder

    return run


@pytest.fixture
def autoencoder(root, train):
    """A run of an autoencoder of digits, 8 x 8 -> 4 x 4 x 2, four steps with a discriminator."""
    folder = root / "autoencoder"
    return folder if folder.exists() else train(folder, *AUTOENCODER)


@pytest.fixture
def latents(root, autoencoder, compose):
    folder = root / "latents"
    if not folder.exists():
        options = [f"encoder={autoencoder}", "data=digits", f"out={folder}", "workers=0", "shard_mib=0.1"]
        prepare(compose(*options, "device=cpu", config_name="prepare"))
    return folder


def of_latents(latents):
    options = [
        "data=latents",
        f"data.path={latents}",
        "data.image_size=4",
        "data.channels=2",
        "data.num_classes=10",
    ]
    net = ["base_channels=8", "channel_mult=[1]", "num_blocks=1", "attention_resolutions=[]"]
    return [*options, "sampler.num_steps=3", *(f"model.net.{o}" for o in net), *SHORT]


@pytest.fixture
def model(root, latents, train):
    """A run of a score model of these latents."""
    folder = root / "model"
    return folder if folder.exists() else train(folder, *of_latents(latents))


def test_an_autoencoder_logs_the_distance_of_its_reconstructions(autoencoder):
    numbers = runs.history(autoencoder)
    (name,) = [n for n in numbers if n.startswith("rfd_digits64")]
    assert set(numbers[name]) == {4} and {"train/kl", "train/discriminator", "val/loss"} <= set(numbers)
    summary = runs.summary(autoencoder)
    assert summary["fd_name"] == name and summary["fd"] == numbers[name][4]
    module, _, _ = models.load(autoencoder, device="cpu")
    test = module.image_source.dataset("test")
    x = module.pixels.to_model(test.batch(range(24))["image"])
    restored = module.pixels.from_model(module.network.decode(module.network.encode(x)[0]))
    assert torch.equal(module.sample(range(24)), restored)


def test_evaluate_measures_an_autoencoder_as_its_training_did(autoencoder, compose, tmp_path):
    cfg = compose(f"run={autoencoder}", "checkpoint=last", f"out={tmp_path}", "num=24", "device=cpu",
                  config_name="evaluate")  # fmt: skip
    record = evaluating.evaluate(cfg, tmp_path)
    assert runs.summary(autoencoder)["fd"] == pytest.approx(
        value(record, runs.summary(autoencoder)["fd_name"][1:])
    )


def test_latents_are_what_the_averaged_encoder_gives(autoencoder, latents):
    module, _, _ = models.load(autoencoder, device="cpu")
    test = module.image_source.dataset("test")
    stored = data_module(str(latents), Codec(latents), f"{latents}/images").latents("test")
    x = module.pixels.to_model(test.batch(range(64))["image"])
    assert torch.equal(stored.batch(range(64))["image"], torch.cat(module.network.encode(x), 1))
    network = Codec(latents).network("cpu")
    assert all(torch.equal(t, module.network.state_dict()[k]) for k, t in network.state_dict().items())


def test_an_interrupted_command_goes_on(autoencoder, latents, compose, tmp_path):
    options = [f"encoder={autoencoder}", "data=digits", "workers=0", "shard_mib=0.1", "device=cpu"]
    whole = {path.relative_to(latents): path.read_bytes() for path in latents.rglob("*") if path.is_file()}
    shutil.copytree(latents, tmp_path / "some")
    for name in ("latents.json", "images/test/prepared.json"):
        (tmp_path / "some" / name).unlink()
    shutil.rmtree(tmp_path / "some" / "test")
    shutil.rmtree(tmp_path / "some" / "images" / "test")
    prepare(compose(*options, f"out={tmp_path / 'some'}", config_name="prepare"))
    assert all((tmp_path / "some" / name).read_bytes() == content for name, content in whole.items())
    with pytest.raises(ConfigError, match="holds these data already: train on them with data=latents"):
        prepare(compose(*options, f"out={latents}", config_name="prepare"))
    with pytest.raises(ConfigError, match="holds something else"):
        prepare(compose(*options, "ema=false", "checkpoint=last", f"out={latents}", config_name="prepare"))


def test_a_run_decodes_by_itself(model, latents, compose, tmp_path):
    """Where the latents are gone, the command and the library give the pictures of the codec's latents."""
    module, _, _ = models.load(model, device="cpu")
    assert module.codec.path == str(model / "codec") and module.picture_shape == (1, 8, 8)
    generator = PerSample.keyed(3, range(6))
    noise = module.denoiser.process.prior_sample((6, 2, 4, 4), generator)
    x_0 = module.sampler(module.denoiser, noise, label=torch.arange(6), generator=generator)
    expected = module.pixels.from_model(Codec(latents).decode(x_0))
    hidden = latents.with_name("hidden")
    latents.rename(hidden)
    try:
        found = lit_gen.load(model, device="cpu").sample(6, seed=3)
        cfg = compose(
            f"run={model}", "num=6", "seed=3", "device=cpu", f"out={tmp_path}", config_name="sample"
        )
        sample(cfg, tmp_path)
    finally:
        hidden.rename(latents)
    assert torch.equal(found, expected)
    for i in range(6):
        written = np.asarray(Image.open(tmp_path / "images" / f"{i:06d}.png"))
        assert np.array_equal(written, expected[i, 0].numpy())


def test_distances_are_of_pictures(model, compose, tmp_path):
    numbers = runs.history(model)
    cfg = compose(f"run={model}", "checkpoint=last", "num=24", "device=cpu", config_name="evaluate")
    record = evaluating.evaluate(cfg, tmp_path)
    (name,) = [n for n in numbers if n.startswith("fd_digits64")]
    assert numbers[name][4] == pytest.approx(value(record, name))
    frames = models.load(model, device="cpu")[0].sample_trajectory([0, 1], num_frames=3)
    assert frames.shape == (2, 3, 1, 8, 8) and frames.dtype == torch.uint8


def test_what_works_on_pixels_is_refused(model, autoencoder, compose, tmp_path):
    loaded = lit_gen.load(model, device="cpu")
    with pytest.raises(ConfigError, match="Restoration works on pixels, and the model generates latents"):
        loaded.restore(torch.zeros(1, 1, 8, 8), lambda x: x)
    cfg = compose(
        f"run={model}",
        f"out={tmp_path}/a",
        "nll_images=4",
        "extractor=digits64",
        "num=8",
        "device=cpu",
        config_name="evaluate",
    )
    with pytest.raises(ConfigError, match="a density of images works on pixels"):
        evaluating.evaluate(cfg, tmp_path / "a")
    with pytest.raises(
        ConfigError, match="is an autoencoder, which samples nothing: lit-gen prepare encoder="
    ):
        sample(compose(f"run={autoencoder}", f"out={tmp_path}/b", config_name="sample"), tmp_path / "b")
    for options, words in (
        (["encoder=nowhere"], "checkpoint nowhere does not exist"),
        ([f"encoder={model}"], "is of a ScoreModule, which makes no latents"),
        ([f"encoder={autoencoder}", "format=zip"], "format=zip holds pictures, not latents"),
        (
            [f"encoder={autoencoder}", "data=letters", "data.channels=3"],
            "images of 1 channels, and these have 3",
        ),
        ([f"encoder={autoencoder}", "dtype=uint8"], "dtype=uint8: latents are stored as"),
    ):
        cfg = compose("data=digits", *options, f"out={tmp_path}/c", "workers=0", config_name="prepare")
        with pytest.raises(ConfigError, match=words):
            prepare(cfg)


@pytest.mark.parametrize("kind", ["autoencoder", "model"])
def test_resume_is_bit_identical(kind, request, train, tmp_path):
    whole = request.getfixturevalue(kind)
    options = AUTOENCODER if kind == "autoencoder" else of_latents(request.getfixturevalue("latents"))
    folder = train(tmp_path / "half", *options, "trainer.max_steps=2")
    train(folder, f"resume={folder}", "trainer.max_steps=4")
    expected, found = state(whole), state(folder)
    found["config"] = expected["config"]
    assert checkpoints.folder(folder) and expected["batches_seen"] == 4
    assert_same(found, expected)


def test_an_autoencoder_starts_from_a_run_and_from_a_file_of_diffusers(autoencoder, compose, tmp_path):
    trained, cfg, _ = models.load(autoencoder, device="cpu")
    net = trained.network
    (tmp_path / "config.json").write_text('{"norm_num_groups": 4}')
    save_file(invert(net, diffusers.rules(net, "diffusers")), tmp_path / "vae.safetensors")
    for source, new in ((tmp_path / "vae.safetensors", True), (autoencoder, False)):
        module = instantiate(cfg.model)
        start = models.start_from(module, source, cfg.model)
        assert all(torch.equal(t, net.state_dict()[k]) for k, t in module.network.state_dict().items())
        assert any(name.startswith("discriminator.") for name in start.new) == new


@pytest.mark.slow
def test_two_processes_train_the_autoencoder_of_one(autoencoder, tmp_path):
    """Both networks' gradients are averaged, and the draws are those of the whole batch."""
    options = [*AUTOENCODER, "trainer=ddp_cpu", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "lit_gen.train", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = runs.history(autoencoder), runs.history(tmp_path)
    for name in [n for n in one if not n.startswith(("throughput", "memory", "summary"))]:
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    expected = state(autoencoder)["state_dict"]
    for key, tensor in state(tmp_path)["state_dict"].items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4)
