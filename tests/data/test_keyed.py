import time
import tracemalloc
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_gen.augment import AugMix, AutoAugment, Policy, RandAugment, TrivialAugmentWide, shipped_policies
from lit_gen.data import ImageDataModule, KeyedBatches, KeyedDataset, digits
from lit_gen.data import module as modules
from lit_gen.data.images import TensorImages
from lit_gen.data.transforms import Compose, Flip, RandomCrop
from lit_gen.errors import ConfigError
from lit_gen.rng import Permutation, keyed_generator


def take(batches, n):
    return list(islice(iter(batches), n))


def test_every_epoch_shows_every_image_once():
    stream = [k for batch in take(KeyedBatches(10, 4), 5) for k in batch]
    assert [e for e, _ in stream] == [0] * 10 + [1] * 10
    first, second = [i for e, i in stream if e == 0], [i for e, i in stream if e == 1]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_a_later_start_reads_on():
    assert take(KeyedBatches(10, 4, seed=3, start=7), 6) == take(KeyedBatches(10, 4, seed=3), 13)[7:]


def test_iterating_twice_gives_the_same():
    batches = KeyedBatches(10, 4)
    assert take(batches, 3) == take(batches, 3)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(world_size):
    whole = take(KeyedBatches(11, 8, seed=1), 9)
    parts = [take(KeyedBatches(11, 8, seed=1, rank=r, world_size=world_size), 9) for r in range(world_size)]
    assert [[k for part in together for k in part] for together in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (3, 3), (9000, 7), (20_000, 128)])
def test_an_epoch_is_the_keyed_permutation(size, batch_size):
    """However many batches are computed at once."""
    count = 3 * size // batch_size
    stream = [k for batch in take(KeyedBatches(size, batch_size, seed=2), count) for k in batch]
    orders = [Permutation(size, 2, "order", epoch)(np.arange(size)) for epoch in range(3)]
    assert stream == [(p // size, orders[p // size][p % size]) for p in range(count * batch_size)]


def test_a_billion_images_begin_at_once():
    begin = time.process_time()
    batches = KeyedBatches(10**9, 256, seed=1, start=10**7)
    tracemalloc.start()
    keys = take(batches, 1)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {epoch for epoch, _ in keys} == {2} and len({i for _, i in keys}) == 256
    assert time.process_time() - begin < 1  # CPU seconds; benchmarks/loading.py measures a hundredth of it
    assert peak < 10e6


class Seen(ImageDataModule):
    """Data of a run that has trained on `batches`."""

    def __init__(self, images, batches=0, **options):
        super().__init__(images, images, batch_size=4, seed=3, pin_memory=False, **options)
        self.trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            global_rank=0,
            world_size=1,
            lightning_module=SimpleNamespace(batches_seen=batches),
        )

    def indices(self, n):
        return [batch["index"].tolist() for batch in islice(iter(self.train_dataloader()), n)]


def test_a_run_is_resumed_in_its_order():
    images = TensorImages(torch.zeros(10, 1, 2, 2, dtype=torch.uint8))
    whole = Seen(images)
    first = whole.indices(6)
    resumed = Seen(images, 2)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.indices(4) == first[2:]


def test_a_run_of_before_the_permutation_keeps_its_order():
    """A checkpoint that names no order goes on with `torch.randperm`, and so do the checkpoints after it."""
    images = TensorImages(torch.zeros(10, 1, 2, 2, dtype=torch.uint8))
    epochs = [torch.randperm(10, generator=keyed_generator(3, "order", e)).tolist() for e in range(3)]
    old = [i for epoch in epochs for i in epoch]
    resumed = Seen(images, 2)
    assert resumed.indices(4) == [old[p : p + 4] for p in range(8, 24, 4)]
    again = Seen(images, 3)
    again.load_state_dict(resumed.state_dict())
    assert again.indices(1) == [old[12:16]]


def test_another_order_than_the_runs_is_refused():
    images = TensorImages(torch.zeros(10, 1, 2, 2, dtype=torch.uint8))
    resumed = Seen(images, 2)
    resumed.load_state_dict({"order": "windows of 8 shards"})
    with pytest.raises(ConfigError, match=r"'windows of 8 shards'.*'permuted'"):
        resumed.train_dataloader()


def test_seeds_differ():
    assert take(KeyedBatches(100, 10, seed=0), 1) != take(KeyedBatches(100, 10, seed=1), 1)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "says"), [(11, 1, "10 images"), (0, 1, "between 1"), (9, 2, "multiple of 2")]
)
def test_what_does_not_fit_is_refused(batch_size, world_size, says):
    with pytest.raises(ConfigError, match=says):
        KeyedBatches(10, batch_size, world_size=world_size)


def test_augmentation_depends_on_epoch_and_index_alone():
    def shift(image, generator):
        return image + torch.randint(0, 100, (), generator=generator).to(torch.uint8)

    data = KeyedDataset(digits("train"), shift, seed=5)
    together = data.__getitems__([(0, 3), (1, 3), (0, 4)])["image"]
    assert torch.equal(together[0], data[(0, 3)]["image"][0])
    assert torch.equal(together[1], data[(1, 3)]["image"][0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], KeyedDataset(digits("train"), shift, seed=6)[(0, 3)]["image"][0])


def test_conditions_of_a_transform_reach_the_batch():
    data = KeyedDataset(digits("train"), lambda image, g: (image, torch.full((2,), 0.5)))
    assert data.__getitems__([(0, 0), (0, 1)])["augment_label"].tolist() == [[0.5, 0.5]] * 2


@pytest.mark.parametrize(
    "augment",
    [
        *map(AutoAugment, shipped_policies()),
        AutoAugment(RandAugment()),
        AutoAugment(TrivialAugmentWide()),
        AutoAugment(AugMix()),
        AutoAugment(Policy([[["SamplePairing", 0.8, 7], ["Rotate", 0.8, 5]]], "classification")),
        Flip(),
        Compose([Flip(), RandomCrop(20), AutoAugment("classification_cifar10")]),
    ],
    ids=lambda a: getattr(getattr(a, "policy", a), "name", type(getattr(a, "policy", a)).__name__),
)
def test_a_batch_is_augmented_as_its_images_are(augment):
    """Bit for bit what the transform gives image by image with each image's own keyed generator."""
    g = keyed_generator(0, "images")
    data = TensorImages(torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8, generator=g))
    keys = [(epoch, i) for epoch in (0, 1) for i in range(40)]
    together = KeyedDataset(data, augment, seed=3).__getitems__(keys)["image"]
    for (epoch, i), image in zip(keys, together, strict=True):
        generator = keyed_generator(3, "augment", epoch, i)
        if getattr(augment, "needs_partner", False):
            j = int(torch.randint(40, (), generator=keyed_generator(3, "partner", epoch, i)))
            alone = augment.augment(data.images[i], generator, data.images[j])
        else:
            alone = augment(data.images[i], generator)
        assert torch.equal(image, alone), (epoch, i)
    assert len({tuple(x.flatten().tolist()) for x in together}) > 40  # it does something


@pytest.mark.parametrize(
    ("device", "transform", "cores", "slurm", "expected"),
    [
        ("cuda", None, 32, None, 0),  # rows of an array
        ("cuda", Flip(), 32, None, 8),
        ("cuda", Flip(), 8, None, 3),  # 4 for each of two devices, one of them the training's
        ("cuda", Flip(), 2, None, 1),
        ("cuda", Flip(), 6, "6", 5),  # a task's own cores: srun has divided them
        ("cpu", Flip(), 32, None, 0),
    ],
)
def test_workers_by_themselves(monkeypatch, device, transform, cores, slurm, expected):
    monkeypatch.setattr(modules.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if slurm:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    images = TensorImages(torch.zeros(8, 1, 2, 2, dtype=torch.uint8))
    data = ImageDataModule(images, images, batch_size=4, augment=transform, pin_memory=False)
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)),
        num_devices=2,
        global_rank=0,
        world_size=2,
        lightning_module=None,
    )
    loader = data.train_dataloader()
    assert (loader.num_workers, loader.persistent_workers) == (expected, expected > 0)
    assert data.val_dataloader().num_workers == 0
