"""Deterministic solvers converge to the exact solution of the ODE at their own order, on every process."""

import math
from functools import partial

import pytest
import torch

from lit_gen.rng import keyed_generator
from lit_gen.score.denoiser import AbstractDenoiser, CountingDenoiser, GaussianDenoiser
from lit_gen.score.samplers import (
    ascending,
    consistency,
    ddim,
    dpm_solver_multistep,
    dpm_solver_singlestep,
    encode,
    euler,
    geometric,
    heun,
    karras,
    predictor_corrector,
    probability_flow,
    rk45,
    uniform_time,
    unipc,
)
from lit_gen.score.samplers.predictor_corrector import probability_flow_step
from lit_gen.score.sde import EDM, VE, VP, Flow, SubVP

PROCESSES = [EDM(0.02, 20.0), VE(0.02, 20.0), VP(t_min=0.02), SubVP(t_min=0.05), Flow(0.02, 0.98)]
MEAN = torch.tensor([0.3, -0.4, 0.1, 0.2]).reshape(1, 2, 2)
VARIANCE = torch.tensor([0.04, 0.25, 0.5, 1.0]).reshape(1, 2, 2)


def graded(process, num_steps):
    """Even in lambda but for two short steps at first, where multistep methods are of lower order."""
    high, low = process.noise_level(torch.tensor([process.t_max, process.t_min], dtype=torch.float64)).log()
    h = (high - low) / (num_steps - 2)
    nodes = torch.cat([torch.stack([0 * h, h**2, h**1.5]) / 4, h * torch.arange(1, num_steps - 1)])
    return process.time((high - nodes).exp())


multistep = partial(dpm_solver_multistep, grid=graded, lower_order_final=False)
even = partial(geometric, denoise=False)
singlestep = partial(dpm_solver_singlestep, grid=even)
corrected = partial(unipc, grid=graded, lower_order_final=False)
in_time = partial(uniform_time, denoise=False)
SOLVERS = {  # name: (order, solver)
    "euler": (1, partial(euler, grid=partial(karras, denoise=False))),
    "ddim": (1, partial(ddim, grid=even)),
    "heun": (2, partial(heun, grid=partial(karras, denoise=False))),
    "probability flow, Euler": (1, partial(probability_flow, alpha=None, grid=in_time)),
    "probability flow, Heun": (2, partial(probability_flow, alpha=1.0, grid=in_time)),
    "probability flow, midpoint": (2, partial(probability_flow, alpha=0.5, grid=in_time)),
    "reverse diffusion": (
        1,
        partial(predictor_corrector, predictor=probability_flow_step, corrector=None, grid=in_time),
    ),
    "DPM-Solver++ (1)": (1, partial(multistep, order=1)),
    "DPM-Solver++ (2M)": (2, partial(multistep, order=2)),
    "DPM-Solver++ (3M)": (3, partial(multistep, order=3)),
    "DPM-Solver++ (3M), official": (2, partial(multistep, order=3, curvature=0.5)),
    "DPM-Solver (2M)": (2, partial(multistep, order=2, data_prediction=False)),
    "DPM-Solver (3M)": (3, partial(multistep, order=3, data_prediction=False)),
    "DPM-Solver++ (2S)": (2, partial(singlestep, order=2)),
    "DPM-Solver++ (3S)": (3, partial(singlestep, order=3)),
    "DPM-Solver-2": (2, partial(singlestep, order=2, data_prediction=False)),
    "DPM-Solver-3": (3, partial(singlestep, order=3, data_prediction=False)),
    "UniPC-1": (2, partial(corrected, order=1)),
    "UniPC-2": (3, partial(corrected, order=2)),
    "UniPC-3": (4, partial(corrected, order=3)),
}


def exact(process, x: torch.Tensor, t_from: float, t_to: float) -> torch.Tensor:
    """The flow of a Gaussian scales the distance to the mean with the deviation of the marginal."""
    start, end = (torch.tensor(t, dtype=torch.float64) for t in (t_from, t_to))
    std = [(process.alpha(t).square() * VARIANCE + process.sigma(t).square()).sqrt() for t in (start, end)]
    return process.alpha(end) * MEAN + (x - process.alpha(start) * MEAN) * std[1] / std[0]


def problem(process):
    denoiser = GaussianDenoiser(process, MEAN, VARIANCE)
    x = process.prior_std * torch.randn(3, 1, 2, 2, generator=keyed_generator("x"), dtype=torch.float64)
    return denoiser, x, exact(process, x, process.t_max, process.t_min)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", SOLVERS)
def test_order(name, process):
    order, solver = SOLVERS[name]
    denoiser, x, truth = problem(process)
    # 2 modulo 3, so that singlestep methods end with a step of order 2, not 1.
    steps = [98, 194] if order < 4 else [50, 98]
    errors = [(solver(denoiser, x, num_steps=n) - truth).square().mean().sqrt().item() for n in steps]
    slope = math.log2(errors[-2] / errors[-1])
    assert errors[-1] < 0.15, errors
    assert order - 0.4 < slope < order + 1.3, (slope, errors)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_rk45_and_encode_solve_to_their_tolerance(process):
    denoiser, x, truth = problem(process)
    for tol in (1e-4, 1e-8):
        out = rk45(denoiser, x, rtol=tol, atol=tol, denoise=False)
        assert (out - truth).abs().max() < 30 * tol
        back = encode(denoiser, truth, rtol=tol, atol=tol)
        assert ((back - x).abs() / (1 + x.abs())).max() < 300 * tol * process.prior_std


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_ascending_grids_invert_a_solver(process):
    """DDIM and its inverse meet to first order, Heun and its inverse to second."""
    denoiser, _, truth = problem(process)
    for solver, order in ((euler, 1), (heun, 2)):
        errors = []
        for n in (100, 200):
            latent = solver(denoiser, truth, num_steps=n, grid=ascending(geometric))
            back = solver(denoiser, latent, num_steps=n, grid=partial(geometric, denoise=False))
            errors.append((back - truth).square().mean().sqrt().item())
        assert math.log2(errors[0] / errors[1]) > order - 0.3, errors


NFE = {
    "consistency": (consistency, lambda n: n),
    "euler": (euler, lambda n: n),
    "ddim": (ddim, lambda n: n),
    "heun": (heun, lambda n: 2 * n - 1),
    "probability_flow": (probability_flow, lambda n: 2 * n - 1),
    "multistep": (dpm_solver_multistep, lambda n: n),
    "singlestep": (dpm_solver_singlestep, lambda n: n),
    "unipc": (unipc, lambda n: n),
    "predictor_corrector": (predictor_corrector, lambda n: 2 * n),
}


@pytest.mark.parametrize("name", NFE)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7])
def test_number_of_evaluations_and_end(name, num_steps):
    """The documented number of evaluations; the last of a grid to noise level 0 is one denoising."""
    solver, evaluations = NFE[name]
    denoiser, x, _ = problem(PROCESSES[0])
    counted = CountingDenoiser(denoiser)
    out = solver(counted, x, num_steps=num_steps, generator=keyed_generator("nfe"))
    assert counted.calls == evaluations(num_steps)
    assert counted.evaluations == len(x) * counted.calls
    assert out.dtype == torch.float64
    if name not in ("predictor_corrector", "consistency"):  # whose noise is another one again
        steps = []
        solver(denoiser, x, num_steps=num_steps, trace=lambda step, x_t, x0_hat: steps.append((step, x0_hat)))
        assert torch.equal(steps[-1][1], out)


class Stiff(AbstractDenoiser):
    """A denoiser to which the rows of a batch are unequally hard."""

    process = VP()

    def forward(self, x_t, t, label=None):
        return x_t.tanh() * x_t.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1).sin()


def test_a_row_of_rk45_is_solved_as_if_alone():
    """Each row takes scipy's steps for that row alone, whatever else is in the batch."""
    from scipy.integrate import solve_ivp

    from lit_gen.score.samplers.ode import velocity
    from lit_gen.score.samplers.rk45 import integrate

    denoiser = Stiff()
    x = torch.randn(3, 1, 2, 2, generator=keyed_generator("rows"), dtype=torch.float64)
    x[1] *= 4

    def f(t, y, rows):
        return velocity(denoiser, y.view(-1, 1, 2, 2), t).flatten(1)

    together, calls = integrate(f, x.flatten(1), 1.0, 1e-3, rtol=1e-3, atol=1e-3)
    assert calls.unique().numel() > 1
    for i in range(3):
        alone, calls_alone = integrate(f, x[i : i + 1].flatten(1), 1.0, 1e-3, rtol=1e-3, atol=1e-3)
        assert torch.equal(alone[0], together[i]) and calls_alone[0] == calls[i]

        def g(t, y):
            return f(torch.tensor([t], dtype=torch.float64), torch.from_numpy(y)[None], None)[0].numpy()

        scipy = solve_ivp(g, (1.0, 1e-3), x[i].flatten().numpy(), method="RK45", rtol=1e-3, atol=1e-3)
        assert calls[i] == scipy.nfev
        torch.testing.assert_close(alone[0], torch.from_numpy(scipy.y[:, -1]), rtol=0, atol=1e-7)
