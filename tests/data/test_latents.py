"""Latents as data: stored moments are exact, draws are keyed, and scales are what they are called."""

import json
import shutil

import numpy as np
import pytest
import torch

from lit_gen.autoencoder import AutoencoderKL, Codec
from lit_gen.autoencoder.codec import write_codec
from lit_gen.autoencoder.networks import as_moments
from lit_gen.data.images import TensorImages
from lit_gen.data.keyed import KeyedBatches
from lit_gen.data.latents import EncodedImages, LatentDraw, data_module, latent_statistics
from lit_gen.data.prepared import PreparedImages
from lit_gen.data.shards import put_files, write_shards
from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator

pytest.importorskip("litdata")


def images(n=23, seed=0):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=g)
    return TensorImages(pixels, torch.arange(n) % 3, ["a", "b", "c"])


@pytest.fixture
def network():
    torch.manual_seed(0)
    return AutoencoderKL(1, 2, (8, 16), 1, 4).eval().requires_grad_(False)


def encoded(dataset, network, **options):
    return EncodedImages(dataset, lambda x: as_moments(*network.encode(x)), "ours", batch_size=5, **options)


def straight(bar, total):
    return bar


@pytest.fixture
def folder(tmp_path, network):
    """A prepared set of latents as the command writes it, with the pictures beside it."""
    for split, seed in (("train", 0), ("test", 1)):
        dataset = images(seed=seed)
        for place, some in ((split, encoded(dataset, network)), (f"images/{split}", dataset)):
            write_shards(some, f"{tmp_path}/out/{place}", workers=0, shard_mib=0.001, bar=straight)
    moments = latent_statistics(PreparedImages(f"{tmp_path}/out/train"))
    (tmp_path / "codec").mkdir()
    write_codec(tmp_path / "codec", network, (1, 8, 8), moments, factor=0.5, shift=0.25)
    put_files(tmp_path / "codec", f"{tmp_path}/out")
    return tmp_path / "out"


def module(folder, **options):
    codec = Codec(folder, **options.pop("codec", {}))
    paths = {"path": str(folder), "images": f"{folder}/images"}
    options = paths | {"batch_size": 4, "seed": 7, "image_size": 4, "channels": 2} | options
    return data_module(codec=codec, **options)


def test_moments_are_those_of_the_encoder_to_the_bit(folder, network):
    dataset, stored = images(), PreparedImages(folder / "train")
    assert stored.shape == (4, 4, 4) and stored.classes == ["a", "b", "c"]
    for block in range(0, 23, 5):
        rows = range(block, min(block + 5, 23))
        x = dataset.pixels.to_model(dataset.batch(rows)["image"])
        found = stored.batch(rows)
        assert torch.equal(found["image"], as_moments(*network.encode(x)))
        assert torch.equal(found["label"], dataset.labels[rows.start : rows.stop])


def test_any_process_and_any_start_encodes_the_same(network):
    """What an interrupted command has left is written by blocks that begin elsewhere, with or without
    processes that read ahead."""
    dataset = images()
    whole = encoded(dataset, network)
    expected = [whole[i]["image"] for i in range(23)]
    for order in (range(11, 23), [22, 3, 4, 5, 0]):
        for workers in (0, 1):
            some = encoded(dataset, network, workers=workers)
            assert all(torch.equal(some[i]["image"], expected[i]) for i in order)


def test_halves_are_the_nearest(network):
    whole, half = (encoded(images(), network, dtype=d) for d in ("float32", "float16"))
    assert half[3]["image"].dtype == torch.float16
    assert torch.equal(half[3]["image"], whole[3]["image"].half())
    assert half.fingerprint() != whole.fingerprint()
    with pytest.raises(ConfigError, match="dtype=uint8: latents are stored as float32 or float16"):
        encoded(images(), network, dtype="uint8")


def test_a_latent_is_drawn_by_seed_epoch_and_index(folder, network):
    made = module(folder)
    stored, codec = PreparedImages(folder / "train"), made.codec
    keyed = made.keyed_train()
    for epoch, i in ((0, 3), (0, 4), (2, 3)):
        noise = torch.randn(2, 4, 4, generator=keyed_generator(7, "augment", epoch, i))
        mean, deviation = stored[i]["image"].chunk(2)
        expected = codec.normalized(mean + deviation * noise)
        assert torch.equal(keyed[epoch, i]["image"][0], expected)
        assert torch.equal(
            LatentDraw(codec)(stored[i]["image"], keyed_generator(7, "augment", epoch, i)), expected
        )
        together = keyed.__getitems__([(0, 9), (epoch, i)])["image"][1]
        assert torch.equal(together, expected)
    assert not torch.equal(keyed[0, 3]["image"], keyed[1, 3]["image"])
    assert not torch.equal(keyed[0, 3]["image"], module(folder, seed=8).keyed_train()[0, 3]["image"])


def test_ranks_and_resumed_runs_see_the_batches_of_one(folder):
    keyed = module(folder).keyed_train()
    whole = [
        keyed.__getitems__(keys)["image"] for keys, _ in zip(KeyedBatches(23, 4, 7), range(9), strict=False)
    ]
    for start in (0, 7):
        parts = [iter(KeyedBatches(23, 4, 7, rank=r, world_size=2, start=start)) for r in (0, 1)]
        for s in range(start, 9):
            found = torch.cat([keyed.__getitems__(next(part))["image"] for part in parts])
            assert torch.equal(found, whole[s])


def test_statistics_are_those_of_all_draws(folder):
    moments = latent_statistics(PreparedImages(folder / "train"), batch_size=6)
    mean, deviation = (
        x.double() for x in PreparedImages(folder / "train").batch(range(23))["image"].chunk(2, 1)
    )
    np.testing.assert_allclose(moments["mean"], mean.mean((0, 2, 3)))
    variance = mean.var((0, 2, 3), correction=0) + deviation.square().mean((0, 2, 3))
    np.testing.assert_allclose(moments["std"], variance.sqrt())
    assert Codec(folder).described["std"] == latent_statistics(PreparedImages(folder / "train"))["std"]
    shown = []

    def bar(batches, total):
        shown.append(total)
        yield from batches

    assert latent_statistics(PreparedImages(folder / "train"), 6, bar) == moments and shown == [4]


def test_channels_have_the_standard_deviation_that_is_asked_for(folder):
    made = module(folder, codec={"std": 0.7})
    keyed = made.keyed_train()
    drawn = torch.cat([keyed.read([(e, i) for i in range(23)])["image"] for e in range(40)]).double()
    assert drawn.mean((0, 2, 3)).abs().max() < 0.01
    torch.testing.assert_close(drawn.std((0, 2, 3)), torch.full((2,), 0.7).double(), rtol=0.01, atol=0)


def test_the_factor_is_that_of_the_file(folder):
    codec, z = Codec(folder, normalize="factor"), torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(codec.normalized(z), (z - 0.25) * 0.5)
    for some in (codec, Codec(folder)):
        torch.testing.assert_close(some.latents(some.normalized(z)), z)
    each = [[0.25, -1.0], [0.5, 2.0]]  # of each channel
    codec.described |= dict(zip(("shift", "factor"), each, strict=True))
    shift, factor = torch.tensor(each)[..., None, None]
    torch.testing.assert_close(codec.normalized(z), (z - shift) * factor)
    with pytest.raises(ConfigError, match="normalize='sd': must be one of channels, factor"):
        Codec(folder, normalize="sd")


def test_decoding_is_that_of_the_network(folder, network, monkeypatch):
    codec, x = Codec(folder), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    expected = network.decode(codec.latents(x).float())
    assert torch.equal(codec.decode(x), expected) and codec.shape == (1, 8, 8)
    monkeypatch.setattr("lit_gen.autoencoder.codec.PIXELS_AT_ONCE", 128)
    torch.testing.assert_close(codec.decode(x), expected)


def test_pictures_stand_for_the_latents(folder):
    made = module(folder, num_classes=3)
    made.check(world_size=2)
    assert torch.equal(made.dataset("test").batch([5])["image"], images(seed=1).batch([5])["image"])
    batch = made.on_after_batch_transfer(made.keyed_test()[0, 5], 0)
    assert batch["image"].shape == (1, 2, 4, 4) and int(batch["label"]) == 2
    assert len(next(iter(made.val_dataloader()))["image"]) == 4


class WithVectors(TensorImages):
    """Images that come with a vector each."""

    def batch(self, indices):
        return super().batch(indices) | {"vector": torch.tensor([[i, i / 2] for i in indices])}

    def __getitem__(self, i):
        return {name: rows[0] for name, rows in self.batch([i]).items()}


def test_conditions_of_pictures_are_those_of_latents(folder, network, tmp_path):
    dataset = images()
    with_vectors = WithVectors(dataset.images, dataset.labels, dataset.classes)
    for split in ("train", "test"):
        shards = encoded(with_vectors, network)
        write_shards(shards, f"{tmp_path}/some/{split}", workers=0, shard_mib=0.001, bar=straight)
    made = module(folder, path=str(tmp_path / "some"))
    batch = made.on_after_batch_transfer(made.keyed_train().__getitems__([(0, 4), (1, 9)]), 0)
    assert batch["vector"].tolist() == [[4, 2], [9, 4.5]] and batch["image"].shape == (2, 2, 4, 4)
    assert made.conditions([3, 26])["vector"].tolist() == [[3, 1.5], [3, 1.5]]
    assert made.vectors().shape == (23, 2)


def test_what_does_not_fit_is_said(folder, tmp_path):
    bare = module(folder, images=None)
    bare.check()
    assert len(bare.train) == 23
    with pytest.raises(ConfigError, match=r"data.images=null: without pictures nothing can be measured"):
        bare.dataset("test")
    with pytest.raises(ConfigError, match=r"data.image_size=8, but .* image_size 4: set data.image_size=4"):
        module(folder, image_size=8).check()
    with pytest.raises(ConfigError, match=r"data.augment changes pictures, not latents"):
        module(folder, augment=lambda x, g: x)
    with pytest.raises(ConfigError, match=r"data.condition.\* to lit-gen prepare"):
        module(folder, condition={"vector": "a.csv"})
    write_shards(images(22), f"{tmp_path}/few/train", workers=0, shard_mib=1, bar=straight)
    write_shards(images(), f"{tmp_path}/few/test", workers=0, shard_mib=1, bar=straight)
    with pytest.raises(ConfigError, match=r"data.images has 22 train images, and there are 23 latents"):
        module(folder, images=f"{tmp_path}/few").check()
    with pytest.raises(ConfigError, match=r"latents.json: cannot be read .*lit-gen prepare encoder="):
        Codec(tmp_path).decode(torch.zeros(1, 2, 4, 4))


def test_latents_of_another_encoder_are_refused(folder, network, tmp_path):
    """A resumed run whose data.path alone has changed keeps data.codec.path."""
    other = shutil.copytree(folder, tmp_path / "other")
    described = json.loads((other / "latents.json").read_text())
    (other / "latents.json").write_text(json.dumps(described | {"mean": [0.5, 0.5]}))
    kept = Codec(folder)
    module(folder, path=str(shutil.copytree(folder, tmp_path / "moved")), images=None).check()
    made = data_module(path=str(other), codec=kept, images=None, image_size=4, channels=2)
    with pytest.raises(ConfigError, match=r"data.path=.*other has other latents than .* begin a new run"):
        made.check()


def test_latents_come_from_remote_storage(folder, tmp_path):
    made = module(folder, path=f"file://{folder}", images=None, cache=str(tmp_path / "cache"))
    made.codec = Codec(f"file://{folder}")
    near = module(folder).keyed_train()[1, 2]["image"]
    assert torch.equal(made.keyed_train()[1, 2]["image"], near)
    made.codec.copy(tmp_path / "kept")
    moved = Codec("nowhere")
    moved.use(tmp_path / "kept")
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(moved.decode(x), Codec(folder).decode(x))
