"""Arms of FUNIT (Liu et al. 2019, https://arxiv.org/abs/1905.01723): translations as labelled images."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lit_gen.augment.differentiable import DifferentiableAugment
from lit_gen.comparison.generators import NO_OTHER, digest, in_turn, random_numbers, trained
from lit_gen.comparison.task import Treatment, seconds
from lit_gen.data.transforms import Transform
from lit_gen.errors import ConfigError, check_choice
from lit_gen.funit.losses import gradient_penalty
from lit_gen.funit.networks import FewShotGenerator, PatchDiscriminator
from lit_gen.funit.step import Batch, Objective, alternating_step, average_
from lit_gen.funit.translator import translate
from lit_gen.images import to_float
from lit_gen.rng import key, keyed_generator, rand, randint
from lit_gen.schedules import warmup_cosine
from lit_gen.search import Labelled

__all__ = ["FUNITTraining", "Translated"]

CHUNK = 500  # images that are translated at once


@dataclass(frozen=True)
class FUNITTraining:
    """How FUNIT is trained on few small images: Adam, whose rate warms up and falls to 5 %, and an average
    of the generator's weights with `ema_decay`, which translates.

    The networks are as deep as the images are large; contents are coded at `positions` a side or a few more,
    and the fewer, the more of what is shown must come from the class. In the reconstruction the class comes
    from another image of the content's class; `content_augment`, a transform of uint8 (C, H, W), is what the
    content encoder sees images through (both: docs/funit.md).
    """

    steps: int = 400
    batch_size: int = 8
    width: int = 12
    code_size: int = 32
    positions: int = 2
    learning_rate: float = 1e-3  # of the discriminator twice that
    ema_decay: float = 0.99
    reconstruction: float = 0.3  # weights of the objective, see `lit_gen.funit.step.Objective`
    features: float = 1.0
    content_codes: float = 0.0
    penalty: float = 1.0
    augment: DifferentiableAugment | None = None  # of what the discriminator sees
    content_augment: Transform | None = None

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.width, self.code_size, self.positions) < 1:
            raise ConfigError(
                f"training: steps={self.steps}, batch_size={self.batch_size}, width={self.width}, "
                f"code_size={self.code_size}, and positions={self.positions} must be at least 1."
            )

    def generator(self, data: Labelled, seed: int) -> tuple[FewShotGenerator, float, float]:
        """The generator that translates among the classes of `data`; seconds that its training took here,
        and before (`trained`)."""
        device, (_, channels, *sides) = data.images.device, data.images.shape
        levels = max(1, (min(sides) // 4).bit_length() - 1)
        downs = max(0, (min(sides) // self.positions).bit_length() - 1)
        with random_numbers(device, "funit", seed):
            generator = FewShotGenerator(
                channels=channels,
                width=self.width,
                code_size=self.code_size,
                content_downs=downs,
                class_downs=levels,
                mlp_width=64,
            ).to(device)
            discriminator = PatchDiscriminator(
                num_classes=int(data.labels.max()) + 1,
                channels=channels,
                width=self.width,
                num_res_blocks=2 * max(levels, 2),
                max_width=128,
            ).to(device)
        learn = partial(self._train, generator, discriminator, data, seed)
        seen = f"{type(self.content_augment).__name__} {vars(self.content_augment or self)}"
        depends = repr(replace(self, content_augment=None)), seen, digest(data), seed
        spent, borrowed = trained(generator, learn, device, *depends)
        return generator.eval().requires_grad_(False), spent, borrowed

    def _train(
        self, generator: FewShotGenerator, discriminator: PatchDiscriminator, data: Labelled, seed: int
    ) -> None:
        """Leaves the average in `generator`."""
        average, rate = copy.deepcopy(generator), self.learning_rate
        objective = Objective(
            reconstruction=self.reconstruction,
            features=self.features,
            content_codes=self.content_codes,
            penalty=partial(gradient_penalty, weight=self.penalty),
            augment=self.augment,
        )
        optimizers = {
            "generator": torch.optim.Adam(generator.parameters(), rate, betas=(0.0, 0.99)),
            "discriminator": torch.optim.Adam(discriminator.parameters(), 2 * rate, betas=(0.0, 0.99)),
        }
        warm = partial(warmup_cosine, steps=self.steps // 50 + 1, total=self.steps, floor=0.05)
        schedules = [LambdaLR(optimizer, warm) for optimizer in optimizers.values()]

        def update(which: str, parts: dict[str, Tensor]) -> None:
            optimizers[which].step()
            optimizers[which].zero_grad()

        for step in range(self.steps):
            random = keyed_generator(seed, "funit", step, device=data.images.device)
            batch = self._batch(data, random, key(seed, "view", step))
            draws = objective.draw(self.batch_size, random, data.images.device)
            alternating_step(generator, discriminator, batch, objective, Tensor.backward, update, 1, draws)
            average_(average, generator, min(self.ema_decay, (step + 1) / (step + 10)))
            for schedule in schedules:
                schedule.step()
        generator.load_state_dict(average.state_dict())

    def _batch(self, data: Labelled, random: torch.Generator, seed: int) -> Batch:
        device, size = data.images.device, self.batch_size
        contents, classes = (randint(0, len(data), (size,), random, device=device) for _ in range(2))
        same = _of_classes(data.labels, data.labels[contents], rand((size,), random, device=device))
        images, view = to_float(data.images), None
        if self.content_augment is not None:
            own = torch.Generator().manual_seed(seed)
            seen = [self.content_augment(image, own) for image in data.images[contents].cpu()]
            view = to_float(torch.stack(seen)).to(device)
        labels = data.labels[contents], data.labels[classes]
        return Batch(images[contents], labels[0], images[classes], labels[1], images[same], view)


@dataclass(frozen=True)
class Translated:
    """Translations by FUNIT, `per_class` of each class.

    `keeps` says what of a translation is certain. "class": contents of other classes are translated into the
    class that `style_images` of the labelled images show, drawn anew for each, and have its label. "content":
    labelled images are translated into the classes of other images (typefaces), and keep their label, which
    is right where these classes are styles of the same contents.

    FUNIT is trained on the labelled images alone, or, with `pretrained`, on other classes or typefaces alone;
    their images are the contents then, or the styles. That training is the same whatever the seed. Raises
    ConfigError where the data have no such images.
    """

    training: FUNITTraining
    per_class: int = 30
    keeps: str = "class"
    style_images: int = 5
    pretrained: bool = False

    def __post_init__(self):
        check_choice("keeps", self.keeps, ("class", "content"))
        if self.keeps == "content" and not self.pretrained:
            raise ConfigError(
                "keeps=content translates into the classes of other images: it needs pretrained=true."
            )

    @property
    def needs_other(self) -> bool:
        return self.pretrained

    def treatments(
        self, train: Labelled, classes: int, seed: int, other: Labelled | None
    ) -> Iterator[Treatment]:
        if self.pretrained and other is None:
            raise ConfigError(f"pretrained=true learns from {NO_OTHER}")
        known = other if self.pretrained and other is not None else train
        generator, spent, borrowed = self.training.generator(known, 0 if self.pretrained else seed)
        device = train.images.device
        start = seconds(device)
        labels = torch.arange(classes, device=device).repeat(self.per_class)
        random = keyed_generator(seed, "translations", device=device)
        if self.keeps == "content":
            contents = train.images[in_turn(train.labels, classes, self.per_class)]
            into = known.labels[randint(0, len(known), (len(labels),), random, device=device)]
        else:
            contents, into = known.images[_others(known.labels, labels, self.pretrained, random)], labels
        shown = known if self.keeps == "content" else train
        picked = rand((self.style_images, len(labels)), random, device=device)
        styles = torch.stack([_of_classes(shown.labels, into, u) for u in picked], 1)
        made = [
            translate(generator, to_float(contents[rows]), to_float(shown.images[styles[rows]]))
            for rows in torch.arange(len(labels), device=device).split(CHUNK)
        ]
        cost = {"training": spent, "sampling": seconds(device) - start}
        yield Treatment(None, Labelled(torch.cat(made), labels), "", cost, borrowed)


def _others(labels: Tensor, into: Tensor, disjoint: bool, random: torch.Generator) -> Tensor:
    """A row for each of the classes `into`, of another class; of any, where the classes have nothing to do
    with these."""
    u = rand((len(into),), random, device=labels.device)
    if disjoint:
        return (u * len(labels)).long()
    order, starts, counts = _sorted(labels)
    place = (u * (len(labels) - counts[into])).long()
    return order[place + counts[into] * (place >= starts[into])]


def _of_classes(labels: Tensor, wanted: Tensor, u: Tensor) -> Tensor:
    """A row for each wanted label, by uniform numbers `u` of the same shape."""
    order, starts, counts = _sorted(labels)
    return order[starts[wanted] + (u * counts[wanted]).long()]


def _sorted(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in the order of their labels; where each label begins there, and how many it has."""
    counts = labels.bincount()
    return labels.argsort(stable=True), counts.cumsum(0) - counts, counts
