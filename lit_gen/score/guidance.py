"""Guidance: denoisers that wrap denoisers, so that every sampler, likelihood and restoration runs guided."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.score.condition import PARTS, Condition, Label, class_of
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.sde import per_image

__all__ = ["ClassifierGuidance", "Guidance", "Unconditional", "classifier_free_guidance"]


class Unconditional(AbstractDenoiser):
    """A conditional denoiser without its condition, or without the named `parts` of it
    (`lit_gen.score.condition.PARTS`)."""

    def __init__(self, denoiser: AbstractDenoiser, parts: Sequence[str] = PARTS):
        super().__init__()
        self.denoiser, self.process, self.parts = denoiser, denoiser.process, tuple(parts)

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        if not isinstance(label, Condition):
            return self.denoiser(x_t, t, None if "label" in self.parts else label)
        return self.denoiser(x_t, t, label.without(*self.parts))


class Guidance(AbstractDenoiser):
    """guide + weight (denoiser - guide): away from a worse denoiser and beyond the better one.

    With a smaller or less trained `guide` this is autoguidance (Karras et al. 2024,
    https://arxiv.org/abs/2406.02507), with `Unconditional(denoiser)` classifier-free guidance (Ho & Salimans
    2022, https://arxiv.org/abs/2207.12598), in whose notation w = weight - 1. Weight 1 is no guidance and
    does not call the guide. Guidance is on only at noise levels in `interval` (Kynkaanniemi et al. 2024,
    https://arxiv.org/abs/2404.07724). `channels` guides the first so many alone: 3 of 4 in the official
    samples of DiT and SiT.
    """

    def __init__(
        self,
        denoiser: AbstractDenoiser,
        guide: AbstractDenoiser,
        weight: float,
        interval: tuple[float, float] = (0.0, math.inf),
        channels: int | None = None,
    ):
        super().__init__()
        if channels is not None and channels < 1:
            raise ConfigError(f"guidance.channels={channels}: must be at least 1, or null for all.")
        if guide.process != denoiser.process:
            raise ConfigError(
                "The guide has another process; wrap it: ReparameterizedDenoiser(guide, denoiser.process)."
            )
        self.denoiser, self.guide, self.process = denoiser, guide, denoiser.process
        self.weight, self.interval, self.channels = weight, interval, channels

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        return self._guided(self.denoiser(x_t, t, label), x_t, t, label)

    def with_variance(
        self, x_t: Tensor, t: Tensor, label: Label = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The variance is that of the denoiser itself. It has the shape of `x_t`."""
        x0_hat, v = self.denoiser.with_variance(x_t, t, label, **others)
        return self._guided(x0_hat, x_t, t, label), v

    def _guided(self, x0_hat: Tensor, x_t: Tensor, t: Tensor, label: Label) -> Tensor:
        level = self.process.noise_level(t)
        inside = (level >= self.interval[0]) & (level <= self.interval[1])
        # Times on a GPU (one an image, as `rk45` has them) are waited for only if this may spare the guide.
        if self.weight == 1 or (self.interval != (0.0, math.inf) and not inside.any()):
            return x0_hat
        weight = per_image(torch.where(inside, self.weight, 1.0), x_t)
        guided = self.guide(x_t, t, label).lerp(x0_hat, weight)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], x0_hat[:, self.channels :]], 1)


def classifier_free_guidance(
    denoiser: AbstractDenoiser,
    weight: float,
    interval: tuple[float, float] = (0.0, math.inf),
    parts: Sequence[str] = PARTS,
    channels: int | None = None,
) -> Guidance:
    """Guidance of a conditional denoiser, trained with dropped conditions, by itself without the named parts
    of its condition."""
    return Guidance(denoiser, Unconditional(denoiser, parts), weight, interval, channels)


class ClassifierGuidance(AbstractDenoiser):
    """Adds weight grad log p(label | x_t) to the score (Dhariwal & Nichol 2021, Section 4,
    https://arxiv.org/abs/2105.05233).

    `classifier(x_t, t) -> logits (B, num_classes)` is trained on noisy images; without a label nothing is
    added. The gradient is taken at x_t. With `unconditional` the denoiser itself gets no class, but the rest
    of a condition.
    """

    def __init__(
        self,
        denoiser: AbstractDenoiser,
        classifier: Callable[[Tensor, Tensor], Tensor],
        weight: float = 1.0,
        unconditional: bool = True,
    ):
        super().__init__()
        self.denoiser = Unconditional(denoiser, ["label"]) if unconditional else denoiser
        self.process, self.classifier, self.weight = denoiser.process, classifier, weight

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        x0_hat = self.denoiser(x_t, t, label)
        label = class_of(label)
        if label is None:
            return x0_hat
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_p = self.classifier(x, t).log_softmax(1)
            hot = label if label.is_floating_point() else nn.functional.one_hot(label, log_p.shape[1])
            (gradient,) = torch.autograd.grad((log_p * hot.to(log_p)).sum(), x)
        gain = self.weight * self.process.sigma(t).square() / self.process.alpha(t)
        return x0_hat + per_image(gain, x_t) * gradient
