"""Fast AutoAugment: policies under which a net trained without augmentation recognizes what it has not seen
(https://arxiv.org/abs/1905.00397, Algorithm 1).

The data are split several times into a part that a net is trained on, without augmentation, and a held-out
part; for each split the policies are searched whose augmentation of the held-out part the net recognizes
best, and the best of all splits are merged. No child model is trained for a policy.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_gen import rng
from lit_gen.errors import ConfigError
from lit_gen.search.rewards import DensityReward, Labelled, train_classifier

__all__ = ["density_folds"]


def stratified_split(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (int64) of two disjoint parts of `labels` (N,), the second with `share` of every class, rounded,
    but one at least and not all."""
    first, second = [], []
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label)[:, 0]
        if len(rows) < 2:
            raise ConfigError(f"Class {label} has {len(rows)} image; a split needs two of every class.")
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cut = min(max(1, round(share * len(rows))), len(rows) - 1)
        first.append(rows[cut:])
        second.append(rows[:cut])
    return torch.cat(first), torch.cat(second)


def density_folds(
    data: Labelled,
    classes: int,
    *,
    folds: int = 5,
    held_out: float = 0.4,
    passes: int = 2,
    strength: float = 0.5,
    seed: int = 0,
    split: Callable[[Tensor, float, torch.Generator], tuple[Tensor, Tensor]] = stratified_split,
    **training,
) -> list[DensityReward]:
    """A reward for each of `folds` splits, with its own net; `held_out` is the share that is augmented.

    Folds and share are the published code's. `split` divides labels as `stratified_split` does. `training`:
    see `train_classifier`. Raises ConfigError for no fold, or a `held_out` that is not within (0, 1).
    """
    if folds < 1 or not 0 < held_out < 1:
        raise ConfigError(f"folds={folds} must be at least 1 and held_out={held_out} within (0, 1).")
    rewards = []
    for fold in range(folds):
        parts = split(data.labels, held_out, rng.keyed_generator(seed, "fold", fold))
        net = train_classifier(
            data[parts[0]], None, classes=classes, seed=rng.key(seed, "fold", fold), **training
        )
        rewards.append(DensityReward(net, data[parts[1]], passes=passes, strength=strength, seed=seed))
    return rewards
