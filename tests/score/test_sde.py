import math

import pytest
import torch
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator
from lit_gen.score.sde import (
    EDM,
    GVP,
    VE,
    VP,
    DiscreteVP,
    Flow,
    SubVP,
    cosine_betas,
    linear_betas,
    per_image,
    per_row,
    sigmoid_betas,
)

PROCESSES = {
    "EDM": EDM(),
    "VE": VE(),
    "VP": VP(),
    "SubVP": SubVP(),
    "Flow": Flow(),
    "GVP": GVP(),
    "linear": DiscreteVP(linear_betas()),
    "cosine": DiscreteVP(cosine_betas()),
    "sigmoid": DiscreteVP(sigmoid_betas(200)),
}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def times(process, n=301):
    """From t_min to t_max, off the knots of discrete processes."""
    low, high = math.log(process.t_min), math.log(process.t_max)
    return torch.linspace(low, high, n, dtype=torch.float64).exp()[1:-1] + 1e-9


@each_process
def test_time_inverts_noise_level(process):
    t = times(process)
    assert_close(process.time(process.noise_level(t)), t, rtol=1e-9, atol=0)
    assert (process.noise_level(t).diff() > 0).all()
    assert process.noise_level(process.time(torch.zeros(()))) == 0


@each_process
def test_noise_level_is_sigma_over_alpha(process):
    t = times(process)
    assert_close(process.sigma(t) / process.alpha(t), process.noise_level(t), rtol=1e-12, atol=0)


@each_process
def test_drift_and_diffusion_are_the_derivatives_of_the_marginals(process):
    """f = d log alpha / dt and g^2 = d sigma^2 / dt - 2 f sigma^2."""
    t = times(process).requires_grad_()
    log_alpha = process.alpha(t).log() + 0 * t
    (f,) = torch.autograd.grad(log_alpha.sum(), t)
    (slope,) = torch.autograd.grad(process.sigma(t).square().sum(), t)
    t = t.detach()
    assert_close(process.drift(t), f, rtol=1e-10, atol=1e-12)
    assert_close(
        process.diffusion(t).square(), slope - 2 * f * process.sigma(t).square(), rtol=1e-7, atol=1e-14
    )


@each_process
def test_slopes_are_the_derivatives_of_alpha_and_sigma(process):
    t = times(process).requires_grad_()
    for ours, of in zip(
        process.slopes(t.detach()), (process.alpha(t) + 0 * t, process.sigma(t)), strict=True
    ):
        assert_close(ours, torch.autograd.grad(of.sum(), t)[0], rtol=1e-7, atol=1e-12)


@each_process
def test_transitions_compose(process):
    """x_s -> x_t -> x_u is x_s -> x_u, and from noise level 0 the transition is the marginal."""
    s, t, u = torch.linspace(process.t_min, process.t_max, 5, dtype=torch.float64)[1:4]
    (r1, v1), (r2, v2), (r, v) = (process.transition(*pair) for pair in ((s, t), (t, u), (s, u)))
    assert_close(r1 * r2, r)
    assert_close(r2.square() * v1 + v2, v)
    ratio, variance = process.transition(process.time(torch.zeros(())), u)
    assert_close(ratio, process.alpha(u))
    assert_close(variance, process.sigma(u).square())


@each_process
def test_coefficients_keep_the_shape_of_t_and_are_float64(process):
    for t in (torch.tensor(0.5), torch.tensor([0.4, 0.5], dtype=torch.float32)):
        for name in ("alpha", "sigma", "noise_level", "drift", "diffusion"):
            c = getattr(process, name)(t)
            assert c.shape == t.shape and c.dtype == torch.float64, name


def test_small_times_are_exact():
    """The series of the variances at t = 1e-5, where float32 is off by per cents (score_sde_pytorch, EDM)."""
    t = torch.tensor(1e-5, dtype=torch.float64)
    integral = 0.1e-5 + 19.9 * 1e-10 / 2
    series = integral - integral**2 / 2 + integral**3 / 6
    assert VP().sigma(t).item() == pytest.approx(math.sqrt(series), rel=1e-12)
    assert SubVP().sigma(t).item() == pytest.approx(series, rel=1e-12)
    assert VP().sigma(t).item() == pytest.approx(0.0010005, rel=1e-4)
    assert VP().time(VP().noise_level(t)).item() == pytest.approx(1e-5, rel=1e-10)


def test_discrete_process_has_its_betas_as_transitions():
    betas = linear_betas(50)
    process = DiscreteVP(betas)
    t = torch.arange(51, dtype=torch.float64) / 50
    ratio, variance = process.transition(t[:-1], t[1:])
    assert_close(ratio, (1 - betas).sqrt())
    assert_close(variance, betas)
    assert_close(process.alpha(t[1:]).square(), (1 - betas).cumprod(0))
    assert_close(process.index(t[1:]), torch.arange(50, dtype=torch.float64))


def test_beta_schedules():
    """Ho et al.; the cosine of Nichol & Dhariwal away from its clipped end; Jabri et al. in the middle."""
    assert linear_betas()[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    cosine = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
    assert_close((1 - cosine_betas(100)).cumprod(0)[:-1], (cosine / cosine[0])[1:-1])
    assert cosine_betas()[-1] == 0.999
    half = (1 - sigmoid_betas(100)).cumprod(0)[49]
    assert half.item() == pytest.approx(0.5)


@each_process
def test_prior(process):
    x = process.prior_sample((64, 3, 8, 8), keyed_generator("prior"))
    assert x.std().item() == pytest.approx(process.prior_std, rel=0.02)
    normal = torch.distributions.Normal(0.0, process.prior_std)
    assert_close(process.prior_log_prob(x), normal.log_prob(x.double()).flatten(1).sum(1))
    # What sampling starts from is what the process ends at, for data of deviation 1/2.
    t = torch.tensor(process.t_max)
    total = (0.25 * process.alpha(t).square() + process.sigma(t).square()).sqrt()
    assert process.prior_std == pytest.approx(total.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: EDM(1.0, 0.5), "t_min, t_max"),
        (lambda: VE(sigma_min=0.0), "sigma_min, sigma_max"),
        (lambda: VP(beta_min=3.0, beta_max=2.0), "beta_min, beta_max"),
        (lambda: Flow(t_max=1.1), "at most 1"),
        (lambda: DiscreteVP([0.1, 1.0]), "between 0 and 1"),
    ],
)
def test_errors_name_what_is_wrong(build, words):
    with pytest.raises(ConfigError, match=words):
        build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_of_the_cpu_stays_there_and_multiplies_as_a_column_would(dtype):
    """On a GPU the copy of a single number would wait for all that was asked of it before."""
    x, c = torch.randn(3, 2, 4, generator=keyed_generator("x"), dtype=dtype), torch.tensor(1 / 3).double()
    assert torch.equal(per_image(c, x) * x, per_image(c.expand(3), x) * x)
    assert torch.equal(per_row(c, x), c.expand(3).to(dtype)) and per_row(c, x).dtype == dtype
    elsewhere = x.to("meta")
    assert per_image(c, elsewhere).device.type == "cpu" and per_image(c, elsewhere).dtype == dtype
    assert per_row(c, elsewhere).device.type == "meta" and per_row(c, elsewhere).shape == (3,)
    rows = torch.rand(3, device="meta")
    assert per_image(rows, elsewhere).shape == (3, 1, 1) and per_row(rows, elsewhere).shape == (3,)
