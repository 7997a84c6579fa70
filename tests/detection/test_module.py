"""The small detector: mAP by hand, a training through the entry point's pieces, and a net that memorises."""

import sys

import pytest
import torch

from lit_gen import models
from lit_gen.commands import train as training
from lit_gen.config.experiment import build
from lit_gen.data.scenes import Scenes
from lit_gen.detection.networks import small_fcos
from lit_gen.errors import ConfigError
from lit_gen.images import to_float
from lit_gen.metrics.detection import mean_average_precision, precision_scores
from lit_gen.search.detector import boxed, detection_scores, train_detector

A, B = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]


def scores(found, truth):
    metric = mean_average_precision()
    boxes, confidence, labels = found
    metric.update(
        [{"boxes": torch.tensor(boxes), "scores": torch.tensor(confidence), "labels": torch.tensor(labels)}],
        [{"boxes": torch.tensor(truth), "labels": torch.zeros(len(truth), dtype=torch.int64)}],
    )
    return precision_scores(metric)


def test_precision_by_hand():
    """Interpolated at 101 recalls: both found 1; one of two found, precision 1 up to recall .5, 51/101; a
    false one ranked first halves that; an IoU of .81 counts for 7 of the 10 thresholds."""
    assert scores(([A, B], [0.9, 0.8], [0, 0]), [A, B])["map"] == pytest.approx(1)
    assert scores(([A], [0.9], [0]), [A, B])["map50"] == pytest.approx(51 / 101)
    assert scores(([[60.0, 60, 70, 70], A], [0.9, 0.8], [0, 0]), [A, B])["map50"] == pytest.approx(51 / 202)
    close = scores(([[0.0, 0, 9, 9]], [0.9], [0]), [A])
    assert (close["map"], close["map50"], close["map75"]) == pytest.approx((0.7, 1.0, 1.0))


def test_a_missing_pycocotools_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigError, match=r"lit-gen\[detection\]"):
        mean_average_precision()


def test_a_detector_memorises_its_images():
    """The digits of two scenes, found where they are and by name."""
    data = boxed(Scenes("train", 2), range(2))
    net = train_detector(data, None, classes=10, steps=120, batch_size=2, learning_rate=4e-3)
    assert detection_scores(net, data)["map50"] > 0.95


def test_boxes_come_back_in_the_pixels_of_the_image():
    """An image of twice the network's size is halved for it; its boxes are those of the half, doubled."""
    torch.manual_seed(0)
    net = small_fcos(3, 64).eval()
    net.score_thresh = 0.0
    half = torch.rand(3, 64, 64) * 2 - 1
    double = half.repeat_interleave(2, 1).repeat_interleave(2, 2)  # bilinear halving gives `half` back
    with torch.no_grad():
        (a,), (b,) = net([half]), net([double])
    torch.testing.assert_close(a["scores"], b["scores"])
    torch.testing.assert_close(2 * a["boxes"], b["boxes"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"), [({"width": 24}, "width=24"), ({"levels": 0}, "levels=0"), ({"size": 16}, "=16")]
)
def test_sizes_that_do_not_fit_are_named(settings, message):
    size = settings.pop("size", 64)
    with pytest.raises(ConfigError, match=message):
        small_fcos(3, size, **settings)


def test_experiments_compose_and_train(compose, tmp_path):
    """With a policy, through build: measures, keeps the best checkpoint, and that finds what the module
    with its averaged weights finds."""
    short = ["trainer=cpu", "trainer.max_steps=3", "data.batch_size=4", "log_every=1", "augment=detection_v1"]
    short += ["data.train.size=8", "data.test.size=4", "callbacks.quality.every=2", "~callbacks.progress"]
    short += ["logger=csv", f"logger.csv.save_dir={tmp_path}"]
    training._quiet()
    experiment = build(compose("experiment=detector_scenes", *short), tmp_path)
    module, trainer = experiment.module, experiment.trainer
    trainer.fit(module, datamodule=experiment.data)
    assert module.batches_seen == 3 and set(module.results.summary) == {"map", "map50", "map75"}
    assert module.results.logged["train/loss"] == pytest.approx(
        sum(
            module.results.logged[f"train/{p}"] for p in ("classification", "bbox_regression", "bbox_ctrness")
        )
    )
    assert {p.name for p in (tmp_path / "grids").iterdir()} == {f"detections_000000{i}.png" for i in (2, 3)}
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()
    loaded, _, _ = models.load(tmp_path / "checkpoints" / "last.ckpt", device="cpu")
    images = [to_float(experiment.data.test[i]["image"]) for i in range(2)]
    ema = next(c for c in trainer.callbacks if type(c).__name__ == "EMA")
    with ema.applied(module.net):
        expected = module.detect(images)
    for a, b in zip(expected, loaded.detect(images), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert compose("experiment=detector_bccd").model.net.levels == 3


def test_images_without_boxes_teach_the_background():
    net = small_fcos(2, 64)
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = net([torch.zeros(3, 64, 64)], [none])
    assert losses["bbox_regression"] == 0 and losses["classification"] > 0
    assert all(torch.isfinite(v) for v in losses.values())
