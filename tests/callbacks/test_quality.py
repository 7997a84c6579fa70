import json
from types import SimpleNamespace

import pytest
import torch

from lit_gen import runs
from lit_gen.callbacks import EMA, SampleQuality, evaluating, quality
from lit_gen.callbacks.validation import TestBatches
from lit_gen.data import ImageDataModule, digits
from lit_gen.errors import ConfigError
from lit_gen.metrics import digits64, frechet_distance, moments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quality")


@pytest.fixture
def trained(fit, folder):
    return fit(folder / str(len(list(folder.iterdir()))), "trainer.max_steps=10")


def test_logged_distances_are_those_of_the_ema_samples(trained):
    trainer, module = trained.trainer, trained.module
    with evaluating(trainer):
        samples = module.sample(range(64), seed=1)
    features = digits64()
    reference = moments(features(digits("test").images))
    expected = frechet_distance(reference, moments(features(samples)))
    assert module.results.summary["fd"] == pytest.approx(expected, rel=1e-5)
    name = features.id.key("fd", 32)
    logged = runs.history(trainer.default_root_dir)[name][10]
    assert logged == pytest.approx(frechet_distance(reference, moments(features(samples[:32]))), rel=1e-5)
    training = moments(features(digits("train").images))
    floor = frechet_distance(reference, training)
    assert module.results.summary["fd_train_test"] == pytest.approx(floor, rel=1e-9)
    to_training = frechet_distance(training, moments(features(samples)))
    assert module.results.summary["fd_train"] == pytest.approx(to_training, rel=1e-5)
    assert module.results.summary["fd_name"] == features.id.key("fd", 64)


def test_the_best_checkpoint_is_the_one_with_the_smallest_distance(fit, tmp_path):
    experiment = fit(tmp_path, "callbacks.quality.every=5", "callbacks.checkpoint.every=1000")
    name = digits64().id.key("fd", 32)
    logged = runs.history(tmp_path)[name]
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert sorted(logged) == [5, 10, 15, 20]
    assert best["batches_seen"] == min(logged, key=logged.get)
    assert experiment.module.batches_seen == 20


def test_the_pace_of_sampling_is_known_where_the_end_draws_nothing_new(fit, tmp_path):
    experiment = fit(tmp_path, "callbacks.quality.final_images=32")  # those of the evaluation at batch 20
    assert experiment.module.results.summary["samples"] == 32
    assert experiment.module.results.summary["samples_per_second"] > 0


def test_a_distance_needs_two_samples():
    with pytest.raises(ConfigError, match="at least 2"):
        SampleQuality(digits64(), num_images=1)


def test_callbacks_that_average_come_first(trained):
    order = [type(c).__name__ for c in trained.trainer.callbacks]
    assert order.index("EMA") < order.index("SampleQuality") < order.index("Checkpoint")
    assert sum(isinstance(c, EMA) for c in trained.trainer.callbacks) == 1
    json.dumps(trained.module.results.summary)


RUNNING = [
    "+sampler@callbacks.quality.sampler=euler",
    "callbacks.quality.sampler.num_steps=4",
    "+sampler@callbacks.grid.sampler=euler",
    "callbacks.grid.sampler.num_steps=4",
]


def test_a_run_is_followed_by_one_sampler_and_measured_at_the_end_by_its_own(fit, tmp_path):
    """Both at the same step: neither takes the other's samples, nor its name, nor the choice of the best."""
    experiment = fit(tmp_path, *RUNNING, "callbacks.quality.every=5", "callbacks.quality.final_images=32")
    trainer, module = experiment.trainer, experiment.module
    quality = next(c for c in trainer.callbacks if isinstance(c, SampleQuality))
    own = digits64().id.key("fd", 32)
    history = runs.history(tmp_path)
    assert sorted(history[own]) == [20]
    assert sorted(history[own + "_euler4steps"]) == [5, 10, 15, 20]
    reference = moments(digits64()(digits("test").images))
    with evaluating(trainer):
        for name, sampler in ((own, None), (own + "_euler4steps", quality.sampler)):
            samples = module.sample(range(32), 1, sampler)
            expected = frechet_distance(reference, moments(digits64()(samples)))
            assert history[name][20] == pytest.approx(expected, rel=1e-5), name
    assert history[own][20] != pytest.approx(history[own + "_euler4steps"][20], rel=1e-3)
    assert module.results.scores["fd"] == (20, pytest.approx(history[own + "_euler4steps"][20]))
    summary = module.results.summary
    assert (summary["fd"], summary["fd_name"]) == (pytest.approx(history[own][20]), own)
    assert module.results.summary["fd_sampler"].startswith("heun (")
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    running = history[own + "_euler4steps"]
    assert best["batches_seen"] == min(running, key=running.get)


def test_the_best_of_another_sampler_is_forgotten(fit, tmp_path, recwarn):
    fit(tmp_path, "trainer.max_steps=10")
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["callbacks"]["Checkpoint"]["best_step"] == 10
    longer = "callbacks.quality.every=100"
    same = fit(tmp_path / "same", longer, checkpoint=last).trainer.checkpoint_callback
    assert same.best_step == 10 and not [w for w in recwarn if "chosen anew" in str(w.message)]
    with pytest.warns(UserWarning, match="chosen anew: the run measured fd_digits64_0184e91c_n32 until now"):
        other = fit(tmp_path / "other", longer, *RUNNING, checkpoint=last).trainer.checkpoint_callback
    assert other.best is None


def test_a_sampler_that_does_not_fit_is_refused_before_the_training(fit, tmp_path):
    options = [
        "+sampler@callbacks.grid.sampler=euler",
        "sampler/grid@callbacks.grid.sampler.grid=uniform_steps",
    ]
    with pytest.raises(ConfigError, match="uniform_steps needs a DiscreteVP"):
        fit(tmp_path, "~callbacks.quality", *options)


def test_a_measure_that_cannot_be_made_is_refused_before_the_training(fit, tmp_path):
    for measure, words in (
        ("ct", "more than 60 images in each set, there are 32"),
        ("fdinf", "256 generated images, there are 32"),
        ("cmmd", "CLIP's features"),
    ):
        with pytest.raises(ConfigError, match=f"{measure} needs {words}"):
            fit(tmp_path / measure, f"callbacks.quality.measures=[fd,{measure}]", "trainer.max_steps=1")
        assert not list(tmp_path.rglob("*.ckpt"))


def test_reference_images_go_to_the_device_that_trains(monkeypatch):
    monkeypatch.setattr(quality, "reference_summary", lambda batches, *_, **__: list(batches()))
    data = ImageDataModule(digits("train"), digits("test"), num_workers=1)
    for device in ("meta", "cpu"):
        trainer = SimpleNamespace(
            datamodule=data, strategy=SimpleNamespace(root_device=torch.device(device)), callbacks=[]
        )
        parts = SampleQuality(digits64(), batch_size=100).summary_of(trainer, "test")
        assert {images.device.type for _, images, _ in parts} == {device}
        assert [i for rows, _, _ in parts for i in rows] == list(range(360))
    rows = zip(*((images, labels) for _, images, labels in parts), strict=True)
    images, labels = map(torch.cat, rows)
    assert torch.equal(images, digits("test").images) and torch.equal(labels, digits("test").labels)


def test_validation_leaves_the_numbers_of_the_images_on_the_cpu():
    """A module keys its noise by them: from the device they would have to be waited for."""
    module = SimpleNamespace(
        device=torch.device("meta"),
        transfer_batch_to_device=lambda batch, device, _: {name: x.to(device) for name, x in batch.items()},
    )
    trainer = SimpleNamespace(datamodule=ImageDataModule(digits("train"), digits("test")), callbacks=[])
    for batch in TestBatches()(trainer, module):
        assert batch["image"].device.type == batch["label"].device.type == "meta"
        assert batch["index"].device.type == "cpu"


def test_validation_keeps_its_loader_and_its_workers(fit, tmp_path):
    experiment = fit(tmp_path, "trainer.max_steps=1", "data.num_workers=1", "callbacks.validation.every=1")
    batches = TestBatches()
    indices, workers = [], []
    for _ in range(2):
        indices.append(torch.cat([b["index"] for b in batches(experiment.trainer, experiment.module)]))
        workers.append([w.pid for w in batches._loader._iterator._workers])
    assert torch.equal(*indices) and len(indices[0]) == 360
    assert workers[0] == workers[1] and len(workers[0]) == 1
