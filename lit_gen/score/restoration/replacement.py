"""Restoration by replacement (Song et al. 2021, Appendix I.2 and I.3, https://arxiv.org/abs/2011.13456)."""

from collections.abc import Callable

from torch import Tensor

from lit_gen.rng import Generator, randn
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.restoration.noise import Noise, check_exact
from lit_gen.score.restoration.operators import LinearOperator
from lit_gen.score.samplers.ode import Trace
from lit_gen.score.samplers.predictor_corrector import predictor_corrector
from lit_gen.score.sde import Process, per_image, wide

__all__ = ["Replace", "replacement"]


class Replace:
    """`replace(x_t, t)`: the part of x_t that A sees becomes that of the measured image y at time t, with
    fresh noise.

    x_t + A^+ (alpha y + sigma A z - A x_t). At noise level 0 the result has A x = y, up to what y has outside
    the range of A.
    """

    def __init__(self, process: Process, operator: LinearOperator, y: Tensor, generator: Generator = None):
        self.process, self.operator, self.y, self.generator = process, operator, wide(y), generator

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        z = randn(x_t.shape, self.generator, device=x_t.device, dtype=x_t.dtype)
        alpha, sigma = (per_image(c, x_t) for c in (self.process.alpha(t), self.process.sigma(t)))
        missing = alpha * self.y + self.operator(sigma * z - x_t)
        return x_t + self.operator.pseudo_inverse(missing)


def replacement(
    denoiser: AbstractDenoiser,
    x: Tensor,
    operator: LinearOperator,
    y: Tensor,
    *,
    noise_std: Noise = 0.0,
    num_steps: int = 1000,
    sampler: Callable[..., Tensor] = predictor_corrector,
    label: Tensor | None = None,
    generator: Generator = None,
    trace: Trace | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) in float64 with A x_0 = y from `x` at t_max: a sampler that takes `constrain`, put
    right after every move. For measurements without noise; the seen and the unseen part know little of one
    another (see `repaint`). Raises ConfigError for noise that A^+ would blow up.
    """
    check_exact(noise_std, operator, x, "replacement")
    constrain = Replace(denoiser.process, operator, y, generator)
    watched = {"label": label, "generator": generator, "trace": trace}
    return sampler(denoiser, x, num_steps=num_steps, constrain=constrain, **watched)
