"""Continuous-time consistency models, sCM (Lu & Song 2024, https://arxiv.org/abs/2410.11081): consistency of
pairs that are infinitely close, by the derivative of the network along a path instead of a second call.

Any denoiser is seen in the units of TrigFlow: the angle a = atan(s / sigma_data) of a noise level s, the
state x = cos(a) x_0 + sin(a) sigma_data z, and the network F with x0_hat = cos(a) x - sin(a) sigma_data F.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.precision import full_float32
from lit_gen.rng import Generator
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.fewstep.tangent import jvp
from lit_gen.score.fewstep.teacher import Distillation
from lit_gen.score.losses import NoiseDistribution, Reduction, Uncertainty, Weight, mean_of_pixels, noise
from lit_gen.score.sde import Process, per_image, wide

__all__ = ["ContinuousConsistencyLoss", "inverse_level", "trig_flow"]


def inverse_level(process: Process, t: Tensor) -> Tensor:
    """1 / s, the prior weight of FastGen's sCM."""
    return process.noise_level(t).reciprocal()


def trig_flow(
    denoiser: Callable[..., Tensor],
    process: Process,
    sigma_data: float,
    x: Tensor,
    angle: Tensor,
    **told: Any,
) -> Tensor:
    """F(x, a) of a denoiser on `process`, like `x` (B, C, H, W), for angles (B,) in (0, pi / 2).

    With EDM's preconditioning it is the network itself, negated.
    """
    cos, sin = (per_image(c, x) for c in (angle.cos(), angle.sin()))
    t = process.time(sigma_data * angle.tan())
    x0_hat = denoiser(per_image(process.alpha(t), x) / cos * x, t, **told)
    return (cos * x - x0_hat) / (sigma_data * sin)


class ContinuousConsistencyLoss(Distillation):
    """weight(t) e^-u ||F - stop(F + g)||^2 + u, whose gradient leads F along g and u(s) to the logarithm of
    the first term (Algorithm 1). u is `lit_gen.score.losses.Uncertainty`, trained with the network.

    g is the tangent, -cos^2 (sigma_data F - w) - R cos sin (x + sigma_data dF/da), divided by its own norm +
    `c`. w is the velocity dx/da: cos sigma_data z - sin x_0 in training (sCT), and in distillation (sCD,
    `distill`) the teacher's. R rises from 0 to 1 over the first `warmup` batches. The norm is the root of
    `norm` of the squares, the RMS by default; `sum_of_pixels` gives the plain norm.

    `reduction` takes the squares of the pixels. FastGen divides their mean by their number once more, which
    moves u alone.

    The network and its derivative, which bfloat16 and TF32 spoil, run in full float32 whatever the autocast.
    The network must be neither compiled nor sharded.
    """

    differentiates: ClassVar[str] = "sCM takes a forward derivative"

    def __init__(
        self,
        noise_distribution: NoiseDistribution,
        sigma_data: float = 0.5,
        warmup: int = 10_000,
        c: float = 0.1,
        weight: Weight = inverse_level,
        norm: Reduction = mean_of_pixels,
        reduction: Reduction = mean_of_pixels,
        features: int = 128,
        distill: bool = False,
        guidance: float = 1.0,
        tune: bool = False,
    ):
        super().__init__(distill, guidance, tune)
        for name, value in (("sigma_data", sigma_data), ("c", c)):
            if value <= 0:
                raise ConfigError(f"model.loss.{name}={value}: must be above 0.")
        if warmup < 0:
            raise ConfigError(f"model.loss.warmup={warmup}: give a number of batches, or 0.")
        self.noise_distribution, self.sigma_data, self.warmup, self.c = (
            noise_distribution,
            sigma_data,
            warmup,
            c,
        )
        self.weight, self.norm, self.reduction = weight, norm, reduction
        self.u = Uncertainty(features)

    def draw(
        self, process: Process, x_0: Tensor, generator: Generator = None, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The times t (B,), the noise z like `x_0`, and R of this step (B,)."""
        t = self.noise_distribution(process, x_0, generator)
        ramp = min(step / self.warmup, 1.0) if self.warmup else 1.0
        return t, noise(x_0, generator), torch.full_like(t, ramp)

    def forward(
        self, denoiser: AbstractDenoiser, x_0: Tensor, t: Tensor, z: Tensor, ramp: Tensor, **told: Any
    ) -> Tensor:
        """(B,) in float64, which may be negative. `told` goes to the denoiser: `label` and
        `augment_label`."""
        with torch.autocast(x_0.device.type, enabled=False), full_float32():
            f, g = self.tangent(denoiser, x_0, t, z, ramp, **told)
        squares = self.reduction((f - f.detach() - g).square())
        u = self.u.uncertainty(denoiser.process, t)
        return self.weight(denoiser.process, t) * squares / u.exp() + u

    def tangent(
        self, denoiser: AbstractDenoiser, x_0: Tensor, t: Tensor, z: Tensor, ramp: Tensor, **told: Any
    ) -> tuple[Tensor, Tensor]:
        """F with its gradient, and the normalized g; both (B, C, H, W) in float64."""
        x_0, z = wide(x_0), self.sigma_data * wide(z)
        angle = (denoiser.process.noise_level(t) / self.sigma_data).atan()
        cos, sin = (per_image(c, x_0) for c in (angle.cos(), angle.sin()))
        x = cos * x_0 + sin * z

        def network(x: Tensor, angle: Tensor, ask: Callable[..., Tensor] = denoiser) -> Tensor:
            return trig_flow(ask, denoiser.process, self.sigma_data, x, angle, **told)

        velocity = cos * z - sin * x_0
        if self.distill:
            velocity = self.sigma_data * network(x, angle, self.taught)
        # cos sin dF/da is finite at both ends, where dF/da is not.
        f, derivative = jvp(network, (x, angle), (cos * sin * velocity, angle.cos() * angle.sin()))
        ramp = per_image(ramp, x)
        g = cos.square() * (velocity - self.sigma_data * f.detach())
        g = g - ramp * (cos * sin * x + self.sigma_data * derivative)
        return f, g / (per_image(self.norm(g.square()).sqrt(), g) + self.c)
