"""Restorations of a Gaussian, whose posterior is known in closed form."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.rng import PerSample, keyed_generator
from lit_gen.score.denoiser import GaussianDenoiser, GaussianMixtureDenoiser
from lit_gen.score.restoration import (
    Blur,
    Colorization,
    Denoising,
    Inpainting,
    PosteriorDenoiser,
    Replace,
    SuperResolution,
    ddnm,
    ddrm,
    diffpir,
    dps,
    gaussian_kernel,
    mmps,
    pigdm,
    repaint,
    replacement,
    slerp,
)
from lit_gen.score.restoration.repaint import walk
from lit_gen.score.samplers import encode, geometric, heun, predictor_corrector, rk45
from lit_gen.score.sde import EDM, VE, VP, DiscreteVP, Flow, SubVP, linear_betas

PROCESSES = [EDM(0.01, 40.0), VE(0.01, 40.0), VP(), SubVP(), Flow(), DiscreteVP(linear_betas())]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
SHAPE = (3, 4, 4)
MASK = (torch.arange(4) < 2).expand(1, 4, 4)
OPERATORS = {
    "inpainting": Inpainting(MASK),
    "colorisation": Colorization(),
    "super-resolution": SuperResolution(2),
    "blur": Blur(gaussian_kernel(0.6, 3)),
    "denoising": Denoising(),
}
each_operator = pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS)
N = 600


def randn(*shape, seed="x"):
    return torch.randn(shape, generator=keyed_generator(seed), dtype=torch.float64)


def matrix(A) -> torch.Tensor:
    """A as (D, d): row i is A applied to the i-th unit vector."""
    return A(torch.eye(48, dtype=torch.float64).view(48, *SHAPE)).flatten(1)


def covariance(kind: str) -> torch.Tensor:
    """White, or falling off with the distance of pixels and channels."""
    if kind == "white":
        return 0.25 * torch.eye(48, dtype=torch.float64)
    place = torch.cartesian_prod(torch.arange(3) * 0.7, torch.arange(4.0), torch.arange(4.0)).double()
    return 0.25 * (-torch.cdist(place, place) / 3).exp()


MEAN = 0.3 * randn(*SHAPE, seed="mean")


def posterior(A, y: torch.Tensor, noise_std: float, prior: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (C, H, W) and covariance (D, D) of x_0 given one y."""
    M = matrix(A)  # (D, d)
    gain = prior @ M @ torch.linalg.pinv(M.T @ prior @ M + noise_std**2 * torch.eye(M.shape[1]).double())
    mean = MEAN.flatten() + gain @ (y.flatten() - MEAN.flatten() @ M)
    return mean.view(SHAPE), prior - gain @ M.T @ prior


def measurement(A, noise_std: float = 0.0) -> torch.Tensor:
    y = A(MEAN + 0.5 * randn(1, *SHAPE, seed="truth"))
    return y + noise_std * randn(*y.shape, seed="noise")


@each_process
@each_operator
@pytest.mark.parametrize("noise_std", [0.0, 0.2])
def test_posterior_denoiser_is_exact_for_white_data(A, process, noise_std):
    """E[x_0 | x_t, y] in closed form: y is one more observation of x_0, beside x_t."""
    if noise_std == 0 and isinstance(A, Blur):
        noise_std = 0.01  # deconvolution without noise amplifies rounding
    y = measurement(A, noise_std)
    exact = GaussianDenoiser(process, MEAN, torch.tensor(0.25))
    t = process.time(torch.tensor(0.7, dtype=torch.float64))
    x_t = process.marginal(randn(1, *SHAPE), t, randn(1, *SHAPE, seed="z"))
    found = PosteriorDenoiser(exact, A, y, noise_std, sigma_data=0.5)(x_t, t)
    # First x_t, then y.
    s2 = process.noise_level(t).square()
    middle = GaussianDenoiser(process, MEAN, torch.tensor(0.25))(x_t, t)[0]
    prior = torch.eye(48).double() / (4 + 1 / s2)
    M = matrix(A)
    gain = prior @ M @ torch.linalg.pinv(M.T @ prior @ M + noise_std**2 * torch.eye(M.shape[1]).double())
    expected = middle.flatten() + gain @ (y.flatten() - middle.flatten() @ M)
    assert_close(found.flatten(), expected, rtol=1e-7, atol=1e-7)


@each_process
def test_pigdm_draws_from_the_posterior_of_white_data(process):
    A, noise_std = OPERATORS["super-resolution"], 0.2
    y = measurement(A, noise_std)
    denoiser = GaussianDenoiser(process, MEAN, torch.tensor(0.25))
    x = process.prior_sample((N, *SHAPE), keyed_generator("start"))
    sampler = partial(heun, grid=geometric)
    out = pigdm(denoiser, x, A, y.expand(N, -1, -1, -1), noise_std=noise_std, num_steps=24, sampler=sampler)
    mean, cov = posterior(A, y, noise_std, covariance("white"))
    assert_close(out.mean(0), mean, rtol=0, atol=0.09)
    assert (out.flatten(1).T.cov() - cov).abs().max() < 0.07


@pytest.mark.parametrize("process", PROCESSES[1:5:2], ids=lambda p: type(p).__name__)
def test_repaint_draws_from_the_posterior_where_replacement_does_not(process):
    """The seen half is exact in both; the unseen half needs RePaint's jumps to fit it."""
    A, prior = OPERATORS["inpainting"], covariance("smooth")
    y = measurement(A)
    denoiser = GaussianDenoiser(process, MEAN, prior)
    mean, cov = posterior(A, y, 0.0, prior)
    x = process.prior_sample((300, *SHAPE), keyed_generator("start"))
    options = {"num_steps": 40, "grid": geometric, "generator": keyed_generator("repaint")}
    out = repaint(denoiser, x, A, y, jump_length=4, num_resamples=6, **options)
    once = repaint(denoiser, x, A, y, jump_length=4, num_resamples=1, **options)
    for samples in (out, once):
        assert_close(A(samples), y.expand(300, -1, -1, -1), rtol=0, atol=1e-9)
    error, error_once = ((s.mean(0) - mean).square().mean().sqrt() for s in (out, once))
    assert error < 0.08 and error < 0.75 * error_once, (error, error_once)
    assert (out.var(0).flatten() - cov.diagonal()).abs().max() < 0.12


@each_process
@pytest.mark.parametrize("name", ["inpainting", "colorisation", "super-resolution"])
def test_replacement_meets_the_measurement_exactly(name, process):
    A = OPERATORS[name]
    y = measurement(A)
    denoiser = GaussianDenoiser(process, MEAN, covariance("smooth"))
    g = keyed_generator("replacement")
    x = process.prior_sample((4, *SHAPE), g)
    sampler = partial(predictor_corrector, grid=geometric)
    out = replacement(denoiser, x, A, y, num_steps=30, sampler=sampler, generator=g)
    assert_close(A(out), y.expand_as(A(out)), rtol=0, atol=1e-9)
    assert (out - A.pseudo_inverse(A(out))).abs().mean() > 0.05


def test_replaced_part_has_the_marginal_of_the_process():
    process, A = VP(), OPERATORS["colorisation"]
    t, y = torch.tensor(0.3), A(MEAN[None]).expand(4000, -1, -1, -1)
    x = Replace(process, A, y, keyed_generator("replace"))(torch.zeros(4000, *SHAPE).double(), t)
    z = A(process.marginal(MEAN.expand(4000, -1, -1, -1), t, randn(4000, *SHAPE, seed="z")))
    assert_close(A(x).mean(0), z.mean(0), rtol=0, atol=0.06)
    assert_close(A(x).std(0), z.std(0), rtol=0.1, atol=0)


@pytest.mark.parametrize("process", PROCESSES[:3], ids=lambda p: type(p).__name__)
def test_dps_explains_the_measurement_and_nears_the_posterior_mean(process):
    A, prior = OPERATORS["super-resolution"], covariance("smooth")
    y = measurement(A)
    denoiser = GaussianDenoiser(process, MEAN, prior)
    x = process.prior_sample((64, *SHAPE), keyed_generator("start"))
    options = {"num_steps": 100, "grid": geometric, "generator": keyed_generator("dps")}
    out, free = (dps(denoiser, x, A, y, zeta=zeta, **options) for zeta in (0.5, 0.0))
    residual, residual_free = ((A(o) - y).flatten(1).norm(dim=1).mean() for o in (out, free))
    assert residual < 0.25 * residual_free
    mean, _ = posterior(A, y, 0.0, prior)
    error, error_free = ((o.mean(0) - mean).square().mean().sqrt() for o in (out, free))
    assert error < 0.5 * error_free


def test_an_image_depends_on_its_own_stream_alone():
    process, A = VP(), OPERATORS["inpainting"]
    denoiser, y = GaussianDenoiser(process, MEAN, torch.tensor(0.25)), measurement(A)
    for method in (
        partial(repaint, num_steps=6, jump_length=2, num_resamples=2),
        partial(dps, num_steps=6),
        partial(replacement, num_steps=6),
        partial(pigdm, num_steps=6),
        partial(mmps, num_steps=6, iterations=2),
        partial(ddrm, num_steps=6),
        partial(ddnm, num_steps=6, noise_std=0.1),
        partial(diffpir, num_steps=6),
    ):

        def draw(indices, method=method):
            g = PerSample.keyed(0, indices)
            x = process.prior_sample((len(indices), *SHAPE), g)
            return method(denoiser, x, A, y.expand(len(indices), -1, -1, -1), generator=g)

        assert_close(draw([3])[0], draw([1, 3])[1], rtol=0, atol=1e-9)


def test_walk_of_repaint():
    assert walk(4, 2, 1) == [0, 1, 2, 3, 4]
    assert walk(4, 2, 2) == [0, 1, 2, 1, 0, 1, 2, 3, 4, 3, 2, 3, 4]
    assert walk(3, 2, 2) == [0, 1, 2, 1, 0, 1, 2, 3, 2, 3]
    with pytest.raises(ConfigError, match="at least 1, got 0, 2"):
        repaint(None, torch.zeros(1), None, torch.zeros(1), jump_length=0, num_resamples=2)
    with pytest.raises(ConfigError, match=r"sigma_data=0\.0"):
        PosteriorDenoiser(GaussianDenoiser(VP(), MEAN, torch.tensor(1.0)), Denoising(), MEAN, sigma_data=0.0)


def test_latents_encode_and_interpolate():
    """Decoding an encoded image gives it back; on the way between two latents the norm goes from one to the
    other.
    """
    process = EDM(0.01, 20.0)
    model = GaussianMixtureDenoiser(process, 0.5 * randn(2, *SHAPE), torch.tensor(0.04), torch.ones(2))
    images = 0.5 * randn(2, *SHAPE) + 0.1
    latents = encode(model, images, rtol=1e-7, atol=1e-7)
    assert_close(rk45(model, latents, rtol=1e-7, atol=1e-7, denoise=False), images, rtol=0, atol=1e-4)
    a, b = latents[:1], latents[1:]
    assert_close(slerp(a, b, 0.0), a)
    assert_close(slerp(a, b, 1.0), b)
    middle = slerp(a / a.norm(), b / b.norm(), torch.tensor([0.25]))
    assert middle.norm().item() == pytest.approx(1)
    angles = [torch.acos((middle * v / v.norm()).sum()) for v in (a, b)]
    assert (angles[1] / angles[0]).item() == pytest.approx(3)
    assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)


@each_operator
def test_no_images_are_restored_to_none(A):
    process = VP()
    denoiser = GaussianDenoiser(process, torch.zeros(SHAPE), torch.tensor(0.25))
    x = torch.zeros(0, *SHAPE)
    for method in (replacement, repaint, dps, pigdm, mmps, ddrm, ddnm, diffpir):
        out = method(denoiser, x, A, A(x), num_steps=2, generator=PerSample([]))
        assert out.shape == x.shape and out.dtype == torch.float64
    assert encode(denoiser, x).shape == x.shape
