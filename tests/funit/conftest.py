"""The glyphs experiment, small enough for a test."""

from pathlib import Path

import pytest

from lit_gen.config.experiment import build

FACES = ["DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "DejaVuSansMono", "cmss10"]
TINY = [
    "experiment=funit_glyphs",
    "trainer=cpu",
    "logger=csv",
    "trainer.max_steps=4",
    "data.batch_size=4",
    "data.num_classes=4",
    "data.target=2",
    "+data.images.characters=ABCdef",
    f"+data.images.classes=[{','.join(FACES)}]",
    "model.generator.width=4",
    "model.generator.mlp_width=8",
    "model.discriminator.width=4",
    "model.discriminator.num_res_blocks=4",
    "log_every=1",
    "callbacks.translations.every=2",
    "callbacks.translations.ks=[1,2]",
    "callbacks.translations.contents=4",
    "callbacks.translations.rows=3",
    "callbacks.translations.columns=2",
    "metrics.classifiers.steps=2",
    "metrics.classifiers.width=4",
    "callbacks.checkpoint.every=2",
]


@pytest.fixture
def tiny_glyphs() -> list[str]:
    return list(TINY)


@pytest.fixture
def fit_glyphs(compose, monkeypatch, tmp_path_factory):
    """`fit_glyphs(folder, *overrides, checkpoint=None) -> Experiment`: trains here, leaving a whole run
    folder."""
    from omegaconf import OmegaConf

    from lit_gen.commands import train as training

    monkeypatch.setenv("LITGEN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))

    def run(folder: Path, *overrides: str, checkpoint: Path | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        cfg = compose(*TINY, f"logger.csv.save_dir={folder}", *overrides)
        training._quiet()
        experiment = build(cfg, folder)
        OmegaConf.save(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), folder / "config.yaml")
        experiment.trainer.fit(
            experiment.module, datamodule=experiment.data, ckpt_path=checkpoint, weights_only=True
        )
        return experiment

    return run
