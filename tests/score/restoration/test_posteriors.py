"""DDRM, DDNM, DiffPIR, and MMPS against what is true of them: marginals, exact posteriors, minimizers,
solvers."""

from functools import partial
from itertools import repeat

import pytest
import torch
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.rng import PerSample, keyed_generator
from lit_gen.score.denoiser import AbstractDenoiser, GaussianDenoiser
from lit_gen.score.restoration import (
    Blur,
    Colorization,
    Denoising,
    Inpainting,
    Matrix,
    MomentMatchingDenoiser,
    SuperResolution,
    cg,
    ddnm,
    ddrm,
    diffpir,
    gmres,
    mmps,
    motion_kernel,
    travel,
)
from lit_gen.score.restoration.diffpir import data_step
from lit_gen.score.samplers import ddim, geometric, heun, uniform_steps
from lit_gen.score.sde import EDM, VE, VP, DiscreteVP, Flow, SubVP, linear_betas

SHAPE, D = (3, 2, 4), 24
PROCESSES = [EDM(0.01, 40.0), VE(0.01, 40.0), VP(), SubVP(), Flow(), DiscreteVP(linear_betas())]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def randn(*shape, seed="x"):
    return torch.randn(shape, generator=keyed_generator(seed), dtype=torch.float64)


OPERATORS = {
    "denoising": Denoising(),
    "inpainting": Inpainting(torch.arange(4) < 2),
    "colorization": Colorization((0.5, 0.3, 0.4)),
    "super-resolution": SuperResolution(2),
    "blur": Blur(torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64)),
    "motion blur": Blur(motion_kernel(3, 0.0)[1:2]),
    "matrix": Matrix(randn(10, D, seed="matrix") / 4, SHAPE),
}
each_operator = pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS)
MEAN = 0.3 * randn(*SHAPE, seed="mean")


def smooth() -> torch.Tensor:
    """A covariance that falls off with the distance of pixels and channels."""
    place = torch.cartesian_prod(torch.arange(3) * 0.7, torch.arange(2.0), torch.arange(4.0)).double()
    return 0.25 * (-torch.cdist(place, place) / 3).exp()


def dense(A) -> torch.Tensor:
    """(M, D)."""
    return A(torch.eye(D, dtype=torch.float64).view(D, *SHAPE)).flatten(1).T


def conditioned(mean, cov, A, y, std):
    """N(mean (D,), cov) given y (M,) = A x + std n."""
    M = dense(A)
    noise = torch.as_tensor(std, dtype=torch.float64).expand(y.shape).square().flatten().diag()
    gain = cov @ M.T @ torch.linalg.pinv(M @ cov @ M.T + noise, hermitian=True)
    return mean + gain @ (y.flatten() - M @ mean), cov - gain @ M @ cov


class Known(AbstractDenoiser):
    """Knows the image."""

    def __init__(self, process, image):
        super().__init__()
        self.process, self.image = process, image

    def forward(self, x_t, t, label=None):
        return self.image.expand(x_t.shape)


def stds(A):
    """A number, and a map where the operator takes one."""
    y = A(MEAN[None])
    maps = [0.1 + 1.5 * torch.rand(y.shape[1:], generator=keyed_generator("map"), dtype=torch.float64)]
    return [0.4, *(maps if A.pixelwise else [])]


@each_operator
@pytest.mark.parametrize("method", [ddrm, ddnm], ids=["ddrm", "ddnm"])
def test_noise_of_the_state_is_that_of_its_time(A, method):
    """Whatever y is and how noisy: x_t ~ N(alpha x_0, sigma^2 I) if the denoiser knows x_0 (DDRM's
    Proposition 3.1, and how DDNM+ chooses its scales), in coordinates noisier and quieter than y."""
    n, process = 8_000, EDM()
    x_0 = MEAN.expand(n, *SHAPE)
    for std in stds(A):
        clean = A(x_0)
        y = clean + std * randn(*clean.shape, seed="noise")
        for levels in ([4.0, 2.0, 1.0], [4.0, 2.0, 1.0, 0.5, 0.25]):
            times = torch.tensor(levels, dtype=torch.float64)
            x = process.prior_std * randn(n, *SHAPE, seed="start")
            if method is ddnm:
                x = x_0 + levels[0] * x / process.prior_std
            options = {"grid": lambda process, num_steps, times=times: times, "num_steps": len(times) - 1}
            g = keyed_generator("restore")
            out = method(Known(process, MEAN), x, A, y, noise_std=std, generator=g, **options)
            z = ((out - x_0) / levels[-1]).flatten(1)
            assert z.mean(0).abs().max() < 0.06
            assert (z.T @ z / n - torch.eye(D)).abs().max() < 0.09, levels


@each_operator
@pytest.mark.parametrize("method", [ddrm, ddnm, diffpir], ids=["ddrm", "ddnm", "diffpir"])
def test_without_noise_the_measurement_is_met(A, method):
    denoiser = GaussianDenoiser(VP(), MEAN, smooth())
    y = A(MEAN + 0.4 * randn(3, *SHAPE, seed="truth"))
    x = randn(3, *SHAPE)
    assert_close(A(method(denoiser, x, A, y, num_steps=5)), y, rtol=0, atol=1e-10)
    if method is ddrm:  # 0 < 0 is false: the official comparison leaves y out at the last step
        strict = method(denoiser, x, A, y, num_steps=5, strict=True)
        assert (A(strict) - y).abs().max() > 1e-4
        quiet = method(denoiser, x, A, y, num_steps=5, eta_noisier=0.5)
        assert (A(quiet) - y).abs().max() > 1e-4


@each_process
@pytest.mark.parametrize("name", ["inpainting", "super-resolution"])
def test_ddrm_and_ddnm_draw_from_the_posterior_of_white_data(process, name):
    """Without noise the seen and the unseen part of white data are independent, and the unseen one is sampled
    by DDIM where the etas are 0. With the papers' 0.85 it varies too little, however short the steps."""
    A, n = OPERATORS[name], 1500
    y = A(MEAN + 0.5 * randn(1, *SHAPE, seed="truth"))
    denoiser = GaussianDenoiser(process, MEAN, torch.tensor(0.25))
    mean, cov = conditioned(MEAN.flatten(), 0.25 * torch.eye(D).double(), A, y, 0.0)
    x = process.prior_sample((n, *SHAPE), keyed_generator("start"))
    for method, eta in ((ddrm, "eta_unseen"), (ddnm, "eta")):

        def draw(value, method=method, eta=eta):
            options = {"num_steps": 60, "grid": geometric, "generator": keyed_generator("restore")}
            return method(denoiser, x, A, y.expand(n, -1, -1, -1), **{eta: value}, **options).flatten(1)

        out = draw(0.0)
        assert_close(out.mean(0), mean, rtol=0, atol=0.06)
        assert (out.T.cov() - cov).abs().max() < 0.05
        assert draw(0.85).var(0).sum() < 0.8 * cov.diagonal().sum()


@each_operator
@each_process
def test_mmps_is_exact_for_gaussian_data(A, process):
    """With as many iterations as pixels, for noise of one deviation and for a map, on every operator."""
    exact = GaussianDenoiser(process, MEAN, smooth())
    t = process.time(torch.tensor(0.7, dtype=torch.float64))
    x_t = process.marginal(randn(1, *SHAPE), t, randn(1, *SHAPE, seed="z"))
    y = A(MEAN + 0.5 * randn(1, *SHAPE, seed="truth"))
    # First x_t, then y.
    precision = torch.linalg.inv(smooth()) + torch.eye(D) / process.noise_level(t).square()
    cov, mean = torch.linalg.inv(precision), exact(x_t, t).flatten()
    every = 0.1 + torch.rand(y.shape[1:], generator=keyed_generator("map"), dtype=torch.float64)
    for std in (0.3, every):
        expected, _ = conditioned(mean, cov, A, y, std)
        for solver, enough in ((gmres, D), (cg, 3 * D)):
            found = MomentMatchingDenoiser(exact, A, y, std, enough, solver)(x_t, t)
            assert_close(found.flatten(), expected, rtol=0, atol=1e-8)


def test_mmps_draws_from_the_posterior():
    A, n, std, process = OPERATORS["blur"], 400, 0.2, VP()
    y = A(MEAN + 0.5 * randn(1, *SHAPE, seed="truth"))
    x = process.prior_sample((n, *SHAPE), keyed_generator("start"))
    sampler = partial(heun, grid=geometric)
    denoiser = GaussianDenoiser(process, MEAN, smooth())
    options = {"noise_std": std, "num_steps": 16, "sampler": sampler}
    out = mmps(denoiser, x, A, y.expand(n, -1, -1, -1), iterations=12, **options)
    mean, cov = conditioned(MEAN.flatten(), smooth(), A, y, std)
    assert_close(out.flatten(1).mean(0), mean, rtol=0, atol=0.06)
    assert (out.flatten(1).T.cov() - cov).abs().max() < 0.05
    with pytest.raises(ConfigError, match="iterations=0"):
        mmps(denoiser, x, A, y, iterations=0)


@each_operator
def test_data_step_minimizes(A):
    x0_hat, y = randn(2, *SHAPE), A(randn(2, *SHAPE, seed="truth")) + 0.1
    maps = [0.1 + y.square()] if A.pixelwise else []
    for rho in (0.3, *maps):
        p = data_step(x0_hat, A, y, rho)
        slope = A.adjoint((A(p) - y) / rho) + p - x0_hat
        assert slope.abs().max() < 1e-9
    nearest = data_step(x0_hat, A, y, 0.0)
    assert_close(nearest, x0_hat + A.pseudo_inverse(y - A(x0_hat)), rtol=0, atol=1e-9)


class Same(PerSample):
    """Draws the same numbers every time."""

    def __init__(self, z):
        self.draws = repeat(z)

    def _stack(self, fill, shape, device, dtype):
        return next(self.draws).to(dtype)


def test_diffpir_without_a_measurement_is_ddim():
    """No guidance, no zeta: its noise by the betas is that of DDIM's eta over neighboring steps; with zeta =
    1 a step is a fresh draw around the denoised image; inner steps repeat one."""
    process, A = DiscreteVP(linear_betas(50)), Denoising()
    denoiser, x, z = GaussianDenoiser(process, MEAN, smooth()), randn(2, *SHAPE), randn(2, *SHAPE, seed="z")
    options = {"num_steps": 50, "grid": uniform_steps, "generator": Same(z)}
    free = {"guidance_scale": 0.0, "clip": False}
    for eta in (0.0, 0.7):
        found = diffpir(denoiser, x, A, x, eta=eta, zeta=0.0, **free, **options)
        assert_close(found, ddim(denoiser, x, eta=eta, **options), rtol=1e-9, atol=1e-9)
    trajectory = []
    diffpir(
        denoiser, x, A, x, zeta=1.0, inner_steps=2, trace=lambda *a: trajectory.append(a), **free, **options
    )
    times = uniform_steps(process, 50)
    assert [step for step, _, _ in trajectory] == list(range(100))
    for k in (2, 40, 98):
        (_, x_t, _), (_, _, before) = trajectory[k], trajectory[k - 1]
        assert_close(x_t, process.marginal(before, times[k // 2], z), rtol=1e-9, atol=1e-9)
    with pytest.raises(ConfigError, match="inner_steps=0"):
        diffpir(denoiser, x, A, x, inner_steps=0)


def test_walk_of_ddnm():
    assert travel(3, 1, 1) == [0, 1, 2, 3]
    assert travel(4, 2, 2) == [0, 1, 2, 3, 2, 1, 2, 3, 4]
    assert travel(3, 1, 2) == [0, 1, 0, 1, 2, 1, 2, 3]
    with pytest.raises(ConfigError, match="at least 1, got 0, 1"):
        ddnm(None, randn(1), None, randn(1), travel_length=0)


def systems(n: int):
    a, b = randn(3, n, n), randn(3, n, seed="b")
    return a, a @ a.mT + torch.eye(n, dtype=torch.float64), b


def test_gmres_has_the_least_residual_in_the_krylov_space():
    """For any matrix; as many iterations as there are rows solve it, more do no harm."""
    a, _, b = systems(12)
    for k in (1, 4, 9):
        v = gmres(lambda v: (a @ v[..., None])[..., 0], b, iterations=k)
        powers = [b[..., None]]
        for _ in range(k - 1):
            powers.append(a @ powers[-1])
        krylov = torch.linalg.qr(torch.cat(powers, -1)).Q
        best = krylov @ torch.linalg.lstsq(a @ krylov, b[..., None]).solution
        assert_close(v, best[..., 0], rtol=1e-7, atol=1e-7)
    for k in (12, 30):
        v = gmres(lambda v: (a @ v[..., None])[..., 0], b, iterations=k)
        assert_close((a @ v[..., None])[..., 0], b, rtol=1e-8, atol=1e-8)
    assert_close(gmres(lambda v: 2 * v, b, iterations=5), b / 2, rtol=1e-12, atol=1e-12)
    assert torch.equal(gmres(lambda v: 2 * v, 0 * b, iterations=3), 0 * b)


def test_cg_solves_symmetric_systems():
    _, a, b = systems(12)
    v = cg(lambda v: (a @ v[..., None])[..., 0], b, iterations=30)
    assert_close((a @ v[..., None])[..., 0], b, rtol=1e-9, atol=1e-9)
    assert_close(cg(lambda v: 2 * v, b, iterations=5), b / 2, rtol=1e-12, atol=1e-12)
    # The energy norm of the error falls.
    exact = torch.linalg.solve(a, b)
    errors = [cg(lambda v: (a @ v[..., None])[..., 0], b, iterations=k) - exact for k in (1, 3, 6)]
    energies = [float(torch.einsum("bi,bij,bj", e, a, e)) for e in errors]
    assert energies[0] > energies[1] > energies[2]
