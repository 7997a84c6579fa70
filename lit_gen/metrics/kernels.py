"""Maximum mean discrepancies of two sets of features: KID and CMMD, in float64, by blocks. Features are (n,
d) and (m, d)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lit_gen.metrics.functional import Estimate, pair

Kernel = Callable[[Tensor, Tensor], Tensor]
BLOCK = 256  # rows of a kernel matrix held at a time; more leave the cache


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """KID's (x . y / d + 1)^3; (n, d), (m, d) -> (n, m)."""
    K = (x @ y.T).div_(x.shape[1]).add_(1)
    return K.square().mul_(K)


def rbf_kernel(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)); (n, d), (m, d) -> (n, m)."""
    squares = (x @ y.T).mul_(-2).add_(x.square().sum(1)[:, None]).add_(y.square().sum(1))
    return squares.div_(-2 * sigma**2).exp_()


def kernel_distance(reference: Tensor, generated: Tensor, kernel: Kernel = polynomial_kernel) -> Estimate:
    """The unbiased MMD^2 of the whole sets; with the default kernel KID without its subsets, hence without a
    seed.

    Pairs of an image with itself are left out within either set. Bińkowski et al. 2018,
    https://arxiv.org/abs/1801.01401
    """
    x, y = pair(reference, generated)
    within_x = _row_means(x, x, kernel, own=False)
    return _mmd(within_x, _row_means(y, y, kernel, own=False), _row_means(y, x, kernel))


def cmmd(reference: Tensor, generated: Tensor, sigma: float = 10.0) -> Estimate:
    """1000 times the biased MMD^2 with a Gaussian kernel, of CLIP embeddings divided by their norms.

    Jayasumana et al. 2024, https://arxiv.org/abs/2401.09603
    """
    x, y = pair(reference, generated)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return rbf_kernel(a, b, sigma)

    return _mmd(_row_means(x, x, kernel), _row_means(y, y, kernel), _row_means(y, x, kernel)).scaled(1000)


def _mmd(within_x: Tensor, within_y: Tensor, across: Tensor) -> Estimate:
    """From the kernel's means over each image's partners: (n,), (m,) and, for the generated images, (m,)."""
    value = within_x.mean() + within_y.mean() - 2 * across.mean()
    influence = 2 * (within_y - across)  # of a generated image: it stands in both sums over y
    return Estimate(float(value), float(influence.std() / math.sqrt(len(influence))))


def _row_means(x: Tensor, y: Tensor, kernel: Kernel, own: bool = True) -> Tensor:
    """The mean of k(x_i, y_j) over j, (n,); `own=False` leaves out j = i, for y = x."""
    means = []
    for start in range(0, len(x), BLOCK):
        K = kernel(x[start : start + BLOCK], y)
        total = K.sum(1) if own else K.sum(1) - K.diagonal(start)
        means.append(total / (len(y) if own else len(y) - 1))
    return torch.cat(means)
