"""Moment matching posterior sampling (Rozet et al. 2024, "Learning Diffusion Priors from Observations by
Expectation Maximization", https://arxiv.org/abs/2405.13712)."""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator
from lit_gen.score.condition import Label
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.restoration.noise import Noise, check_linear, deviation
from lit_gen.score.restoration.operators import LinearOperator
from lit_gen.score.restoration.solvers import Solver, gmres
from lit_gen.score.samplers.ddim import ddim
from lit_gen.score.samplers.ode import Trace
from lit_gen.score.sde import per_image, wide

__all__ = ["MomentMatchingDenoiser", "mmps"]


class MomentMatchingDenoiser(AbstractDenoiser):
    """E[x_0 | x_t, y] for y = A x_0 + noise, if q(x_0 | x_t) were N(x0_hat, C) with C = sigma^2 / alpha
    dx0_hat/dx_t, which is its covariance (Tweedie).

    x0_hat + C A^T v with (Sigma_y + A C A^T) v = y - A x0_hat, solved by `iterations` products, of one
    backward pass each and one more at the end. Exact for Gaussian data if there are enough of them. Any
    operator takes a noise map. `solver` is `gmres`, because the Jacobian of a network is not symmetric, or
    `cg`. A denoiser like any other: every sampler draws from the posterior with it.
    """

    def __init__(
        self,
        denoiser: AbstractDenoiser,
        operator: LinearOperator,
        y: Tensor,
        noise_std: Noise = 0.0,
        iterations: int = 1,
        solver: Solver = gmres,
    ):
        super().__init__()
        check_linear(operator, "mmps")
        if iterations < 1:
            raise ConfigError(f"iterations={iterations}: must be at least 1.")
        self.denoiser, self.process, self.operator, self.y = denoiser, denoiser.process, operator, wide(y)
        self.variance = deviation(noise_std, self.y) ** 2
        self.iterations, self.solver = iterations, solver

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        if len(x_t) == 0:
            return x_t.clone()
        gain = self.process.sigma(t).square() / self.process.alpha(t)
        A = self.operator
        with torch.enable_grad():
            x = wide(x_t).detach().requires_grad_()
            output = self.denoiser(x, t, label)
        x0_hat = output.detach()

        def covariance(v: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(output, x, v, retain_graph=True)
            return per_image(gain, x) * product

        def system(v: Tensor) -> Tensor:
            return self.variance * v + A(covariance(A.adjoint(v)))

        v = self.solver(system, self.y - A(x0_hat), iterations=self.iterations)
        return (x0_hat + covariance(A.adjoint(v))).to(x_t)


def mmps(
    denoiser: AbstractDenoiser,
    x: Tensor,
    operator: LinearOperator,
    y: Tensor,
    *,
    noise_std: Noise = 0.0,
    iterations: int = 1,
    solver: Solver = gmres,
    num_steps: int = 100,
    sampler: Callable[..., Tensor] = ddim,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 from `x` at t_max that explains y, by any `sampler` of the
    `MomentMatchingDenoiser`: num_steps evaluations, and num_steps (iterations + 1) backward passes.
    """
    posterior = MomentMatchingDenoiser(denoiser, operator, y, noise_std, iterations, solver)
    return sampler(posterior, x, num_steps=num_steps, label=label, generator=generator, trace=trace)
