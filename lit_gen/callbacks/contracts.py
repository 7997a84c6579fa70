"""What callbacks ask of a module and of its data: Protocols, so that a class of a user's own needs no base.

A callback says in `requires` which Protocol of the module it uses; `lit_gen.config.experiment` refuses a
module without it before the training begins.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_gen.errors import ConfigError
from lit_gen.module import BaseModule

Sampler = Callable[..., Tensor]
T = TypeVar("T")


@runtime_checkable
class HasAverage(Protocol):
    """A module with a network whose weights `EMA` averages."""

    def ema_network(self) -> nn.Module: ...


@runtime_checkable
class Samples(Protocol):
    """A module that samples images, image i of `indices` from (seed, i) alone: (N, C, H, W) as the data are
    stored (`BaseModule.pixels`).

    `sampler` None is the module's own. `check` raises ConfigError for a sampler that does not fit.
    """

    def sample(self, indices: Sequence[int], seed: int = 0, sampler: Sampler | None = None) -> Tensor: ...

    def sampler_name(self, sampler: Sampler | None = None) -> str: ...

    def check(self, sampler: Sampler | None = None) -> None: ...


@runtime_checkable
class SamplesTrajectories(Samples, Protocol):
    """A module that also shows how an image is generated from noise: uint8 (N, frames, C, H, W)."""

    def sample_trajectory(self, indices: Sequence[int], seed: int = 0, num_frames: int = 10) -> Tensor: ...


@runtime_checkable
class Validates(Protocol):
    """A module with losses (B,) of a batch of test images."""

    def validation_loss(self, batch: dict[str, Tensor]) -> Tensor: ...


@runtime_checkable
class Translates(Protocol):
    """A module that translates content images (N, C, H, W) into the class that images (K, C, H, W) show,
    floats in [-1, 1]."""

    def translate(self, content: Tensor, classes: Tensor) -> Tensor: ...


@runtime_checkable
class Detects(Protocol):
    """A module that finds objects: {"boxes" (K, 4), "scores" (K,), "labels" (K,)} for each image."""

    def detect(self, images: Tensor | Sequence[Tensor]) -> list[dict[str, Tensor]]: ...


@runtime_checkable
class Data(Protocol):
    """What a training asks of every data module. `batch_size` counts the images of all devices together;
    `check` raises ConfigError for what would fail later."""

    batch_size: int

    @property
    def train(self) -> Any: ...

    @property
    def test(self) -> Any: ...

    def check(self, world_size: int = 1) -> None: ...

    def val_dataloader(self) -> DataLoader: ...

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]: ...


@runtime_checkable
class HasKeyedTrain(Protocol):
    """Data whose training images are read by keys (epoch, index): {"image", "label", ...} of one."""

    def keyed_train(self) -> Any: ...


@runtime_checkable
class ImageData(Data, Protocol):
    """Data whose splits, "train" and "test", can be read image by image."""

    def dataset(self, split: str) -> Any: ...

    def in_order(self, dataset: Any, parts: Iterable[range]) -> DataLoader: ...


def base(module: LightningModule) -> BaseModule:
    """The module that a callback is handed, as what every module of lit_gen is."""
    if not isinstance(module, BaseModule):
        raise ConfigError(
            f"The callbacks of lit_gen count batches with lit_gen.module.BaseModule: derive "
            f"{type(module).__name__} from it."
        )
    return module


def of(module: LightningModule, kind: type[T]) -> T:
    """The module as the Protocol that a callback requires."""
    assert isinstance(module, kind), missing(module, kind)
    return module


def data_of(trainer: Trainer, kind: type[T]) -> T:
    """The trainer's data module. Raises ConfigError where it lacks what the callback asks of it."""
    data = vars(trainer)["datamodule"]  # set by Lightning without a declaration
    if not isinstance(data, kind):
        raise ConfigError(
            f"The data, a {type(data).__name__}, have no {', '.join(missing(data, kind))}, which a callback "
            "needs: leave the callback out, or take data of its family."
        )
    return data


class Periodic(Callback, ABC):
    """A callback that acts after every `every` batches, and has `finish` called when the training ends.

    `where` is its place in the configuration, for the message.
    """

    def __init__(self, every: int, where: str):
        if every < 1:
            raise ConfigError(f"{where}.every={every}: must be at least 1 batch.")
        self.every = every

    @abstractmethod
    def act(self, trainer: Trainer, module: BaseModule) -> None:
        """Called on every rank after a batch whose count `every` divides."""

    def finish(self, trainer: Trainer, module: BaseModule) -> None:
        """Called on every rank when the training ends."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        module = base(pl_module)
        if module.batches_seen % self.every == 0:
            self.act(trainer, module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer, base(pl_module))


def missing(thing: object, kind: type) -> list[str]:
    """The members of a Protocol that something does not have."""
    names = {n for k in kind.__mro__ if k is not object for n in (*vars(k), *k.__annotations__)}
    return sorted(n for n in names if not n.startswith("_") and not hasattr(thing, n))
