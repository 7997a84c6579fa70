"""Streaming moments of features as a `torchmetrics.Metric`.

Its states are float64 sums: n, the sum of the features and the sum of their outer products. Summed over ranks
they are those of one process for any division of the images, also with an empty rank or batch; they are
neither parameters nor in a state_dict.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_gen.errors import ConfigError
from lit_gen.metrics.distributed import all_reduce_sum, world_size
from lit_gen.metrics.functional import Moments, moments_of_sums

__all__ = ["FeatureStatistics"]


class FeatureStatistics(Metric):
    """`update(features)` with (B, d) features; `compute()` gives their `Moments` over all ranks."""

    full_state_update = False
    n: Tensor
    total: Tensor
    outer: Tensor
    non_finite: Tensor
    first_bad: Tensor | None = None  # this rank's first batch with a bad feature vector, from 1; 0: none

    def __init__(self, d: int, **kwargs: Any):
        super().__init__(dist_sync_fn=all_reduce_sum, **kwargs)
        zeros = torch.zeros
        self.add_state("n", zeros((), dtype=torch.int64), dist_reduce_fx="sum", persistent=False)
        self.add_state("total", zeros(d, dtype=torch.float64), dist_reduce_fx="sum", persistent=False)
        self.add_state("outer", zeros(d, d, dtype=torch.float64), dist_reduce_fx="sum", persistent=False)
        self.add_state("non_finite", zeros((), dtype=torch.int64), dist_reduce_fx="sum", persistent=False)

    def update(self, features: Tensor) -> None:
        d = len(self.total)
        if features.ndim != 2 or features.shape[1] != d:
            raise ConfigError(f"Expected features of shape (B, {d}), got {tuple(features.shape)}.")
        with torch.inference_mode(), torch.autocast(self.outer.device.type, enabled=False):
            x = features.to(self.outer.device).to(torch.float64)
            bad = (~x.isfinite()).any(1).sum()
            self.n += len(x)
            self.total += x.sum(0)
            self.outer.addmm_(x.T, x)
            self.non_finite += bad
            first = torch.where(bad > 0, self.update_count, 0)
            if self.first_bad is not None:
                first = torch.where(self.first_bad > 0, self.first_bad, first)
            self.first_bad = first
        # A GPU would have to be waited for, and one rank that stopped here would leave the others waiting:
        # there `compute` stops them all.
        if self.outer.device.type == "cpu" and world_size() == 1 and bad:
            self._refuse(int(bad))

    def compute(self) -> Moments:
        if bad := int(self.non_finite):
            self._refuse(bad)
        return moments_of_sums(int(self.n), self.total, self.outer)

    def _refuse(self, bad: int) -> None:
        first = 0 if self.first_bad is None else int(self.first_bad)
        where = f"the first in batch {first} (from 1)" if first else "none on this rank"
        raise ValueError(f"{bad} of {int(self.n)} feature vectors are NaN or infinite, {where}.")

    def reset(self) -> None:
        super().reset()
        self.first_bad = None

    @property
    def update_called(self) -> bool:
        return True  # an empty rank is no mistake; the sums say how many images there were

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> nn.Module:
        # `module.to(torch.bfloat16)` would round the sums; they follow the device only, and not to Apple's,
        # which has no float64.
        device = fn(torch.empty(0, device=self.outer.device)).device
        device = torch.device("cpu") if device.type == "mps" else device
        self.first_bad = None if self.first_bad is None else self.first_bad.to(device)
        return super()._apply(lambda x: x.to(device), exclude_state)
