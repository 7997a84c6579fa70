"""BaseModule: what every LightningModule here shares, whatever it trains.

One counter, `batches_seen`, is the x-axis of everything: with two optimizers Lightning's `global_step` is not
the number of batches. Random numbers of a step are keyed by (seed, step), so a resumed run draws what the
undisturbed one would have drawn.
"""

import importlib.util
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_gen import sharding
from lit_gen.errors import ConfigError
from lit_gen.images import BYTES, Pixels
from lit_gen.rng import key, keyed_generator

log = logging.getLogger(__name__)
CallbackType = TypeVar("CallbackType", bound=pl.Callback)


class Score(NamedTuple):
    """A number by which the best checkpoint can be chosen, and the batches seen when it was measured."""

    step: int
    value: float


class Results:
    """What a run has measured so far. The module and the callbacks write it; the progress bar, the
    checkpoints, `summary.json` and the closing table read it, and know no metric by name.

    `logged` holds the newest value of every logged number, `scores` those that choose checkpoints, `summary`
    what goes into `summary.json`, and `rows` the lines of the closing table, label -> text.
    """

    def __init__(self):
        self.logged: dict[str, float] = {}
        self.scores: dict[str, Score] = {}
        self.summary: dict[str, Any] = {}
        self.rows: dict[str, str] = {}

    def score(self, name: str, step: int, value: float) -> None:
        """Sets the newest value of a score, measured after `step` batches."""
        self.scores[name] = Score(step, value)

    def record(self, **values: Any) -> None:
        """Adds entries to `summary.json`; values are what JSON can hold."""
        self.summary |= values

    def objective(self, name: str | None) -> float | None:
        """The final value of a score: what `summary.json` says of it, or else its newest measurement; None if
        it was never measured."""
        newest = self.scores.get(name or "")
        return self.summary.get(name or "", None if newest is None else newest.value)

    def row(self, label: str, text: str) -> None:
        """Adds a row to the closing table, below those that are there."""
        self.rows[label] = text


class BaseModule(pl.LightningModule):
    """Counting, keyed randomness and cheap logging.

    A subclass calls `self.log_scalars({...})` in its `training_step`; nothing is computed, reduced or written
    except every `log_every`-th batch (one `self.log` per step costs half a millisecond). `watch(loss, parts)`
    shows the NaN guard what to look at. `results` is what the run has measured (`Results`).

    What a callback calls of a module is a Protocol in `lit_gen.callbacks.contracts`: a module that has
    `ema_network()` can be averaged, one that has `sample(...)` can be measured.

    `compile` (see `compiles`) is decided when a training begins; a module that samples alone stays as it is.
    """

    clipping_option = "trainer.gradient_clip_val"  # where gradient clipping is set, for advice
    next_commands: ClassVar[dict[str, str]] = {
        "more samples": "lit-gen sample run={run} num=64",
        "evaluate": "lit-gen evaluate run={run}",
    }
    """What to type after a training."""
    batch_keys: ClassVar[frozenset[str]] = frozenset()
    """What its steps take from a batch: `lit_gen.config.experiment` refuses data that lack it."""
    pixels: Pixels = BYTES
    """How the images that it samples are stored."""

    def __init__(self, seed: int = 0, log_every: int = 50, compile: bool | str = False):
        super().__init__()
        if compile not in (True, False, "auto"):
            raise ConfigError(f"model.compile={compile}: give true, false or auto.")
        self.seed, self.log_every, self._compile = seed, log_every, compile
        self._batches_before = 0  # of earlier launches of this run
        self._processed_at_start: int | None = None
        self._log_clock: tuple[float, int] | None = None
        self._paced = [0.0, 0.0]  # seconds and images of all intervals between logs
        self._pending: dict[str, Tensor] = {}
        self.results = Results()
        self.nan_context: dict[str, Tensor] | None = None  # of the step, see `watch`

    def check_batch(self, batch: dict[str, Any]) -> None:
        """Raises ConfigError for a batch of training images, as a step gets it, that the model cannot be
        trained with."""

    def keep_beside(self, folder: Path) -> None:
        """Writes into the run folder what the model needs besides its checkpoints."""

    def find_beside(self, folder: Path) -> None:
        """Takes what `keep_beside` has written into the run folder, if it is there."""

    # --- compiled and sharded networks ---

    def compiled_networks(self) -> Iterable[nn.Module]:
        """The networks that `compile` means."""
        return ()

    def on_fit_start(self) -> None:
        networks = list(self.compiled_networks())
        if networks and compiles(self._compile, self.device):
            for network in networks:  # in place, so that the names in a state_dict stay clean
                if self.device_mesh is None:
                    network.compile()
                    continue
                if getattr(network, "checkpoint_blocks", False):
                    log.warning(
                        "Sharded blocks that are recomputed (model.net.checkpoint_blocks) are not compiled."
                    )
                    continue
                for unit in sharding.units(network):  # weights are gathered outside of what is compiled
                    unit.forward = torch.compile(unit.forward)

    def sharded_networks(self) -> Iterable[nn.Module]:
        """The networks that `trainer=fsdp` shards. Raises ConfigError for a module that cannot be trained so.

        A network is called by its forward alone, and so are its children; what it does with its weights must
        have a first derivative only.
        """
        raise ConfigError(
            f"trainer=fsdp shards score models and classifiers of noisy images, not a {type(self).__name__}: "
            "take trainer=ddp."
        )

    def configure_model(self) -> None:
        """Shards the networks where the trainer's strategy does (`lit_gen.checkpoints.FullySharded`)."""
        if self.device_mesh is not None and not sharding.is_sharded(self.parameters()):
            for network in self.sharded_networks():
                sharding.shard(network, self.device_mesh["data_parallel"])

    # --- the counter ---

    @property
    def batches_seen(self) -> int:
        """Batches trained on since the beginning of the run, over all resumptions. In a callback's
        `on_train_batch_end` it already counts the batch that has just ended."""
        if self._processed_at_start is None:
            return self._batches_before
        return self._batches_before + self._processed - self._processed_at_start

    @property
    def _processed(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # pyright: ignore[reportAttributeAccessIssue] declared by its base class

    def on_train_start(self) -> None:
        self._processed_at_start = self._processed
        self._log_clock = None
        for optimizer in self.trainer.optimizers:
            lay_out_state(optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._batches_before = checkpoint.get("batches_seen", 0)
        self._processed_at_start = None

    # --- randomness ---

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Global generators (dropout draws from them) start every step from (seed, rank, step)."""
        seed = key(self.seed, "step", self.global_rank, self.batches_seen)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def step_generator(self, purpose: str) -> torch.Generator:
        """This step's generator for `purpose`, the same on every rank: draw for the whole batch, then take
        `local_shard`."""
        return keyed_generator(self.seed, purpose, self.batches_seen, device=self.device)

    def whole_batch(self, images: Tensor) -> Tensor:
        """Images (N, ...) of all ranks together, by shape, dtype, and device alone: what draws are like."""
        return images.new_empty(()).expand(len(images) * self.trainer.world_size, *images.shape[1:])

    def local_shard(self, rows: Tensor) -> Tensor:
        """This rank's rows of a tensor drawn for the batch of all ranks."""
        world_size = self.trainer.world_size if self._trainer is not None else 1
        return rows if world_size == 1 else rows.chunk(world_size)[self.global_rank]

    # --- logging ---

    @property
    def should_log(self) -> bool:
        """Whether the batch now being trained is one whose numbers are logged."""
        return (self.batches_seen + 1) % self.log_every == 0

    def log_scalars(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Keeps this step's numbers for the log, written when the batch has ended; nothing is kept unless
        `should_log`."""
        if self.should_log:
            for name, value in scalars.items():
                if not isinstance(value, Tensor):  # filled there: a copy would wait for the device
                    value = torch.full((), float(value), device=self.device)
                self._pending[name] = value.detach().to(self.device, torch.float32)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes the kept numbers, averaged over the ranks, under the batch count."""
        if self._pending:
            values = torch.stack(list(self._pending.values()))
            if self.trainer.world_size > 1:
                values = self.trainer.strategy.reduce(values, reduce_op="mean")
            scalars = dict(zip(self._pending, values.tolist(), strict=True))
            self._pending = {}
            self.write(scalars | self._pace(), self.batches_seen)

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Hands numbers to the loggers (which act on rank 0 alone) at `step` batches."""
        self.results.logged |= scalars
        for logger in self.trainer.loggers:
            logger.log_metrics(scalars, step=step)

    def _pace(self) -> dict[str, float]:
        """Images per second since the last log, over all ranks, and peak memory of this one."""
        now, step = time.perf_counter(), self.batches_seen
        pace = {"memory/peak_gib": _peak_gib(self.device)}
        if self._log_clock is not None:
            then, before = self._log_clock
            images, seconds = (step - before) * self._global_batch_size(), now - then
            self._paced = [self._paced[0] + seconds, self._paced[1] + images]
            pace["throughput/images_per_second"] = images / seconds
        self._log_clock = (now, step)
        return pace

    def _global_batch_size(self) -> int:
        return getattr(vars(self.trainer).get("datamodule"), "batch_size", 1)

    def training_pace(self) -> float:
        """Images per second of this launch, evaluations left out; 0 before the second log."""
        seconds, images = self._paced
        return images / seconds if seconds else 0.0

    def restart_clock(self) -> None:
        """Leaves the time since the last log out of the throughput (an evaluation came between)."""
        self._log_clock = None

    # --- gradients ---

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the gradient's norm; modules that step by hand log their own."""
        if not self.automatic_optimization:
            return
        if self.device_mesh is not None:
            sharding.average_gradients(self.parameters())
        if self.should_log or self.trainer.gradient_clip_val:
            self._unscale(optimizer)
        if self.should_log:
            self.log_scalars({"train/grad_norm": clip_gradients(self.parameters(), None)})

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by `trainer.gradient_clip_val`, a fused optimizer's gradients too.

        Lightning refuses those in mixed precision, because such an optimizer unscales within its step; in
        bfloat16 nothing is scaled, and in float16 the scaler leaves out what is unscaled already.
        """
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        if not gradient_clip_val or not (mixed or self.device_mesh is not None):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_algorithm == "value":
            with sharding.mixing(parameters):
                nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            clip_gradients(parameters, gradient_clip_val)

    def _unscale(self, optimizer: Optimizer) -> None:
        """Gradients in their own units, where a scaler of float16 has left that to a fused optimizer."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)

    # --- for callbacks ---

    def watch(self, loss: Tensor, details: Mapping[str, Tensor]) -> None:
        """Shows the NaN guard this step's loss and what to print if it is not finite (loss parts, noise
        levels)."""
        self.nan_context = {"loss": loss.detach()} | {name: v.detach() for name, v in details.items()}


class SingleOptimizerModule(BaseModule):
    """A module with one optimizer of all parameters: `optimizer(parameters)` makes it, `lr_schedule(step)` is
    the factor of its learning rate (None: constant)."""

    def __init__(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        lr_schedule: Callable[[int], float] | None = None,
        seed: int = 0,
        log_every: int = 50,
        compile: bool | str = False,
    ):
        super().__init__(seed, log_every, compile)
        self.optimizer, self.lr_schedule = optimizer, lr_schedule

    def log_step(self, loss: Tensor, **parts: Tensor) -> None:
        """Logs a step's loss, its parts by name, and the learning rate, where `should_log`. Each is ()."""
        if self.should_log:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            scalars = {"loss": loss, "lr": optimizer.param_groups[0]["lr"]} | parts
            self.log_scalars({f"train/{name}": value for name, value in scalars.items()})

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_schedule is None:
            return optimizer
        scheduler = LambdaLR(optimizer, self.lr_schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def callbacks_of(trainer: pl.Trainer, kind: type[CallbackType]) -> list[CallbackType]:
    """The trainer's callbacks of a kind, in their order."""
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]  # set by Lightning without a declaration
    return [callback for callback in callbacks if isinstance(callback, kind)]


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float | None) -> Tensor:
    """The norm () of all gradients together, which are then scaled down to `largest` where it is more (None:
    left as they are). Works with every optimizer in bfloat16 and float32, and waits for no device."""
    parameters = [p for p in parameters if p.grad is not None]
    with sharding.mixing(parameters):
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if largest is not None:
            nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return sharding.whole(norm)


def compiles(option: bool | str, device: torch.device) -> bool:
    """Whether `compile: <option>` compiles networks that train on `device`.

    "auto" does on a CUDA device, where the compiler fuses what would otherwise wait for memory, if it can
    work there: with Triton, a C compiler, and compute capability 7 or above.
    """
    if option != "auto":
        return bool(option)
    if device.type != "cuda":
        return False
    missing = {
        "Triton": importlib.util.find_spec("triton") is None,
        "a C compiler (cc, gcc or clang)": not any(map(shutil.which, ("cc", "gcc", "clang"))),
        "a GPU of compute capability 7": torch.cuda.get_device_capability(device) < (7, 0),
    }
    if lacking := ", ".join(name for name, is_missing in missing.items() if is_missing):
        log.warning("The networks are not compiled, for want of %s: training is slower.", lacking)
    return not lacking


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def lay_out_state(optimizer: Optimizer) -> None:
    """Puts the optimizer's state in the memory layout of its parameters.

    A checkpoint of a network in the other layout (`channels_last`) brings its own, and torch's fused Adam on
    the CPU reads both as if they were alike: without a word it would update weights by others' moments.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            same = not isinstance(value, Tensor) or value.shape != parameter.shape
            if not same and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
