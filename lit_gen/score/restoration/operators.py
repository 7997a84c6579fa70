"""Degradations y = A x as linear operators on images (B, C, H, W), each with its adjoint, the inverse of a I
+ b A A^T, and its singular value decomposition.

All but `Matrix` are so simple that A A^T is diagonal, in pixels or in frequencies, and nothing here iterates.
What an operator holds (a mask, weights, a spectrum) moves to the device of the first images and stays there,
so that a sampler's loop does not wait for copies.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

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
    "Matrix",
    "SuperResolution",
    "box_mask",
    "gaussian_kernel",
    "motion_kernel",
]


class LinearOperator(ABC):
    """The interface: A, A^T, (a I + b A A^T)^-1 for real numbers a >= 0 and b > 0, and A = U S V^T.

    Images have one coordinate V^T x for each singular value, those that are 0 included: `coordinates`,
    `image`, `singular_values`. Which basis V has within equal singular values is up to the operator.
    `pixelwise` says that A A^T is diagonal in the pixels of y: then U is the identity there, and `a` may be a
    value for each. An operator that does not say so is not taken to be, and maps of noise are refused.
    """

    pixelwise: bool = False

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""

    @abstractmethod
    def solve(self, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        """(a I + b A A^T)^-1 y; 0 where a = 0 and A A^T vanishes. `a` and `b` broadcast to y."""

    @abstractmethod
    def coordinates(self, x: Tensor) -> Tensor:
        """V^T x, (B, ...) with as many numbers as x."""

    @abstractmethod
    def image(self, v: Tensor) -> Tensor:
        """V v, the inverse of `coordinates`."""

    @abstractmethod
    def singular_values(self, v: Tensor) -> Tensor:
        """At least 0, in an order of the operator's own; they broadcast to the coordinates `v`."""

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A^+ y = A^T (A A^T)^+ y: the least image that explains y best."""
        return self.adjoint(self.solve(y, 0.0, 1.0))

    def measured_coordinates(self, y: Tensor) -> Tensor:
        """U^T y where the coordinates of images have it, and 0 where a singular value is 0: for y = A x it is
        S V^T x."""
        v = self.coordinates(self.adjoint(y))  # U^T y = S^+ V^T A^T y
        s = self.singular_values(v)
        return torch.where(s > 0, v / _positive(s), 0.0)


class Denoising(LinearOperator):
    """A = I: nothing is lost but for the noise on y."""

    pixelwise = True

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y

    def solve(self, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        return y / (a + b)

    def coordinates(self, x: Tensor) -> Tensor:
        return x

    def image(self, v: Tensor) -> Tensor:
        return v

    def singular_values(self, v: Tensor) -> Tensor:
        return v.new_ones(())


class Inpainting(LinearOperator):
    """Keeps the pixels where `mask` (broadcastable to (C, H, W)) is true or 1; the others become 0."""

    pixelwise = True

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

    def coordinates(self, x: Tensor) -> Tensor:
        return x

    def image(self, v: Tensor) -> Tensor:
        return v

    def singular_values(self, v: Tensor) -> Tensor:
        return self._mask_beside(v).to(v.dtype)

    def _mask_beside(self, x: Tensor) -> Tensor:
        self.mask = self.mask.to(x.device)
        return self.mask


class Colorization(LinearOperator):
    """A weighted sum of the channels, their mean by default: (B, C, H, W) -> (B, 1, H, W)."""

    pixelwise = True

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

    def coordinates(self, x: Tensor) -> Tensor:
        return _reflected(x, self._weights_beside(x) / math.sqrt(self.square), 1)

    def image(self, v: Tensor) -> Tensor:
        return self.coordinates(v)

    def singular_values(self, v: Tensor) -> Tensor:
        return _first(math.sqrt(self.square), v, 1)

    def _weights_beside(self, x: Tensor) -> Tensor:
        self.weights = self.weights.to(x.device, wide_dtype(x.device))
        return self.weights.to(x.dtype)


class SuperResolution(LinearOperator):
    """The mean of each block of `factor` x `factor` pixels."""

    pixelwise = True

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

    def coordinates(self, x: Tensor) -> Tensor:
        """(B, C, factor^2, h, w), the mean of each block first."""
        f, (h, w) = self.factor, x.shape[-2:]
        blocks = x.unflatten(3, (w // f, f)).unflatten(2, (h // f, f))  # (B, C, h, f, w, f)
        return self._reflected(blocks.permute(0, 1, 3, 5, 2, 4).flatten(2, 3))

    def image(self, v: Tensor) -> Tensor:
        blocks = self._reflected(v).unflatten(2, (self.factor, self.factor))
        return blocks.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)

    def singular_values(self, v: Tensor) -> Tensor:
        return _first(1 / self.factor, v, 2)

    def _reflected(self, blocks: Tensor) -> Tensor:
        return _reflected(blocks, blocks.new_full((self.factor**2,), 1 / self.factor), 2)


class Blur(LinearOperator):
    """Convolution with `kernel` (h, w), of odd sides and sum 1, around the image's edges (circular).

    Frequencies that the kernel damps below `cutoff` count as lost. The singular vectors are those of
    Hartley's transform, cos + sin of each frequency, and the singular values the moduli of the spectrum.
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
        total = a + b * self._moduli(y).square()
        return self._filter(y, torch.where(total > 0, 1 / _positive(total), 0.0))

    def coordinates(self, x: Tensor) -> Tensor:
        """(B, C, H, W), one for each frequency."""
        if len(x) == 0:
            return x
        spectrum = torch.fft.fft2(wide(x), norm="ortho")
        return (spectrum.real - spectrum.imag).to(x)

    def image(self, v: Tensor) -> Tensor:
        return self.coordinates(v)

    def singular_values(self, v: Tensor) -> Tensor:
        return self._moduli(v).to(v.dtype)

    def _moduli(self, x: Tensor) -> Tensor:
        moduli = self._spectrum(x).abs()
        return torch.where(moduli < self.cutoff, 0.0, moduli)

    def _spectrum(self, x: Tensor) -> Tensor:
        (h, w), (height, width) = self.kernel.shape, x.shape[-2:]
        if h > height or w > width:
            raise ConfigError(f"The kernel ({h}, {w}) is larger than the image ({height}, {width}).")
        at = x.shape[-2:], x.device
        if at not in self._spectra:
            padded = F.pad(self.kernel, (0, width - w, 0, height - h)).roll((-(h // 2), -(w // 2)), (0, 1))
            self._spectra[at] = torch.fft.fft2(padded.to(x.device, wide_dtype(x.device)))
        return self._spectra[at]

    @staticmethod
    def _filter(x: Tensor, spectrum: Tensor) -> Tensor:
        if len(x) == 0:
            return x  # some FFT libraries refuse it
        half = spectrum[..., : x.shape[-1] // 2 + 1]
        return torch.fft.irfft2(torch.fft.rfft2(wide(x)) * half, s=x.shape[-2:]).to(x)


class Matrix(LinearOperator):
    """Any `matrix` (M, D) on images of `shape` (C, H, W), D = C H W, flattened; y is (B, M).

    Decomposed once, at a cost that grows with the cube of D: for small images, and as a reference.
    """

    def __init__(self, matrix: Tensor, shape: Sequence[int]):
        if matrix.ndim != 2 or matrix.shape[1] != math.prod(shape):
            raise ConfigError(
                f"A matrix on images {tuple(shape)} has {math.prod(shape)} columns, "
                f"got {tuple(matrix.shape)}."
            )
        self.shape, self.matrix = tuple(shape), wide(matrix)
        self.left, values, self.right = torch.linalg.svd(self.matrix)
        values = torch.where(
            values > values[0] * max(matrix.shape) * torch.finfo(values.dtype).eps, values, 0
        )
        self.values = F.pad(values, (0, max(matrix.shape) - len(values)))

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self._beside(x).matrix.T.to(x.dtype)

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self._beside(y).matrix.to(y.dtype)).unflatten(1, self.shape)

    def solve(self, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        left = self._beside(y).left.to(y.dtype)
        total = a + b * self.values[: len(left)].square()
        return (y @ left * torch.where(total > 0, 1 / _positive(total), 0.0).to(y.dtype)) @ left.T

    def coordinates(self, x: Tensor) -> Tensor:
        """(B, D)."""
        return x.flatten(1) @ self._beside(x).right.T.to(x.dtype)

    def image(self, v: Tensor) -> Tensor:
        return (v @ self._beside(v).right.to(v.dtype)).unflatten(1, self.shape)

    def singular_values(self, v: Tensor) -> Tensor:
        return self._beside(v).values[: v.shape[1]].to(v.dtype)

    def _beside(self, x: Tensor) -> "Matrix":
        parts = (self.matrix, self.left, self.values, self.right)
        self.matrix, self.left, self.values, self.right = (
            part.to(x.device, wide_dtype(x.device)) for part in parts
        )
        return self


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


def _reflected(x: Tensor, unit: Tensor, axis: int) -> Tensor:
    """x along `axis` in an orthonormal basis that begins with `unit`: I - 2 w w^T with w the direction of e_1
    - unit, which is its own inverse (Householder)."""
    w = -unit
    w[0] += 1
    w = w / _positive(w.norm())
    rows = x.movedim(axis, -1)
    return (rows - 2 * (rows * w).sum(-1, keepdim=True) * w).movedim(-1, axis)


def _first(value: float, v: Tensor, axis: int) -> Tensor:
    """`value` for the first along `axis` of v, 0 for the others."""
    values = v.new_zeros(v.shape[axis], *(1,) * (v.ndim - axis - 1))
    values[0] = value
    return values


def _over(y: Tensor, a: Tensor | float) -> Tensor:
    """y / a, and 0 where a is 0."""
    if isinstance(a, Tensor) and a.device == y.device:
        return torch.where(a > 0, y / _positive(a), 0.0)
    return y / a if a > 0 else torch.zeros_like(y)


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)
