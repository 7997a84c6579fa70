"""Arms of a score model that is trained on the labelled images: its samples, and restorations.

The model is a small class-conditional EDM (Karras et al. 2022, https://arxiv.org/abs/2206.00364), trained
with dropped labels, for classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gen.augment.conditional import ConditionalAugment
from lit_gen.comparison.generators import NO_OTHER, digest, in_turn, random_numbers, trained
from lit_gen.comparison.task import Treatment, seconds
from lit_gen.errors import ConfigError
from lit_gen.images import to_float, to_uint8
from lit_gen.rng import keyed_generator, rand, randint
from lit_gen.schedules import train_one_cycle
from lit_gen.score import EDM, Denoiser
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.guidance import classifier_free_guidance
from lit_gen.score.losses import edm_loss
from lit_gen.score.networks.ncsnpp import NCSNpp
from lit_gen.score.precondition import EDMPrecondition
from lit_gen.score.restoration.ddnm import ddnm
from lit_gen.score.restoration.operators import Inpainting
from lit_gen.score.samplers.dpm_solver import dpm_solver_multistep
from lit_gen.score.samplers.grids import karras
from lit_gen.search import Labelled

__all__ = ["Restored", "Sampled", "ScoreTraining"]

NOISIEST = 20.0
"""The noise level that sampling begins at: images in [-1, 1] are nothing beside it."""
CHUNK = 500  # images that are sampled at once


@dataclass(frozen=True)
class ScoreTraining:
    """How a score model of few images is trained: Adam under a one-cycle rate of at most `learning_rate`.

    The network sees images of 16 pixels and more as squares of 2 x 2, and halves them until a side is odd or
    of 4; its widths are `base_channels`, then twice that. The noise levels of training are log-normal:
    `P_mean` and `P_std` are above EDM's -1.2 and 1.2, because what a sample shows is decided at high noise,
    and a short training learns that first or never. `augment` moves images, which the network is told of
    (EDM's Appendix F.2): it keeps a long training from repeating its images. `pretraining` is the number of
    steps, before all others, on images of other classes or typefaces without their labels, if the arm has
    them.
    """

    steps: int = 1000
    batch_size: int = 32
    base_channels: int = 16
    learning_rate: float = 6e-3
    label_dropout: float = 0.1
    P_mean: float = 0.0
    P_std: float = 1.8
    augment: ConditionalAugment | None = None
    pretraining: int = 0

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.base_channels) < 1 or self.pretraining < 0:
            raise ConfigError(
                f"training: steps={self.steps}, batch_size={self.batch_size}, and base_channels="
                f"{self.base_channels} must be at least 1, pretraining={self.pretraining} not negative."
            )

    def model(
        self, train: Labelled, classes: int, seed: int, other: Labelled | None = None
    ) -> tuple[Denoiser, dict[str, float], float]:
        """The model, conditioned on the labels of `train`; what its training took here, by phase, and what
        it took before (`trained`). The pretraining is the same whatever the seed."""
        device, images = train.images.device, to_float(train.images if other is None else other.images)
        with random_numbers(device, "score", 0 if other is not None else seed):
            denoiser = self._network(images, classes).to(device)
        spent, borrowed = {}, 0.0
        if other is not None:
            before = repr(self), classes, digest(other)
            learn = partial(self._train, denoiser, images, None, classes, self.pretraining, 0)
            spent["pretraining"], borrowed = trained(denoiser, learn, device, *before)
            denoiser = copy.deepcopy(denoiser)
        hot = F.one_hot(train.labels, classes).float()
        learn = partial(self._train, denoiser, to_float(train.images), hot, classes, self.steps, seed)
        depends = repr(self), classes, digest(train), seed, "" if other is None else digest(other)
        spent["training"], earlier = trained(denoiser, learn, device, *depends)
        return denoiser.eval().requires_grad_(False), spent, borrowed + earlier

    def _network(self, images: Tensor, classes: int) -> Denoiser:
        _, channels, *sides = images.shape
        patch = 2 if min(sides) >= 16 and not any(side % 2 for side in sides) else 1
        inner, levels = [side // patch for side in sides], 1
        while levels < 4 and not any(side % 2**levels or side < 2 ** (levels + 2) for side in inner):
            levels += 1
        told = 0 if self.augment is None else self.augment.label_dim
        known = {"num_classes": classes, "augment_dim": told, "dropout": 0.0, "patch": patch}
        widths = [1, *[2] * (levels - 1)]
        net = NCSNpp(sides, channels, self.base_channels, widths, 1, (), **known)
        return Denoiser(net, EDM(t_max=NOISIEST), EDMPrecondition(_spread(images)))

    def _train(
        self, denoiser: Denoiser, images: Tensor, hot: Tensor | None, classes: int, steps: int, seed: int
    ) -> None:
        """On float images (N, C, H, W) of the classes `hot` (N, classes), or of none."""
        device, size = images.device, self.batch_size
        loss = edm_loss(P_mean=self.P_mean, P_std=self.P_std, sigma_data=_spread(images))
        nothing = images.new_zeros(size, classes)

        def losses() -> Iterator[Tensor]:
            for step in range(steps):
                generator = keyed_generator(seed, "score", step, device=device)
                rows = randint(0, len(images), (size,), generator, device=device)
                kept = rand((size, 1), generator, device=device) >= self.label_dropout
                label = nothing if hot is None else hot[rows] * kept
                x_0, moved = images[rows], None
                if self.augment is not None:
                    x_0, moved = self.augment(x_0, generator)
                draws = loss.draw(denoiser.process, x_0, generator, step)
                yield loss(denoiser, x_0, *draws, label=label, augment_label=moved).mean()

        optimizer = torch.optim.Adam(denoiser.parameters(), self.learning_rate, betas=(0.9, 0.99))
        train_one_cycle(denoiser, optimizer, losses(), steps)


def _spread(images: Tensor) -> float:
    """sigma_data: the standard deviation of all pixels, but not 0."""
    return max(float(images.std()), 0.05)


@dataclass(frozen=True)
class Sampled:
    """Images that the score model makes of each class, `per_class` of each; a candidate for each weight of
    `guidance`, 1 being none. `num_steps` of DPM-Solver++ (2M) are as many evaluations of the network,
    twice with guidance. With `pretrained` the training begins on other images, see `ScoreTraining`."""

    training: ScoreTraining
    per_class: int = 30
    guidance: Sequence[float] = (1.0,)
    num_steps: int = 10
    pretrained: bool = False

    @property
    def needs_other(self) -> bool:
        return self.pretrained

    def treatments(
        self, train: Labelled, classes: int, seed: int, other: Labelled | None
    ) -> Iterator[Treatment]:
        denoiser, cost, borrowed = _model(self, train, classes, seed, other)
        labels = torch.arange(classes, device=train.images.device).repeat(self.per_class)
        for weight in self.guidance:
            start = seconds(labels.device)
            guided = denoiser if weight == 1 else classifier_free_guidance(denoiser, weight)
            images = _drawn(denoiser, labels, train, seed, partial(self._sample, guided))
            spent = cost | {"sampling": seconds(labels.device) - start}
            setting = f"guidance {weight:g}" if len(self.guidance) > 1 else ""
            yield Treatment(None, Labelled(images, labels), setting, spent, borrowed)

    def _sample(self, denoiser: AbstractDenoiser, x: Tensor, rows: slice, label: Tensor, generator) -> Tensor:
        return dpm_solver_multistep(denoiser, x, num_steps=self.num_steps, label=label, generator=generator)


@dataclass(frozen=True)
class Restored:
    """The labelled images with a share of their pixels erased, and restored by the score model of their
    class: `per_class` variants near the data of each class, and a candidate for each share in `erased`.

    One half of the images lose a rectangle, of any form and place, the others pixels here and there.
    `method` is one of `lit_gen.score.restoration`, with its number of steps; None: DDNM in 10 steps.
    `pretrained` as in `Sampled`.
    """

    training: ScoreTraining
    per_class: int = 30
    erased: Sequence[float] = (0.5, 0.25, 0.75)
    method: Callable[..., Tensor] | None = None
    pretrained: bool = False

    def __post_init__(self):
        if not self.erased or not all(0 < share < 1 for share in self.erased):
            raise ConfigError(f"erased={list(self.erased)}: give shares of the pixels, within (0, 1).")

    @property
    def needs_other(self) -> bool:
        return self.pretrained

    def treatments(
        self, train: Labelled, classes: int, seed: int, other: Labelled | None
    ) -> Iterator[Treatment]:
        denoiser, cost, borrowed = _model(self, train, classes, seed, other)
        method = self.method or partial(ddnm, num_steps=10, grid=karras)
        labels = torch.arange(classes, device=train.images.device).repeat(self.per_class)
        rows = in_turn(train.labels, classes, self.per_class)
        images = to_float(train.images)[rows]
        for share in self.erased:
            start = seconds(labels.device)
            masks = masks_of(len(labels), images.shape[-2:], share, keyed_generator(seed, "erased"))
            masks = masks.to(labels.device)

            def restore(x: Tensor, some: slice, label: Tensor, generator, masks: Tensor = masks) -> Tensor:
                operator = Inpainting(masks[some])
                y = operator(images[some])
                return method(denoiser, x, operator, y, label=label, generator=generator)

            made = _drawn(denoiser, labels, train, seed, restore)
            spent = cost | {"sampling": seconds(labels.device) - start}
            yield Treatment(None, Labelled(made, labels), f"{share:g} erased", spent, borrowed)


def _model(
    arm: Sampled | Restored, train: Labelled, classes: int, seed: int, other: Labelled | None
) -> tuple[Denoiser, dict[str, float], float]:
    if arm.pretrained and other is None:
        raise ConfigError(f"pretrained=true learns from {NO_OTHER}")
    return arm.training.model(train, classes, seed, other if arm.pretrained else None)


def _drawn(
    denoiser: Denoiser,
    labels: Tensor,
    like: Labelled,
    seed: int,
    make: Callable[[Tensor, slice, Tensor, torch.Generator], Tensor],
) -> Tensor:
    """uint8 images (N, C, H, W) of the labels, by `make(x at t_max, which of them, their labels, generator)`;
    the noise is the same for every candidate."""
    device, shape, made = labels.device, like.images.shape[1:], []
    generator = keyed_generator(seed, "sample", device=device)
    for start in range(0, len(labels), CHUNK):
        some = slice(start, start + CHUNK)
        label = labels[some]
        x = denoiser.process.prior_sample((len(label), *shape), generator, device=device)
        made.append(to_uint8(make(x, some, label, generator)))
    return torch.cat(made)


def masks_of(count: int, sides: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """bool (count, 1, H, W), false for about `share` of the pixels: by turns in a rectangle, whose sides are
    in a ratio of 1/2 to 2, and here and there."""
    height, width = sides
    u = torch.rand(count, 3, generator=generator)
    ratio = 4 ** (u[:, 0] - 0.5)
    h = (height * (share * ratio).sqrt()).clamp(max(1.0, share * height), height).round()
    w = (share * height * width / h).clamp(1, width).round()
    top, left = (u[:, 1] * (height - h + 1)).floor(), (u[:, 2] * (width - w + 1)).floor()
    y, x = torch.arange(height)[:, None], torch.arange(width)
    top, left, h, w = (part.view(-1, 1, 1) for part in (top, left, h, w))
    box = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
    grains = torch.rand(count, height, width, generator=generator) < share
    return ~torch.where((torch.arange(count) % 2 == 0).view(-1, 1, 1), box, grains)[:, None]
