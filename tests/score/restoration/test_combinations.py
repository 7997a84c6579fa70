"""Every method with every operator, process, and kind of noise: it explains the measurement, or it is refused
in words."""

from functools import partial

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator
from lit_gen.score.denoiser import GaussianDenoiser
from lit_gen.score.restoration import (
    Blur,
    Colorization,
    Denoising,
    Inpainting,
    Matrix,
    SuperResolution,
    box_mask,
    ddnm,
    ddrm,
    diffpir,
    dps,
    gaussian_kernel,
    mmps,
    motion_kernel,
    pigdm,
    repaint,
    replacement,
)
from lit_gen.score.restoration.solvers import cg
from lit_gen.score.samplers import ddim, geometric, predictor_corrector
from lit_gen.score.sde import EDM, VE, VP, DiscreteVP, Flow, SubVP, linear_betas

SHAPE = (3, 4, 8)
STEPS = {"num_steps": 12, "grid": geometric}
EXACT, NOISY = ("replacement", "repaint"), ("ddrm", "ddnm", "diffpir")
METHODS = {
    "replacement": partial(replacement, num_steps=12, sampler=partial(predictor_corrector, grid=geometric)),
    "repaint": partial(repaint, **STEPS, jump_length=4, num_resamples=2),
    "dps": partial(dps, num_steps=24, grid=geometric),
    "pigdm": partial(pigdm, num_steps=12, sampler=partial(ddim, grid=geometric)),
    "mmps": partial(mmps, num_steps=12, iterations=3, sampler=partial(ddim, grid=geometric)),
    "ddrm": partial(ddrm, **STEPS),
    "ddnm": partial(ddnm, **STEPS),
    "diffpir": partial(diffpir, **STEPS),
}
KERNEL = torch.randn(20, 96, generator=keyed_generator("matrix"), dtype=torch.float64) / 10
OPERATORS = {
    "denoising": Denoising(),
    "inpainting": Inpainting(box_mask(4, 8, 1, 2, 2, 4)),
    "colorization": Colorization(),
    "super-resolution": SuperResolution(2),
    "blur": Blur(gaussian_kernel(0.8, 3)),
    "motion blur": Blur(motion_kernel(3, 30.0)),
    "matrix": Matrix(KERNEL, SHAPE),
}
PROCESSES = [EDM(0.01, 40.0), VE(0.01, 40.0), VP(), SubVP(), Flow(), DiscreteVP(linear_betas())]
N = 6


def randn(*shape, seed):
    return torch.randn(shape, generator=keyed_generator(seed), dtype=torch.float64)


MEAN, TRUTH = 0.3 * randn(*SHAPE, seed="mean"), 0.4 * randn(N, *SHAPE, seed="truth")


def refusal(method: str, operator, noise: str) -> str | None:
    """Words of the refusal; None: it is taken."""
    if method in EXACT and noise == "map":
        return "is a map: .* takes what was measured as exact"
    if method in EXACT and noise == "number" and isinstance(operator, Blur):
        return r"noise_std=0.1: .* times larger. Take method=dps, pigdm, ddrm, ddnm, diffpir, or mmps"
    if method in (*NOISY, "pigdm") and noise == "map" and not operator.pixelwise:
        return "is a map, and (Blur|Matrix) mixes pixels: .* Take method=mmps or method=dps"
    return None


def levels(noise: str, y: torch.Tensor):
    return {
        "none": 0.0,
        "number": 0.1,
        "map": 0.05 + 0.1 * torch.rand(y[0].shape, generator=keyed_generator("map")),
    }[noise]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_operator_process_and_noise(method, operator):
    A, restore = OPERATORS[operator], METHODS[method]
    for noise in ("none", "number", "map"):
        clean = A(MEAN + TRUTH)
        std = levels(noise, clean)
        y = clean + std * randn(*clean.shape, seed="noise")
        words = refusal(method, A, noise)
        for process in PROCESSES:
            denoiser = GaussianDenoiser(process, MEAN, torch.tensor(0.16))
            x = process.prior_sample((N, *SHAPE), keyed_generator("start"))
            options = {"noise_std": std, "generator": keyed_generator("restore")}
            if words is not None:
                with pytest.raises(ConfigError, match=words):
                    restore(denoiser, x, A, y, **options)
                continue
            out = restore(denoiser, x, A, y, **options)
            assert out.shape == x.shape and out.dtype == torch.float64
            error = (A(out) - clean).square().mean().sqrt()
            free = (A(ddim(denoiser, x, num_steps=12, grid=geometric)) - clean).square().mean().sqrt()
            assert error < (0.7 if method == "dps" else 0.6) * free, (process, noise, error, free)
            if noise == "none" and method in (*EXACT, *NOISY):
                assert error < 1e-6, (process, error)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_fresh_noise_by_betas_needs_betas(process):
    """The eta of DiffPIR; its zeta is defined on every process."""
    denoiser, A = GaussianDenoiser(process, MEAN, torch.tensor(0.16)), Denoising()
    x = process.prior_sample((N, *SHAPE), keyed_generator("start"))
    if isinstance(process, DiscreteVP):
        assert diffpir(denoiser, x, A, TRUTH, num_steps=3, eta=0.5).isfinite().all()
    else:
        with pytest.raises(ConfigError, match=rf"eta=0.5: .* {type(process).__name__} has none. Take eta=0"):
            diffpir(denoiser, x, A, TRUTH, num_steps=3, eta=0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("std", "words"),
    [
        (-0.1, "noise_std=-0.1: a standard deviation"),
        (float("nan"), "noise_std=nan"),
        (torch.tensor([-1.0, 0.5, 0.5, 0.5]).repeat(2), "negative or no numbers|is a map: "),
        (torch.ones(1, 5, 8), r"map \(1, 5, 8\), which does not fit a measurement \(6, 3, 4, 8\)|is a map: "),
    ],
)
def test_noise_that_is_none(method, std, words):
    process = VP()
    x = process.prior_sample((N, *SHAPE), keyed_generator("start"))
    denoiser = GaussianDenoiser(process, MEAN, torch.tensor(0.16))
    with pytest.raises(ConfigError, match=words):
        METHODS[method](denoiser, x, OPERATORS["inpainting"], TRUTH, noise_std=std)


def test_weights_of_dps_need_noise_everywhere():
    process = VP()
    denoiser = GaussianDenoiser(process, MEAN, torch.tensor(0.16))
    x = process.prior_sample((N, *SHAPE), keyed_generator("start"))
    std = torch.ones(4, 8)
    std[0, 0] = 0
    with pytest.raises(ConfigError, match=r"pixels that have no noise: .* method=pigdm or method=mmps"):
        dps(denoiser, x, Denoising(), TRUTH, noise_std=std, num_steps=2)
    same = [
        dps(
            denoiser,
            x,
            Denoising(),
            TRUTH,
            noise_std=std,
            num_steps=4,
            generator=keyed_generator("dps"),
        )
        for std in (0.3, torch.full((3, 4, 8), 0.3))
    ]
    assert torch.allclose(*same, rtol=0, atol=1e-9)


def test_conjugate_gradients_stop_where_the_matrix_is_not_positive():
    b = torch.tensor([[0.3, 1.0], [0.3, 1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -0.2], [1.0, 2.0]], dtype=torch.float64)
    indefinite, positive = cg(lambda v: diagonal * v, b, iterations=2)
    assert torch.equal(indefinite, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(positive, b[1] / diagonal[1])


@pytest.mark.parametrize("options", [{"eta": 1.5}, {"travel_length": 4, "travel_repeats": 2}])
def test_options_out_of_range_are_refused(options):
    process = EDM()
    pixel = GaussianDenoiser(process, torch.zeros(1, 2, 2), torch.tensor(0.25))
    x = process.prior_sample((1, 1, 2, 2))
    with pytest.raises(ConfigError, match=next(iter(options))):
        ddnm(pixel, x, Denoising(), x, num_steps=4, **options)
