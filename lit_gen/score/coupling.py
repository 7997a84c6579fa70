"""Minibatch optimal transport (Tong et al. 2023, https://arxiv.org/abs/2302.00482; Pooladian et al. 2023,
https://arxiv.org/abs/2304.14772): within a batch every image gets the noise that lies near it, which makes
the paths of flow matching straighter and its regression target less noisy.
"""

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.losses import DenoisingLoss, UncertaintyLoss
from lit_gen.score.sde import Process, wide


def assignment(a: Tensor, b: Tensor) -> Tensor:
    """int64 (N,), the permutation p of least sum_i ||a_i - b_p(i)||^2, for a and b of one shape (N, ...).

    It is the exact optimal transport of N points onto N others, where ties leave a choice. Solved on the CPU,
    which waits for the device. Raises ValueError for numbers that are not finite.
    """
    # The norms are in the sum whatever the permutation: the products alone decide, and lose no digits.
    products = wide(a).flatten(1) @ wide(b).flatten(1).T
    return torch.from_numpy(linear_sum_assignment(products.cpu().numpy(), maximize=True)[1]).to(a.device)


class OptimalTransportLoss(nn.Module):
    """`loss` with the noise of a batch permuted by `assignment`: images, their labels and times stay.

    Each rank couples its own part of the batch, a validation batch its own images. Waits for the device in
    every step. For flow matching and samplers of the ODE (Euler, Heun, any `probability_flow`): given its
    image, the noise of a batch is no longer N(0, I), so that the network's output is the velocity of a flow
    to the data, but no score, which stochastic samplers and restoration need. A class prefers some noise
    likewise: a conditional model that samples from N(0, I) is biased by it (Cheng & Schwing 2025,
    https://arxiv.org/abs/2503.10636).
    """

    def __init__(self, loss: DenoisingLoss | UncertaintyLoss):
        super().__init__()
        if not isinstance(loss, DenoisingLoss | UncertaintyLoss):
            raise ConfigError(
                f"Optimal transport couples the images and noise of a denoising loss, not of "
                f"{type(loss).__name__}: take model/loss=flow_ot."
            )
        self.loss = loss

    def draw(
        self, process: Process, x_0: Tensor, generator: Generator = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """t (B,) and z, not coupled yet: the draws know nothing of the images but their shape."""
        return self.loss.draw(process, x_0, generator, step)

    def forward(
        self, denoiser: AbstractDenoiser, x_0: Tensor, t: Tensor, z: Tensor, **conditions: Any
    ) -> Tensor:
        """(B,) in float64."""
        return self.loss(denoiser, x_0, t, z[assignment(x_0, z)], **conditions)
