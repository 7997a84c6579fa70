"""Distances between two sets of features, as pure functions in float64.

The first argument is always the reference (real), the second the generated set; features are (n, d).
"""

import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_gen.errors import ConfigError

__all__ = [
    "Estimate",
    "Moments",
    "frechet_distance",
    "frechet_estimate",
    "frechet_infinity",
    "inception_score",
    "mean_estimate",
    "moments",
    "moments_of_sums",
]


class Estimate(NamedTuple):
    """A number and its standard error: what another draw of the generated set would change, the reference
    held fixed.
    """

    value: float
    se: float | None

    def scaled(self, factor: float) -> "Estimate":
        """Both times `factor`, as for percentages."""
        return Estimate(factor * self.value, None if self.se is None else factor * self.se)


class Moments:
    """Mean (d,) and covariance (d, d; divided by n - 1) of n feature vectors, in float64 on the CPU."""

    def __init__(self, n: int, mean: Tensor, cov: Tensor, factor: Tensor | None = None):
        if n < 2:
            raise ConfigError(f"A covariance needs at least 2 images, got {n}.")
        self.n = int(n)
        self.mean = mean.detach().to("cpu", torch.float64)
        self.cov = cov.detach().to("cpu", torch.float64)
        d = self.mean.numel()
        if self.mean.shape != (d,) or self.cov.shape != (d, d):
            shapes = f"{tuple(mean.shape)} and {tuple(cov.shape)}"
            raise ConfigError(f"Moments need a mean (d,) and a covariance (d, d), got {shapes}.")
        if factor is not None:
            self.factor = factor.detach().to("cpu", torch.float64)

    @property
    def d(self) -> int:
        return self.mean.numel()

    @cached_property
    def factor(self) -> Tensor:
        """L (d, r) with L L^T = cov and r its rank, by an eigendecomposition; computed once."""
        values, vectors = torch.linalg.eigh(self.cov)
        keep = values > self.d * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
        return vectors[:, keep] * values[keep].sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """n, mean, cov and its factor, to be stored."""
        return {"n": torch.tensor(self.n), "mean": self.mean, "cov": self.cov, "factor": self.factor}

    @classmethod
    def from_tensors(cls, packed: dict[str, Tensor]) -> "Moments":
        """The inverse of `tensors`."""
        return cls(int(packed["n"]), packed["mean"], packed["cov"], packed["factor"])


def moments(features: Tensor) -> Moments:
    """Moments of (n, d) features, n >= 2, two passes."""
    x = _float64(features)
    mean = x.mean(0)
    centred = x - mean
    return Moments(len(x), mean, centred.T @ centred / (len(x) - 1))


def moments_of_sums(n: int, total: Tensor, outer: Tensor) -> Moments:
    """Moments of n vectors given their sum (d,) and the sum of their outer products (d, d)."""
    mean = total / max(n, 1)
    return Moments(n, mean, (outer - torch.outer(total, mean)) / max(n - 1, 1))


def frechet_distance(reference: Moments, generated: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    With S1 = L L^T the root's trace is the sum of the square roots of the eigenvalues of the symmetric L^T S2
    L: always real and defined, also for n <= d. L belongs to the reference and is computed once.
    https://arxiv.org/abs/1706.08500. Raises ConfigError for sets of different features, ValueError for
    moments that are not finite.
    """
    if reference.d != generated.d:
        raise ConfigError(
            f"The reference has {reference.d} features per image, the generated set {generated.d}."
        )
    L = reference.factor
    M = L.T @ generated.cov @ L
    # eigvalsh reads one triangle; the mean of both halves the rounding errors that the products left.
    values = torch.linalg.eigvalsh((M + M.T) / 2)
    # S2 has rank n - 1 at most; beyond that are rounding errors (1e-16), whose roots (1e-8) would add up.
    root = values[-min(len(values), generated.n - 1) :].clamp(min=0).sqrt().sum()
    traces = reference.cov.trace() + generated.cov.trace()
    value = float((reference.mean - generated.mean).square().sum() + traces - 2 * root)
    if not math.isfinite(value):
        raise ValueError(f"The Frechet distance is {value}: the moments are not finite.")
    # Rounding alone makes it negative, by far less than this; a larger negative value would be a mistake to
    # be seen.
    return max(value, 0.0) if value > -1e-6 * float(traces) else value


def frechet_estimate(reference: Moments, generated: Moments, features: Tensor) -> Estimate:
    """`frechet_distance` with its standard error by the infinitesimal jackknife; `features` (m, d) is a
    random part of the generated set that has the moments `generated`. https://doi.org/10.1137/1.9781611970319
    (Efron 1982, chapter 6)

    No standard error for n <= d, where the distance has no derivative.
    """
    value = frechet_distance(reference, generated)
    if generated.n <= generated.d:
        return Estimate(value, None)
    influence = _frechet_influence(reference, generated, features)
    return Estimate(value, float(influence.std() / math.sqrt(generated.n)))


def frechet_infinity(reference: Moments, features: Tensor, points: int = 10) -> Estimate:
    """FID-infinity: the intercept of a line in 1/N through the distances of growing parts of the generated
    features.

    The parts are prefixes, so the rows of `features` (m, d) must be in random order; at least 4 d rows, as
    below about 2 d the distance is no line in 1/N. Chong and Forsyth 2020,
    https://arxiv.org/abs/1911.07023. Raises ConfigError for fewer rows.
    """
    x = _float64(features)
    m, d = x.shape
    if m < 4 * d:
        raise ConfigError(f"FID-infinity of {d} features needs at least {4 * d} images, got {m}.")
    sizes = np.linspace(max(m / points, 2 * d), m, points).round().astype(int)
    total, outer = x.new_zeros(d), x.new_zeros(d, d)
    distances, start = [], 0
    for size in sizes:
        part, start = x[start:size], size
        total, outer = total + part.sum(0), outer + part.T @ part
        distances.append(frechet_distance(reference, moments_of_sums(size, total, outer)))
    # The intercept is a weighted sum of the distances, so its influence function is that of theirs: image i
    # counts weight / size in each prefix that holds it.
    weights = np.linalg.pinv(np.stack([np.ones(points), 1 / sizes], 1))[0]
    counts = ((np.arange(m)[:, None] < sizes) * (weights / sizes)).sum(1)
    sd = float(_frechet_influence(reference, moments_of_sums(m, total, outer), x).std())
    return Estimate(float(weights @ distances), sd * float(np.linalg.norm(counts)))


def inception_score(logits: Tensor) -> Estimate:
    """exp(E KL(p(y|x) || p(y))) over all images at once, logits (n, classes).
    https://arxiv.org/abs/1606.03498
    """
    log_p = _float64(logits).log_softmax(1)
    p = log_p.exp()
    divergence = (p * (log_p - p.mean(0).log())).sum(1)
    score = float(divergence.mean().exp())
    return Estimate(score, score * float(divergence.std() / math.sqrt(len(p))))


def mean_estimate(values: Tensor) -> Estimate:
    """The mean of (n,) independent values and its standard error."""
    x = values.to(torch.float64)
    return Estimate(float(x.mean()), float(x.std() / math.sqrt(len(x))))


def _frechet_influence(reference: Moments, generated: Moments, features: Tensor) -> Tensor:
    """The derivative of the distance in the weight of each generated image, (m,), up to a constant.

    d/dm2 = 2 (m2 - m1) and d/dS2 = 1 - T, with T = L (L^T S2 L)^(-1/2) L^T the optimal map from N(0, S2) to
    N(0, S1).
    """
    x = features.to("cpu", torch.float64) - generated.mean
    L = reference.factor
    values, vectors = torch.linalg.eigh(L.T @ generated.cov @ L)
    keep = values > generated.d * torch.finfo(torch.float64).eps * values[-1:].clamp(min=0)
    half = (x @ L) @ (vectors[:, keep] * values[keep] ** -0.25)  # |half|^2 = x^T T x
    return 2 * x @ (generated.mean - reference.mean) + x.square().sum(1) - half.square().sum(1)


def _float64(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ConfigError(f"Features must be (n, d) with n >= 2, got shape {tuple(features.shape)}.")
    return double(features.detach())


def double(x: Tensor) -> Tensor:
    """float64, on the CPU if the device of `x` has none (Apple's GPUs)."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def pair(reference: Tensor, generated: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Two sets of features, (n, d) and (m, d), in float64."""
    x, y = reference, generated
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ConfigError(f"Two sets of at least {least} features of one width are needed, got {shapes}.")
    return double(x), double(y)
