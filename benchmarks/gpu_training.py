"""The last section of `gpu.py`: a training on real images by the framework's own path, with its FD curve."""

import logging
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from gpu_sections import Emit, Setting
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gen.augment.conditional import ConditionalAugment
from lit_gen.callbacks import EMA
from lit_gen.callbacks.ema import HalfLife, evaluating
from lit_gen.data import ImageDataModule, digits
from lit_gen.data.folders import ImageFiles
from lit_gen.data.images import batches
from lit_gen.metrics import Extractor, ExtractorId, FeatureStatistics, Moments, digits64, frechet_distance
from lit_gen.metrics.inception import WEIGHTS, inception2015
from lit_gen.schedules import warmup, warmup_cosine
from lit_gen.score.losses import edm_loss, sum_of_pixels
from lit_gen.score.module import ScoreModule
from lit_gen.score.networks.ncsnpp import NCSNpp
from lit_gen.score.precondition import EDMPrecondition
from lit_gen.score.samplers import heun
from lit_gen.score.sde import EDM

POINTS = 8  # of the curve
"""The distance is measured this often; the clock of the training stands still meanwhile."""


def train(setting: Setting, deadline: float, emit: Emit) -> None:
    """Until the deadline, in the precision that `trainer=auto` takes on the device."""
    if time.monotonic() > deadline:
        emit("left out, the time was over.")
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(0)
    sets = cifar10(setting.data)
    make = small if sets is None else edm
    data, module, extractor, average, images = make(sets, setting)
    known = "CIFAR-10" if sets else "scikit-learn's digits, 8x8: no CIFAR-10 in --data or $LITGEN_DATA"
    emit(f"real images: {known}; features: {extractor.id.name}")
    curve = Curve(extractor, images, deadline, emit)
    trainer = pl.Trainer(
        accelerator="gpu" if setting.cuda else "cpu",
        devices=[setting.device.index or 0] if setting.cuda else 1,
        precision="bf16-mixed" if setting.cuda else "32-true",
        max_epochs=-1,
        max_steps=4 if setting.tiny else -1,
        callbacks=[average, curve],
        logger=False,
        benchmark=True,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)


def cifar10(folder: Path | None) -> dict[str, Any] | None:
    """Training and test images from EDM's zips or torchvision's folder; None where there are none."""
    if folder is None:
        return None
    zips = {split: folder / f"cifar10-{split}.zip" for split in ("train", "test")}
    if all(path.is_file() for path in zips.values()):
        return {split: ImageFiles(path, image_size=32) for split, path in zips.items()}
    if (folder / "cifar-10-batches-py").is_dir():
        from torchvision.datasets import CIFAR10

        return {split: CIFAR10(folder, train=split == "train") for split in ("train", "test")}
    return None


def edm(sets: dict[str, Any], setting: Setting) -> tuple[Any, ...]:
    """conf/experiment/cifar10_edm_vp at half its batch, with a shorter warm-up."""
    batch, small = 8 if setting.tiny else 256, {"base_channels": 8, "num_blocks": 1}
    options = {"channel_mult": (2, 2, 2), "dropout": 0.13, "augment_dim": 9} | (small if setting.tiny else {})
    net = NCSNpp(32, **options)
    module = ScoreModule(
        net, EDM(), EDMPrecondition(), edm_loss(reduction=sum_of_pixels),
        partial(torch.optim.Adam, lr=1e-3, fused=True), partial(heun, num_steps=18), (3, 32, 32),
        lr_schedule=partial(warmup, steps=500), augment=ConditionalAugment(p=0.12), compile="auto",
    )  # fmt: skip
    data = ImageDataModule(sets["train"], sets["test"], batch, num_workers=0 if setting.tiny else 4)
    return data, module, inception_or_pixels(), EMA(HalfLife(500_000, batch)), 8 if setting.tiny else 5000


def small(_: None, setting: Setting) -> tuple[Any, ...]:
    """conf/experiment/digits, for as long as there is time."""
    net = NCSNpp(
        8, 1, base_channels=24, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(), dropout=0.0,
        num_classes=10,
    )  # fmt: skip
    module = ScoreModule(
        net, EDM(), EDMPrecondition(0.7), edm_loss(-1.0, 1.2, 0.7),
        partial(torch.optim.Adam, lr=8e-3, betas=(0.9, 0.99), fused=True), partial(heun, num_steps=18),
        (1, 8, 8), lr_schedule=partial(warmup_cosine, steps=100, total=20_000), num_classes=10,
        compile=False if setting.tiny else "auto",
    )  # fmt: skip
    data = ImageDataModule(partial(digits, "train"), partial(digits, "test"), 32 if setting.tiny else 128)
    return data, module, digits64(), EMA(0.999), 8 if setting.tiny else 1437


class Curve(pl.Callback):
    """Emits the Frechet distance of `num` samples to the test images `POINTS` times, then ends the fit."""

    def __init__(self, extractor: Extractor, num: int, deadline: float, emit: Emit):
        self.extractor, self.num, self.deadline, self.emit = extractor, num, deadline, emit
        self.trained = 0.0  # seconds, measurements left out

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        test, training = (self._of(trainer.datamodule.dataset(s), pl_module) for s in ("test", "train"))
        self.test, self.floor = test, frechet_distance(test, training)
        self.emit(f"floor, the distance of the training images to the test images: {self.floor:.4g}")
        self.since = time.monotonic()
        self.pause = max(0.0, self.deadline - self.since) / POINTS
        self.next = self.since + self.pause

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        now, over = time.monotonic(), trainer.global_step == trainer.max_steps
        if now < self.next and not over:
            return
        self.trained += now - self.since
        images = pl_module.batches_seen * trainer.datamodule.batch_size
        row = {"batches": pl_module.batches_seen, "training s": self.trained}
        row["images/s"] = images / self.trained
        with evaluating(trainer) as module:
            parts = (range(i, min(i + 256, self.num)) for i in range(0, self.num, 256))
            drawn = self._moments((module.sample(part) for part in parts), module.device)
        self.emit(row | {self.extractor.id.key("fd", self.num): frechet_distance(self.test, drawn)})
        self.since = time.monotonic()
        # Where measuring takes long, the training gets at least as much time.
        self.next = self.since + max(self.pause, self.since - now)
        trainer.should_stop = over or self.since >= self.deadline

    def _of(self, dataset: Any, module: pl.LightningModule) -> Moments:
        parts = [range(i, min(i + 256, len(dataset))) for i in range(0, len(dataset), 256)]
        return self._moments((images for _, images, _ in batches(dataset, parts)), module.device)

    def _moments(self, parts: Any, device: torch.device) -> Moments:
        statistics = FeatureStatistics(self.extractor.id.d).to(device)
        for images in parts:
            statistics.update(self.extractor(images.to(device)))
        return statistics.compute()


def inception_or_pixels() -> Extractor:
    """Inception where $LITGEN_WEIGHTS has its weights; nothing is downloaded."""
    folder = Path(os.environ.get("LITGEN_WEIGHTS", "."))
    for name in WEIGHTS.files:
        if (folder / name).is_file():
            return inception2015(folder / name)
    return Extractor(ExtractorId("pixels-of-8x8", "1", "0" * 64, "mean", "input", 192), Pixels(), channels=3)


class Pixels(nn.Module):
    """Images averaged to 8x8 as their own features, without a network: comparable within one table alone."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.adaptive_avg_pool2d(x / 127.5 - 1, 8).flatten(1), None
