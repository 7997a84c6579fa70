import json

import pytest
import torch

from lit_gen import runs
from lit_gen.callbacks import EMA, SampleQuality, evaluating
from lit_gen.data import digits
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
    assert module.summary["fd"] == pytest.approx(expected, rel=1e-5)
    name = features.id.key("fd", 32)
    logged = runs.history(trainer.default_root_dir)[name][10]
    assert logged == pytest.approx(frechet_distance(reference, moments(features(samples[:32]))), rel=1e-5)
    floor = frechet_distance(reference, moments(features(digits("train").images)))
    assert module.summary["fd_floor"] == pytest.approx(floor, rel=1e-9)
    assert module.summary["fd_name"] == features.id.key("fd", 64)


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
    assert experiment.module.summary["samples"] == 32
    assert experiment.module.summary["samples_per_second"] > 0


def test_a_distance_needs_two_samples():
    with pytest.raises(ConfigError, match="at least 2"):
        SampleQuality(digits64(), num_images=1)


def test_callbacks_that_average_come_first(trained):
    order = [type(c).__name__ for c in trained.trainer.callbacks]
    assert order.index("EMA") < order.index("SampleQuality") < order.index("Checkpoint")
    assert sum(isinstance(c, EMA) for c in trained.trainer.callbacks) == 1
    json.dumps(trained.module.summary)
