import math

import pytest
import torch
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator
from lit_gen.score.restoration import (
    Blur,
    Colorization,
    Denoising,
    Inpainting,
    Matrix,
    SuperResolution,
    box_mask,
    gaussian_kernel,
    motion_kernel,
)

SHAPE = (2, 3, 12, 8)
OPERATORS = {
    "denoising": Denoising(),
    "inpainting": Inpainting(box_mask(12, 8, 3, 2, 5, 4)),
    "inpainting per channel": Inpainting(torch.rand(3, 12, 8, generator=keyed_generator("mask")) > 0.4),
    "colorisation": Colorization(),
    "colorisation, weighted": Colorization((0.3, 0.6, 0.1)),
    "super-resolution": SuperResolution(4),
    "Gaussian blur": Blur(gaussian_kernel(1.0)),
    "box blur": Blur(torch.ones(3, 5) / 15),  # some frequencies vanish
    "motion blur": Blur(motion_kernel(5, 30.0)),
}


def randn(*shape, seed="x"):
    return torch.randn(shape, generator=keyed_generator(seed), dtype=torch.float64)


OPERATORS["matrix"] = Matrix(randn(40, 3 * 12 * 8, seed="matrix"), (3, 12, 8))
OPERATORS["matrix, tall"] = Matrix(randn(300, 4, seed="a") @ randn(4, 288, seed="b"), (3, 12, 8))
each_operator = pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS)


@each_operator
def test_adjoint(A):
    """<A x, y> = <x, A^T y>."""
    x = randn(*SHAPE)
    y = randn(*A(x).shape, seed="y")
    assert_close((A(x) * y).sum(), (x * A.adjoint(y)).sum())


@each_operator
def test_solve_inverts_a_i_plus_b_a_at(A):
    y = randn(*A(randn(*SHAPE)).shape, seed="y")
    b = torch.tensor([2.0, 0.3], dtype=torch.float64).reshape(2, *(1,) * (y.ndim - 1))
    v = A.solve(y, 0.1, b)
    assert_close(0.1 * v + b * A(A.adjoint(v)), y, rtol=1e-6, atol=1e-8)


@each_operator
def test_pseudo_inverse_is_moore_and_penroses(A):
    """A A+ A = A, A+ A A+ = A+, and A+ A and A A+ are symmetric."""
    x, other = randn(*SHAPE), randn(*SHAPE, seed="other")
    y, again = A(x), randn(*A(x).shape, seed="y")
    plus = A.pseudo_inverse
    close = {"rtol": 1e-5, "atol": 1e-6}
    assert_close(A(plus(y)), y, **close)
    assert_close(plus(A(plus(again))), plus(again), **close)
    assert_close((plus(A(x)) * other).sum(), (x * plus(A(other))).sum(), **close)
    assert_close((A(plus(again)) * y).sum(), (again * A(plus(y))).sum(), **close)


def basis() -> torch.Tensor:
    """The unit images (D, C, H, W)."""
    return torch.eye(288, dtype=torch.float64).view(288, *SHAPE[1:])


@each_operator
def test_singular_value_decomposition(A):
    """U S V^T is the dense matrix of A, with V orthogonal, U orthonormal where S is positive, and LAPACK's
    singular values."""
    images = basis()
    dense = A(images).flatten(1).T  # (M, D)
    v = A.coordinates(images)
    V = v.flatten(1)  # row i: V^T e_i
    s = A.singular_values(v).expand(v.shape)[0].flatten()
    assert_close(V @ V.T, torch.eye(288, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(A.image(v), images, rtol=0, atol=1e-12)
    y = torch.eye(len(dense), dtype=torch.float64).view(-1, *A(images).shape[1:])
    U = A.measured_coordinates(y).flatten(1)  # row j: U^T e_j
    assert_close(U @ (s[:, None] * V.T), dense, rtol=0, atol=1e-8)
    assert_close(U.T @ U, (s > 0).double().diag(), rtol=0, atol=1e-8)
    expected = torch.linalg.svdvals(dense)
    assert_close(s.sort(descending=True).values[: len(expected)], expected, rtol=1e-9, atol=1e-9)


@each_operator
def test_what_a_pixelwise_operator_measures_has_the_noise_of_its_pixels(A):
    """There U is the identity: a map of deviations, and a solution with a map, are those of each pixel."""
    y = randn(*A(randn(*SHAPE)).shape, seed="y")
    u, s = A.measured_coordinates(y), A.singular_values(A.coordinates(randn(*SHAPE)))
    seen = (s > 0).expand(u.shape)
    nearest = (u[seen][:, None] - y.flatten()).abs().min(1).values
    assert bool((nearest < 1e-12).all()) == A.pixelwise
    if A.pixelwise:
        a = 0.1 + y.square()
        v = A.solve(y, a, 2.0)
        assert_close(a * v + 2 * A(A.adjoint(v)), y, rtol=1e-9, atol=1e-9)


@each_operator
def test_dtype_is_kept(A):
    x = randn(*SHAPE).float()
    y, v = A(x), A.coordinates(x)
    assert y.dtype == A.adjoint(y).dtype == A.pseudo_inverse(y).dtype == torch.float32
    assert v.dtype == A.image(v).dtype == A.singular_values(v).dtype == torch.float32


def test_what_operators_do():
    x = randn(*SHAPE)
    mask = box_mask(12, 8, 3, 2, 5, 4)
    assert (~mask).sum() == 20 and not mask[0, 3:8, 2:6].any()
    assert torch.equal(Inpainting(mask)(x), x * mask)
    assert_close(Colorization()(x), x.mean(1, keepdim=True))
    assert_close(SuperResolution(2)(x)[0, 0, 1, 2], x[0, 0, 2:4, 4:6].mean())
    # A blur keeps the mean, and a kernel's centre stays where it is.
    impulse = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    impulse[0, 0, 4, 3] = 1
    kernel = gaussian_kernel(0.8, 5)
    assert_close(Blur(kernel)(impulse)[0, 0, 2:7, 1:6], kernel)


def test_kernels():
    for kernel in (gaussian_kernel(1.3), motion_kernel(7, 20.0), motion_kernel(4)):
        assert kernel.sum().item() == pytest.approx(1) and (kernel >= 0).all()
        i = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
        assert (kernel.sum(0) @ i).abs() < 1e-9 and (kernel.sum(1) @ i).abs() < 1e-9
    wide = gaussian_kernel(1.3, 21)
    i = torch.arange(21, dtype=torch.float64) - 10
    assert (wide.sum(0) @ i.square()).item() == pytest.approx(1.69, rel=1e-3)
    assert_close(motion_kernel(5, 0.0)[2].sum(), torch.tensor(1.0).double())
    assert_close(motion_kernel(5, 90.0), motion_kernel(5, 0.0).T, rtol=0, atol=1e-9)
    # The spread lies along the line: the larger axis of the second moments has the angle.
    k = motion_kernel(9, 30.0)
    y, x = torch.meshgrid(-(torch.arange(9.0) - 4), torch.arange(9.0) - 4, indexing="ij")
    angle = 0.5 * math.atan2(2 * (k * x * y).sum(), (k * (x * x - y * y)).sum())
    assert math.degrees(angle) == pytest.approx(30, abs=1)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Inpainting(torch.ones(1, 4, 4)), "keeps all pixels or none"),
        (lambda: SuperResolution(1), "at least 2, got 1"),
        (lambda: SuperResolution(3)(torch.zeros(1, 1, 8, 8)), "does not divide"),
        (lambda: Blur(torch.ones(2, 3)), "two odd sides"),
        (lambda: Blur(torch.ones(9, 9))(torch.zeros(1, 1, 8, 8)), "larger than the image"),
        (lambda: Colorization()(torch.zeros(1, 1, 8, 8)), "weighs 3 channels"),
        (lambda: Matrix(torch.zeros(3, 4), (1, 2, 3)), r"has 6 columns, got \(3, 4\)"),
    ],
)
def test_errors(build, words):
    with pytest.raises(ConfigError, match=words):
        build()
