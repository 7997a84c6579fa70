"""Exponential moving average of a network's weights, and the one way to evaluate with them.

Lightning's own averaging copies the whole module, lets the callback order decide which weights a metric sees
and stores swapped weights when an evaluation fails; here the network alone is averaged, and whoever evaluates
says so: `with evaluating(trainer): ...`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_gen.callbacks.contracts import HasAverage, base, of
from lit_gen.errors import ConfigError
from lit_gen.module import BaseModule, callbacks_of
from lit_gen.score.phema import exponent, power_beta
from lit_gen.sharding import gathered, local, whole

__all__ = ["EMA", "HalfLife", "Power", "evaluating"]


@dataclass(frozen=True)
class HalfLife:
    """The decay with which weights count half after `images` images, in the beginning after `ramp` of those
    seen so far (EDM: half a million, 0.05; https://arxiv.org/abs/2206.00364, Appendix F.2)."""

    images: float
    batch_size: int
    ramp: float | None = 0.05

    def __post_init__(self):
        if self.images <= 0 or (self.ramp is not None and self.ramp <= 0):
            raise ConfigError(
                f"EMA half-life of {self.images} images with ramp {self.ramp}: both must be above 0."
            )

    def __call__(self, update: int) -> float:
        images = self.images
        if self.ramp is not None:
            images = min(images, update * self.batch_size * self.ramp)
        return 0.5 ** (self.batch_size / images)


@dataclass(frozen=True)
class Power:
    """The decays of EDM2's power-function average of relative deviation `std` (`lit_gen.score.phema`)."""

    std: float

    def __post_init__(self):
        exponent(self.std)

    def __call__(self, update: int) -> float:
        return power_beta(self.std, update, 1)


class EMA(Callback):
    """w_ema <- decay_n w_ema + (1 - decay_n) w after every optimizer step n, on `module.ema_network()`.

    `decay` is a number, then `decay_n = min(decay, (1 + n) / (10 + n))`, the warm-up of score_sde
    (https://arxiv.org/abs/2011.13456), which forgets the initial weights soon, or `decay` from the start with
    `warmup=False`; or a rule `decay(n)` with n from 1: `HalfLife`, `Power`. Several EMA callbacks may run
    side by side; the first one listed is the one that evaluations use. Saved under its own key;
    `lit_gen.models.load` reads it. It moves at each step that `every` divides, by
    decay_n^every (py-meanflow has 16).

    `keep_every` batches (of a `Power` average; 0: never) the average is stored as
    `averages/<std>_<batch>.safetensors` of the run folder, from which `lit-gen average` makes an
    average of any other length.
    """

    requires = HasAverage

    def __init__(
        self,
        decay: float | Callable[[int], float] = 0.9999,
        warmup: bool = True,
        keep_every: int = 0,
        every: int = 1,
    ):
        if not callable(decay) and not 0 <= decay < 1:
            raise ConfigError(f"EMA decay={decay}: must lie in [0, 1), for instance 0.999.")
        if keep_every < 0 or (keep_every and not isinstance(decay, Power)):
            raise ConfigError(f"EMA keep_every={keep_every}: 0 or more, and only for a Power average.")
        if every < 1:
            raise ConfigError(f"EMA every={every}: 1 or more optimizer steps.")
        if keep_every % every:
            raise ConfigError(f"EMA keep_every={keep_every}: must be a multiple of every={every}.")
        self.decay, self.warmup, self.keep_every, self.every = decay, warmup, keep_every, every
        self.num_updates = 0
        self.shadow: dict[str, Tensor] = {}
        self._seen_steps = 0
        # The network's own: a walk over its modules costs a millisecond.
        self._weights: dict[str, Tensor] = {}
        self._applied = False

    @property
    def state_key(self) -> str:
        return f"EMA{{'decay': {self.decay}}}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = _weights(of(pl_module, HasAverage).ema_network())
        if not self.shadow:
            self.shadow = {name: w.detach().clone() for name, w in weights.items()}
        else:
            self.shadow = {name: self.shadow[name].to(w.device) for name, w in weights.items()}
        self._seen_steps, self._weights = trainer.global_step, weights

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        module = base(pl_module)
        if module.should_log and callbacks_of(trainer, EMA)[0] is self:
            module.log_scalars({"train/ema_decay": self.decay_of(self.num_updates + 1)})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step != self._seen_steps:  # no update while gradients accumulate
            self._seen_steps = trainer.global_step
            self.update(self._weights)
        step = base(pl_module).batches_seen
        if self.keep_every and step % self.keep_every == 0:
            shadow = {name: whole(w) for name, w in self.shadow.items()}
            if trainer.is_global_zero:
                self._keep(Path(trainer.default_root_dir) / "averages", step, shadow)

    def _keep(self, folder: Path, step: int, shadow: dict[str, Tensor]) -> None:
        assert isinstance(self.decay, Power)  # of a `keep_every`
        folder.mkdir(exist_ok=True)
        path = folder / f"{self.decay.std:.4f}_{step:09d}.safetensors"
        part = path.with_suffix(".part")
        told = {"std": repr(self.decay.std), "updates": str(self.num_updates)}
        save_file({name: w.contiguous() for name, w in shadow.items()}, part, metadata=told)
        part.chmod(folder.stat().st_mode & 0o666)  # safetensors leaves it to its writer alone
        part.replace(path)

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor]) -> None:
        """One step towards the weights, given by name."""
        self.num_updates += 1
        if self.num_updates % self.every:
            return
        decay = self.decay_of(self.num_updates) ** self.every
        shadow = [local(average) for average in self.shadow.values()]
        own = [local(weights[name]) for name in self.shadow]
        torch._foreach_lerp_(shadow, own, 1 - decay)  # pyright: ignore[reportPrivateImportUsage] no public name

    def decay_of(self, update: int) -> float:
        """The decay of an update, counted from 1."""
        if callable(self.decay):
            return self.decay(update)
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """The network holds the averaged weights inside the block, its own again after it, whatever
        happens."""
        if not self.shadow or self._applied:
            yield
            return
        weights = _weights(network)
        own = {name: w.detach().clone() for name, w in weights.items()}
        self._applied = True
        try:
            _copy(weights, self.shadow)
            yield
        finally:
            _copy(weights, own)
            self._applied = False

    def state_dict(self) -> dict[str, Any]:
        if self._applied:
            raise RuntimeError("A checkpoint was asked for while the network holds its EMA weights.")
        return {"num_updates": self.num_updates, "shadow": self.shadow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_updates, self.shadow = state_dict["num_updates"], dict(state_dict["shadow"])


@contextmanager
def evaluating(trainer: Trainer) -> Iterator[LightningModule]:
    """The module in eval mode, without gradients, with the EMA weights if there is an EMA callback; then as
    before. Sharded weights are gathered for as long: every rank must enter, whatever it does inside."""
    module = trainer.lightning_module
    averages = callbacks_of(trainer, EMA)
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), ExitStack() as stack:
            if averages:
                stack.enter_context(averages[0].applied(of(module, HasAverage).ema_network()))
            stack.enter_context(gathered(module))
            yield module
    finally:
        module.train(training)
        if isinstance(module, BaseModule):
            module.restart_clock()


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


@torch.no_grad()
def _copy(into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    own, new = [local(w) for w in into.values()], [local(values[name]) for name in into]
    torch._foreach_copy_(own, new)  # pyright: ignore[reportPrivateImportUsage] no public name
