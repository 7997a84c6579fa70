"""A small FUNIT training for tests."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, IterableDataset

from lit_gen.funit.module import FUNITModule
from lit_gen.funit.networks import FewShotGenerator, PatchDiscriminator

BATCH, CLASSES = 4, 3


def batch(step: int, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
    """Random images that depend on the step alone; this rank's part of them."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(2, BATCH, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
    labels = torch.randint(CLASSES, (2, BATCH), generator=generator)
    whole = {"content": images[0], "content_label": labels[0], "classes": images[1], "class_label": labels[1]}
    return {name: value.chunk(world_size)[rank] for name, value in whole.items()}


class Batches(IterableDataset):
    def __init__(self, start: int, rank: int, world_size: int):
        self.start, self.rank, self.world_size = start, rank, world_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        step = self.start
        while True:
            yield batch(step, self.rank, self.world_size)
            step += 1


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        start = trainer.lightning_module.batches_seen
        return DataLoader(Batches(start, trainer.global_rank, trainer.world_size), batch_size=None)


class Recorder(Logger):
    """Keeps what was logged: {name: {step: value}}."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.history: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.history.setdefault(name, {})[step] = value

    def log_hyperparams(self, params: Any) -> None:
        return


def module(
    optimizer: Any = None, kind: type[FewShotGenerator] = FewShotGenerator, **options: Any
) -> FUNITModule:
    torch.manual_seed(0)
    generator = kind(width=3, code_size=4, content_downs=2, class_downs=2, mlp_width=5)
    discriminator = PatchDiscriminator(CLASSES, width=3, num_res_blocks=4)
    optimizer = optimizer or partial(torch.optim.RMSprop, lr=1e-3, weight_decay=1e-4)
    return FUNITModule(generator.double(), discriminator.double(), optimizer, **options)


def fit(
    training: FUNITModule, steps: int, resume: str | None = None, callbacks: Any = (), **options: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "devices": 1, "logger": False} | options,
        max_steps=steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(training, datamodule=Data(), ckpt_path=resume, weights_only=True)
    return trainer
