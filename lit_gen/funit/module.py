"""FUNITModule: trains a few-shot translator and translates with the average of its weights."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_gen.errors import ConfigError
from lit_gen.funit import translator
from lit_gen.funit.gradients import GradientMean
from lit_gen.funit.losses import Parts
from lit_gen.funit.networks import FewShotGenerator, PatchDiscriminator
from lit_gen.funit.step import Batch, Objective, alternating_step, average_
from lit_gen.module import BaseModule, clip_gradients


class FUNITModule(BaseModule):
    """FUNIT (Liu et al. 2019, https://arxiv.org/abs/1905.01723) in manual optimization; a batch has the
    fields of `Batch`.

    One batch is one step of everything: of both optimizers, their schedules, the average and
    `trainer.global_step` (Lightning alone would count two). Any precision but float16 works. Under DDP the
    gradients are averaged once per update, whatever `micro_batches` is, while the last backward pass goes on
    (`lit_gen.funit.gradients`), and equal those of one process with the whole batch.

    Arguments
        generator, discriminator: the networks; `generator_ema`, made here, is the average that translates.
        optimizer: parameters -> optimizer, for both networks; discriminator_optimizer: another one for D.
        objective: loss weights and gradient penalty. lr_schedule: step -> factor of both learning rates.
        ema_decay: of the average, from the first step on (official: 0.999). gradient_clip_val: largest norm
        of each network's gradient (Trainer's own option is refused by Lightning here). micro_batches: equal
        parts in which a batch is worked off to save memory; the update stays the same. compile: torch.compile
        for both networks (the pass that the penalty differentiates twice stays eager), true, false or "auto"
        (`lit_gen.module.compiles`). channels_last: the layout of their weights, which a CPU and a GPU's
        convolutions prefer.
    """

    batch_keys = frozenset({"content", "classes"})
    clipping_option = "model.gradient_clip_val"
    next_commands: ClassVar[dict[str, str]] = {
        "translate": "lit-gen translate run={run} content=<image or folder> classes=<folder>",
        "evaluate": "lit-gen evaluate-translation run={run} k=[1,5,10,15,20]",
    }

    def __init__(
        self,
        generator: FewShotGenerator,
        discriminator: PatchDiscriminator,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        discriminator_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        objective: Objective | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        ema_decay: float = 0.999,
        gradient_clip_val: float | None = None,
        micro_batches: int = 1,
        compile: bool | str = False,
        channels_last: bool = False,
        seed: int = 0,
        log_every: int = 50,
    ):
        super().__init__(seed, log_every, compile)
        if not 0 <= ema_decay < 1:
            raise ConfigError(f"model.ema_decay={ema_decay}: must lie in [0, 1), for instance 0.999.")
        if micro_batches < 1:
            raise ConfigError(f"model.micro_batches={micro_batches}: must be at least 1.")
        if gradient_clip_val is not None and gradient_clip_val <= 0:
            raise ConfigError(
                f"model.gradient_clip_val={gradient_clip_val}: must be positive, or null for none."
            )
        self.automatic_optimization = False
        if channels_last:
            generator.to(memory_format=torch.channels_last)
            discriminator.to(memory_format=torch.channels_last)
        self.generator, self.discriminator = generator, discriminator
        self.generator_ema = copy.deepcopy(generator).requires_grad_(False)
        self.optimizer, self.discriminator_optimizer = optimizer, discriminator_optimizer or optimizer
        self.objective, self.lr_schedule = objective or Objective(), lr_schedule
        self.ema_decay, self.micro_batches = ema_decay, micro_batches
        self.gradient_clip_val = gradient_clip_val
        self._means: dict[str, GradientMean] = {}  # over the processes of a training
        self._passes = 0  # backward passes of the turn at hand
        self._norms: dict[str, Tensor] = {}  # of the newest gradients, before clipping

    # --- training ---

    def compiled_networks(self) -> Iterable[nn.Module]:
        return (*self.generator.children(), self.discriminator)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.precision.startswith("16"):
            raise ConfigError(
                f"trainer.precision={self.trainer.precision}: the gradient penalty overflows in float16. "
                "Use bf16-mixed."
            )
        if not isinstance(self.trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise ConfigError(
                f"trainer.strategy is {type(self.trainer.strategy).__name__}; FUNIT trains on one device or "
                "with strategy=ddp."
            )
        if getattr(self.trainer.strategy.model, "static_graph", False):
            raise ConfigError(
                "trainer.strategy.static_graph=true: the turns of FUNIT's two networks have different "
                "graphs; leave it out."
            )
        if self.device.type == "cuda" and torch.get_deterministic_debug_mode() == 2:  # "error"
            raise ConfigError(
                "trainer.deterministic=true: on CUDA the backward pass of reflected borders, which all of "
                "FUNIT's convolutions have, is not deterministic. Use trainer.deterministic=warn."
            )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        _uncounted(self._optimizers()[1])
        part = Batch(**{field: batch[field] for field in Batch._fields if field in batch})
        self._check_labels(part)
        whole = len(part.content) * self.trainer.world_size
        draws = self.objective.draw(whole, self.step_generator("augment"), self.device)
        parts = alternating_step(
            self.generator,
            self.discriminator,
            part,
            self.objective,
            self._backward,
            self._update,
            self.micro_batches,
            None if draws is None else self.local_shard(draws),
        )
        average_(self.generator_ema, self.generator, self.ema_decay)
        for scheduler in self._schedulers():
            scheduler.step()
        self.watch(parts["discriminator/loss"] + parts["generator/loss"], parts)
        if self.should_log:
            scalars = parts | self._norms | self._rates()
            self.log_scalars({f"train/{name}": value for name, value in scalars.items()})

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.trainer.world_size > 1:
            self._means = {name: GradientMean(getattr(self, name)) for name in ("generator", "discriminator")}

    def on_train_end(self) -> None:
        super().on_train_end()
        for mean in self._means.values():
            mean.remove()
        self._means = {}

    def _backward(self, loss: Tensor) -> None:
        self._passes = self._passes % self.micro_batches + 1
        if self._passes == self.micro_batches:  # the last pass of a turn completes its network's gradients
            for mean in self._means.values():
                mean.start()
        if isinstance(self.trainer.strategy, DDPStrategy):
            # One DDP wrapper holds both networks and would wait for gradients that a turn does not have.
            with self.trainer.strategy.block_backward_sync():
                self.manual_backward(loss)
        else:
            self.manual_backward(loss)

    def _update(self, which: str, parts: Parts) -> None:
        network = getattr(self, which)
        optimizer = self._optimizers()[0 if which == "generator" else 1]
        for name, mean in self._means.items():
            if name == which:
                mean.finish()
            else:
                mean.stop()
        if self.should_log or self.gradient_clip_val is not None:
            norm = clip_gradients(network.parameters(), self.gradient_clip_val)
            self._norms[f"{which}/grad_norm"] = norm
        optimizer.step()
        optimizer.zero_grad()

    def _check_labels(self, batch: Batch) -> None:
        if self.device.type != "cpu":  # a look would wait for the device; there an index error says it
            return
        highest = int(torch.cat([batch.content_label, batch.class_label]).max())
        n = self.discriminator.num_classes
        if highest >= n:
            raise ConfigError(
                f"A training label is {highest}, the discriminator has {n} classes: set num_classes."
            )

    def _optimizers(self) -> list[LightningOptimizer]:
        """The generator's and the discriminator's."""
        both = self.optimizers()
        assert isinstance(both, list)
        return both

    def _schedulers(self) -> list[LambdaLR]:
        schedulers = self.lr_schedulers() if self.lr_schedule is not None else []
        assert isinstance(schedulers, list)
        return [s for s in schedulers if isinstance(s, LambdaLR)]

    def _rates(self) -> dict[str, float]:
        generator, discriminator = (optimizer.param_groups[0]["lr"] for optimizer in self._optimizers())
        return {"generator/lr": generator, "discriminator/lr": discriminator}

    def configure_optimizers(self) -> Any:
        optimizers = [
            self.optimizer(self.generator.parameters()),
            self.discriminator_optimizer(self.discriminator.parameters()),
        ]
        schedules = [] if self.lr_schedule is None else [LambdaLR(o, self.lr_schedule) for o in optimizers]
        return optimizers, schedules

    # --- translating ---

    def class_code(self, images: Tensor) -> Tensor:
        """`translator.class_code` by the averaged weights."""
        return translator.class_code(self.generator_ema, images)

    def translate(self, content: Tensor, classes: Tensor) -> Tensor:
        """`translator.translate` by the averaged weights."""
        return translator.translate(self.generator_ema, content, classes)

    def interpolate(self, content: Tensor, first: Tensor, second: Tensor, steps: int = 8) -> Tensor:
        """`translator.interpolate` by the averaged weights."""
        return translator.interpolate(self.generator_ema, content, first, second, steps)


def _uncounted(optimizer: LightningOptimizer) -> None:
    """Keeps an optimizer's step out of `trainer.global_step`, for the batch at hand.

    Lightning counts optimizer steps (https://github.com/Lightning-AI/pytorch-lightning/issues/17958) through
    two private hooks that it sets before every batch; tests/funit/test_module.py watches that this goes on.
    """
    optimizer._on_before_step = optimizer._on_after_step = lambda: None
