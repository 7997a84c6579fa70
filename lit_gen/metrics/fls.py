"""The feature likelihood score (Jiralerspong et al. 2023, https://arxiv.org/abs/2302.04440): quality,
diversity, and novelty by the likelihood of test images under Gaussians around the generated ones. Features
are (N, d), each set of its own N."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_gen.metrics.functional import pair
from lit_gen.metrics.neighbours import squared_distances

BLOCK = 1024  # rows of a distance matrix that a step works on at a time
STEPS, RATE, LATE_RATE = 100, 0.5, 0.05  # of Adam; the late rate is that of the second half
BOUNDS = -100, 20  # of the logarithm of a variance


class Likelihood(NamedTuple):
    """The score, 100 for generated images as good as the baseline; how many per cent of the Gaussians, beyond
    one half, fit the training images better than the test images (50: all are copies); the mean negative
    log-likelihood of the test images; the loss before every step."""

    score: float
    overfit: float
    nll: float
    losses: list[float]


def feature_likelihood(training: Tensor, baseline: Tensor, test: Tensor, generated: Tensor) -> Likelihood:
    """100 exp(-2 (nll - nll of the baseline) / d), all sets of features (., d) standardized together.

    Around every generated image stands a Gaussian of its own variance; the variances are those that 100
    steps of Adam find for the likelihood of the training images. The baseline are real images that are
    neither training nor test images, or at least not those training images.
    """
    sets = [pair(training, x)[1] for x in (training, baseline, test, generated)]
    union = torch.cat(sets)
    sd = union.std(0)
    training, baseline, test, generated = (
        (x - union.mean(0)) / torch.where(sd > 0, sd, 1) for x in sets
    )  # a constant feature says nothing
    log_variance, losses = _fit(training, generated)
    nll = -float(_log_likelihoods(test, generated, log_variance).mean())
    nll_baseline = -float(_log_likelihoods(test, baseline, _fit(training, baseline)[0]).mean())
    k = min(len(training), len(test))
    of_training, of_test = (_log_terms(x[:k], generated, log_variance).logsumexp(0) for x in (training, test))
    overfit = 100 * float((of_training > of_test).double().mean()) - 50
    score = 100 * math.exp(-2 * (nll - nll_baseline) / training.shape[1])
    return Likelihood(score, overfit, nll, losses)


def _fit(x: Tensor, centers: Tensor) -> tuple[Tensor, list[float]]:
    """The logarithms of the centers' variances (m,), and the losses on the way."""
    s = x.new_zeros(len(centers), requires_grad=True)
    optimizer = torch.optim.Adam([s], lr=RATE)
    blocks = [(rows, _squares(rows, centers)) for rows in x.split(BLOCK)]
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE if step < STEPS // 2 else LATE_RATE
        optimizer.zero_grad()
        loss = 0.0
        for rows, squares in blocks:
            part = -_mixture(squares, s, rows.shape[1]).sum() / len(x)
            part.backward()
            loss += float(part.detach())
        losses.append(loss)
        optimizer.step()
        with torch.no_grad():
            s.clamp_(*BOUNDS)
    return s.detach(), losses


def _log_likelihoods(x: Tensor, centers: Tensor, log_variance: Tensor) -> Tensor:
    """(n,), without the factor (2 pi)^(-d/2)."""
    parts = [_mixture(_squares(rows, centers), log_variance, x.shape[1]) for rows in x.split(BLOCK)]
    return torch.cat(parts)


def _mixture(squares: Tensor, s: Tensor, d: int) -> Tensor:
    return (squares / (-2 * s.exp()) - d / 2 * s).logsumexp(1) - math.log(len(s))


def _log_terms(x: Tensor, centers: Tensor, s: Tensor) -> Tensor:
    return _squares(x, centers) / (-2 * s.exp()) - x.shape[1] / 2 * s


def _squares(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([block for _, block in squared_distances(x, y)])
