"""C_T: whether generated images are copies of training images (Meehan, Chaudhuri, and Dasgupta 2020,
https://arxiv.org/abs/2004.05675)."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.metrics.functional import Estimate, pair
from lit_gen.metrics.neighbours import nearest

CELLS, OF_A_CELL = 3, 20  # generated images that a cell must exceed, as in dgm-eval
ENOUGH = CELLS * OF_A_CELL  # of more generated images than these one cell at least has enough
Triple = tuple[Tensor, Tensor, Tensor]  # of training, test, and generated images
COMPONENTS = 64  # of the features in which the cells are found, as in dgm-eval
SEED = 0


def rank_statistic(training: Tensor, test: Tensor, generated: Tensor) -> Estimate:
    """Z_U: whether generated images (m, d) lie farther from their nearest training image than test images
    (n, d) do from theirs, in standard deviations of the Mann-Whitney statistic of two equal distributions.

    Negative: nearer, which is copying; positive: farther, which is underfitting.
    """
    farther, nearer = (nearest(training, x)[0][:, 0].contiguous() for x in (generated, test))
    nearer = nearer.sort().values
    below, up_to = torch.searchsorted(nearer, farther), torch.searchsorted(nearer, farther, right=True)
    m, n = len(farther), len(nearer)
    # Of each generated image: the fraction of test images nearer than it, ties by half.
    placements = (below + up_to).to(torch.float64) / (2 * n)
    sd = math.sqrt(m * n * (m + n + 1) / 12)
    se = m * n * float(placements.std()) / math.sqrt(m) / sd if m > 1 else 0.0
    return Estimate((m * n * float(placements.mean()) - (m * n / 2 - 0.5)) / sd, se)


def cell_statistics(sets: Triple, cells: Triple) -> list[Estimate]:
    """Z_U within each cell, 0 for one without generated or without test images.

    `sets` are training, test, and generated features, `cells` the numbers of their cells. Raises ConfigError
    for a cell that has both generated and test images, and no training images.
    """
    estimates = []
    for c in range(1 + max(int(cell.max()) for cell in cells)):
        parts = [x[cell == c] for x, cell in zip(sets, cells, strict=True)]
        if not (len(parts[1]) and len(parts[2])):
            estimates.append(Estimate(0.0, 0.0))
            continue
        if not len(parts[0]):
            raise ConfigError(f"Cell {c} has no training images: C_T has no distances to measure there.")
        estimates.append(rank_statistic(*parts))
    return estimates


def copying(
    training: Tensor,
    test: Tensor,
    generated: Tensor,
    cells: Triple | None = None,
    tau: float | None = None,
) -> Estimate:
    """C_T: the mean of Z_U over the cells that hold more than a fraction `tau` of the generated images (more
    than 20 of them by default), each counting by its test images.

    `cells` are the numbers of the cells of training, test, and generated images; by default those of k-means
    in the first 64 principal components of the training features, in which the distances are measured too.
    NaN if no cell holds enough. All are features (N, d) of their own N.
    """
    training, test = pair(training, test)
    sets = training, test, pair(test, generated)[1]
    if cells is None:
        sets = projected(sets)
        cells = _k_means(sets)
    tau = OF_A_CELL / len(generated) if tau is None else tau
    estimates = cell_statistics(sets, cells)
    of_test, of_generated = (
        torch.bincount(c.long(), minlength=len(estimates)).to(torch.float64) / len(c) for c in cells[1:]
    )
    weights = torch.where(of_generated > tau, of_test, 0)
    weights = (weights / weights.sum()).tolist()
    value = math.fsum(w * z.value for w, z in zip(weights, estimates, strict=True))
    return Estimate(value, math.hypot(*(w * (z.se or 0) for w, z in zip(weights, estimates, strict=True))))


def projected(sets: Triple, components: int = COMPONENTS) -> Triple:
    """All sets on the first principal components of the training features, if they are wider."""
    training, test, generated = sets
    if training.shape[1] <= components:
        return sets
    mean = training.mean(0)
    axes = torch.linalg.eigh((training - mean).T @ (training - mean)).eigenvectors[:, -components:]
    return (training - mean) @ axes, (test - mean) @ axes, (generated - mean) @ axes


def _k_means(sets: Triple) -> Triple:
    from sklearn.cluster import KMeans

    training, test, generated = (np.ascontiguousarray(x.cpu()) for x in sets)
    n_init: Any = 10  # annotated as the default, "auto"
    fitted = KMeans(CELLS, n_init=n_init, random_state=SEED).fit(training)

    def cells(x: np.ndarray) -> Tensor:
        return torch.from_numpy(fitted.predict(x)).to(sets[0].device)

    return cells(training), cells(test), cells(generated)
