"""MeanFlow: a network of the average velocity between two times, which samples in one step (Geng et al. 2025,
https://arxiv.org/abs/2505.13447).

On the rectified flow x_t = (1 - t) x_0 + t z, with velocity v, the average velocity u(x_t, t, r) between
r <= t and t is that with which x_r = x_t - (t - r) u. Its derivative along the flow gives the identity
u = v - (t - r) du/dt, on which it is trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.precision import switched
from lit_gen.rng import Generator, rand, randn
from lit_gen.score.condition import Label
from lit_gen.score.denoiser import AbstractDenoiser, Denoiser
from lit_gen.score.fewstep.tangent import jvp
from lit_gen.score.losses import sum_of_pixels
from lit_gen.score.precondition import Precondition
from lit_gen.score.sde import Flow, Process, per_image, wide

__all__ = ["MeanFlowDenoiser", "MeanFlowLoss", "TwoLogitNormals", "heading"]


class MeanFlowDenoiser(Denoiser):
    """A denoiser on `Flow` whose network is also told t - r, as `second_time` (B,).

    The average velocity is u = (x_t - x0_hat) / t, with x0_hat by whatever preconditioning: so a diffusion
    model with an added second time is a MeanFlow model without a change, that of its velocity, and with
    `PredictFlow` the network is u itself. Called as a denoiser it is one, at r = t; inside `heading` its
    images are x_t - t u instead.

    Raises ConfigError for another process.
    """

    destination: Tensor | None = None  # the noise level of r, see `heading`

    def __init__(self, net: nn.Module, process: Process, precondition: Precondition):
        super().__init__(net, process, precondition)
        if not isinstance(process, Flow):
            raise ConfigError(
                f"model.net.second_time={getattr(net, 'second_time', '')} is for MeanFlow, which needs "
                f"model/process=flow, not {type(process).__name__}. model/precondition=edm works there too."
            )

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None, augment_label: Label = None) -> Tensor:
        if len(x_t) == 0:
            return x_t.clone()
        second = torch.zeros_like(t) if self.destination is None else t - self.process.time(self.destination)
        c_skip, c_out, f = self._terms(x_t, t, label, augment_label, second_time=second)
        return per_image(c_skip, x_t) * x_t + per_image(c_out, x_t) * f

    def average_velocity(
        self, x_t: Tensor, t: Tensor, r: Tensor, label: Label = None, augment_label: Label = None
    ) -> Tensor:
        """u (B, C, H, W) from the times t to r, each () or (B,), t above 0."""
        if len(x_t) == 0:
            return x_t.clone()
        t, r = wide(t), wide(r)
        c_skip, c_out, f = self._terms(x_t, t, label, augment_label, second_time=t - r)
        return per_image((1 - c_skip) / t, x_t) * x_t - per_image(c_out / t, x_t) * f

    def jump(
        self, x_t: Tensor, t: Tensor, r: Tensor, label: Label = None, augment_label: Label = None
    ) -> Tensor:
        """x_r = x_t - (t - r) u (Equation 12)."""
        return x_t - per_image(t - r, x_t) * self.average_velocity(x_t, t, r, label, augment_label)


@contextmanager
def heading(denoiser: nn.Module, level: Tensor) -> Iterator[None]:
    """Inside, all `MeanFlowDenoiser`s in `denoiser`, guides included, are on their way to a noise level ():
    x0_hat is where their average velocity until then would lead if it lasted until t = 0. An Euler step to
    that level is then their jump, and what combines denoisers combines average velocities.
    """
    parts = [part for part in denoiser.modules() if isinstance(part, MeanFlowDenoiser)]
    with switched(*((part, "destination", level) for part in parts)):
        yield


@dataclass(frozen=True)
class TwoLogitNormals:
    """Times r <= t, each the logistic function of a normal number: of `mean` and `std` for t, of `r_mean` and
    `r_std` for r.

    The defaults are the better recipe of the code for CIFAR-10, in which r is at most t. The paper has both
    of one law, and `ordered`: t is the larger. With probability 1 - `different` r = t. Both are multiplied by
    `largest`, so that a network is not asked where it knows nothing.
    """

    mean: float = -0.6
    std: float = 1.6
    r_mean: float = -4.0
    r_std: float = 1.6
    different: float = 0.75
    ordered: bool = False
    largest: float = 1.0

    def __post_init__(self):
        if not 0 <= self.different <= 1:
            raise ConfigError(
                f"model.loss.times.different={self.different}: the probability of r < t lies in [0, 1]."
            )
        if not 0 < self.largest <= 1:
            raise ConfigError(f"model.loss.times.largest={self.largest}: must lie in (0, 1].")

    def of(self, normal: Tensor, r_normal: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """(t, r), each (B,), of two standard normal numbers and one from [0, 1)."""
        t = self.largest * (self.mean + self.std * normal).sigmoid()
        r = self.largest * (self.r_mean + self.r_std * r_normal).sigmoid()
        if self.ordered:
            t, r = torch.maximum(t, r), torch.minimum(t, r)
        return t, torch.minimum(r.where(uniform >= 1 - self.different, t), t)

    def __call__(self, like: Tensor, generator: Generator = None) -> tuple[Tensor, Tensor]:
        draws = [draw((len(like),), generator, device=like.device) for draw in (randn, randn, rand)]
        return self.of(*map(wide, draws))


@dataclass(frozen=True)
class MeanFlowLoss:
    """||u - stop(v - (t - r) du/dt)||^2 summed over the pixels, and divided by its own stopped value, plus
    `norm_eps`, to the power `norm_p`, so that no image counts too much (Equations 10, 11, and 22).

    du/dt is the total derivative at fixed r, along (v, 1, 0) in (x_t, t, r). It is taken in float32, and the
    differences in float64. With a power near 1 the value tells nothing: it is about 1 whatever is learned.
    """

    differentiates: ClassVar[str] = "MeanFlow takes a forward derivative"
    times: TwoLogitNormals = TwoLogitNormals()
    norm_p: float = 0.75
    norm_eps: float = 1e-3

    def draw(
        self, process: Process, x_0: Tensor, generator: Generator = None, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t (B,), z of the shape of `x_0`, and r (B,)."""
        t, r = self.times(x_0, generator)
        return t, randn(x_0.shape, generator, device=x_0.device), r

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        x_0: Tensor,
        t: Tensor,
        z: Tensor,
        r: Tensor,
        label: Label = None,
        augment_label: Tensor | None = None,
    ) -> Tensor:
        """(B,) in float64."""
        if not isinstance(denoiser, MeanFlowDenoiser):
            raise ConfigError(f"MeanFlow trains a MeanFlowDenoiser, not a {type(denoiser).__name__}.")
        v = wide(z) - wide(x_0)
        x_t = denoiser.process.marginal(wide(x_0), t, wide(z))

        def velocity(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return denoiser.average_velocity(x_t, t, r, label, augment_label)

        u, derivative = jvp(velocity, (x_t, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
        # Where r = t nothing of the derivative is to come in, whatever it is.
        rest = (per_image(t - r, v) * derivative).where(per_image(t - r, v) > 0, 0.0)
        squares = sum_of_pixels((u - (v - rest)).square())
        return squares * (squares.detach() + self.norm_eps).pow(-self.norm_p)
