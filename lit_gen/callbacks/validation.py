"""The loss on the test split, with the EMA weights."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lit_gen.callbacks.ema import evaluating
from lit_gen.callbacks.progress import working
from lit_gen.errors import ConfigError

__all__ = ["TestBatches", "ValidationLoss"]


class TestBatches:
    """This rank's test images, batch by batch on its device, for callbacks that pass over them again and
    again: the loader is made once, so that its worker processes live on between two passes.
    """

    __test__ = False  # no class of tests

    def __init__(self):
        self._loader: DataLoader | None = None

    def __call__(self, trainer: pl.Trainer, pl_module: Any) -> Iterator[dict[str, Any]]:
        """`index` stays on the CPU, where a module keys its random numbers by it without a wait."""
        data = trainer.datamodule
        if self._loader is None:
            self._loader = data.val_dataloader()
        with working(trainer, "passing over the test images", len(self._loader), announce=False) as advance:
            for batch in self._loader:
                index = {"index": batch["index"]} if "index" in batch else {}
                moved = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
                yield data.on_after_batch_transfer(moved, 0) | index
                advance(1)

    def close(self) -> None:
        """Ends the workers."""
        self._loader = None


class ValidationLoss(pl.Callback):
    """Every `every` batches, `val/loss`: the mean over the test images of `module.validation_loss(batch) ->
    (B,)`.

    A module draws its noise from (seed, image index), so that the number is the same for any batch size and
    number of devices and its changes are the network's alone.
    """

    asks = ("validation_loss",)

    def __init__(self, every: int = 500):
        if every < 1:
            raise ConfigError(f"callbacks.validation.every={every}: must be at least 1 batch.")
        self.every = every
        self._batches = TestBatches()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._batches.close()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.batches_seen % self.every == 0:
            self.measure(trainer, pl_module)

    def measure(self, trainer: pl.Trainer, pl_module: Any) -> float:
        total = torch.zeros(2, device=pl_module.device)
        with evaluating(trainer):
            for batch in self._batches(trainer, pl_module):
                losses = pl_module.validation_loss(batch)
                total += torch.stack([losses.sum(), torch.ones_like(losses).sum()])
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total, reduce_op="sum")
        value = float(total[0] / total[1])
        pl_module.write({"val/loss": value}, pl_module.batches_seen)
        pl_module.scores["val/loss"] = (pl_module.batches_seen, value)
        return value
