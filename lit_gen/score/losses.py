"""Training objectives. Every denoising objective is one formula, w(t) ||x0_hat - x_0||^2, with its own draw
of t and weight w; sliced score matching is the other one.

A loss draws its random numbers apart from using them:

    draws = loss.draw(process, x_0, generator, step)               # for the whole of x_0 (B, ...)
    per_image_loss = loss(denoiser, x_0, *draws, label=label)      # (B,) in float64

The first of the draws is t (B,), and each other has a row for each image. `step` is how many batches the
training has seen: the losses here do not depend on it, those of `fewstep` have stages or a warm-up.

| objective                                   | noise distribution | weight             |
|---------------------------------------------|--------------------|--------------------|
| EDM                                         | LogNormal          | EDMWeight          |
| DSM with lambda = sigma^2; eps-MSE (DDPM)   | UniformTime, -Step | snr                |
| DSM with likelihood weighting               | UniformTime        | likelihood         |
| annealed DSM of NCSN, anneal power 2        | UniformStep        | snr                |
| v-MSE, x_0-MSE                              | UniformTime        | velocity, constant |
| min-SNR-gamma                               | UniformStep        | MinSNR             |
| flow matching                               | UniformTime        | flow               |
| SiT, on any interpolant                     | UniformTime        | path_velocity      |
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_gen.errors import ConfigError
from lit_gen.rng import Generator, rand, randint, randn
from lit_gen.score.condition import Label
from lit_gen.score.denoiser import AbstractDenoiser
from lit_gen.score.sde import Process, wide

NoiseDistribution = Callable[[Process, Tensor, Generator], Tensor]
"""`draw(process, x_0, generator)`: times (B,) for images (B, ...), of which the shape and device matter."""
Weight = Callable[[Process, Tensor], Tensor]
"""`weight(process, t)`: w, of the shape of t."""
Reduction = Callable[[Tensor], Tensor]
"""(B, ...) -> (B,)."""


def differentiates(loss: object) -> str:
    """What a loss says of a derivative of the network that it takes itself, which neither a compiled nor a
    sharded network has: the loss's `differentiates`; "" for most."""
    return getattr(loss, "differentiates", "")


def mean_of_pixels(squares: Tensor) -> Tensor:
    """(B, ...) -> (B,). Learning rates carry over between image sizes. The VP configurations of score_sde."""
    return squares.flatten(1).mean(1)


def sum_of_pixels(squares: Tensor) -> Tensor:
    """(B, ...) -> (B,), as EDM's code has it: C H W times `mean_of_pixels`."""
    return squares.flatten(1).sum(1)


def half_sum_of_pixels(squares: Tensor) -> Tensor:
    """(B, ...) -> (B,), as NCSN's code and the VE configurations of score_sde have it."""
    return squares.flatten(1).sum(1) / 2


@dataclass(frozen=True)
class LogNormal:
    """Times whose noise level is log-normal, ln s ~ N(mean, std^2) (EDM, Table 1; EDM2 has -0.4 and 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, process: Process, like: Tensor, generator: Generator = None) -> Tensor:
        normal = randn((len(like),), generator, device=like.device)
        return process.time((self.mean + self.std * wide(normal)).exp())


@dataclass(frozen=True)
class TruncatedLogNormal:
    """`LogNormal` between the noise levels `low` and `high`, by the inverse of its distribution function."""

    mean: float = -1.1
    std: float = 2.0
    low: float = 0.002
    high: float = 80.0

    def __post_init__(self):
        if not (0 < self.low < self.high and self.std > 0):
            raise ConfigError(f"{self}: low must be above 0 and below high, and std above 0.")

    def __call__(self, process: Process, like: Tensor, generator: Generator = None) -> Tensor:
        u = wide(rand((len(like),), generator, device=like.device))
        a, b = (_normal_cdf((math.log(end) - self.mean) / self.std) for end in (self.low, self.high))
        return process.time((self.mean + self.std * torch.special.ndtri(a + u * (b - a))).exp())


@dataclass(frozen=True)
class Mixture:
    """Each image's time by one of the noise distributions, at random: some levels matter for what is drawn,
    others for how."""

    parts: Sequence[NoiseDistribution]

    def __call__(self, process: Process, like: Tensor, generator: Generator = None) -> Tensor:
        drawn = torch.stack([part(process, like, generator) for part in self.parts])
        which = randint(0, len(self.parts), (len(like),), generator, device=like.device)
        return drawn.gather(0, which[None])[0]


@dataclass(frozen=True)
class UniformTime:
    """t ~ U(t_min, t_max). The official continuous models train from `t_min` 1e-5 on; None: the process's
    own.
    """

    t_min: float | None = 1e-5

    def __call__(self, process: Process, like: Tensor, generator: Generator = None) -> Tensor:
        t_min = process.t_min if self.t_min is None else self.t_min
        u = wide(rand((len(like),), generator, device=like.device))
        return t_min + u * (process.t_max - t_min)


@dataclass(frozen=True)
class UniformStep:
    """One of `num_steps` times, evenly spread from t_min to t_max: DDPM's steps, the geometric levels of a
    `VE`.
    """

    num_steps: int = 1000

    def __call__(self, process: Process, like: Tensor, generator: Generator = None) -> Tensor:
        i = wide(randint(0, self.num_steps, (len(like),), generator, device=like.device))
        return process.t_min + i / (self.num_steps - 1) * (process.t_max - process.t_min)


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std n) (Esser et al. 2024, https://arxiv.org/abs/2403.03206), for `Flow`."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, process: Process, like: Tensor, generator: Generator = None) -> Tensor:
        normal = randn((len(like),), generator, device=like.device)
        return (self.mean + self.std * wide(normal)).sigmoid().clamp(process.t_min, process.t_max)


@dataclass(frozen=True)
class EDMWeight:
    """(s^2 + sigma_data^2) / (s sigma_data)^2: weight one for EDM's network output at every noise level s."""

    sigma_data: float = 0.5

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        s = process.noise_level(t)
        return (s.square() + self.sigma_data**2) / (s * self.sigma_data).square()


@dataclass(frozen=True)
class MinSNR:
    """min(alpha^2 / sigma^2, gamma) (Hang et al. 2023, https://arxiv.org/abs/2303.09556)."""

    gamma: float = 5.0

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return snr(process, t).clamp(max=self.gamma)


def constant(process: Process, t: Tensor) -> Tensor:
    """1: the squared error of x_0."""
    return torch.ones_like(process.alpha(t))


def snr(process: Process, t: Tensor) -> Tensor:
    """alpha^2 / sigma^2: the squared error of the noise, and score matching weighted by sigma^2."""
    return process.noise_level(t).square().reciprocal()


def likelihood(process: Process, t: Tensor) -> Tensor:
    """g^2 alpha^2 / sigma^4: score matching weighted by g^2, a bound on the likelihood (Song et al. 2021,
    https://arxiv.org/abs/2101.09258)."""
    return snr(process, t) * (process.diffusion(t) / process.sigma(t)).square()


def variance(process: Process, t: Tensor) -> Tensor:
    """sigma^2, the weight of a score that makes every noise level count the same."""
    return process.sigma(t).square()


def velocity(process: Process, t: Tensor) -> Tensor:
    """1 + alpha^2 / sigma^2: the squared error of v on a variance-preserving process."""
    return 1 + snr(process, t)


def flow(process: Process, t: Tensor) -> Tensor:
    """(alpha + sigma)^2 / sigma^2: the squared error of z - x_0, which is flow matching on `Flow`."""
    return (1 + process.noise_level(t).reciprocal()).square()


def path_velocity(process: Process, t: Tensor) -> Tensor:
    """((alpha sigma' - sigma alpha') / sigma)^2: the squared error of dx_t/dt on any process (SiT); that of
    the noise with SiT's weight "velocity".
    """
    sigma = process.sigma(t)
    d_alpha, d_sigma = process.slopes(t)
    # At sigma 0 the error of x_0 is exactly 0.
    return ((process.alpha(t) * d_sigma - sigma * d_alpha) / sigma.clamp(min=1e-12)).square()


@dataclass(frozen=True)
class DenoisingLoss:
    """w(t) ||x0_hat(x_t, t) - x_0||^2 with x_t = alpha x_0 + sigma z.

    `noise_distribution` draws t, `weight` is w, and `reduction` takes the squares (B, ...) to (B,). Computed
    in float64 around the network, for at small t the noise is below the last digit of a float32 image.
    """

    noise_distribution: NoiseDistribution
    weight: Weight
    reduction: Reduction = mean_of_pixels

    def draw(
        self, process: Process, x_0: Tensor, generator: Generator = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """t (B,) in float64 and z of the shape and dtype of `x_0` (float32 at least), of which only shape,
        dtype and device matter.
        """
        return self.noise_distribution(process, x_0, generator), noise(x_0, generator)

    def __call__(
        self, denoiser: AbstractDenoiser, x_0: Tensor, t: Tensor, z: Tensor, **conditions: Any
    ) -> Tensor:
        """(B,) in float64. `conditions` go to the denoiser: `label`, a class or a `Condition`, and
        `augment_label`."""
        x_0 = wide(x_0)
        x0_hat = denoiser(denoiser.process.marginal(x_0, t, wide(z)), t, **conditions)
        return self.weight(denoiser.process, t) * self.reduction((x0_hat - x_0).square())


class Uncertainty(nn.Module):
    """u(s), a learned number for every noise level s: a linear map of `features` random Fourier features of
    ln(s) / 4, zero at first. Its parameters are trained with the network's and not needed to sample.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = 128, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("frequencies", torch.randn(features, generator=generator))
        self.register_buffer("phases", torch.rand(features, generator=generator))
        self.out = nn.Parameter(torch.zeros(features))

    def uncertainty(self, process: Process, t: Tensor) -> Tensor:
        """u, of the shape of `t`."""
        c_noise = (process.noise_level(t).log() / 4).to(self.out)
        waves = (2 * torch.pi * (c_noise[..., None] * self.frequencies + self.phases)).cos()
        # Not a matrix product, which autocast would take in half precision.
        return wide((waves * self.out).sum(-1) * (2 / len(self.out)) ** 0.5)


class UncertaintyLoss(Uncertainty):
    """w / e^u ||x0_hat - x_0||^2 + u: every noise level counts the same (EDM2, Karras et al. 2024, Equation
    21, https://arxiv.org/abs/2312.02696).
    """

    def __init__(self, loss: DenoisingLoss, features: int = 128, seed: int = 0):
        super().__init__(features, seed)
        self.loss = loss

    def draw(
        self, process: Process, x_0: Tensor, generator: Generator = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        return self.loss.draw(process, x_0, generator, step)

    def forward(
        self, denoiser: AbstractDenoiser, x_0: Tensor, t: Tensor, z: Tensor, **conditions: Any
    ) -> Tensor:
        """(B,) in float64, which may be negative."""
        u = self.uncertainty(denoiser.process, t)
        weighted = self.loss(denoiser, x_0, t, z, **conditions) / u.exp()
        ones = torch.ones(1, *x_0.shape[1:], dtype=u.dtype, device=u.device)
        return weighted + self.loss.reduction(ones) * u


@dataclass(frozen=True)
class SlicedScoreLoss:
    """w(t) (v^T grad(s) v + (v^T s)^2 / 2) for a random direction v and the score s at x_t: no noise to
    predict (Song et al. 2019, https://arxiv.org/abs/1905.07088). `variance_reduced` has ||s||^2 / 2 in the
    second term (SSM-VR).

    The default weight is sigma^2, as in NCSN's annealed form. The directions are random signs.
    """

    differentiates: ClassVar[str] = "sliced score matching takes a second derivative"
    noise_distribution: NoiseDistribution
    weight: Weight = variance
    variance_reduced: bool = True

    def draw(
        self, process: Process, x_0: Tensor, generator: Generator = None, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t (B,), z and the directions v, both of the shape of `x_0`."""
        t, z = self.noise_distribution(process, x_0, generator), noise(x_0, generator)
        signs = randint(0, 2, x_0.shape, generator, device=x_0.device)
        return t, z, (2 * signs - 1).to(z)

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        x_0: Tensor,
        t: Tensor,
        z: Tensor,
        v: Tensor,
        label: Label = None,
        augment_label: Tensor | None = None,
    ) -> Tensor:
        """(B,) in float64."""
        if augment_label is not None:
            raise ConfigError(
                "Sliced score matching takes no augment_label; train without augmentation labels."
            )
        process, v = denoiser.process, wide(v)
        # Of the attention kernels only the plain one has a second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            x_t = process.marginal(wide(x_0), t, wide(z)).requires_grad_()
            score = denoiser.score(x_t, t, label)
            (gradient,) = torch.autograd.grad((score * v).sum(), x_t, create_graph=True)
        norm = sum_of_pixels(score.square()) if self.variance_reduced else sum_of_pixels(score * v).square()
        return self.weight(process, t) * (sum_of_pixels(gradient * v) + norm / 2)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def noise(like: Tensor, generator: Generator) -> Tensor:
    """Standard normal numbers: half precision would know but a few thousand different ones."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return randn(like.shape, generator, device=like.device, dtype=dtype)


def edm_loss(
    P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5, reduction: Reduction = mean_of_pixels
) -> DenoisingLoss:
    """The EDM loss (Karras et al. 2022, Equation 2 and Table 1); its code has `sum_of_pixels`."""
    return DenoisingLoss(LogNormal(P_mean, P_std), EDMWeight(sigma_data), reduction)
