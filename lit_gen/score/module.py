"""ScoreModule: trains a denoiser and samples from it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_gen.errors import ConfigError
from lit_gen.images import BYTES, Pixels, to_uint8
from lit_gen.module import SingleOptimizerModule
from lit_gen.rng import PerSample
from lit_gen.score.condition import PARTS, Condition, Label
from lit_gen.score.denoiser import (
    Denoiser,
    GaussianDenoiser,
    bound,
    check_precision,
    network_precision,
)
from lit_gen.score.fewstep.meanflow import MeanFlowDenoiser, MeanFlowLoss
from lit_gen.score.fewstep.teacher import Distillation
from lit_gen.score.losses import DenoisingLoss, differentiates
from lit_gen.score.networks.embeddings import VectorEmbedding
from lit_gen.score.precondition import Precondition, check_defined
from lit_gen.score.sde import Process

CODEC = "codec"
"""The folder beside a run's checkpoints that holds what decodes its latents."""


@runtime_checkable
class GivesConditions(Protocol):
    """Data whose images come with conditions: `vectors`, those of the training images, (N, V); and
    `conditions(indices)`, those of the test images of these numbers, modulo how many there are: {"label":
    int64 (B,), "vector": (B, V), "condition_image": (B, C, h, w) in [-1, 1]}, the latter two if there are
    any."""

    def vectors(self) -> Tensor | None: ...

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]: ...


class Codec(Protocol):
    """What makes pictures of latents: `shape` (C, H, W), `decode` normalized latents (B, c, h, w) to float32
    (B, C, H, W) about in [-1, 1], `copy` what it needs into a folder, and `use` such a folder."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def decode(self, x: Tensor) -> Tensor: ...

    def copy(self, folder: Path) -> None: ...

    def use(self, folder: Path) -> None: ...


class ScoreModule(SingleOptimizerModule):
    """Denoising score matching for any network, process, preconditioning, and loss.

    `image_shape` is (C, H, W), and `pixels` says how the data are stored. With a `codec` the model is one of
    latents of this shape, and its samples are decoded. `optimizer(parameters)` makes the
    optimizer, `lr_schedule(step)` its learning-rate factor. `sampler(denoiser, x, label=, generator=,
    trace=)` is the sampler of grids and distances; any other can be passed to `sample`. `num_classes > 0`
    trains with labels, dropped with probability `label_dropout` (for classifier-free guidance); samples then
    take class i mod num_classes unless told otherwise. `vector_dim` and `condition_channels > 0` train with
    the "vector" (B, vector_dim) and the "condition_image" (B, condition_channels, h, w) of a batch too;
    samples are then told what `condition_source` says of test image i, class included. `condition_dropout`
    drops these parts of a `Condition` in training: {"vector": probability, "image": probability, "all":
    probability}, the last together and with the class. `sampling_precision` is that of the network while it
    samples: float32, bf16 or fp16 (`lit_gen.score.denoiser.network_precision`); the sampler's state is
    float64 in each.

    `augment` has `draw(n, generator, device)` -> {name: rows} and `apply(images, draws) -> (images,
    labels)`; the network is conditioned on the labels (`lit_gen.augment.conditional`). Parameters of the
    network whose names match `freeze` ("encoder.*") are not trained. `compile` is true, false or "auto"
    (`lit_gen.module.compiles`). `channels_last` is the memory layout of the network; "auto" takes it where
    there is CUDA: on CPUs the steps of U-Nets are faster without (docs/benchmarks.md).
    """

    batch_keys = frozenset({"image", "label"})
    condition_source: GivesConditions | None = None
    """What tells samples their conditions where nobody else does; in training the data module."""

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        precondition: Precondition,
        loss: DenoisingLoss,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        sampler: Callable[..., Tensor],
        image_shape: Sequence[int],
        pixels: Pixels = BYTES,
        codec: Codec | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        num_classes: int = 0,
        label_dropout: float = 0.0,
        vector_dim: int = 0,
        condition_channels: int = 0,
        condition_dropout: Mapping[str, float] | None = None,
        augment: Any = None,
        sampling_precision: str = "float32",
        freeze: str | None = None,
        channels_last: bool | str = "auto",
        compile: bool | str = False,
        seed: int = 0,
        log_every: int = 50,
    ):
        super().__init__(optimizer, lr_schedule, seed, log_every, compile)
        if not 0 <= label_dropout <= 1:
            raise ConfigError(f"model.label_dropout={label_dropout}: must be a probability.")
        if label_dropout and not num_classes:
            raise ConfigError(
                f"model.label_dropout={label_dropout} needs a conditional model: set model.num_classes."
            )
        self.vector_dim, self.condition_channels = vector_dim, condition_channels
        self.condition_dropout = dict(condition_dropout or {})
        self._check_conditions(net, augment)
        check_precision("model.sampling_precision", sampling_precision)
        self.sampling_precision = sampling_precision
        kind = Denoiser if getattr(net, "second_time", "none") == "none" else MeanFlowDenoiser
        self.denoiser = kind(net, process, precondition)
        if isinstance(loss, MeanFlowLoss) and kind is Denoiser:
            raise ConfigError(
                f"model/loss=meanflow: the network, a {type(net).__name__}, is told one time. Take "
                "model/net=ddpmpp or ncsnpp with model.net.second_time=added, or concatenated as published."
            )
        if freeze is not None:
            _freeze(net, freeze)
        self.loss, self.sampler = loss, sampler
        if isinstance(loss, Distillation):
            loss.make_room(self.denoiser)
        self.image_shape, self.pixels, self.codec = tuple(image_shape), pixels, codec
        self.num_classes, self.label_dropout, self.augment = num_classes, label_dropout, augment
        if channels_last not in (True, False, "auto"):
            raise ConfigError(f"model.channels_last={channels_last}: take true, false or auto.")
        self._channels_last = channels_last
        if channels_last is True or (channels_last == "auto" and torch.cuda.is_available()):
            for network in (net, *self._teachers()):
                network.to(memory_format=torch.channels_last)
        if compile is True and differentiates(loss):
            raise ConfigError(
                f"model.compile=true: {differentiates(loss)}, which a compiled network does not have. Leave "
                "it at auto or false."
            )

    def _check_conditions(self, net: nn.Module, augment: Any) -> None:
        for name in ("vector_dim", "condition_channels"):
            own, of_net = getattr(self, name), getattr(net, name, 0)
            if own != of_net:
                raise ConfigError(
                    f"model.{name}={own}, and the network, a {type(net).__name__}, has {of_net}: give both "
                    "the same, or take a network that has conditions (ddpmpp, ncsnpp, ddpm, adm, edm2, uvit, "
                    "dit)."
                )
        known = {"vector": self.vector_dim, "image": self.condition_channels}
        for name, p in self.condition_dropout.items():
            if name not in (*known, "all") or not 0 <= p <= 1:
                raise ConfigError(
                    f"model.condition_dropout.{name}={p}: give probabilities of vector, image, or all; that "
                    "of the class is model.label_dropout."
                )
            if p and not known.get(name, sum(known.values())):
                raise ConfigError(f"model.condition_dropout.{name}={p}: the model has no such condition.")
        if augment is not None and self.condition_channels:
            raise ConfigError(
                "model.augment moves images away from their condition images: leave it out of a model with "
                "condition_channels."
            )

    @property
    def dropout(self) -> dict[str, float]:
        """With which probability each part of the condition was left out in training, by itself or with all
        others."""
        together = self.condition_dropout.get("all", 0.0)
        alone = {"label": self.label_dropout} | self.condition_dropout
        return {part: max(alone.get(part, 0.0), together) for part in self.parts}

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a `Condition` that the model takes."""
        sizes = {"label": self.num_classes, "vector": self.vector_dim, "image": self.condition_channels}
        return tuple(part for part in PARTS if sizes[part])

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """(C, H, W) of its samples: `image_shape`, or that of what a codec makes of it."""
        return self.image_shape if self.codec is None else self.codec.shape

    def pictures(self, x_0: Tensor) -> Tensor:
        """Samples as the data are stored, of x_0 as a sampler gives it: decoded, if it is latents."""
        return self.pixels.from_model(x_0 if self.codec is None else self.codec.decode(x_0))

    def refuse_latents(self, what: str) -> None:
        """Raises ConfigError for a model of latents."""
        if self.codec is not None:
            raise ConfigError(f"{what} works on pixels, and the model generates latents: take one of pixels.")

    def refuse_consistency(self, what: str, instead: str) -> None:
        """Raises ConfigError for a consistency model, whose images are no means of what noise may hide."""
        if isinstance(self.loss, Distillation):
            raise ConfigError(
                f"{what} needs E[x_0 | x_t], and a consistency model gives the end of a path: {instead}."
            )

    def keep_beside(self, folder: Path) -> None:
        if self.codec is not None:
            self.codec.copy(folder / CODEC)

    def find_beside(self, folder: Path) -> None:
        if self.codec is not None:
            self.codec.use(folder / CODEC)

    def sampler_name(self, sampler: Callable[..., Tensor] | None = None) -> str:
        """What a sampler, the module's own by default, is called in captions and names of numbers."""
        sampler = sampler or self.sampler
        steps = getattr(sampler, "keywords", {}).get("num_steps")
        return getattr(sampler, "func", sampler).__name__ + (f" ({steps} steps)" if steps else "")

    def ema_network(self) -> nn.Module:
        return self.denoiser.net

    def compiled_networks(self) -> Iterable[nn.Module]:
        return () if differentiates(self.loss) else (self.denoiser.net, *self._teachers())

    def _teachers(self) -> tuple[nn.Module, ...]:
        return self.loss.networks() if isinstance(self.loss, Distillation) else ()

    def sharded_networks(self) -> Iterable[nn.Module]:
        if differentiates(self.loss):
            raise ConfigError(
                f"trainer=fsdp: {differentiates(self.loss)}, which sharded weights do not have. Take "
                "trainer=ddp, or another loss (model/loss=dsm)."
            )
        if self._channels_last is True:
            raise ConfigError(
                "model.channels_last=true: sharded weights are contiguous. Leave it at auto or false."
            )
        return (self.denoiser.net, *self._teachers())

    @torch.no_grad()
    def check(self, sampler: Callable[..., Tensor] | None = None) -> None:
        """Samples one pixel of a Gaussian that is known exactly: a sampler, the module's own by default, and
        a process that do not go together raise their ConfigError here and not in the middle of a training.
        """
        sampler = sampler or self.sampler
        if sampler is None:
            raise ConfigError("A score model needs a sampler for its pictures and distances: sampler=heun.")
        process = self.denoiser.process
        t_max = torch.tensor([process.t_max], dtype=torch.float64)
        check_defined(self.denoiser.precondition, process, t_max, "model.process.t_max")
        pixel = GaussianDenoiser(process, torch.zeros(1, 1, 1), torch.tensor(0.25))
        generator = PerSample.keyed(0, [0])
        x = process.prior_sample((1, 1, 1, 1), generator)
        with network_precision(pixel, self.sampling_precision):
            x_0 = sampler(pixel, x, label=None, generator=generator, trace=None)
        if not x_0.isfinite().all():
            raise ConfigError(
                f"The sampler {self.sampler_name(sampler)} gives {float(x_0):g} on {type(process).__name__} "
                f"with t_max={process.t_max:g} and t_min={process.t_min:g}: take another sampler, or a "
                "process that ends short of pure noise."
            )

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        for name, option in (("vector", "vector_dim"), ("condition_image", "condition_channels")):
            found, expected = batch[name].shape[1] if name in batch else 0, getattr(self, option)
            if found != expected:
                where = name.removeprefix("condition_")
                option_of_data = "channels" if found and where == "image" else where
                raise ConfigError(
                    f"model.{option}={expected}, and data.condition.{where} gives {found or 'none'}: set "
                    f"model.{option}={found}, or data.condition.{option_of_data}."
                )
        if self.condition_channels:
            h, w = batch["condition_image"].shape[2:]
            if h > self.image_shape[1] or w > self.image_shape[2]:
                raise ConfigError(
                    f"Condition images of {h}x{w} (height x width) are larger than the images, "
                    f"{self.image_shape[1]}x{self.image_shape[2]}: set data.condition.image_size."
                )

    # --- training ---

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if isinstance(self.loss, Distillation):
            self.loss.check_start(bool(self.parts))
        data = vars(self.trainer).get("datamodule")
        self.condition_source = data if isinstance(data, GivesConditions) else None
        embeddings = [part for part in self.denoiser.net.modules() if isinstance(part, VectorEmbedding)]
        if self.condition_source is not None and not all(part.is_fitted for part in embeddings):
            vectors = self.condition_source.vectors()  # which may read thousands of images
            for part in embeddings:
                if vectors is not None:
                    part.fit(vectors)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x_0, augment_label = self._augmented(batch)
        draws = self.loss.draw(
            self.denoiser.process, self.whole_batch(x_0), self.step_generator("noise"), self.batches_seen
        )
        t, *others = map(self.local_shard, draws)
        conditions = {"label": self._condition(batch), "augment_label": augment_label}
        losses = self.loss(self.denoiser, x_0, t, *others, **conditions)
        loss = losses.mean()
        self.watch(loss, {"noise levels of the batch": self.denoiser.process.noise_level(t)})
        if self.should_log:
            self.log_step(loss, **self._by_noise_level(losses, t))
        return loss

    def _augmented(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """This rank's images and what was done to them; the draws depend on the seed and the step alone."""
        x_0 = batch["image"]
        if self.augment is None:
            return x_0, batch.get("augment_label")
        draws = self.augment.draw(
            len(x_0) * self.trainer.world_size, self.step_generator("augment"), x_0.device
        )
        return self.augment.apply(x_0, {name: self.local_shard(rows) for name, rows in draws.items()})

    def _labels(self, batch: dict[str, Tensor]) -> Tensor | None:
        if not self.num_classes:
            return None
        rows = nn.functional.one_hot(batch["label"], self.num_classes).to(batch["image"].dtype)
        if self.label_dropout:
            n, generator = len(rows) * self.trainer.world_size, self.step_generator("label dropout")
            kept = torch.rand(n, generator=generator, device=rows.device) >= self.label_dropout
            rows = rows * self.local_shard(kept)[:, None]
        return rows

    def _condition(self, batch: dict[str, Tensor]) -> Label:
        """What the network is told of a training batch: parts are dropped by (seed, step)."""
        told = self._with_others(self._labels(batch), batch)
        if not isinstance(told, Condition):
            return told
        kept: dict[str, Tensor] = {}
        for name, p in self.condition_dropout.items():
            n, generator = len(told) * self.trainer.world_size, self.step_generator(f"{name} dropout")
            rows = self.local_shard(torch.rand(n, generator=generator, device=self.device) >= p)
            for part in self.parts if name == "all" else (name,):
                kept[part] = kept.get(part, rows) & rows
        return told.kept(kept)

    def _with_others(self, label: Tensor | None, batch: dict[str, Tensor]) -> Label:
        """The label, or with the batch's vector and image a `Condition`, if the model takes these."""
        if not (self.vector_dim or self.condition_channels):
            return label
        vector = batch["vector"] if self.vector_dim else None
        return Condition(label, vector, batch["condition_image"] if self.condition_channels else None)

    def _by_noise_level(self, losses: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The mean loss of each quarter of the batch of all ranks, from the least noise to the most."""
        gathered = self.all_gather(torch.stack([losses.detach(), t.to(losses)]))
        assert isinstance(gathered, Tensor)
        losses, t = gathered.reshape(-1, 2, len(t)).unbind(1)
        quarters = losses.flatten()[t.flatten().argsort()].chunk(4)
        return {f"loss_noise_q{i + 1}": q.mean() for i, q in enumerate(quarters)}

    @torch.no_grad()
    def validation_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) losses with noise drawn from (seed, image index)."""
        x_0 = batch["image"]
        generator = PerSample.keyed(self.seed, batch["index"].tolist())
        draws = self.loss.draw(self.denoiser.process, x_0, generator, self.batches_seen)
        label = nn.functional.one_hot(batch["label"], self.num_classes).to(x_0) if self.num_classes else None
        return self.loss(self.denoiser, x_0, *draws, label=self._with_others(label, batch))

    # --- sampling ---

    @torch.no_grad()
    def sample(
        self,
        indices: Sequence[int],
        seed: int = 0,
        sampler: Callable[..., Tensor] | None = None,
        label: Tensor | None = None,
        trace: Callable[[int, Tensor, Tensor], None] | None = None,
        condition: Condition | None = None,
    ) -> Tensor:
        """Images (N, C, H, W) as the data are stored (`pixels`), of the given indices: image i is drawn from
        (seed, i), whatever else is in the call.

        `label` is int64 (N,), one class an image; `condition` has a row for each. Raises ConfigError for one
        that does not fit the model.
        """
        if len(indices) == 0:
            return torch.zeros((0, *self.picture_shape), dtype=self.pixels.torch_dtype, device=self.device)
        generator = PerSample.keyed(seed, indices)
        x = self.denoiser.process.prior_sample(
            (len(indices), *self.image_shape), generator, device=self.device
        )
        told = self.condition_at(indices, label, condition).to(self.device)
        denoiser, label = bound(self.denoiser, told)
        training = self.training
        self.eval()
        try:
            half = network_precision(self.denoiser, self.sampling_precision)
            with torch.autocast(self.device.type, enabled=False), half:
                x_0 = (sampler or self.sampler)(denoiser, x, label=label, generator=generator, trace=trace)
        finally:
            self.train(training)
        return self.pictures(x_0)

    def condition_of(self, batch: dict[str, Tensor]) -> Condition:
        """What the model takes of a batch's "label", int64 (B,), "vector", and "condition_image"."""
        told = self._with_others(batch["label"] if self.num_classes else None, batch)
        return told if isinstance(told, Condition) else Condition(told)

    def condition_at(
        self, indices: Sequence[int], label: Tensor | None = None, condition: Condition | None = None
    ) -> Condition:
        """What samples of these indices are told: `condition` as given, with class i mod num_classes where it
        has no class; else that of test image i, by `condition_source`, where the model takes more than
        classes. A `label` goes before either.

        Raises ConfigError for a condition that the model does not take, lacks what it was always told, or has
        another size.
        """
        others = self.vector_dim or self.condition_channels
        if condition is None and others and self.condition_source is not None:
            condition = self.condition_of(self.condition_source.conditions(indices))
        elif condition is None:
            condition = Condition()
        parts = condition.parts() | ({} if label is None else {"label": label})
        if self.num_classes and "label" not in parts:
            parts["label"] = torch.tensor([i % self.num_classes for i in indices])
        self._check_condition(parts, len(indices))
        return Condition(**parts)

    def _check_condition(self, parts: dict[str, Tensor], n: int) -> None:
        if unknown := [part for part in parts if part != "label" and part not in self.parts]:
            takes = ", ".join(self.parts) or "none"
            raise ConfigError(f"The model takes no condition {unknown[0]}; the conditions it takes: {takes}.")
        if lacking := [part for part in self.parts if part not in parts and not self.dropout[part]]:
            raise ConfigError(
                f"The model was always told a condition {lacking[0]} in training: give "
                f"condition.{lacking[0]}=..."
            )
        if wrong := [len(part) for part in parts.values() if len(part) != n]:
            raise ConfigError(f"A condition of {wrong[0]} rows for {n} images: give one row for each.")
        label, k = parts.get("label"), self.num_classes
        indices = label.tolist() if k and label is not None and not label.is_floating_point() else []
        if wrong := [i for i in indices if not -1 <= i < k]:
            raise ConfigError(
                f"A condition of class {wrong[0]}: the classes are 0 to {k - 1}, and -1 is none."
            )
        if "vector" in parts and (size := parts["vector"].shape[1]) != self.vector_dim:
            raise ConfigError(f"A condition vector of {size} numbers: the model takes {self.vector_dim}.")
        if "image" in parts:
            (c, h, w), (_, height, width) = parts["image"].shape[1:], self.image_shape
            if c != self.condition_channels or h > height or w > width:
                raise ConfigError(
                    f"A condition image of {c} channels, {h}x{w} (height x width): the model takes "
                    f"{self.condition_channels} channels, at most {height}x{width}."
                )

    def sample_trajectory(
        self, indices: Sequence[int], seed: int = 0, num_frames: int = 10, *, estimates: bool = False
    ) -> Tensor:
        """How the images come out of noise: uint8 (N, F, C, H, W), F <= num_frames, the last one the image.

        A frame is x_t, divided by a multiple of its standard deviation where that is beyond the range of
        pixels; of latents, which noise makes no pictures of, and with `estimates`, it is the decoded estimate
        of x_0.
        """
        frames: list[Tensor] = []  # as pixels: thousands of float64 states of 256 x 256 would fill a GPU

        def watch(step: int, x_t: Tensor, x0_hat: Tensor) -> None:
            if self.codec is not None or estimates:
                frames.append(self.pixels.to_uint8(self.pictures(x0_hat)))
                return
            frames.append(to_uint8(x_t / (x_t.flatten(1).std(1) / 0.8).clamp(min=1).reshape(-1, 1, 1, 1)))

        image = self.sample(indices, seed, trace=watch)
        keep = torch.linspace(0, len(frames) - 1, min(num_frames - 1, len(frames))).round().long().tolist()
        return torch.stack([*(frames[k] for k in keep), self.pixels.to_uint8(image)], 1)


def _freeze(net: nn.Module, pattern: str) -> None:
    """Keeps the parameters whose names match the pattern from being trained. Raises ConfigError where none
    or all do."""
    parameters = dict(net.named_parameters())
    frozen = [name for name in parameters if fnmatchcase(name, pattern)]
    if len(frozen) in (0, len(parameters)):
        raise ConfigError(
            f"model.freeze={pattern} matches {'all' if frozen else 'none'} of the network's "
            f"{len(parameters)} parameters, which are called {', '.join(list(parameters)[:3])} ...: give a "
            'pattern of some, such as "encoder.*".'
        )
    for name in frozen:
        parameters[name].requires_grad_(False)
