"""Augmentations without a list of sub-policies of their own: RandAugment, TrivialAugment, AugMix, chains."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gen.augment.ops import Op, Record
from lit_gen.augment.policy import Augmentation, Draws, Policy, uniform
from lit_gen.augment.tables import absolute, classification_table
from lit_gen.errors import ConfigError

__all__ = ["AugMix", "Chain", "RandAugment", "TrivialAugmentWide", "augmix_loss", "jensen_shannon"]

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
FIXED = ("AutoContrast", "Equalize", "Posterize", "Solarize")  # with GEOMETRIC: the nine ops of AugMix
ENHANCING = ("Brightness", "Color", "Contrast", "Sharpness")
FOURTEEN = ("Identity", *GEOMETRIC, *ENHANCING, *FIXED)


def _pick(names: Sequence[str], u: float) -> str:
    return names[int(u * len(names))]


class RandAugment(Augmentation):
    """`num_ops` of 14 ops, each uniformly drawn, at one magnitude (https://arxiv.org/abs/1909.13719).

    Bins, ranges and signs are torchvision's: `magnitude` counts from 0 to `num_bins` - 1. Boxes may come
    along.
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 9, num_bins: int = 31, **options: Any):
        if num_ops < 0 or num_bins < 2 or not 0 <= magnitude < num_bins:
            raise ConfigError(
                f"RandAugment: num_ops = {num_ops}, magnitude = {magnitude}, num_bins = {num_bins}; "
                "magnitude must be in 0..num_bins - 1, num_ops at least 0."
            )
        self.num_ops, self.magnitude, self.num_bins = num_ops, magnitude, num_bins
        super().__init__(classification_table(levels=num_bins - 1), **options)

    def sample(self, num_boxes: int = 0, generator: torch.Generator | None = None) -> Draws:
        u = uniform(3 * self.num_ops, generator)
        names = [_pick(FOURTEEN, next(u)) for _ in range(self.num_ops)]
        return {"ops": [self.draw_op(name, 1.0, self.magnitude, num_boxes, u) for name in names]}


class TrivialAugmentWide(Augmentation):
    """One op of 14 at a uniformly drawn magnitude, in wide ranges (https://arxiv.org/abs/2103.10158).

    Ranges are torchvision's: shear .99, translation 32 pixels, rotation 135 degrees, enhancing .99, 8 to 2
    bits.
    """

    def __init__(self, num_bins: int = 31, **options: Any):
        if num_bins < 2:
            raise ConfigError(f"TrivialAugmentWide: num_bins = {num_bins}; at least 2.")
        self.num_bins = num_bins
        table = classification_table(
            shear=0.99,
            translate=32,
            rotate=135,
            enhance=0.99,
            posterize=6,
            levels=num_bins - 1,
            length=absolute,
        )
        super().__init__(table, **options)

    def sample(self, num_boxes: int = 0, generator: torch.Generator | None = None) -> Draws:
        u = uniform(4, generator)
        name, level = _pick(FOURTEEN, next(u)), int(next(u) * self.num_bins)
        return {"ops": [self.draw_op(name, 1.0, level, num_boxes, u)]}


class Chain(Augmentation):
    """Policies one after another, such as a mosaic and then the ops of `detection_v1`; names are those of
    `Policy.load`.

    The options (fill, min_visibility, tight) are this one's, not the policies' own. Raises ConfigError for
    policies that give the same name to different ops.
    """

    def __init__(self, policies: Sequence[Augmentation | str], **options: Any):
        self.policies = [Policy.load(p) if isinstance(p, str) else p for p in policies]
        table: dict[str, Op] = {}
        for policy in self.policies:
            if isinstance(policy, AugMix) or policy.official:
                raise ConfigError("A chain has no AugMix, which mixes chains itself, and no official=True.")
            used = policy.names_used if isinstance(policy, Policy) else policy.table
            for name in used:
                if table.setdefault(name, policy.table[name]) != policy.table[name]:
                    raise ConfigError(f"Chain: two of its policies have different ops called {name!r}.")
        super().__init__(table, **options)
        self.partners = sum(policy.partners for policy in self.policies)

    def sample(self, num_boxes: int = 0, generator: torch.Generator | None = None) -> Draws:
        parts = [policy.sample(num_boxes, generator) for policy in self.policies]
        return {"ops": [record for part in parts for record in part["ops"]]}


class AugMix(Augmentation):
    """A convex mixture of `width` chains of ops with the image (https://arxiv.org/abs/1912.02781).

    Each chain has `depth` ops (None: 1 to 3, drawn), each at a level uniform in [0.1, `severity`] of 10; the
    chains' weights are Dirichlet(`alpha`), the mixture's weight Beta(`alpha`, `alpha`). `enhancing` adds the
    four enhancing ops, which the paper leaves out. With boxes `geometric=False` is required: a mixture of
    moved images has no one box. Warps are nearest, not bilinear.
    """

    def __init__(
        self,
        severity: float = 3,
        width: int = 3,
        depth: int | None = None,
        alpha: float = 1.0,
        *,
        geometric: bool = True,
        enhancing: bool = False,
        **options: Any,
    ):
        if not 0.1 <= severity <= 10 or width < 1 or (depth is not None and depth < 1) or alpha <= 0:
            raise ConfigError(
                f"AugMix: severity = {severity} (0.1..10), width = {width} (>= 1), depth = {depth} (>= 1 or "
                f"None), alpha = {alpha} (> 0): one is out of its range."
            )
        self.severity, self.width, self.depth, self.alpha = severity, width, depth, alpha
        self.geometric = geometric
        self.names = FIXED + (GEOMETRIC if geometric else ()) + (ENHANCING if enhancing else ())
        table = classification_table(translate=1 / 3, levels=10)
        table["Posterize"] = replace(table["Posterize"], magnitude=_augmix_bits)
        super().__init__(table, **options)

    def sample(self, num_boxes: int = 0, generator: torch.Generator | None = None) -> Draws:
        u = uniform(1 + self.width * (1 + 4 * max(3, self.depth or 0)), generator)
        rng = np.random.default_rng(int(next(u) * 2**24))  # torch has no public Dirichlet with a generator
        chains = []
        for _ in range(self.width):
            depth = 1 + int(next(u) * 3)
            chains.append([self._link(num_boxes, u) for _ in range(self.depth or depth)])
        weights = rng.dirichlet([self.alpha] * self.width).tolist()
        return {"chains": chains, "weights": weights, "mix": float(rng.beta(self.alpha, self.alpha))}

    def _link(self, num_boxes: int, u: Iterator[float]) -> Record:
        name = _pick(self.names, next(u))
        record = self.draw_op(name, 1.0, 0.1 + next(u) * (self.severity - 0.1), num_boxes, u)
        assert record is not None  # its probability is 1
        return record

    def apply_batch(
        self,
        images: Tensor,
        boxes: Sequence[Tensor] | None,
        draws: Sequence[Draws],
        masks: Sequence[Tensor] | None = None,
        *options: Any,
        **named: Any,
    ) -> tuple[Any, ...]:
        """(1 - mix) image + mix (sum of weights times chains), rounded; otherwise as
        `Augmentation.apply_batch`. Raises ConfigError for boxes or masks where chains may move the image."""
        if self.geometric and (boxes is not None or masks is not None):
            raise ConfigError(
                "AugMix mixes differently moved images: with boxes or masks use AugMix(geometric=False)."
            )

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=images.device).view(-1, 1, 1, 1)

        mixed = torch.zeros(images.shape, device=images.device)
        out: tuple[Any, ...] = ()
        for c in range(self.width):
            chain = [{"ops": d["chains"][c]} for d in draws]
            out = super().apply_batch(images, boxes, chain, masks, *options, **named)
            mixed += column([d["weights"][c] for d in draws]) * out[0]
        mixed = torch.lerp(images.float(), mixed, column([d["mix"] for d in draws]))
        return mixed.round_().clamp_(0, 255).to(torch.uint8), *out[1:]


def _augmix_bits(level: float) -> int:
    return 4 - int(level / 10 * 4)


def jensen_shannon(logits: Sequence[Tensor]) -> Tensor:
    """Jensen-Shannon divergence of the k distributions softmax(logits[i]), (B, classes) each; the batch's
    mean."""
    log_p = torch.stack([F.log_softmax(x, dim=-1) for x in logits])
    log_mean = log_p.logsumexp(0) - np.log(len(log_p))
    return (log_p.exp() * (log_p - log_mean)).sum(-1).mean()


def augmix_loss(logits: Sequence[Tensor], target: Tensor, weight: float = 12.0) -> Tensor:
    """Cross-entropy of the clean images, logits[0], plus `weight` times the divergence of all views (AugMix,
    Eq. 3). Logits are (B, classes), `target` is int64 (B,)."""
    return F.cross_entropy(logits[0], target) + weight * jensen_shannon(logits)
