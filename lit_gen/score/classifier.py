"""ClassifierModule: trains a classifier of noisy images, which then guides a score model
(`lit_gen.score.guidance.ClassifierGuidance`)."""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lit_gen.module import SingleOptimizerModule
from lit_gen.rng import Generator, PerSample, randn
from lit_gen.score.losses import NoiseDistribution
from lit_gen.score.precondition import Precondition
from lit_gen.score.sde import Process, per_image, per_row, wide


class ClassifierModule(SingleOptimizerModule):
    """Cross-entropy of `net(c_in x_t, c_noise) -> logits` on images as noisy as a sampler will meet them
    (Dhariwal & Nichol 2021, Section 4, https://arxiv.org/abs/2105.05233).

    `image_shape` is (C, H, W); `precondition` gives c_in and c_noise, `noise_distribution` draws t.
    """

    next_commands: ClassVar[dict[str, str]] = {
        "guide": "lit-gen sample run=<a score model's run> guidance=classifier guidance.run={run}"
    }

    batch_keys = frozenset({"image", "label"})

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        precondition: Precondition,
        noise_distribution: NoiseDistribution,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        image_shape: Sequence[int],
        lr_schedule: Callable[[int], float] | None = None,
        seed: int = 0,
        log_every: int = 50,
    ):
        super().__init__(optimizer, lr_schedule, seed, log_every)
        self.net, self.process, self.precondition = net, process, precondition
        self.noise_distribution = noise_distribution
        self.image_shape, self.num_classes = tuple(image_shape), net.num_classes

    def ema_network(self) -> nn.Module:
        return self.net

    def sharded_networks(self) -> Iterable[nn.Module]:
        return (self.net,)

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
        x_0, label = batch["image"], batch["label"]
        draws = self._draw(self.whole_batch(x_0), self.step_generator("noise"))
        t, z = map(self.local_shard, draws)
        logits = self(self.process.marginal(wide(x_0), t, wide(z)), t)
        loss = F.cross_entropy(logits, label)
        self.watch(loss, {"noise levels of the batch": self.process.noise_level(t)})
        self.log_step(loss, accuracy=(logits.argmax(1) == label).float().mean())
        return loss

    def _draw(self, x_0: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """t (B,) and z like x_0."""
        t = self.noise_distribution(self.process, x_0, generator)
        return t, randn(x_0.shape, generator, device=x_0.device)

    @torch.no_grad()
    def validation_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) cross-entropies with noise drawn from (seed, image index)."""
        x_0 = batch["image"]
        t, z = self._draw(x_0, PerSample.keyed(self.seed, batch["index"].tolist()))
        logits = self(self.process.marginal(wide(x_0), t, wide(z)), t)
        return F.cross_entropy(logits, batch["label"], reduction="none")
