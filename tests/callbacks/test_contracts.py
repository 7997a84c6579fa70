"""What callbacks ask of modules and data, and how results reach the closing table."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest

from lit_gen.callbacks.contracts import (
    Data,
    Detects,
    HasAverage,
    HasKeyedTrain,
    ImageData,
    Periodic,
    Samples,
    SamplesTrajectories,
    Translates,
    Validates,
    base,
    data_of,
    missing,
    of,
)
from lit_gen.callbacks.detection import DetectionQuality
from lit_gen.callbacks.ema import EMA
from lit_gen.callbacks.grid import SampleGrid
from lit_gen.callbacks.quality import SampleQuality
from lit_gen.callbacks.translations import Translations
from lit_gen.callbacks.validation import ValidationLoss
from lit_gen.commands import train
from lit_gen.data import ImageDataModule
from lit_gen.data.detection_module import DetectionDataModule
from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.detection.module import DetectorModule
from lit_gen.errors import ConfigError
from lit_gen.funit.module import FUNITModule
from lit_gen.module import BaseModule, Results
from lit_gen.score.classifier import ClassifierModule
from lit_gen.score.module import ScoreModule

CALLBACKS = (EMA, SampleGrid, SampleQuality, ValidationLoss, Translations, DetectionQuality)
FITTING = {
    ScoreModule: {EMA, SampleGrid, SampleQuality, ValidationLoss},
    ClassifierModule: {EMA, ValidationLoss},
    FUNITModule: {Translations},
    DetectorModule: {EMA, DetectionQuality},
    BaseModule: set(),
}


@pytest.mark.parametrize("module", FITTING, ids=lambda m: m.__name__)
def test_a_module_fits_the_callbacks_of_its_family(module):
    assert {callback for callback in CALLBACKS if not missing(module, callback.requires)} == FITTING[module]


def test_what_is_missing_is_named():
    methods = ["check", "sample", "sample_trajectory", "sampler_name"]
    assert missing(BaseModule, SamplesTrajectories) == methods
    assert missing(BaseModule, Translates) == ["translate"]
    assert missing(BaseModule, Detects) == ["detect"]
    assert missing(BaseModule, Validates) == ["validation_loss"]
    assert missing(FUNITModule, HasAverage) == ["ema_network"]
    assert missing(ScoreModule, Samples) == []


@pytest.mark.parametrize("data", [ImageDataModule, DetectionDataModule, FewShotDataModule])
def test_data_modules_keep_their_contract(data):
    assert missing(data, Data) == ["batch_size"]  # set when one is made
    assert not missing(data, HasKeyedTrain)
    assert missing(ImageDataModule, ImageData) == ["batch_size"]


def test_data_of_another_kind_are_refused():
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ConfigError, match=r"The data, a NoneType, have no batch_size, check, .*in_order"):
        data_of(trainer, ImageData)


def test_a_callback_that_the_model_cannot_serve_is_refused(compose, tmp_path):
    from lit_gen.config.experiment import build

    other = "+callbacks.other={_target_:lit_gen.callbacks.translations.Translations}"
    cfg = compose("logger=csv", f"logger.csv.save_dir={tmp_path}", "trainer=cpu", other)
    with pytest.raises(ConfigError, match=r"callbacks\.other \(Translations\) calls translate of the model"):
        build(cfg, tmp_path)


def test_a_model_without_the_base_is_refused(compose, tmp_path):
    from lit_gen.config.experiment import build

    cfg = compose("logger=csv", f"logger.csv.save_dir={tmp_path}", "trainer=cpu")
    cfg.model = {"_target_": "lightning.pytorch.LightningModule"}
    with pytest.raises(ConfigError, match=r"model\._target_ is LightningModule: a model must derive from"):
        build(cfg, tmp_path)
    with pytest.raises(ConfigError, match="derive LightningModule from it"):
        base(pl.LightningModule())
    with pytest.raises(AssertionError):
        of(BaseModule(), Samples)


def test_a_periodic_callback_acts_on_multiples(monkeypatch):
    acted = []

    class Act(Periodic):
        def act(self, trainer, module):
            acted.append(module.batches_seen)

    module, callback = BaseModule(), Act(3, "callbacks.act")
    for step in range(1, 11):
        monkeypatch.setattr(BaseModule, "batches_seen", step)
        callback.on_train_batch_end(pl.Trainer, module, None, None, 0)
    assert acted == [3, 6, 9]
    with pytest.raises(ConfigError, match=r"callbacks\.act\.every=0: must be at least 1 batch"):
        Act(0, "callbacks.act")


def test_results_are_kept_apart():
    results, other = Results(), Results()
    results.score("fd", 10, 2.5)
    results.score("fd", 20, 1.5)
    results.record(fd=1.5, **{"k_shot/top1": 0.25})
    assert results.scores == {"fd": (20, 1.5)} and results.scores["fd"].value == 1.5
    assert results.summary == {"fd": 1.5, "k_shot/top1": 0.25}
    assert (other.scores, other.summary, other.rows, other.logged) == ({}, {}, {}, {})


def test_the_closing_table_prints_the_rows_of_the_callbacks(capsys, tmp_path):
    """And no number of the summary by itself: a metric is shown by the callback that measured it."""
    module = BaseModule()
    module.results.row("a metric of one's own", "0.125")
    summary = {"steps": 4, "train_seconds": 1.0, "images_per_second": 10.0, "fd": 77.5}
    train._table(summary, SimpleNamespace(module=module, config={"allow_targets": []}), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert any("a metric of one's own" in line and "0.125" in line for line in lines)
    assert not any("77.5" in line for line in lines)
