"""The loss on the test split, with the EMA weights."""

from typing import Any

import lightning.pytorch as pl
import torch

from lit_gen.callbacks.ema import evaluating
from lit_gen.errors import ConfigError

__all__ = ["ValidationLoss"]


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

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.batches_seen % self.every == 0:
            self.measure(trainer, pl_module)

    def measure(self, trainer: pl.Trainer, pl_module: Any) -> float:
        total = torch.zeros(2, device=pl_module.device)
        with evaluating(trainer):
            for batch in trainer.datamodule.val_dataloader():
                batch = trainer.datamodule.on_after_batch_transfer(
                    pl_module.transfer_batch_to_device(batch, pl_module.device, 0), 0
                )
                losses = pl_module.validation_loss(batch)
                total += torch.stack([losses.sum(), losses.new_tensor(len(losses))]).to(total)
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total, reduce_op="sum")
        value = float(total[0] / total[1])
        pl_module.write({"val/loss": value}, pl_module.batches_seen)
        pl_module.scores["val/loss"] = (pl_module.batches_seen, value)
        return value
