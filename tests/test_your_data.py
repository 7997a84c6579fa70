"""Images of a user's own, from training to sampling, restoring, and evaluation: oblong photos, five channels
of floats, 16-bit arrays; what docs/your-data.md shows, in its order."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from PIL import Image

from lit_gen.cli import _users_mistake
from lit_gen.commands.evaluate import evaluate
from lit_gen.commands.evaluate_images import evaluate_images
from lit_gen.commands.restore import restore
from lit_gen.commands.sample import sample
from lit_gen.config.experiment import build
from lit_gen.data.images import shape_of
from lit_gen.errors import ConfigError
from lit_gen.images import Pixels
from lit_gen.models import load
from lit_gen.score.networks.ncsnpp import NCSNpp

FLOATS = ["data.image_size=[12,16]", "data.channels=5", "data.dtype=float32", "data.range=[0,1]"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """80 JPEGs of different oblong sizes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(80):
        h, w = rng.integers(30, 40), rng.integers(50, 70)
        y, x = np.mgrid[:h, :w]
        waves = [128 + 100 * np.sin((x * rng.random() + y * rng.random()) / 6 + k) for k in range(3)]
        Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(folder / f"{i:02}.jpg")
    return folder


@pytest.fixture(scope="module")
def floats(tmp_path_factory) -> Path:
    """80 arrays (12, 16, 5) of float32 in [0, 1]."""
    folder, rng = tmp_path_factory.mktemp("floats"), np.random.default_rng(1)
    for i in range(80):
        np.save(folder / f"{i:02}.npy", rng.random((12, 16, 5), dtype=np.float32))
    return folder


def trained(fit, folder: Path, *overrides: str):
    """The tiny experiment on a folder of images, unconditional, 3 steps."""
    options = [
        "experiment=omniglot",
        "data=folder",
        "metrics=pixels",
        "data.batch_size=8",
        "trainer.max_steps=3",
    ]
    return fit(folder, *options, *overrides)


def checkpoint(run: Path) -> Path:
    return next((run / "checkpoints").glob("last.ckpt"))


def test_oblong_photos_from_training_to_evaluation(fit, compose, photos, tmp_path):
    run = tmp_path / "run"
    experiment = trained(fit, run, f"data.train.path={photos}", "data.image_size=[12,16]", "augment=flip")
    assert experiment.module.image_shape == shape_of(experiment.data.train) == (3, 12, 16)
    assert len(list((run / "grids").glob("*.png"))) == 2
    common = [f"run={checkpoint(run)}", "device=cpu", "seed=3"]

    def configured(command: str, *options: str):
        return compose(*common, *options, f"out={tmp_path / command}", config_name=command)

    sample(configured("sample", "num=4"), tmp_path / "sample")
    files = sorted((tmp_path / "sample" / "images").glob("*.png"))
    assert [Image.open(f).size for f in files] == [(16, 12)] * 4

    options = ["num=2", "samples=1", "mask=left", "method.num_steps=3"]
    restore(configured("restore", *options), tmp_path / "restore")
    record = json.loads((tmp_path / "restore" / "restoration.json").read_text())
    assert record["operator"]["image_size"] == [12, 16]
    original, degraded = (
        np.asarray(Image.open(tmp_path / "restore" / "images" / f"0000_{name}.png"))
        for name in ("original", "degraded")
    )
    assert np.array_equal(original[:, 8:], degraded[:, 8:]) and (degraded[:, :8] == 128).all()

    found = evaluate(configured("evaluate", "num=16", "nll_images=2"), tmp_path / "evaluate")
    names = {row["key"] for row in found["results"]}
    assert {found["key"], "bits_per_dim"} <= names and found["key"].startswith("fd_pixels4x4x3")


def test_a_training_step_is_the_network_on_oblong_images(fit, photos, tmp_path):
    """The loss of a step of 12x16 images is that of the same weights in a network made for 12x12, which is
    told nothing of the width."""
    experiment = trained(
        fit,
        tmp_path,
        f"data.train.path={photos}",
        "data.image_size=[12,16]",
        "~callbacks.grid",
    )
    module, data = experiment.module.eval(), experiment.data
    batch = data.on_after_batch_transfer(data.keyed_train().__getitems__([(0, i) for i in range(4)]), 0)
    assert batch["image"].shape == (4, 3, 12, 16)
    draws = module.loss.draw(module.denoiser.process, batch["image"], torch.Generator().manual_seed(0))
    oblong = module.loss(module.denoiser, batch["image"], *draws)
    square = NCSNpp(12, 3, 8, (1, 1), 1, ())
    square.load_state_dict(module.denoiser.net.state_dict())
    module.denoiser.net = square.eval()
    assert torch.equal(oblong, module.loss(module.denoiser, batch["image"], *draws))


def test_five_channels_of_floats_from_training_to_evaluation(fit, compose, floats, tmp_path):
    run = tmp_path / "run"
    experiment = trained(fit, run, f"data.train.path={floats}", *FLOATS, "data.shown=[4,2,0]")
    assert experiment.module.pixels == Pixels("float32", [0, 1], [4, 2, 0])
    stored = torch.stack([experiment.data.train[i]["image"] for i in range(4)])
    batch = experiment.data.keyed_train().__getitems__([(0, i) for i in range(4)])
    assert torch.equal(batch["image"], stored)
    arrived = experiment.data.on_after_batch_transfer(batch, 0)["image"]
    torch.testing.assert_close(arrived, 2 * stored - 1, rtol=0, atol=1e-6)

    module, _, _ = load(checkpoint(run), device="cpu")
    drawn = module.sample(range(6), 3)
    assert drawn.dtype == torch.float32 and drawn.shape == (6, 5, 12, 16)
    common = [f"run={checkpoint(run)}", "device=cpu", "seed=3"]

    def configured(command: str, *options: str, out: str = ""):
        return compose(*common, *options, f"out={tmp_path / (out or command)}", config_name=command)

    sample(configured("sample", "num=6", "batch_size=6"), tmp_path / "sample")
    kept = np.load(tmp_path / "sample" / "images.npz")["arr_0"]
    assert np.array_equal(kept, drawn.permute(0, 2, 3, 1).numpy())
    tifffile = pytest.importorskip("tifffile")
    sample(configured("sample", "num=6", "batch_size=6", "format=tiff", out="tiff"), tmp_path / "tiff")
    read = [tifffile.imread(tmp_path / "tiff" / "images" / f"{i:06}.tif") for i in range(6)]
    assert np.array_equal(kept, np.stack(read))
    with pytest.raises(ConfigError, match="format=png: the model makes float32 images of 5 channels"):
        sample(configured("sample", "format=png", out="png"), tmp_path / "png")

    restore(configured("restore", "num=2", "samples=1", "method.num_steps=3"), tmp_path / "restore")
    rows = np.load(tmp_path / "restore" / "images.npz")["arr_0"]
    originals = torch.stack([experiment.data.test[i]["image"] for i in range(2)])
    assert rows.shape == (2, 3, 12, 16, 5)
    assert np.array_equal(rows[:, 0], originals.permute(0, 2, 3, 1).numpy())

    found = evaluate(configured("evaluate", "num=16", "nll_images=2"), tmp_path / "evaluate")
    assert found["key"].startswith("fd_pixels4x4x5") and np.isfinite(found["fd"])
    with pytest.raises(ConfigError, match="The images have 5 channels, digits64 takes pictures"):
        evaluate(configured("evaluate", "extractor=digits64", "num=16", out="refused"), tmp_path / "refused")

    images = [f"images={tmp_path / 'sample' / 'images.npz'}", f"reference={floats}", "device=cpu"]
    images += ["extractor=pixels", "extractor.channels=5", "channels=5", "dtype=float32"]
    cfg = compose(*images, "range=[0,1]", config_name="evaluate_images")  # which samples may leave
    assert evaluate_images(cfg, tmp_path / "images")["n_fake"] == 6
    with pytest.raises(ConfigError, match="needs the range of the values"):
        evaluate_images(compose(*images, config_name="evaluate_images"), tmp_path / "none")


def test_16_bit_images_are_loaded_and_sampled_without_loss(fit, tmp_path):
    tifffile, rng = pytest.importorskip("tifffile"), np.random.default_rng(2)
    (tmp_path / "data").mkdir()
    values = rng.integers(0, 65536, (20, 8, 12, 2)).astype(np.uint16)
    for i, value in enumerate(values):
        tifffile.imwrite(tmp_path / "data" / f"{i:02}.tif", value)
    experiment = trained(
        fit,
        tmp_path / "run",
        f"data.train.path={tmp_path / 'data'}",
        "data.image_size=[8,12]",
        "data.channels=2",
        "data.dtype=uint16",
    )
    data = experiment.data
    for dataset in (data.train, data.test):
        rows = data.keyed(dataset).__getitems__([(0, i) for i in range(len(dataset))])
        known = values[[int(name.split(".")[0]) for name in dataset.names]].transpose(0, 3, 1, 2)
        assert np.array_equal(rows["image"].numpy(), known)
        arrived = data.on_after_batch_transfer(rows, 0)["image"]
        assert np.array_equal(data.pixels.from_model(arrived).numpy(), known)
    assert experiment.module.sample(range(3)).dtype == torch.uint16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.net.channel_mult=[1,1,1,1]"], r"image_size=\[12, 16\] cannot .* \[8, 16\] or \[16, 16\]"),
        (["data.channels=4"], r"its shape is \(12, 16, 5\), neither \(height, width, 4\)"),
        (["data.range=[0,0.5]"], r"its values go from .* and leave data.range=\[0,0.5\]"),
        (["data.range=null"], r"needs the range of the values, data.range=\[0,1\]"),
        (["data.dtype=uint16"], "its pixels are float32, not uint16: set data.dtype=float32"),
        (["data.image_size=[16,12]"], r"its image is 12x16 \(height x width\), not image_size=\[16, 12\]"),
        (["augment=randaugment"], "Augmentation takes uint8 images .* got torch.float32"),
        (["metrics=digits"], "The images have 5 channels, digits64 takes pictures"),
    ],
)
def test_bad_options_are_refused_before_training(compose, tiny, floats, tmp_path, options, message):
    common = ["experiment=omniglot", "data=folder", f"data.train.path={floats}", *FLOATS, "logger=csv"]
    common += [f"logger.csv.save_dir={tmp_path}", "trainer=cpu", "metrics=pixels", *tiny, "data.batch_size=8"]
    with pytest.raises((ConfigError, InstantiationException)) as refused:
        experiment = build(compose(*common, *options), tmp_path)
        experiment.trainer.fit(experiment.module, datamodule=experiment.data)
    assert re.search(message, _users_mistake(refused.value) or "", re.DOTALL)
    assert not list(tmp_path.glob("checkpoints/*"))
