"""Degradations y = A x as linear operators on images (B, C, H, W), each with its adjoint and the inverse of a
I + b A A^T.

All are so simple that A A^T is diagonal, in pixels or in frequencies, and nothing here iterates. What an
operator holds (a mask, weights, a spectrum) moves to the device of the first images and stays there, so that
a sampler's loop does not wait for copies.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.score.sde import wide, wide_dtype

__all__ = [
    "Blur",
    "Colorization",
    "Denoising",
    "Inpainting",
    "LinearOperator",
    "SuperResolution",
    "box_mask",
    "gaussian_kernel",
    "motion_kernel",
]


class LinearOperator(ABC):
    """The interface: A, A^T and (a I + b A A^T)^-1, for real numbers a >= 0 and b > 0."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""

    @abstractmethod
    def solve(self, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        """(a I + b A A^T)^-1 y; 0 where a = 0 and A A^T vanishes. `a` and `b` broadcast to y."""

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A^+ y = A^T (A A^T)^+ y: the least image that explains y best."""
        return self.adjoint(self.solve(y, 0.0, 1.0))


class Denoising(LinearOperator):
    """A = I: nothing is lost but for the noise on y."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y

    def solve(self, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        return y / (a + b)


class Inpainting(LinearOperator):
    """Keeps the pixels where `mask` (broadcastable to (C, H, W)) is true or 1; the others become 0."""

    def __init__(self, mask: Tensor):
        self.mask = mask.to(torch.bool)
        if self.mask.all() or not self.mask.any():
            raise ConfigError(
                "The inpainting mask keeps all pixels or none; true or 1 marks the pixels that are known."
            )

    def __call__(self, x: Tensor) -> Tensor:
        return x * self._mask_beside(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self._mask_beside(y)

    def solve(self, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        return torch.where(self._mask_beside(y), y / (a + b), _over(y, a))

    def _mask_beside(self, x: Tensor) -> Tensor:
        self.mask = self.mask.to(x.device)
        return self.mask


class Colorization(LinearOperator):
    """A weighted sum of the channels, their mean by default: (B, C, H, W) -> (B, 1, H, W)."""

    def __init__(self, weights: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)):
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.square = float(self.weights.square().sum())

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1] != len(self.weights):
            raise ConfigError(
                f"Colorization weighs {len(self.weights)} channels, but the images have {x.shape[1]}."
            )
        return torch.einsum("bchw,c->bhw", x, self._weights_beside(x))[:, None]

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self._weights_beside(y)[:, None, None]

    def solve(self, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        return y / (a + b * self.square)

    def _weights_beside(self, x: Tensor) -> Tensor:
        self.weights = self.weights.to(x.device, wide_dtype(x.device))
        return self.weights.to(x.dtype)


class SuperResolution(LinearOperator):
    """The mean of each block of `factor` x `factor` pixels."""

    def __init__(self, factor: int):
        if factor < 2:
            raise ConfigError(f"factor must be at least 2, got {factor}.")
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ConfigError(f"factor={self.factor} does not divide the image size {tuple(x.shape[-2:])}.")
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2) / self.factor**2

    def solve(self, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        return y / (a + b / self.factor**2)


class Blur(LinearOperator):
    """Convolution with `kernel` (h, w), of odd sides and sum 1, around the image's edges (circular).

    Frequencies that the kernel damps below `cutoff` count as lost in the pseudo-inverse.
    """

    def __init__(self, kernel: Tensor, cutoff: float = 1e-6):
        if kernel.ndim != 2 or any(side % 2 == 0 for side in kernel.shape):
            raise ConfigError(f"A blur kernel has two odd sides, got {tuple(kernel.shape)}.")
        self.kernel, self.cutoff = kernel.to(torch.float64), cutoff
        self._spectra: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return self._filter(x, self._spectrum(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._filter(y, self._spectrum(y).conj())

    def solve(self, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        power = self._spectrum(y).abs().square()
        power = torch.where(power < self.cutoff**2, 0.0, power)
        total = a + b * power
        return self._filter(y, torch.where(total > 0, 1 / _positive(total), 0.0))

    def _spectrum(self, x: Tensor) -> Tensor:
        (h, w), (height, width) = self.kernel.shape, x.shape[-2:]
        if h > height or w > width:
            raise ConfigError(f"The kernel ({h}, {w}) is larger than the image ({height}, {width}).")
        at = x.shape[-2:], x.device
        if at not in self._spectra:
            padded = F.pad(self.kernel, (0, width - w, 0, height - h)).roll((-(h // 2), -(w // 2)), (0, 1))
            self._spectra[at] = torch.fft.rfft2(padded.to(x.device, wide_dtype(x.device)))
        return self._spectra[at]

    @staticmethod
    def _filter(x: Tensor, spectrum: Tensor) -> Tensor:
        if len(x) == 0:
            return x  # some FFT libraries refuse it
        return torch.fft.irfft2(torch.fft.rfft2(wide(x)) * spectrum, s=x.shape[-2:]).to(x)


def gaussian_kernel(std: float, size: int | None = None) -> Tensor:
    """(size, size), of sum 1; by default three deviations to each side."""
    size = size or 2 * math.ceil(3 * std) + 1
    line = torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64) - size // 2) / std).square())
    return torch.outer(line, line) / line.sum() ** 2


def motion_kernel(length: int, angle: float = 0.0) -> Tensor:
    """(n, n) with n the odd number from `length` on: a line through the middle at `angle` degrees."""
    size = length | 1
    kernel = torch.zeros(size, size, dtype=torch.float64)
    # Points along the line share their weight among the four pixels around them.
    along = torch.linspace(-(length - 1) / 2, (length - 1) / 2, 16 * size, dtype=torch.float64)
    y = size // 2 - along * math.sin(math.radians(angle))
    x = size // 2 + along * math.cos(math.radians(angle))
    for dy in (0, 1):
        for dx in (0, 1):
            row, column = y.floor() + dy, x.floor() + dx
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
            inside = (row < size) & (column < size)
            kernel.index_put_((row[inside].long(), column[inside].long()), weight[inside], accumulate=True)
    return kernel / kernel.sum()


def box_mask(height: int, width: int, top: int, left: int, box_height: int, box_width: int) -> Tensor:
    """bool (1, height, width), false (unknown) in the box."""
    mask = torch.ones(1, height, width, dtype=torch.bool)
    mask[:, top : top + box_height, left : left + box_width] = False
    return mask


def _over(y: Tensor, a: Tensor | float) -> Tensor:
    """y / a, and 0 where a is 0."""
    if isinstance(a, Tensor) and a.device == y.device:
        return torch.where(a > 0, y / _positive(a), 0.0)
    return y / a if a > 0 else torch.zeros_like(y)


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)
