"""AutoAugment: policies, their ops, the transform, and the search for policies."""

from lit_gen.augment.families import AugMix, RandAugment, TrivialAugmentWide, augmix_loss, jensen_shannon
from lit_gen.augment.policy import Augmentation, Draws, Policy, shipped_policies
from lit_gen.augment.transform import AutoAugment, Views

__all__ = [
    "AugMix",
    "Augmentation",
    "AutoAugment",
    "Draws",
    "Policy",
    "RandAugment",
    "TrivialAugmentWide",
    "Views",
    "augmix_loss",
    "jensen_shannon",
    "shipped_policies",
]
