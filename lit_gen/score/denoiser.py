"""Denoisers: estimates of E[x_0 | x_t], the one thing that losses, samplers, likelihood and restoration call.

    denoiser(x_t, t, label=None) -> x0_hat

`x_t` is (B, C, H, W) in the units of the data ([-1, 1] for images, and noise in those units), `t` a float
tensor of shape () or (B,), `label` int64 (B,) or float (B, num_classes), or a `Condition`. The result has the
dtype of `x_t`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.precision import switched
from lit_gen.score.condition import Condition, Label, class_of
from lit_gen.score.precondition import Precondition
from lit_gen.score.sde import Process, per_image, per_row, wide

__all__ = [
    "PRECISIONS",
    "AbstractDenoiser",
    "ClippedDenoiser",
    "ConditionedDenoiser",
    "CountingDenoiser",
    "Denoiser",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "IdealDenoiser",
    "ReparameterizedDenoiser",
    "bound",
    "check_precision",
    "half_precision",
    "network_precision",
]

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions of a network that samples; None: that of its own parameters."""


class AbstractDenoiser(nn.Module, ABC):
    """The interface: a `process`, and `forward(x_t, t, label=None) -> x0_hat`; score and noise follow."""

    process: Process
    network_dtype: torch.dtype | None = None  # of products in its networks, see `network_precision`

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        """E[x_0 | x_t], of the shape and dtype of `x_t`."""

    def with_variance(
        self, x_t: Tensor, t: Tensor, label: Label = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        """x0_hat, and what a network with a learned variance says of it (`lit_gen.score.learned_variance`),
        of the shape of `x_t`; None of an exact denoiser, which has no network. Raises ConfigError where
        there is one whose variance is not told."""
        if any(isinstance(part, Denoiser) for part in self.modules()):
            raise ConfigError(f"{type(self).__name__} tells no learned variance: take sampler=ancestral.")
        return self(x_t, t, label), None

    def score(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        """grad log p_t(x_t) = (alpha x0_hat - x_t) / sigma^2 (Tweedie)."""
        return -self.noise(x_t, t, label) / per_image(self.process.sigma(t), x_t)

    def noise(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        """E[z | x_t] = (x_t - alpha x0_hat) / sigma, a small difference at small sigma and hence taken in
        float64.
        """
        x = wide(x_t)
        alpha, sigma = (per_image(c, x) for c in (self.process.alpha(t), self.process.sigma(t)))
        return ((x - alpha * self(x, t, label)) / sigma).to(x_t)


class Denoiser(AbstractDenoiser):
    """x0_hat = c_skip x_t + c_out net(c_in x_t, c_noise, label), with the coefficients of `precondition`.

    The network is called as `net(x, noise_label (B,), label, augment_label)`, and with `vector` and `image`
    where a condition has them, in the dtype of its own parameters, whatever the dtype of `x_t`; the sum is
    taken in that of `x_t`. Channels that the network
    returns beyond those of `x_t` (iDDPM's variances) are left to `with_variance`. Inside
    `network_precision` the network alone runs under autocast.
    """

    def __init__(self, net: nn.Module, process: Process, precondition: Precondition):
        super().__init__()
        self.net, self.process, self.precondition = net, process, precondition

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None, augment_label: Label = None) -> Tensor:
        if x_t.shape[0] == 0:  # not len, which an exported program takes for a constant
            return x_t.clone()  # kernels and networks that refuse an empty batch are spared it
        c_skip, c_out, f = self._terms(x_t, t, label, augment_label)
        return per_image(c_skip, x_t) * x_t + per_image(c_out, x_t) * f

    def with_variance(
        self, x_t: Tensor, t: Tensor, label: Label = None, augment_label: Label = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Raises ConfigError for a network of fewer than twice the channels."""
        c_skip, c_out, f = self._outputs(x_t, t, label, augment_label)
        channels = x_t.shape[1]
        if f.shape[1] < 2 * channels:
            raise ConfigError(
                f"The network, a {type(self.net).__name__}, says no variance: it needs out_channels="
                f"{2 * channels}, or take sampler=ancestral and model/loss=steps."
            )
        x0_hat = per_image(c_skip, x_t) * x_t + per_image(c_out, x_t) * f[:, :channels]
        return x0_hat, f[:, channels : 2 * channels]

    def _terms(
        self, x_t: Tensor, t: Tensor, label: Label, augment_label: Label, **told: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`_outputs`, of the channels of `x_t` alone."""
        c_skip, c_out, f = self._outputs(x_t, t, label, augment_label, **told)
        return c_skip, c_out, f[:, : x_t.shape[1]]

    def _outputs(
        self, x_t: Tensor, t: Tensor, label: Label, augment_label: Label, **told: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, and the network's output in the dtype of `x_t`; `told` is for the network too, each
        () or (B,)."""
        c_skip, c_out, c_in, c_noise = self.precondition(self.process, t)
        dtype = next((p.dtype for p in self.net.parameters()), x_t.dtype)
        x_in = (per_image(c_in, x_t) * x_t).to(dtype)
        half = self.network_dtype
        others = label.without("label").parts() if isinstance(label, Condition) else {}
        others |= {name: per_row(value, x_in) for name, value in told.items()}
        with nullcontext() if half is None else torch.autocast(x_in.device.type, half):
            f = self.net(x_in, per_row(c_noise, x_in), class_of(label), augment_label, **others)
        return c_skip, c_out, f.to(x_t)


@contextmanager
def network_precision(denoiser: nn.Module, precision: str) -> Iterator[None]:
    """Inside, the networks of all `Denoiser`s in `denoiser`, guides included, run in a precision of
    `PRECISIONS`: matrix products and convolutions under autocast. States and sums keep their dtype.

    Raises ConfigError for any other precision.
    """
    check_precision("precision", precision)
    parts = [part for part in denoiser.modules() if isinstance(part, AbstractDenoiser)]
    with switched(*((part, "network_dtype", PRECISIONS[precision]) for part in parts)):
        yield


def check_precision(key: str, precision: str) -> None:
    """Raises ConfigError for what is none of `PRECISIONS`; `key` is where it was given."""
    if precision not in PRECISIONS:
        raise ConfigError(f"{key}={precision}: must be one of {', '.join(PRECISIONS)}.")


def half_precision(denoiser: nn.Module) -> bool:
    """Whether a network in `denoiser` now runs in half precision."""
    return any(getattr(part, "network_dtype", None) is not None for part in denoiser.modules())


class ReparameterizedDenoiser(AbstractDenoiser):
    """A denoiser of one process seen on another, through the noise level that both share.

    x_t / alpha is x_0 + s z on every process, so a VP model is sampled on `EDM` by
    `ReparameterizedDenoiser(denoiser, EDM(...))`.
    """

    def __init__(self, denoiser: AbstractDenoiser, process: Process):
        super().__init__()
        self.denoiser, self.process = denoiser, process

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        inner = self.denoiser.process
        u = inner.time(self.process.noise_level(t))
        return self.denoiser(per_image(inner.alpha(u) / self.process.alpha(t), x_t) * x_t, u, label)


class ConditionedDenoiser(AbstractDenoiser):
    """A denoiser that is told `condition`, of N rows: its own `label` is int64 (B,), the row of each image.

    Samplers and likelihoods that work on some of the images take their labels along, and with these the right
    rows. Without a label row i is that of image i. Raises ConfigError where the images are not N then.
    """

    def __init__(self, denoiser: AbstractDenoiser, condition: Condition):
        super().__init__()
        self.denoiser, self.process, self.condition = denoiser, denoiser.process, condition

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        return self.denoiser(x_t, t, self._told(x_t, label))

    def with_variance(
        self, x_t: Tensor, t: Tensor, label: Label = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        return self.denoiser.with_variance(x_t, t, self._told(x_t, label), **others)

    def _told(self, x_t: Tensor, label: Label) -> Condition:
        index = class_of(label)
        if index is None and len(x_t) != len(self.condition):
            raise ConfigError(
                f"{len(x_t)} images and a condition of {len(self.condition)} rows: the label must say the "
                "row of each image."
            )
        return self.condition if index is None else self.condition.rows(index)


def bound(denoiser: AbstractDenoiser, label: Label) -> tuple[AbstractDenoiser, Tensor | None]:
    """What a sampler, restoration, or likelihood is called with for images of these labels: a class is the
    label, also a `Condition` of nothing else; of more, a `ConditionedDenoiser` and its rows."""
    if not isinstance(label, Condition) or not label.without("label").parts():
        return denoiser, class_of(label)
    part = next(iter(label.parts().values()))
    return ConditionedDenoiser(denoiser, label), torch.arange(len(label), device=part.device)


class ClippedDenoiser(AbstractDenoiser):
    """A denoiser whose images are clamped to [low, high], as DDPM's samplers do."""

    def __init__(self, denoiser: AbstractDenoiser, low: float = -1.0, high: float = 1.0):
        super().__init__()
        self.denoiser, self.process, self.low, self.high = denoiser, denoiser.process, low, high

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        return self.denoiser(x_t, t, label).clamp(self.low, self.high)

    def with_variance(
        self, x_t: Tensor, t: Tensor, label: Label = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        x0_hat, v = self.denoiser.with_variance(x_t, t, label, **others)
        return x0_hat.clamp(self.low, self.high), v


class CountingDenoiser(AbstractDenoiser):
    """A denoiser that counts: `calls` of it, and `evaluations`, the rows of all calls together (NFE of a
    batch of one).
    """

    def __init__(self, denoiser: AbstractDenoiser):
        super().__init__()
        self.denoiser, self.process = denoiser, denoiser.process
        self.calls = self.evaluations = 0

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        self.calls += 1
        self.evaluations += len(x_t)
        return self.denoiser(x_t, t, label)

    def with_variance(
        self, x_t: Tensor, t: Tensor, label: Label = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        self.evaluations += len(x_t)
        return self.denoiser.with_variance(x_t, t, label, **others)


class GaussianDenoiser(AbstractDenoiser):
    """Exact for x_0 ~ N(mean, covariance): x0_hat = mean + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha
    mean).

    `mean` is (C, H, W); `covariance` is (D, D) with D = C H W, a variance for each pixel (C, H, W), or one
    for all ().
    """

    mean: Tensor
    variances: Tensor
    basis: Tensor

    def __init__(self, process: Process, mean: Tensor, covariance: Tensor):
        super().__init__()
        self.process = process
        covariance = wide(covariance)
        if covariance.ndim != 2:
            covariance = covariance.expand(mean.shape).flatten().diag()
        variances, basis = torch.linalg.eigh(covariance)
        for name, value in {"mean": wide(mean), "variances": variances.clamp(min=0), "basis": basis}.items():
            self.register_buffer(name, value)

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        alpha, rest, variance = self._residual(x_t, t)
        gain = alpha * self.variances / variance
        return (self.mean + ((gain * rest) @ self.basis.T).view(x_t.shape)).to(x_t)

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t(x_t) in nats, (B,)."""
        _, rest, variance = self._residual(x_t, t)
        return _log_normal(rest, variance).sum(1)

    def _residual(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha; x_t - alpha mean along the eigenvectors of the covariance, (B, D); its variances there."""
        alpha, sigma = _coefficients(self.process, t, x_t, 2)
        rest = (wide(x_t) - per_image(alpha, self.mean[None]) * self.mean).flatten(1) @ self.basis
        return alpha, rest, alpha.square() * self.variances + sigma.square()


class GaussianMixtureDenoiser(AbstractDenoiser):
    """Exact for a mixture sum_k w_k N(m_k, v_k): the posterior mean of each component, weighted by the
    responsibilities.

    `means` is (K, C, H, W); `variances` broadcasts to it (one for all (), for each pixel, or (K, 1, 1, 1));
    `weights` is (K,). With `label` int64 (B,) or one-hot rows, component k is class k alone; a zero row or -1
    is no class.
    """

    means: Tensor
    variances: Tensor
    log_weights: Tensor

    def __init__(self, process: Process, means: Tensor, variances: Tensor, weights: Tensor):
        super().__init__()
        self.process = process
        self.register_buffer("means", wide(means))
        self.register_buffer("variances", wide(variances).expand(means.shape))
        self.register_buffer("log_weights", (wide(weights) / weights.sum()).log())

    def _joint(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k p_t(x_t | k) as (B, K); the residual and the variance of x_t in each component, (B, K, C,
        H, W).
        """
        alpha, sigma = _coefficients(self.process, t, x_t, 5)
        rest = wide(x_t)[:, None] - alpha * self.means
        variance = alpha.square() * self.variances + sigma.square()
        return self.log_weights + _log_normal(rest, variance).flatten(2).sum(2), rest, variance

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        label = class_of(label)
        log_joint, rest, variance = self._joint(x_t, t)
        if label is not None:
            log_joint = log_joint + wide(_class_mask(label, len(self.log_weights))).log()
        alpha, _ = _coefficients(self.process, t, x_t, 5)
        means = self.means + alpha * self.variances / variance * rest
        return torch.einsum("bk,bk...->b...", log_joint.softmax(1), means).to(x_t)

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t(x_t) in nats, (B,)."""
        return self._joint(x_t, t)[0].logsumexp(1)


class IdealDenoiser(AbstractDenoiser):
    """Exact for a finite data set: the mean of its images, weighted by N(x_t; alpha x_i, sigma^2) (EDM,
    Equation 57).

    `images` is (N, C, H, W); `labels`, int64 (N,), make it class-conditional. Works through the data set in
    chunks.
    """

    images: Tensor
    labels: Tensor | None

    def __init__(self, process: Process, images: Tensor, labels: Tensor | None = None, *, chunk: int = 4096):
        super().__init__()
        self.process, self.chunk = process, chunk
        self.register_buffer("images", wide(images))
        self.register_buffer("labels", labels)

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        label = class_of(label)
        if label is not None and label.is_floating_point():
            label = torch.where(label.sum(1) > 0, label.argmax(1), -1)
        alpha, sigma = _coefficients(self.process, t, x_t, 2)
        flat = wide(x_t).flatten(1)
        mean, log_total = torch.zeros_like(flat), flat.new_full((len(flat), 1), -torch.inf)
        for start in range(0, len(self.images), self.chunk):
            images = self.images[start : start + self.chunk].flatten(1)
            logits = alpha * (flat @ images.T) - alpha.square() / 2 * images.square().sum(1)
            logits = logits / sigma.square()
            if label is not None and self.labels is not None:
                same = label[:, None] == self.labels[start : start + self.chunk]
                logits = logits.masked_fill(~same & (label[:, None] >= 0), -torch.inf)
            log_chunk = logits.logsumexp(1, keepdim=True)
            log_total = torch.logaddexp(log_total, log_chunk)
            # No image of a class in the chunk: -inf - -inf.
            fraction = (log_chunk - log_total).exp().nan_to_num(0)
            mean = mean.lerp(logits.softmax(1).nan_to_num(0) @ images, fraction)
        return mean.view(x_t.shape).to(x_t)


def _coefficients(process: Process, t: Tensor, x_t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """alpha and sigma, to multiply tensors (B, ...) of `ndim` axes: (B, 1, ...), or () for t of shape ()."""
    if t.ndim:
        t = t.to(x_t.device).reshape(-1, *(1,) * (ndim - 1))
    return process.alpha(t), process.sigma(t)


def _log_normal(rest: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (rest.square() / variance + (2 * torch.pi * variance).log())


def _class_mask(label: Tensor, num_classes: int) -> Tensor:
    """(B, K) of ones and zeros: the components that a label allows; all of them when it names no class."""
    if label.is_floating_point():
        return torch.where(label.sum(1, keepdim=True) > 0, label, 1.0)
    mask = label[:, None] == torch.arange(num_classes, device=label.device)
    return mask | (label[:, None] < 0)
