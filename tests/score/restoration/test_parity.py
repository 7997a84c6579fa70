"""DDRM, DDNM, DiffPIR, and MMPS against the official codes (goldens/restoration/*.json, see its README).

A case is its JSON and its arrays; its operator is the dense matrix that they hold, and beside it the operator
of lit_gen that the JSON describes.
"""

import json
import os
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lit_gen.rng import PerSample
from lit_gen.score.denoiser import AbstractDenoiser, CountingDenoiser, GaussianDenoiser
from lit_gen.score.restoration import (
    Blur,
    Colorization,
    Inpainting,
    Matrix,
    MomentMatchingDenoiser,
    SuperResolution,
    cg,
    ddnm,
    ddrm,
    diffpir,
    evidence,
    gmres,
    travel,
)
from lit_gen.score.restoration.ddrm import advance, start
from lit_gen.score.restoration.diffpir import data_step
from lit_gen.score.samplers import ddim
from lit_gen.score.sde import VE, VP, DiscreteVP, Flow, Process, linear_betas

pytestmark = pytest.mark.parity
FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[2] / "goldens") / "restoration"
SHAPE = (3, 8, 8)
SOLVERS = {"gmres": gmres, "cg": cg}


def names(method: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"{method}*.json"))


def each(method: str):
    return pytest.mark.parametrize("name", names(method))


@cache
def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def arrays(name: str) -> dict[str, torch.Tensor]:
    found = {k: torch.from_numpy(v) for k, v in np.load(FOLDER / f"{name}.npz").items()}
    return {k: v if v.dtype == torch.bool else v.double() for k, v in found.items()}


def operators(name: str) -> list:
    """[(operator, what turns the y of the file, (B, M), into its own)], the dense matrix first."""
    case, given = load(name), arrays(name)
    A = given.get("A")
    if A is None:  # one of this kind is its mask
        A = given["mask"].expand(SHAPE).flatten().double().diag()
    channels, h, w = SHAPE
    found = [(Matrix(A, SHAPE), lambda y: y)]
    if "mask" in given:
        found.append((Inpainting(given["mask"]), lambda y: (y @ A).unflatten(1, SHAPE)))
    elif "kernel" in given and case.get("sf", 1) == 1:
        found.append((Blur(given["kernel"]), lambda y: y.unflatten(1, SHAPE)))
    elif "weights" in case:
        found.append((Colorization(tuple(case["weights"])), lambda y: y.unflatten(1, (1, h, w))))
    elif "factor" in case:
        f = case["factor"]
        found.append((SuperResolution(f), lambda y: y.unflatten(1, (channels, h // f, w // f))))
    images = torch.eye(A.shape[1], dtype=torch.float64).unflatten(1, SHAPE)
    for operator, own in found:
        assert_close(operator(images), own(A.T), rtol=0, atol=1e-12)
    return found


def process_of(case: dict, given: dict, t: torch.Tensor) -> Process:
    """Of the times `t`; the levels of VE are told from its recorded sigmas, log sigma being linear in t."""
    t_min, t_max = float(t.min()) / 2, float(t.max())

    def exponential():
        slope = (given["sigma"][-1] / given["sigma"][0]).log() / (t[-1] - t[0])
        lowest = given["sigma"][0] * (-slope * t[0]).exp()
        return VE(float(lowest), float(lowest * slope.exp()), t_min, t_max)

    kinds = {
        "VP": lambda: VP(case.get("beta_min", 0.1), case.get("beta_max", 20.0), t_min, t_max),
        "VE": exponential,
        "Flow": lambda: Flow(t_min, t_max),
    }
    return kinds[case["process"]]()


class Mixture(AbstractDenoiser):
    """`GaussianMixtureDenoiser` with its sums in the order of the recorded numbers: conjugate gradients
    multiply a difference in the last bit by 1e9 on `mmps_steps_matrix_flow`, where 8 recorded iterations are
    7e-7 away from those of exact arithmetic."""

    def __init__(self, process, means, variance, weights):
        super().__init__()
        self.process, self.means, self.variance, self.weights = process, means, variance, weights

    def forward(self, x_t, t, label=None):
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        total = alpha**2 * self.variance + sigma**2
        rest = x_t[:, None] - alpha * self.means
        logits = self.weights.log() - 0.5 * (rest**2).flatten(2).sum(-1) / total
        images = self.means + alpha * self.variance / total * rest
        return (logits.softmax(1)[:, :, None, None, None] * images).sum(1)


def prior(case: dict, process: Process) -> CountingDenoiser:
    given = arrays("problem")
    exact = {
        "gaussian": lambda: GaussianDenoiser(process, given["mean"], given["cov"]),
        "gmm": lambda: Mixture(process, given["gmm_means"], given["gmm_variance"], given["gmm_weights"]),
    }
    return CountingDenoiser(exact[case["prior"]]())


DDPM = DiscreteVP(linear_betas())


def steps(indices: list[int]):
    """A grid of these steps of DDPM, -1 the image without noise."""
    times = torch.tensor([(i + 1) / 1000 for i in indices], dtype=torch.float64)
    return lambda process, num_steps: times


class Recorded(PerSample):
    """A generator that hands out recorded draws in order."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def _stack(self, draw, shape, device, dtype):
        return next(self.draws).to(dtype)


class Watch:
    """Keeps x_t and x0_hat of every call."""

    def __init__(self):
        self.states, self.images = [], []

    def __call__(self, step, x_t, x0_hat):
        self.states.append(x_t.clone())
        self.images.append(x0_hat.clone())


def compare(found, expected, tolerance):
    assert_close(found, expected, rtol=0, atol=tolerance)


# --- DDRM ------------------------------------------------------------------------------------------


def official_ddrm(operator, y, case, given, strict):
    """States x_T ... of `ddrm`'s own steps from the official start, which divides x_T / alpha by its noise
    level s_T, where x_T = alpha (...) divides by sqrt(1 + s_T^2)."""
    denoiser = prior(case, DDPM)
    times = steps([*case["timesteps"], -1])(DDPM, 0)
    known, levels = evidence(operator, y, case["sigma_0"]), DDPM.noise_level(times)
    alphas = [DDPM.alpha(t) for t in times]
    v = start(operator.coordinates(given["start"]), known, levels[0]) / (levels[0] * alphas[0])
    states, images = [operator.image(v) * alphas[0]], []
    etas = case["etaA"], case["etaB"], case["etaC"]
    for k, z in enumerate(given["noise"]):
        images.append(denoiser(states[-1], times[k]))
        p, z = operator.coordinates(images[-1]), operator.coordinates(z)
        v = advance(v, p, z, known, levels[k], levels[k + 1], etas, strict)
        states.append(operator.image(v) * alphas[k + 1])
    return states, images


@each("ddrm")
def test_ddrm(name):
    case, given = load(name), arrays(name)
    for operator, own in operators(name):
        states, images = official_ddrm(operator, own(given["y"]), case, given, strict=True)
        kept = case["states_kept"]
        for k, state in zip(kept, given["states"], strict=True):
            compare(states[k], state, 1e-9)
        for k, x0_hat in zip(kept, given["x0"], strict=False):
            compare(images[k], x0_hat, 1e-9)
        if "end_with_equality" in given:
            states, _ = official_ddrm(operator, own(given["y"]), case, given, strict=False)
            compare(states[-1], given["end_with_equality"], 1e-9)
            compare(operator(states[-1]), own(given["y"]), 1e-12)


@each("ddrm")
def test_ddrm_as_a_whole_differs_by_its_start_alone(name):
    """The public function: those steps from x_T = alpha (...), 1.4e-4 off the official start at step 900."""
    case, given = load(name), arrays(name)
    etas = {"eta_quieter": case["etaA"], "eta_noisier": case["etaB"], "eta_unseen": case["etaC"]}
    operator, own = operators(name)[-1]
    options = {"grid": steps([*case["timesteps"], -1]), "noise_std": case["sigma_0"], "strict": True} | etas
    watch, denoiser = Watch(), prior(case, DDPM)
    generator = Recorded(given["noise"])
    end = ddrm(
        denoiser, given["start"], operator, own(given["y"]), generator=generator, trace=watch, **options
    )
    states = [*watch.states, end]
    level = DDPM.noise_level(options["grid"](DDPM, 0)[0])
    compare(states[0], given["states"][0] * level / (1 + level.square()).sqrt(), 1e-9)
    assert denoiser.calls == len(case["timesteps"]) == case["steps"]
    for k, state in zip(case["states_kept"], given["states"], strict=True):
        compare(states[k], state, 20 / level.item() ** 2)


# --- DDNM ------------------------------------------------------------------------------------------


@each("ddnm")
def test_ddnm(name):
    case, given = load(name), arrays(name)
    num_steps = case["T_sampling"]
    stride = 1000 // num_steps
    options = {"travel_length": case["travel_length"], "travel_repeats": case["travel_repeat"]}
    path = travel(num_steps, *options.values())
    assert [num_steps - 1 - i for i in path] == case["times"]
    grid = steps([*(stride * k for k in reversed(range(num_steps))), -1])
    assert (case["method"] == "ddnm") == (case["sigma_y"] == 0)
    options |= {"noise_std": case["sigma_y"], "num_steps": num_steps, "eta": case["eta"], "grid": grid}
    for operator, own in operators(name):
        watch, generator = Watch(), Recorded(given["noise"])
        y, denoiser = own(given["y"]), prior(case, DDPM)
        end = ddnm(denoiser, given["start"], operator, y, generator=generator, trace=watch, **options)
        assert denoiser.calls == len(case["timesteps_called"])
        for k, state in zip(case["states_kept"], given["states"], strict=True):
            compare(watch.states[k], state, 1e-9)
        compare(watch.images[-1], given["x0_last"], 1e-9)
        compare(end, given["end"], 1e-9)
        assert next(generator.draws, None) is None
        if case["sigma_y"] == 0:
            compare(operator(end), y, 1e-12)


# --- DiffPIR ---------------------------------------------------------------------------------------


@each("diffpir")
def test_diffpir(name):
    """Ours ends where the official code does if its grid has the last time, whose answer that throws away."""
    case, given = load(name), arrays(name)
    inner = case["iter_num_U"]
    deviations = DDPM.noise_level(steps(case["timesteps"])(DDPM, 0))
    rho = case["lambda"] * case["sigma"] ** 2 / deviations.square()
    assert_close(rho, torch.tensor(case["rho_at_timesteps"], dtype=torch.float64), rtol=1e-9, atol=0)
    options = {
        "noise_std": 2 * case["sigma"],  # on [-1, 1]
        "prior_weight": case["lambda"],
        "zeta": case["zeta"],
        "eta": case["eta"],
        "guidance_scale": case["guidance_scale"],
        "inner_steps": inner,
        "clip": case["clip_x0"],
        "grid": steps(case["timesteps"]),
    }
    per_step = 2 * inner + (inner - 1)  # the eta part, the zeta part, the way back
    skipped = {k for k in range(per_step) if k % 3 == 0} if case["eta"] == 0 else set()
    draws = [z for i, z in enumerate(given["noise"]) if i % per_step not in skipped]
    for operator, own in operators(name):
        y = given["y"] if case["task"] == "inpainting" else 2 * given["y"] - 1
        y = own((y.flatten(1) @ given_matrix(name).T) if case["task"] == "inpainting" else y.flatten(1))
        watch, generator, denoiser = Watch(), Recorded(draws), prior(case, DDPM)
        end = diffpir(denoiser, given["x_start"], operator, y, generator=generator, trace=watch, **options)
        states = [*watch.states[inner::inner], end, end]  # after the k-th time, the last leaves it as it is
        assert denoiser.calls == inner * (len(case["timesteps"]) - 1) <= len(case["timesteps_called"]) - 1
        for k, state in zip(case["states_kept"], given["states"], strict=True):
            compare(states[k], state, 1e-8)
        limits = (-1, 1) if case["clip_x0"] else (-torch.inf, torch.inf)
        compare(watch.images[0].clamp(*limits), given["x0_first"], 1e-8)
        compare(end, given["end"], 1e-8)
        last = denoiser(end, options["grid"](DDPM, 0)[-1]).clamp(*limits)
        compare(last, given["x0_last"], 1e-8)
        assert next(generator.draws, None) is None


def given_matrix(name: str) -> torch.Tensor:
    return operators(name)[0][0].matrix


# --- MMPS ------------------------------------------------------------------------------------------


@each("mmps_steps")
def test_mmps_and_azulas_diffpir(name):
    case, given = load(name), arrays(name)
    times = given["t"]
    process = process_of(case, given, times)
    assert_close(process.alpha(times), given["alpha"], rtol=1e-9, atol=1e-12)
    assert_close(process.sigma(times), given["sigma"], rtol=1e-9, atol=1e-12)
    denoiser = prior(case, process)
    for operator, own in operators(name):
        y, deviations = own(given["y"]), own(given["cov_y"].sqrt()[None])
        if not case["diagonal_cov_y"]:
            deviations = case["sigma_y"]
        for i, t in enumerate(times):
            x_t = given["x_t"][i]
            compare(denoiser(x_t, t), given["x0_hat"][i], 1e-9)
            for key in given:
                kind, _, solver = key.partition("_")
                if kind == "mmps":
                    iterations = int(solver.removeprefix("gmres").removeprefix("cg"))
                    solve = SOLVERS[solver.removesuffix(str(iterations))]
                    found = MomentMatchingDenoiser(denoiser, operator, y, deviations, iterations, solve)
                    rounding = 1e-5 if solve is cg and not isinstance(operator, Matrix) else 1e-7
                    compare(found(x_t, t), given[key][i], rounding)
                elif kind == "diffpir":
                    found = azulas(operator, y, case, given, i, key)
                    compare(found, given[key][i], 1e-9 if key.endswith("closed_form") else 1e-7)
            enough = MomentMatchingDenoiser(denoiser, operator, y, deviations, given["A"].shape[0] + 20)
            compare(enough(x_t, t), given["closed_form"][i], 1e-9)


def azulas(operator, y, case, given, i, key):
    """x0_hat + (A^T A / var + lambda / s^2)^-1 A^T (y - A x0_hat) / var; solved in full it is our data
    step."""
    _, weight, solver = key.split("_", 2)
    x0_hat, variance = given["x0_hat"][i], case["sigma_y"] ** 2
    precision = float(weight.removeprefix("lambda")) * (given["alpha"][i] / given["sigma"][i]).square()
    if solver == "closed_form":
        return data_step(x0_hat, operator, y, precision * variance)
    iterations = int(solver.removeprefix("gmres").removeprefix("cg"))

    def system(v):
        return operator.adjoint(operator(v)) / variance + precision * v

    rest = operator.adjoint(y - operator(x0_hat)) / variance
    return x0_hat + SOLVERS[solver.removesuffix(str(iterations))](system, rest, iterations=iterations)


@each("mmps_ddim")
def test_mmps_in_ddim(name):
    """azula's eta multiplies the variance: ours is its root."""
    case, given = load(name), arrays(name)
    times = given["times"]
    process = process_of(case, given, times)
    evenly = torch.linspace(case["start"], case["stop"], case["steps"] + 1, dtype=torch.float64)
    assert_close(times, evenly, rtol=1e-6, atol=1e-6)
    for key in ("alpha", "sigma"):
        assert_close(getattr(process, key)(times), given[key], rtol=1e-9, atol=1e-12)
    for operator, own in operators(name):
        denoiser = MomentMatchingDenoiser(
            prior(case, process),
            operator,
            own(given["y"]),
            case["sigma_y"],
            case["iterations"],
            SOLVERS[case["solver"]],
        )
        watch = Watch()
        sampler = partial(ddim, grid=lambda process, num_steps: times, eta=case["eta"] ** 0.5)
        end = sampler(denoiser, given["start"], generator=Recorded(given["noise"]), trace=watch)
        states = [*watch.states, end]
        for k, state in zip(case["states_kept"], given["states"], strict=True):
            compare(states[k], state, 1e-6)


def test_there_is_a_case_of_every_kind():
    assert all(names(kind) for kind in ("ddrm", "ddnm", "diffpir", "mmps_steps", "mmps_ddim"))
