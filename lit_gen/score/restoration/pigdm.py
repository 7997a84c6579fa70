"""Pseudo-inverse guidance (Song et al. 2023, "Pseudoinverse-Guided Diffusion Models for Inverse Problems",
https://openreview.net/forum?id=9_gsMA8MRKQ)."""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator
from lit_gen.score.condition import Label
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.restoration.noise import Noise, deviation
from lit_gen.score.restoration.observations import Observation
from lit_gen.score.restoration.operators import LinearOperator
from lit_gen.score.samplers.ddim import ddim
from lit_gen.score.samplers.ode import Trace
from lit_gen.score.sde import per_image, wide

__all__ = ["PosteriorDenoiser", "pigdm"]


class PosteriorDenoiser(AbstractDenoiser):
    """E[x_0 | x_t, y] for y = A x_0 + noise_std n, if q(x_0 | x_t) were N(x0_hat, r^2 I) with r^2 = s^2 d^2 /
    (s^2 + d^2), s the noise level and d = `sigma_data` (Equations 7 and 8).

    Exact for data N(mean, d^2 I). A denoiser like any other: every sampler draws from the posterior with it.
    An `Observation` in the operator's place, which says its own noise, is taken by its tangent at x0_hat.
    """

    def __init__(
        self,
        denoiser: AbstractDenoiser,
        operator: LinearOperator | Observation,
        y: Tensor,
        noise_std: Noise = 0.0,
        sigma_data: float = 0.5,
    ):
        super().__init__()
        if sigma_data <= 0:
            raise ConfigError(f"sigma_data={sigma_data}: must be positive.")
        self.denoiser, self.process, self.operator, self.y = denoiser, denoiser.process, operator, wide(y)
        self.variance, self.sigma_data = deviation(noise_std, self.y, operator) ** 2, sigma_data

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        level = self.process.noise_level(t)
        r = (level.square().reciprocal() + self.sigma_data**-2).rsqrt()
        with torch.enable_grad():
            x = wide(x_t).detach().requires_grad_()
            x0_hat = self.denoiser(x, t, label)
            pull = self._pull(x0_hat.detach(), r.square())
            (gradient,) = torch.autograd.grad(x0_hat, x, pull)
        gain = self.process.sigma(t).square() / self.process.alpha(t)
        return (x0_hat.detach() + per_image(gain, x) * gradient).to(x_t)

    def _pull(self, x0_hat: Tensor, variance: Tensor) -> Tensor:
        """The gradient of log q(y | x0) if x0 were N(x0_hat, variance I)."""
        if isinstance(self.operator, Observation):
            return self.operator.pull(self.y, x0_hat, per_image(variance, x0_hat))
        rest = self.y - self.operator(x0_hat)
        return self.operator.adjoint(self.operator.solve(rest, self.variance, per_image(variance, rest)))


def pigdm(
    denoiser: AbstractDenoiser,
    x: Tensor,
    operator: LinearOperator | Observation,
    y: Tensor,
    *,
    noise_std: Noise = 0.0,
    sigma_data: float = 0.5,
    num_steps: int = 100,
    sampler: Callable[..., Tensor] = ddim,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max that explains y, by any `sampler` of the
    `PosteriorDenoiser`.
    """
    posterior = PosteriorDenoiser(denoiser, operator, y, noise_std, sigma_data)
    return sampler(posterior, x, num_steps=num_steps, label=label, generator=generator, trace=trace)
