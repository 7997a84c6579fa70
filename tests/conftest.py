import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import pytest
import torch

torch.set_num_threads(1)

TINY = [
    "model.net.base_channels=8",
    "model.net.channel_mult=[1,1]",
    "model.net.num_blocks=1",
    "model.net.attention_resolutions=[]",
    "model.net.dropout=0.1",
    "sampler.num_steps=3",
    "data.batch_size=128",
    "log_every=1",
    "trainer.max_steps=20",
    "callbacks.validation.every=10",
    "callbacks.quality.every=10",
    "callbacks.quality.num_images=32",
    "callbacks.quality.final_images=64",
    "callbacks.grid.every=10",
    "callbacks.grid.num=4",
    "callbacks.grid.trajectories=2",
    "callbacks.checkpoint.every=5",
]
"""The digits experiment, small enough for a test: 20 steps in a second or two."""


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of recorded numbers: $LITGEN_GOLDENS, or tests/goldens."""
    return goldens_folder()


def goldens_folder() -> Path:
    return Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parent / "goldens")


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    return list(TINY)


@pytest.fixture
def compose() -> Callable:
    """`compose(*overrides) -> cfg` of the entry point `train` (or `config_name=`), as on its command line."""
    import hydra
    from omegaconf import OmegaConf

    from lit_gen import schema
    from lit_gen.cli import CONF_DIR

    schema.register()
    OmegaConf.register_new_resolver("run_out", str, replace=True)

    def make(*overrides: str, config_name: str = "train"):
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return hydra.compose(config_name, list(overrides))

    return make


@pytest.fixture
def fit(compose, tiny) -> Callable:
    """`fit(folder, *overrides) -> Experiment`: trains the tiny experiment here, with the CSV logger alone."""
    from lit_gen import runs, training

    def run(folder: Path, *overrides: str, checkpoint: Path | None = None, callbacks=()):
        folder.mkdir(parents=True, exist_ok=True)
        cfg = compose(
            *(() if any(o.startswith("logger=") for o in overrides) else ("logger=csv",)),
            f"logger.csv.save_dir={folder}",
            "trainer=cpu",
            *tiny,
            *overrides,
        )
        training._quiet()
        experiment = runs.build(cfg, folder)
        experiment.trainer.callbacks[1:1] = callbacks
        experiment.trainer.fit(
            experiment.module, datamodule=experiment.data, ckpt_path=checkpoint, weights_only=True
        )
        return experiment

    return run
