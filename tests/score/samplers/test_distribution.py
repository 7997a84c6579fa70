"""Samplers driven by an exact denoiser draw from its data distribution."""

from functools import partial

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.rng import PerSample, keyed_generator
from lit_gen.score.denoiser import Denoiser, GaussianDenoiser, GaussianMixtureDenoiser
from lit_gen.score.precondition import EDMPrecondition
from lit_gen.score.samplers import (
    annealed_langevin,
    consistency,
    ddim,
    dpm_solver_multistep,
    dpm_solver_singlestep,
    euler,
    geometric,
    heun,
    karras,
    predictor_corrector,
    probability_flow,
    rk45,
    uniform_steps,
    uniform_time,
    unipc,
    vp_levels,
)
from lit_gen.score.samplers.predictor_corrector import (
    AnnealedLangevin,
    Langevin,
    OfficialSteps,
    ancestral,
    euler_maruyama,
    reverse_diffusion,
)
from lit_gen.score.sde import EDM, VE, VP, DiscreteVP, Flow, SubVP, linear_betas

PROCESSES = [EDM(0.01, 40.0), VE(0.01, 40.0), VP(), SubVP(), Flow(), DiscreteVP(linear_betas())]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)

STD, WEIGHTS = 0.15, torch.tensor([0.3, 0.7])
MEANS = torch.tensor([[0.6, -0.4, 0.1, 0.5], [-0.5, 0.3, 0.4, -0.6]]).reshape(2, 1, 2, 2)


def mixture(process):
    return GaussianMixtureDenoiser(process, MEANS, torch.tensor(STD**2), WEIGHTS)


def draw_data(n: int, seed: str = "data") -> torch.Tensor:
    g = keyed_generator(seed)
    k = torch.multinomial(WEIGHTS, n, replacement=True, generator=g)
    return MEANS[k].double() + STD * torch.randn(n, 1, 2, 2, generator=g, dtype=torch.float64)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = 64) -> float:
    """The mean over directions of the 1-Wasserstein distance of the projections."""
    v = torch.randn(a[0].numel(), directions, generator=keyed_generator("directions"), dtype=torch.float64)
    projected = [(x.flatten(1) @ (v / v.norm(dim=0))).sort(0).values for x in (a, b)]
    return (projected[0] - projected[1]).abs().mean().item()


def assert_same_distribution(samples: torch.Tensor, tolerance: float = 0.05):
    """Means, covariances, the share of each component, and the sliced Wasserstein distance to a draw of the
    data.
    """
    flat, w = samples.flatten(1), WEIGHTS.double()
    means = MEANS.flatten(1).double()
    mean = w @ means
    covariance = STD**2 * torch.eye(4).double() + (means - mean).T @ (w[:, None] * (means - mean))
    assert (flat.mean(0) - mean).abs().max() < tolerance
    assert (flat.T.cov() - covariance).abs().max() < tolerance
    near = torch.cdist(flat, means).argmin(1).double().mean().item()
    assert near == pytest.approx(0.7, abs=tolerance)
    distance = sliced_wasserstein(samples, draw_data(len(samples)))
    assert distance < tolerance


N = 2000
SAMPLERS = {
    "euler": partial(euler, num_steps=64, grid=geometric),
    "heun": partial(heun, num_steps=24, grid=geometric),
    "heun with churn": partial(heun, num_steps=48, S_churn=15.0, grid=geometric),
    "ddim": partial(ddim, num_steps=64, grid=geometric),
    "ancestral (eta 1)": partial(ddim, num_steps=150, grid=geometric, eta=1.0),
    "DPM-Solver++ (2M)": partial(dpm_solver_multistep, num_steps=24, grid=geometric),
    "DPM-Solver++ (3M)": partial(dpm_solver_multistep, num_steps=24, order=3, grid=geometric),
    "SDE-DPM-Solver++ (2M)": partial(dpm_solver_multistep, num_steps=64, eta=1.0, grid=geometric),
    "DPM-Solver++ (3S)": partial(dpm_solver_singlestep, num_steps=40),
    "UniPC": partial(unipc, num_steps=24, grid=geometric),
    "probability flow": partial(probability_flow, num_steps=120, grid=vp_levels),
    "RK45": partial(rk45, rtol=1e-3, atol=1e-3),
    "reverse diffusion x Langevin": partial(
        predictor_corrector, num_steps=120, corrector=Langevin(0.05), grid=geometric
    ),
    "ancestral x ALD": partial(
        predictor_corrector,
        num_steps=100,
        predictor=ancestral,
        corrector=AnnealedLangevin(0.16, 1),
        grid=geometric,
    ),
    "reverse diffusion alone": partial(predictor_corrector, num_steps=200, corrector=None, grid=geometric),
}


@each_process
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_the_mixture(name, process):
    if name == "reverse diffusion alone" and type(process) in (Flow, DiscreteVP):
        pytest.skip("needs many more steps where a grid of noise levels takes long steps in time")
    g = keyed_generator("samples", name)
    samples = SAMPLERS[name](mixture(process), process.prior_sample((N, 1, 2, 2), g), generator=g)
    assert_same_distribution(samples)


@pytest.mark.parametrize("process", [VE(0.01, 40.0), VP(), SubVP()], ids=lambda p: type(p).__name__)
def test_euler_maruyama_on_its_own_grid(process):
    g = keyed_generator("em")
    x = process.prior_sample((N, 1, 2, 2), g)
    sampler = partial(
        predictor_corrector, predictor=reverse_diffusion, corrector=None, discretization=euler_maruyama
    )
    assert_same_distribution(sampler(mixture(process), x, num_steps=500, generator=g), 0.06)


def test_official_steps_of_the_discrete_models():
    for process in (VE(0.01, 40.0), VP()):
        g = keyed_generator("official")
        x = process.prior_sample((N, 1, 2, 2), g)
        out = predictor_corrector(
            mixture(process),
            x,
            num_steps=300,
            corrector=None,
            discretization=OfficialSteps(300),
            generator=g,
        )
        assert_same_distribution(out, 0.06)
    with pytest.raises(ConfigError, match=r"OfficialSteps\(10\) on VP needs num_steps > beta_max=20"):
        predictor_corrector(mixture(VP()), x, num_steps=10, discretization=OfficialSteps(10))


def test_annealed_langevin():
    process = VE(0.02, 10.0)
    g = keyed_generator("langevin")
    x = torch.rand(N, 1, 2, 2, generator=g) * 2 - 1
    options = {"num_steps": 40, "steps_per_level": 10, "generator": g}
    out = annealed_langevin(mixture(process), x, step_size=0.3 * 0.02**2, **options)
    # Langevin dynamics mixes the two components only while the noise is large, hence their shares are rough.
    assert_same_distribution(out, 0.1)
    with pytest.raises(ConfigError, match=r"step_size must be between 0 and 0.0008.*; got 1"):
        annealed_langevin(mixture(process), x, step_size=1.0, **options)


def test_stationary_variance_of_langevin_steps_is_that_of_the_discrete_chain():
    """y <- (1 - e/v) y + sqrt(2 e) z has the variance v / (1 - e / (2 v)), at each noise level."""
    process = EDM(0.5, 2.0)
    denoiser = GaussianDenoiser(process, torch.zeros(1, 2, 2), torch.tensor(0.75))
    g, v, step = keyed_generator("chain"), 1.0, 0.2
    x = torch.randn(N, 1, 2, 2, generator=g)
    constant = lambda process, n: torch.full((n + 1,), 0.5).double()  # noqa: E731
    out = annealed_langevin(
        denoiser,
        x,
        num_steps=1,
        steps_per_level=60,
        step_size=step,
        grid=constant,
        denoise=False,
        generator=g,
    )
    assert out.var().item() == pytest.approx(v / (1 - step / (2 * v)), rel=0.04)


FEW_STEPS = {"consistency": consistency}  # on a consistency model: tests/score/fewstep
STOCHASTIC = ["consistency", "heun with churn", "ancestral (eta 1)", "SDE-DPM-Solver++ (2M)"]
STOCHASTIC += ["reverse diffusion x Langevin"]


@pytest.mark.parametrize("name", [*STOCHASTIC, "RK45"])
def test_an_image_depends_on_its_own_stream_alone(name):
    process = VP()
    sampler = SAMPLERS[name] if name == "RK45" else partial((SAMPLERS | FEW_STEPS)[name], num_steps=6)

    def draw(indices):
        g = PerSample.keyed(7, indices)
        return sampler(mixture(process), process.prior_sample((len(indices), 1, 2, 2), g), generator=g)

    # Another batch size may change the last digit of a sum, not the noise.
    torch.testing.assert_close(draw([4, 2])[0], draw(range(5))[4], rtol=0, atol=1e-10)


class Refuses(torch.nn.Module):
    """As a network whose kernels cannot do without images."""

    def forward(self, x, noise_label, label=None, augment_label=None):
        assert len(x) > 0
        return x


@pytest.mark.parametrize("name", [*SAMPLERS, *FEW_STEPS, "annealed Langevin", "Euler-Maruyama"])
def test_no_images_give_none(name):
    """A rank without a share of the images samples like the others."""
    process = VE(0.01, 40.0)
    more = FEW_STEPS | {
        "annealed Langevin": partial(annealed_langevin, num_steps=3, step_size=1e-5),
        "Euler-Maruyama": partial(predictor_corrector, num_steps=3, discretization=euler_maruyama),
    }
    x = process.prior_sample((0, 1, 2, 2), PerSample([]))
    for denoiser in (Denoiser(Refuses(), process, EDMPrecondition()), mixture(process)):
        out = (SAMPLERS | more)[name](denoiser, x, generator=PerSample([]))
        assert out.shape == (0, 1, 2, 2) and out.dtype == torch.float64


def test_batch_coupled_langevin_is_an_option_only():
    """The official rule averages norms over the batch, so that an image changes with its mates."""
    process, x = VP(), torch.randn(4, 1, 2, 2, generator=keyed_generator("x"))
    for per_image, alone in ((True, True), (False, False)):
        run = partial(
            predictor_corrector, mixture(process), num_steps=4, corrector=Langevin(per_image=per_image)
        )
        one = run(x[:1], generator=PerSample.keyed(0, [0]))
        four = run(x, generator=PerSample.keyed(0, range(4)))
        assert torch.allclose(one[0], four[0], rtol=0, atol=1e-10) == alone


def test_grids():
    """From t_max to t_min and, by default, on to noise level 0; the named quantity is evenly spaced."""
    for process in PROCESSES:
        for grid in (karras, geometric, uniform_time):
            times = grid(process, 9)
            assert len(times) == 10 and process.noise_level(times[-1]) == 0
            torch.testing.assert_close(times[[0, 8]], torch.tensor([process.t_max, process.t_min]).double())
            open_end = grid(process, 9, denoise=False)
            assert len(open_end) == 10 and open_end[-1].item() == pytest.approx(process.t_min)
        roots = process.noise_level(karras(process, 9, rho=5.0)[:-1]) ** 0.2
        assert roots.diff().std() < 1e-9 * roots[0]
        log_snr = process.noise_level(geometric(process, 9)[:-1]).log()
        assert log_snr.diff().std() < 1e-9
        assert uniform_time(process, 9)[:-1].diff().std() < 1e-12
    process = DiscreteVP(linear_betas())
    steps = process.index(uniform_steps(process, 25)[:-1])
    assert torch.equal(steps, steps.round()) and steps[0] == 999 and steps[-1] == 0
    with pytest.raises(ConfigError, match="uniform_steps needs a DiscreteVP"):
        uniform_steps(VP(), 5)
    with pytest.raises(ConfigError, match="num_steps must be at least 1, got 0"):
        karras(EDM(), 0)
    for call, words in (
        (lambda: dpm_solver_multistep(mixture(VP()), torch.zeros(1, 1, 2, 2), order=4), "orders 1, 2 and 3"),
        (
            lambda: dpm_solver_multistep(
                mixture(VP()), torch.zeros(1, 1, 2, 2), eta=1.0, data_prediction=False
            ),
            "eta must be 0",
        ),
        (lambda: unipc(mixture(VP()), torch.zeros(1, 1, 2, 2), order=0), "order of UniPC"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()
    vp_times = VP().time(vp_levels(EDM(), 9)[:-1])
    assert vp_times.diff().std() < 1e-9 and vp_levels(EDM(), 9)[0].item() == pytest.approx(80)
