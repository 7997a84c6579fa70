"""The loss on the test split, with the EMA weights."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_gen.callbacks.contracts import Data, Periodic, Validates, data_of, of
from lit_gen.callbacks.ema import evaluating
from lit_gen.callbacks.progress import working
from lit_gen.module import BaseModule

__all__ = ["TestBatches", "ValidationLoss"]


class TestBatches:
    """This rank's test images, batch by batch on its device, for callbacks that pass over them again and
    again: the loader is made once, so that its worker processes live on between two passes.
    """

    __test__ = False  # no class of tests

    def __init__(self):
        self._loader: DataLoader | None = None

    def __call__(self, trainer: Trainer, module: BaseModule) -> Iterator[dict[str, Any]]:
        """`index` stays on the CPU, where a module keys its random numbers by it without a wait."""
        data = data_of(trainer, Data)
        loader = self._loader = self._loader or data.val_dataloader()
        with working(trainer, "passing over the test images", len(loader), announce=False) as advance:
            for batch in loader:
                index = {"index": batch["index"]} if "index" in batch else {}
                moved = module.transfer_batch_to_device(batch, module.device, 0)
                yield data.on_after_batch_transfer(moved, 0) | index
                advance(1)

    def close(self) -> None:
        """Ends the workers."""
        self._loader = None


class ValidationLoss(Periodic):
    """Every `every` batches, `val/loss`: the mean over the test images of `module.validation_loss(batch) ->
    (B,)`.

    A module draws its noise from (seed, image index), so that the number is the same for any batch size and
    number of devices and its changes are the network's alone.
    """

    requires = Validates

    def __init__(self, every: int = 500):
        super().__init__(every, "callbacks.validation")
        self._batches = TestBatches()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._batches.close()

    def act(self, trainer: Trainer, module: BaseModule) -> None:
        total = torch.zeros(2, device=module.device)
        with evaluating(trainer):
            for batch in self._batches(trainer, module):
                losses = of(module, Validates).validation_loss(batch)
                total += torch.stack([losses.sum(), torch.ones_like(losses).sum()])
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total, reduce_op="sum")
        value = float(total[0] / total[1])
        module.write({"val/loss": value}, module.batches_seen)
        module.results.score("val/loss", module.batches_seen, value)
