"""The Vendi score: how many different images a set has (Friedman and Dieng 2023,
https://arxiv.org/abs/2210.02410).

Of order q (Pasarkar and Dieng 2024, https://arxiv.org/abs/2310.12952): below 1 rare images count for more,
above 1 for less.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lit_gen.errors import ConfigError
from lit_gen.metrics.functional import Estimate, double

BLOCK = 4096  # rows in float64 at a time


def vendi_score(features: Tensor, q: float = 1.0, weights: Tensor | None = None) -> Estimate:
    """(sum lambda^q)^(1 / (1 - q)) of the eigenvalues of the images' cosine similarities / n: from 1, all
    features (n, d) alike, to min(n, d). q = 1: exp(-sum lambda log lambda); q = inf: 1 / max lambda.

    `weights` (n,) are the images' probabilities, 1 / n each by default. Compare the score with that of real
    images, as many of them. The standard error is the infinitesimal jackknife's; none for n <= d, where the
    score grows with n.
    """
    n, d = features.shape
    p = features.new_full((n,), 1 / n) if weights is None else weights
    if p.shape != (n,) or bool((p < 0).any()):
        raise ConfigError(f"{n} images need as many weights, none below 0, got shape {tuple(p.shape)}.")
    p = double(p) / double(p).sum()
    if n <= d:
        z = normalize(double(features)) * p.sqrt()[:, None]
        return Estimate(_score(torch.linalg.eigvalsh(z @ z.T), n, q)[0], None)
    parts = list(zip(features.split(BLOCK), p.split(BLOCK), strict=True))
    second = p.new_zeros(d, d)  # it has the eigenvalues of the (n, n) similarities
    for rows, share in parts:
        z = normalize(double(rows))
        second.addmm_(z.T, z * share[:, None])
    values, vectors = torch.linalg.eigh(second)
    score, slope = _score(values, n, q)
    # What an image adds to log score is z^T f(Z^T Z / n) z, with the slope f of its eigenvalues.
    influence = torch.cat([(normalize(double(rows)) @ vectors).square() @ slope for rows, _ in parts])
    mean = p @ influence
    se = (p * (influence - mean)).square().sum().sqrt() * math.sqrt(n / (n - 1))
    return Estimate(score, score * float(se))


def vendi_of_similarities(similarities: Tensor, q: float = 1.0, weights: Tensor | None = None) -> float:
    """The same of any similarities: positive semidefinite (n, n) with a diagonal of ones."""
    K, n = double(similarities), len(similarities)
    root = K.new_full((n,), 1 / n).sqrt() if weights is None else (double(weights) / weights.sum()).sqrt()
    return _score(torch.linalg.eigvalsh(root[:, None] * K * root), n, q)[0]


def _score(values: Tensor, n: int, q: float) -> tuple[float, Tensor]:
    """The score of eigenvalues, and the slopes of its logarithm in them, of the same shape. Those that
    rounding could have made are zeros: q < 1 would count them."""
    if not q >= 0:
        raise ConfigError(f"q={q}: the order of a Vendi score is 0 or more.")
    kept = values > n * torch.finfo(values.dtype).eps * values.max()
    x, slope = values[kept], torch.zeros_like(values)
    if q == 1:
        slope[kept] = -x.log()
        return math.exp(float(-(x * x.log()).sum())), slope
    if math.isinf(q):
        slope[values.argmax()] = -1 / values.max()
        return float(1 / values.max()), slope
    total = x.pow(q).sum()
    slope[kept] = q / (1 - q) * x.pow(q - 1) / total
    return float(total.pow(1 / (1 - q))), slope
