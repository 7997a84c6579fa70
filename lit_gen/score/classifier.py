"""ClassifierModule: trains a classifier of noisy images, which then guides a score model
(`lit_gen.score.guidance.ClassifierGuidance`)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lit_gen.module import BaseModule, optimization
from lit_gen.rng import PerSample, randn
from lit_gen.score.losses import Times
from lit_gen.score.precondition import Precondition
from lit_gen.score.sde import Process, per_image, per_row, wide

__all__ = ["ClassifierModule"]


class ClassifierModule(BaseModule):
    """Cross-entropy of `net(c_in x_t, c_noise) -> logits` on images as noisy as a sampler will meet them
    (Dhariwal & Nichol 2021, Section 4, https://arxiv.org/abs/2105.05233).

    `image_shape` is (C, H, W); `precondition` gives c_in and c_noise, `times(process, x_0, generator)` draws
    t.
    """

    next_commands: ClassVar[dict[str, str]] = {
        "guide": "lit-gen sample run=<a score model's run> guidance=classifier guidance.run={run}",
    }

    batch_keys = frozenset({"image", "label"})

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        precondition: Precondition,
        times: Times,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        image_shape: Sequence[int],
        schedule: Callable[[int], float] | None = None,
        seed: int = 0,
        log_every: int = 50,
    ):
        super().__init__(seed, log_every)
        self.net, self.process, self.precondition, self.times = net, process, precondition, times
        self.optimizer, self.schedule = optimizer, schedule
        self.image_shape, self.num_classes = tuple(image_shape), net.num_classes

    def ema_network(self) -> nn.Module:
        return self.net

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, H, W) on the classifier's own process at t, () or (B,) -> logits (B, num_classes)."""
        _, _, c_in, c_noise = self.precondition(self.process, t)
        x_in = (per_image(c_in, x_t) * x_t).to(next(self.net.parameters()).dtype)
        return self.net(x_in, per_row(c_noise, x_in))

    def on(self, process: Process) -> Callable[[Tensor, Tensor], Tensor]:
        """`classify(x_t, t) -> logits` for images of another process, by the noise level that both share."""

        def classify(x_t: Tensor, t: Tensor) -> Tensor:
            own = self.process.time(process.noise_level(t))
            return self(per_image(self.process.alpha(own) / process.alpha(t), x_t) * x_t, own)

        return classify

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x_0, label, generator = batch["image"], batch["label"], self.step_generator("noise")
        whole = x_0.new_empty(()).expand(len(x_0) * self.trainer.world_size, *x_0.shape[1:])
        t = self.times(self.process, whole, generator)
        z = randn(whole.shape, generator, device=x_0.device)
        t, z = self.local_shard(t), self.local_shard(z)
        logits = self(self.process.marginal(wide(x_0), t, wide(z)), t)
        loss = F.cross_entropy(logits, label)
        self.watch(loss, {"noise levels of the batch": self.process.noise_level(t)})
        if self.should_log:
            right = (logits.argmax(1) == label).float().mean()
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            rate = optimizer.param_groups[0]["lr"]
            self.log_scalars({"train/loss": loss, "train/accuracy": right, "train/lr": rate})
        return loss

    def configure_optimizers(self) -> Any:
        return optimization(self, self.optimizer, self.schedule)

    @torch.no_grad()
    def validation_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) cross-entropies with noise drawn from (seed, image index)."""
        x_0, generator = batch["image"], PerSample.keyed(self.seed, batch["index"].tolist())
        t = self.times(self.process, x_0, generator)
        z = randn(x_0.shape, generator, device=x_0.device)
        logits = self(self.process.marginal(wide(x_0), t, wide(z)), t)
        return F.cross_entropy(logits, batch["label"], reduction="none")
