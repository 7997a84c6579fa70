"""DetectorModule: trains a torchvision detector and finds objects with it."""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_gen.module import SingleOptimizerModule

Found = dict[str, Tensor]  # "boxes" float (K, 4) xyxy pixels, "scores" (K,), "labels" int64 (K,), best first


class DetectorModule(SingleOptimizerModule):
    """Any detector with torchvision's interface, `net(images, targets) -> losses` in training and
    `net(images) -> [Found]` in eval mode, on the batches of `lit_gen.data.detection_module`.

    `optimizer(parameters)` makes the optimizer, `lr_schedule(step)` its learning-rate factor. The losses of a
    batch are divided by its number of matched places, under DDP by each rank's own: there the gradient is
    near that of one device, not equal to it.
    """

    next_commands: ClassVar[dict[str, str]] = {}
    batch_keys = frozenset({"image", "boxes", "labels"})

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        lr_schedule: Callable[[int], float] | None = None,
        seed: int = 0,
        log_every: int = 50,
    ):
        super().__init__(optimizer, lr_schedule, seed, log_every)
        self.net = net

    def ema_network(self) -> nn.Module:
        return self.net

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        targets = [
            {"boxes": boxes, "labels": labels}
            for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True)
        ]
        parts = self.net(list(batch["image"]), targets)
        loss = reduce(torch.add, parts.values())
        self.watch(loss, parts)
        self.log_step(loss, **parts)
        return loss

    @torch.no_grad()
    def detect(self, images: Tensor | Sequence[Tensor]) -> list[Found]:
        """What is found in images, float (3, H, W) in [-1, 1] each."""
        training = self.training
        self.eval()
        try:
            return self.net([image.to(self.device) for image in images])
        finally:
            self.train(training)
