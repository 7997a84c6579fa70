"""Fixtures of all tests. torch is imported where it is used: the process that hands tests out needs none."""

import copy
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from uuid import uuid4

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

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


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """And the first backward pass of the process, which starts threads for the devices that are known by
    then, after which its forks (see `on_ranks`) cannot train: it comes before torch.compile, torch.export,
    and tests/devices, which all tell torch of a CUDA device that is not there."""
    import torch

    torch.set_num_threads(1)
    torch.zeros((), requires_grad=True).backward()


@pytest.fixture(scope="session", autouse=True)
def parsed_once() -> None:
    """Hydra parses each file of conf/ once for all tests: a composition then takes two thirds of its time."""
    from hydra._internal.core_plugins.file_config_source import FileConfigSource

    from lit_gen.cli import CONF_DIR

    load, kept = FileConfigSource.load_config, {}

    def load_config(self, config_path: str):
        if self.path != str(CONF_DIR):
            return load(self, config_path)
        if (key := (self.provider, config_path)) not in kept:
            kept[key] = load(self, config_path)
        return copy.deepcopy(kept[key])

    FileConfigSource.load_config = load_config


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of recorded numbers: $LITGEN_GOLDENS, or tests/goldens."""
    return goldens_folder()


def goldens_folder() -> Path:
    return Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parent / "goldens")


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    return list(TINY)


@pytest.fixture(scope="session")
def compose() -> Callable:
    """`compose(*overrides) -> cfg` of the entry point `train` (or `config_name=`), as on its command line."""
    from omegaconf import OmegaConf

    from lit_gen.cli import _run_out
    from lit_gen.config import schema

    schema.register()
    OmegaConf.register_new_resolver("run_out", _run_out, replace=True)

    def make(*overrides: str, config_name: str = "train"):
        return copy.deepcopy(_composed(config_name, overrides))

    return make


@cache
def _composed(config_name: str, overrides: tuple[str, ...]):
    import hydra

    from lit_gen.cli import CONF_DIR

    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose(config_name, list(overrides))


@pytest.fixture(scope="session")
def fit(compose, tiny) -> Callable:
    """`fit(folder, *overrides) -> Experiment`: trains the tiny experiment here, with the CSV logger alone."""
    from omegaconf import OmegaConf

    from lit_gen.commands import train as training
    from lit_gen.config.experiment import build

    def run(folder: Path, *overrides: str, checkpoint: Path | None = None, callbacks=()):
        folder.mkdir(parents=True, exist_ok=True)
        cfg = compose(
            *(() if any(o.startswith("logger=") for o in overrides) else ("logger=csv",)),
            "trainer=cpu",
            *tiny,
            *overrides,
        )
        OmegaConf.update(cfg, "logger.csv.save_dir", str(folder))
        training._quiet()
        experiment = build(cfg, folder)
        experiment.trainer.callbacks[1:1] = callbacks
        experiment.trainer.fit(
            experiment.module, datamodule=experiment.data, ckpt_path=checkpoint, weights_only=True
        )
        return experiment

    return run


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """`command(main, *arguments) -> (exit code, stdout, stderr)`, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__module__, *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return run


def _rank(body: Callable, args: tuple, rank: int, world: int, folder, store: str) -> None:
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    try:
        store, timeout = f"file://{folder}/{store}", timedelta(seconds=1800)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
        dist.barrier()  # a rank that is done at once would leave while others are still connecting
        answer = body(*args)
        dist.destroy_process_group()
    except BaseException:
        answer = traceback.format_exc()
    torch.save(answer, folder / f"answer{rank}.pt")


@pytest.fixture
def on_ranks(tmp_path):
    """`on_ranks(world, body, *args)`: the answers of `body(*args)` of every rank of a gloo group.

    The ranks are forks, which spares them the imports.
    """

    def run(world: int, body: Callable, *args) -> list:
        import torch

        fork, store = multiprocessing.get_context("fork"), f"store-{uuid4().hex}"
        processes = [
            fork.Process(target=_rank, args=(body, args, r, world, tmp_path, store)) for r in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(1800)
        for process in processes:
            process.kill()
        answers = [torch.load(tmp_path / f"answer{r}.pt", weights_only=False) for r in range(world)]
        failures = [answer for answer in answers if isinstance(answer, str)]
        assert not failures, "\n".join(failures)
        return answers

    return run
