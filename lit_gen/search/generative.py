"""What an augmentation is worth in generative training: the Fréchet distance of the samples of a short score
model, negative.

The augmentations are EDM's (`lit_gen.augment.conditional`), each off, told to the network (so that it does
not leak into samples), or untold, as is right for a symmetry of the images alone. Which are symmetries, and
how much augmentation few images need, is what a search finds out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_gen import rng
from lit_gen.augment.conditional import GEOMETRY, PIXEL_FLIPS, ConditionalAugment
from lit_gen.images import to_float, to_uint8
from lit_gen.metrics import Extractor, frechet_distance, moments
from lit_gen.schedules import train_one_cycle
from lit_gen.score.denoiser import Denoiser
from lit_gen.score.losses import edm_loss
from lit_gen.score.networks import NCSNpp
from lit_gen.score.precondition import EDMPrecondition
from lit_gen.score.samplers import heun
from lit_gen.score.sde import EDM
from lit_gen.search.rewards import ChildReward, Labelled

__all__ = ["ConditionalSpace", "GenerativeReward"]

WAYS = ("off", "told", "untold")


@dataclass(frozen=True)
class ConditionalSpace:
    """One of `probabilities` for all `transforms` of `ConditionalAugment` together, and for each of them one
    of off, told and untold; `options` go to the `ConditionalAugment`."""

    transforms: tuple[str, ...] = PIXEL_FLIPS + GEOMETRY
    probabilities: tuple[float, ...] = (0.12, 0.3, 0.6, 1.0)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, ...]:
        return len(self.probabilities), *[len(WAYS)] * len(self.transforms)

    def decode(self, choices: Sequence[int]) -> ConditionalAugment:
        """The augmentation of a row of choices."""
        ways = {name: WAYS[way] for name, way in zip(self.transforms, choices[1:], strict=True)}
        off = dict.fromkeys(PIXEL_FLIPS + GEOMETRY, 0.0)
        on = {name: 1.0 for name, way in ways.items() if way != "off"}
        untold = tuple(name for name, way in ways.items() if way == "untold")
        options = off | on | self.options
        return ConditionalAugment(self.probabilities[choices[0]], untold=untold, **options)


def train_score_model(
    data: Labelled,
    augmentation: ConditionalAugment | None,
    *,
    classes: int,
    steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 6e-3,
    width: int = 16,
    seed: int = 0,
) -> Denoiser:
    """A small class-conditional DDPM++ trained by EDM's loss with Adam and a one-cycle schedule, in eval
    mode."""
    images = to_float(data.images)
    spread = float(images.std())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(seed, "child") % 2**63)
        net = NCSNpp(
            images.shape[-2:],
            images.shape[1],
            base_channels=width,
            channel_mult=(1, 2),
            num_blocks=1,
            attention_resolutions=(),
            dropout=0.0,
            num_classes=classes,
            augment_dim=0 if augmentation is None else augmentation.label_dim,
        )
    denoiser = Denoiser(net, EDM(), EDMPrecondition(spread))
    loss = edm_loss(P_mean=-1.0, sigma_data=spread)

    def losses() -> Iterator[Tensor]:
        for step in range(steps):
            generator = rng.keyed_generator(seed, "child", step)
            rows = torch.randint(len(data), (batch_size,), generator=generator)
            x_0, told = images[rows], None
            if augmentation is not None:
                x_0, told = augmentation(x_0, generator)
            draws = loss.draw(denoiser.process, x_0, generator)
            label = torch.nn.functional.one_hot(data.labels[rows], classes).to(x_0)
            told = told if told is not None and told.shape[1] else None
            yield loss(denoiser, x_0, *draws, label=label, augment_label=told).mean()

    train_one_cycle(denoiser, torch.optim.Adam(net.parameters(), lr=learning_rate), losses(), steps)
    return denoiser


class GenerativeReward(ChildReward):
    """The Fréchet distance, negative, between `validation` and as many samples with the same labels of
    `train_score_model`, by the features of `extractor` and `num_steps` steps of Heun; `training`: see
    there."""

    fit = staticmethod(train_score_model)

    def __init__(self, *data: Any, extractor: Extractor, num_steps: int = 12, **options: Any):
        super().__init__(*data, **options)
        self.extractor, self.num_steps = extractor, num_steps
        self.images = self.training.get("steps", 300) * self.training.get("batch_size", 64) * len(self.seeds)

    def score(self, net: Denoiser, data: Labelled) -> float:
        """Of a trained model, against data."""
        noise = rng.keyed_generator(0, "samples")
        drawn = []
        for labels in data.labels.split(500):
            x = net.process.prior_sample((len(labels), *data.images.shape[1:]), noise)
            label = torch.nn.functional.one_hot(labels, self.classes).to(x)
            drawn.append(to_uint8(heun(net, x, num_steps=self.num_steps, label=label)))
        true, made = (moments(self.extractor(images)) for images in (data.images, torch.cat(drawn)))
        return -frechet_distance(true, made)
