"""Samplers against the end points of the official codes on an exact Gaussian mixture
(goldens/score/samplers_*).

A case is its name; names of a kind that is not here are reported as skipped.
"""

import json
import os
import re
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.rng import PerSample
from lit_gen.score.denoiser import (
    AbstractDenoiser,
    ClippedDenoiser,
    CountingDenoiser,
    GaussianMixtureDenoiser,
)
from lit_gen.score.guidance import Guidance
from lit_gen.score.likelihood import bits_per_dim, kl_term, log_likelihood, variational_bound
from lit_gen.score.restoration import Colorization, Inpainting, Replace
from lit_gen.score.samplers import (
    ascending,
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
    uniform_time,
    vp_levels,
)
from lit_gen.score.samplers.ode import velocity
from lit_gen.score.samplers.predictor_corrector import (
    AnnealedLangevin,
    FixedStep,
    Langevin,
    OfficialSteps,
    ancestral,
    probability_flow_step,
    reverse_diffusion,
)
from lit_gen.score.sde import EDM, VE, VP, DiscreteVP, Process, SubVP, cosine_betas, linear_betas

pytestmark = pytest.mark.parity
FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[2] / "goldens") / "score"
SONG, OTHER = "samplers_song", "samplers_other"


@cache
def load(stem: str) -> dict:
    path = FOLDER / f"{stem}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def arrays(stem: str) -> dict[str, torch.Tensor]:
    path = FOLDER / f"{stem}.npz"
    return {k: torch.from_numpy(v) for k, v in np.load(path).items()} if path.exists() else {}


class Recorded(PerSample):
    """A generator that hands out recorded draws in order."""

    def __init__(self, draws):
        self.draws = iter(draws) if draws is not None else None

    def _stack(self, draw, shape, device, dtype):
        return next(self.draws).to(dtype)


def mixture(process: Process, std: float = 0.15) -> CountingDenoiser:
    means = arrays(SONG)["gmm_means"]
    return CountingDenoiser(
        GaussianMixtureDenoiser(process, means, torch.tensor(std**2), torch.tensor([0.3, 0.7]))
    )


def start(process: Process) -> torch.Tensor:
    return process.prior_std * arrays(SONG)["unit_latent"].double()


def song_process(name: str, eps: float) -> Process:
    return {"VE": VE(0.01, 50.0, t_min=eps), "VP": VP(t_min=eps), "subVP": SubVP(t_min=eps)}[name]


def given(times) -> callable:
    """A grid of these times."""
    return lambda process, num_steps: torch.as_tensor(times, dtype=torch.float64)


# --- score_sde_pytorch ---------------------------------------------------------------------------


def song_ode(match, _record):
    process = song_process(match["sde"], float(match["eps"]))
    denoiser, tol = mixture(process), float(match["tol"])
    return rk45(denoiser, start(process), rtol=tol, atol=tol, denoise=match["denoise"] == "1"), 30 * tol


def song_pc(match, record):
    process = song_process(match["sde"], 1e-3 if match["sde"] != "VE" else 1e-5)
    steps, snr, n = int(match["N"]), float(match["snr"]), int(match["n"])
    noise = arrays("samplers_song_noise")[match[0]].double()
    predictor = {"ancestral_sampling": ancestral, "none": None}.get(match["predictor"], reverse_diffusion)
    corrector = {"langevin": Langevin(snr, n, per_image=False), "ald": AnnealedLangevin(snr, n), "none": None}
    fixed = match["predictor"] == "euler_maruyama"
    denoiser = mixture(process)
    out = predictor_corrector(
        denoiser,
        process.prior_std * noise[0],
        num_steps=steps,
        predictor=predictor,
        corrector=corrector[match["corrector"]],
        discretization=FixedStep(1 / steps) if fixed else OfficialSteps(steps),
        generator=Recorded(noise[1:]),
    )
    assert denoiser.calls == record["network_calls"]
    return out, 2e-4


def song_pflow(match, record):
    process = song_process(match["sde"], 1e-3 if match["sde"] != "VE" else 1e-5)
    steps, denoiser = int(match["N"]), mixture(process)
    out = predictor_corrector(
        denoiser,
        start(process),
        num_steps=steps,
        predictor=probability_flow_step,
        corrector=None,
        discretization=OfficialSteps(steps),
    )
    assert denoiser.calls == record["network_calls"]
    return out, 2e-4


def song_bpd(match, record):
    process = song_process(match["sde"], 1e-5)
    x_0, denoiser = arrays(SONG)["likelihood_x0"].double(), mixture(process)
    probes = arrays(SONG)[f"{match[0]}_eps"].double()[None]
    if match["probe"] == "Rademacher":
        probes = probes.sign() if probes.min() < 0 else 2 * probes - 1  # recorded as 0 and 1
    result = log_likelihood(denoiser, x_0, probes=probes)
    # Ours estimates the trace in unit-scale coordinates; for probes of another length than sqrt(d) the
    # official one, in those of x_t, differs by what the change of scale contributes.
    ends = torch.tensor([1e-5, 1.0], dtype=torch.float64)
    scale = (process.alpha(ends) * (1 + process.noise_level(ends).square()).sqrt()).log().diff()
    excess = probes[0].square().flatten(1).sum(1) - x_0[0].numel()
    bits = bits_per_dim(result.log_prob + excess * scale, x_0[0].numel(), low=0.0, high=1.0)
    torch.testing.assert_close(bits, torch.tensor(record["bpd_with_offset8"]).double(), atol=3e-3, rtol=0)
    assert denoiser.calls < 0.75 * record["network_calls"]  # the official code has two calls for ours one
    return None


def song_restore(match, _record):
    """The official loops, put together from our pieces: they replace at the time of the step's start, begin
    with known pixels without noise, and return the unknown ones as the last predictor left them, noise
    included.
    """
    process = song_process(match["sde"], 1e-3 if match["sde"] != "VE" else 1e-5)
    steps, denoiser = int(match["N"]), mixture(process)
    image, noise = arrays(SONG)["likelihood_x0"].double(), arrays("samplers_song_noise")[match[0]].double()
    if match["task"] == "inpaint":
        operator, seen = Inpainting(torch.arange(8) < 4), lambda z: z
        free = ~operator.mask
    else:
        basis = torch.tensor([[1.0, -(2**0.5), 0], [1, 0.5**0.5, 1.5**0.5], [1, 0.5**0.5, -(1.5**0.5)]])
        basis = basis.double() / 3**0.5
        operator, seen = Colorization(), lambda z: torch.einsum("bihw,ji->bjhw", z, basis)
        free = torch.tensor([0.0, 1, 1]).reshape(3, 1, 1)  # the mask meant for gray is laid on red
    y, draws = operator(image), iter(noise[1:])
    x = operator.pseudo_inverse(y) + process.prior_std * noise[0] * free
    corrector = Langevin(0.16, 1, per_image=False) if match["sde"] == "VE" else None
    discretization = OfficialSteps(steps) if match["sde"] == "VE" else FixedStep(1 / steps)
    replace = Replace(process, operator, y, Recorded(None))
    for t in uniform_time(process, steps)[:-1]:
        step = discretization(process, t, t)
        if corrector is not None:
            x = corrector(denoiser, x, t, step, generator=Recorded(draws))
        replace.generator.draws = (seen(z) for z in draws)
        x = replace(x, t)
        _, x = reverse_diffusion(x, denoiser.score(x, t), step, next(draws))
        result = x + operator.pseudo_inverse(process.alpha(t) * y - operator(x))
        x = replace(x, t)
    return result, 2e-4


# --- EDM and EDM2 ----------------------------------------------------------------------------------


class CalibratedVP(VP):
    """VP from sigma_min at t = 1e-3 to sigma_max at 1, for which EDM's code lets beta_min be negative."""

    def __post_init__(self):
        pass

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float) -> "CalibratedVP":
        low, high = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
        slope = 2 * (low / 1e-3 - high) / (1e-3 - 1)
        return cls(high - slope / 2, high + slope / 2)


class Ablation(Process):
    """Any schedule of EDM's ablation (noise levels over t) with any of its scalings: "vp" keeps the variance
    of the noise and a unit image at one, "none" leaves the image as it is.
    """

    t_min, t_max, prior_std = 0.0, 1.0, 1.0

    def __init__(self, schedule: str, scaling: str, low: float, high: float):
        vp = CalibratedVP.between(low, high)
        self._level, self._inverse, self._slope = {
            "vp": (vp.noise_level, vp.time, lambda t, s: vp.beta(t) * (s + 1 / s) / 2),
            "ve": (torch.sqrt, torch.square, lambda t, s: 1 / (2 * s)),
            "linear": (torch.clone, torch.clone, lambda t, s: torch.ones_like(s)),
        }[schedule]
        self._scaled = {"vp": True, "none": False}[scaling]

    def noise_level(self, t):
        return self._level(t.double())

    def time(self, noise_level):
        return self._inverse(noise_level)

    def alpha(self, t):
        s = self.noise_level(t)
        return (1 + s.square()).rsqrt() if self._scaled else torch.ones_like(s)

    def sigma(self, t):
        return self.alpha(t) * self.noise_level(t)

    def _growth(self, t):
        s = self.noise_level(t)
        return s * self._slope(t.double(), s)

    def drift(self, t):
        return -self._growth(t) * self.alpha(t).square() if self._scaled else 0 * self._growth(t)

    def diffusion(self, t):
        return self.alpha(t) * (2 * self._growth(t)).sqrt()


ENDS = {"vp": tuple(VP().noise_level(torch.tensor([1e-3, 1.0])).tolist()), "ve": (0.02, 100.0)}
ENDS |= {"iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}


def edm_grid(name: str, steps: int) -> torch.Tensor:
    """Noise levels of the ablation's discretisations, without the final 0."""
    i = torch.arange(steps, dtype=torch.float64)
    if name == "vp":
        return VP().noise_level(1 + i / (steps - 1) * (1e-3 - 1))
    if name == "ve":
        return (100**2 * (0.02**2 / 100**2) ** (i / (steps - 1))).sqrt()
    if name == "iddpm":
        process = DiscreteVP(cosine_betas(1000))
        u = process.noise_level(torch.arange(1000, 0, -1, dtype=torch.float64) / 1000)
        u = u[(u >= 0.002) & (u <= 81)]
        return u[((len(u) - 1) / (steps - 1) * i).round().long()]
    return karras(EDM(), steps)[:-1]


def ablation(solver, discretization, schedule, scaling, steps, x, denoise):
    process = Ablation(schedule, scaling, *ENDS[discretization])
    times = process.time(edm_grid(discretization, steps))
    denoiser = denoise(process)
    x = x * process.sigma(times[0])
    second = None if solver == "euler" else 1.0
    x = probability_flow(denoiser, x, num_steps=steps, grid=given(times), alpha=second)
    # The official last step, to t = 0, is one of Euler's in t, ours a denoising.
    return x - times[-1] * velocity(denoiser, x, times[-1])


def edm_ablation(match, _record):
    out = ablation(
        match["solver"],
        match["discretization"],
        match["schedule"],
        match["scaling"],
        int(match["N"]),
        arrays(SONG)["unit_latent"].double(),
        mixture,
    )
    return out, 1e-5


class Halved(AbstractDenoiser):
    """x / 2 of the unscaled image, the closed form of sde_edm.json."""

    def __init__(self, process: Process):
        super().__init__()
        self.process = process

    def forward(self, x_t, t, label=None):
        return x_t / self.process.alpha(t) / 2


@pytest.mark.parametrize("name", [k for k in load("sde_edm").get("ablation", {}) if k.count(".") == 3])
def test_ablation_of_a_closed_form(name: str):
    golden = load("sde_edm")
    record, x = golden["ablation"][name], torch.tensor(golden["ablation_latents"], dtype=torch.float64)
    steps = record["nfe"] if name.startswith("euler") else (record["nfe"] + 1) // 2
    out = ablation(*name.split("."), steps, x, Halved)
    expected = torch.tensor(record["out"], dtype=torch.float64)
    tolerance = 1e-3 if "iddpm" in name else 1e-5  # the official table of iDDPM's levels is float32
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def edm_alpha(match, record):
    denoiser = mixture(EDM())
    out = probability_flow(
        denoiser, start(EDM()), num_steps=int(match["N"]), grid=karras, alpha=float(match["alpha"])
    )
    assert denoiser.calls == record["nfe"]
    return out, 1e-5


def edm_heun(match, record):
    """With churn: the ImageNet setting, unless the record says another. The official code draws noise at
    every step and uses it from S_min to S_max.
    """
    denoiser, steps, options = mixture(EDM()), int(match["N"]), {}
    if match["churn"]:
        levels = karras(EDM(), steps)[:-1]
        options = {"S_churn": float(match["churn"]), "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}
        options = {key: float(record.get(key, value)) for key, value in options.items()}
        used = (levels >= options["S_min"]) & (levels <= options["S_max"])
        options["generator"] = Recorded(arrays("samplers_other_noise")[match[0]].double()[used])
    out = heun(denoiser, start(EDM()), num_steps=steps, **options)
    assert denoiser.calls == record["nfe"]
    return out, 1e-5


def edm2_heun(match, record):
    main, guide = mixture(EDM()), mixture(EDM(), std=float(re.findall(r"s=([\d.]+)", record["guide"])[0]))
    out = heun(Guidance(main, guide, float(match["weight"])), start(EDM()), num_steps=int(match["N"]))
    assert (main.calls, guide.calls) == (record["nfe_main"], record["nfe_guide"])
    return out, 1e-5


# --- guided-diffusion, DPM-Solver, k-diffusion --------------------------------------------------------


def gd_steps(record) -> torch.Tensor:
    """The times of the respaced chain, the last step first, and noise level 0."""
    steps = torch.tensor(sorted(record["timesteps"], reverse=True))
    return torch.cat([(steps + 1.0) / 1000, torch.zeros(1)]).double()


def gd_ddim(match, record):
    process = DiscreteVP(linear_betas())
    denoiser = ClippedDenoiser(mixture(process)) if match["clip"] == "1" else mixture(process)
    n = int(re.sub(r"\D", "", match["spacing"]))
    # The longest list is cut in the file.
    times = gd_steps(record) if len(record["timesteps"]) == n else torch.arange(n, -1, -1).double() / n
    return ddim(denoiser, start(process), num_steps=n, grid=given(times)), 1e-4


def gd_stochastic(match, _record):
    process = DiscreteVP(linear_betas())
    denoiser = ClippedDenoiser(mixture(process)) if match["clip"] == "1" else mixture(process)
    n = int(match["N"])
    noise = arrays("samplers_other_noise")[match[0]].double()
    record = load(OTHER)[f"gd_ddim_{n}_clip0"]
    out = ddim(
        denoiser,
        start(process),
        num_steps=n,
        grid=given(gd_steps(record)),
        eta=1.0,
        generator=Recorded(noise),
    )
    return out, 1e-4


def gd_reverse(match, _record):
    """The official inverse goes one step beyond the last, to pure noise."""
    process = DiscreteVP(linear_betas())
    n = int(match["N"])
    times = gd_steps(load(OTHER)[f"gd_ddim_{n}_clip0"])[:-1].flip(0)
    denoiser, x = mixture(process), arrays(SONG)["gmm_means"]
    x = euler(denoiser, x, num_steps=n - 1, grid=given(times))
    return denoiser.noise(x, times[-1]), 1e-4


def gd_vb(_match, record):
    process = DiscreteVP(linear_betas())
    x_0, z = arrays(SONG)["gmm_means"], arrays(OTHER)["gd_vb_noise"].double()
    denoiser = ClippedDenoiser(mixture(process))
    t = (torch.tensor(record["t"]) + 1).double() / 1000
    x0_hat = denoiser(process.marginal(x_0, t, z), t)
    bits = kl_term(process, x_0[1:], x0_hat[1:], t[1:] - 1e-3, t[1:]) / (x_0[0].numel() * np.log(2))
    assert bits.item() == pytest.approx(record["vb_bits"][1], rel=1e-3)
    last_two = given([2e-3, 1e-3, 0])
    bound = variational_bound(denoiser, x_0[:1], num_steps=2, grid=last_two, generator=_Last(z[:1]))
    # The official code has an approximation of the normal distribution function.
    assert bound.decoder.item() == pytest.approx(record["vb_bits"][0], rel=5e-3)
    return None


class _Last(PerSample):
    """Recorded noise for every draw."""

    def __init__(self, z: torch.Tensor):
        self.z = z

    def _stack(self, draw, shape, device, dtype):
        return self.z.to(dtype)


def dpm_grid(process, name: str, steps: int, groups: int | None) -> torch.Tensor:
    grid = {"time_uniform": uniform_time, "logSNR": geometric}[name]
    if groups is None or name == "time_uniform":
        return grid(process, steps, denoise=False)
    # The official singlestep grid is even in lambda from group to group, and within each.
    rest = steps % groups
    sizes = [groups] * (steps // groups) + [rest] * (rest > 0)
    if groups == 3 and rest == 0:
        sizes = [3] * (steps // 3 - 1) + [2, 1]
    log_s = process.noise_level(geometric(process, len(sizes), denoise=False)).log()
    inner = [log_s[i] + (log_s[i + 1] - log_s[i]) * k / n for i, n in enumerate(sizes) for k in range(n)]
    return process.time(torch.stack([*inner, log_s[-1]]).exp())


def dpm(match, record):
    process = VP() if match["schedule"] == "linear" else DiscreteVP(linear_betas())
    denoiser, n, order = mixture(process), int(match["N"]), int(match["order"])
    single = match["method"] == "singlestep"
    times = dpm_grid(process, match["grid"], n, order if single else None)
    options = {"num_steps": n, "order": order, "grid": given(times), "data_prediction": bool(match["pp"])}
    if single:
        out = dpm_solver_singlestep(denoiser, start(process), **options)
    else:
        options |= {"lower_order_final": n < 10, "curvature": 0.5}
        out = dpm_solver_multistep(denoiser, start(process), **options)
    assert denoiser.calls == record["nfe"]
    return out, 2e-4


def k_sampler(match, record):
    denoiser, n = mixture(EDM()), int(match["N"])
    eta = float(match["eta"] or 0)
    multistep = partial(dpm_solver_multistep, lower_order_final=False)
    sampler = {
        "euler": euler,
        "heun": heun,
        "dpm_2": partial(_midpoint, denoiser.process),
        "dpmpp_2m": multistep,
        "dpmpp_2m_sde": partial(multistep, eta=eta),
        "dpmpp_3m_sde": partial(multistep, order=3, eta=eta, curvature=0.5),
        "euler_ancestral": partial(ddim, grid=karras, eta=eta),
        "dpmpp_2s_ancestral": _two_stage,
        "dpmpp_sde": _two_stage,
        "dpm_2_ancestral": partial(_midpoint, denoiser.process),
    }.get(match["name"])
    if sampler is None or (eta > 0 and match["name"].startswith(("dpm_2", "dpmpp_2s", "dpmpp_sde"))):
        pytest.skip(f"no such sampler here: {match[0]}")
    generator = Recorded(arrays("samplers_other_noise")["k_ancestral_noise18"].double()) if eta else None
    out = sampler(denoiser, start(EDM()), num_steps=n, generator=generator)
    assert denoiser.calls == record["nfe"]
    return out, 1e-5


def _two_stage(denoiser, x, *, num_steps, generator):
    """DPM-Solver++(2S) on the Karras grid: the node of a step is the middle in lambda."""
    levels = karras(EDM(), num_steps)
    middle = (levels[:-2] * levels[1:-1]).sqrt()
    nodes = torch.stack([levels[:-2], middle], 1).flatten()
    times = torch.cat([nodes, levels[-2:]])
    return dpm_solver_singlestep(denoiser, x, num_steps=len(times) - 1, order=2, grid=given(times))


def _midpoint(process, denoiser, x, *, num_steps, generator):
    """DPM-Solver-2 of Karras et al.: the slope at the geometric middle of a step."""
    levels = karras(process, num_steps)
    for s, s_next in pairwise(levels[:-1]):
        d = velocity(denoiser, x, s)
        middle = (s * s_next).sqrt()
        x = x + (s_next - s) * velocity(denoiser, x + (middle - s) * d, middle)
    return denoiser(x, levels[-2])


def k_likelihood(_match, record):
    process = EDM(record["sigma_min"], record["sigma_max"])
    denoiser, x_0 = mixture(process), arrays(SONG)["likelihood_x0"].double()
    probes = 2 * arrays(OTHER)["k_ll_v01"].double()[None] - 1
    result = log_likelihood(denoiser, x_0, probes=probes, rtol=1e-7, atol=1e-7)
    # The official tolerance is 1e-4 on the whole batch.
    torch.testing.assert_close(result.log_prob, torch.tensor(record["ll_nats"]).double(), atol=0.1, rtol=0)
    return None


NUMBER = r"[\d.e-]+"
KINDS = {
    rf"song_ode_(?P<sde>\w+)_eps(?P<eps>{NUMBER})_tol(?P<tol>{NUMBER})_denoise(?P<denoise>\d)": song_ode,
    rf"song_pc_(?P<sde>[a-zA-Z]+)_(?P<predictor>\w+)_(?P<corrector>langevin|ald|none)_snr(?P<snr>{NUMBER})"
    r"_n(?P<n>\d+)_N(?P<N>\d+)": song_pc,
    r"song_pflow_reverse_diffusion_(?P<sde>\w+)_N(?P<N>\d+)": song_pflow,
    r"song_bpd_(?P<sde>[a-zA-Z]+)_(?P<probe>\w+)": song_bpd,
    r"song_(?P<task>inpaint|colorize)_(?P<sde>\w+)_N(?P<N>\d+)": song_restore,
    r"edm_ablation_(?P<solver>euler|heun)_(?P<discretization>\w+)_(?P<schedule>\w+)_(?P<scaling>\w+)"
    r"_N(?P<N>\d+)": edm_ablation,
    rf"edm_ablation_alpha(?P<alpha>{NUMBER})_N(?P<N>\d+)": edm_alpha,
    rf"edm_heun_(?:churn(?P<churn>{NUMBER})_)?N(?P<N>\d+)": edm_heun,
    rf"edm2_heun_N(?P<N>\d+)_guidance(?P<weight>{NUMBER})": edm2_heun,
    r"gd_ddim_(?P<spacing>(?:ddim)?\d+)_clip(?P<clip>\d)": gd_ddim,
    r"gd_ddim_(?P<N>\d+)_eta1_clip(?P<clip>\d)": gd_stochastic,
    r"gd_ancestral_(?P<N>\d+)_fixedsmall_clip(?P<clip>\d)": gd_stochastic,
    r"gd_ddim_reverse_(?P<N>\d+)_from_means": gd_reverse,
    r"gd_vb_terms": gd_vb,
    r"dpm_(?P<schedule>linear|discrete)_dpmsolver(?P<pp>\+\+)?_(?P<method>multistep|singlestep)(?P<order>\d)"
    r"_(?P<grid>time_uniform|logSNR)_N(?P<N>\d+)": dpm,
    rf"k_(?P<name>\w+?)(?:_eta(?P<eta>{NUMBER}))?_karras(?P<N>\d+)": k_sampler,
    r"k_log_likelihood": k_likelihood,
}
NOT_SAMPLERS = ("sigmas", "schedules", "lambda", "true_bits")


@pytest.mark.parametrize(
    ("stem", "name"),
    [(s, n) for s in (SONG, OTHER) for n in load(s) if not any(word in n for word in NOT_SAMPLERS)],
)
def test_end_point(stem: str, name: str):
    match, kind = next(((m, kind) for p, kind in KINDS.items() if (m := re.fullmatch(p, name))), (None, None))
    if kind is None:
        pytest.skip(f"no such sampler here: {name}")
    expected = arrays(stem).get(name)
    if expected is not None and expected.isnan().any():
        # The official code runs into discrete betas above 1; ours says so.
        with pytest.raises(ConfigError, match="num_steps > beta_max"):
            kind(match, load(stem)[name])
        return
    result = kind(match, load(stem)[name])
    if result is not None:
        (out, atol), expected = result, expected.double()
        torch.testing.assert_close(out, expected, atol=atol * max(1.0, expected.abs().max().item()), rtol=0)


def test_grids():
    golden = load(OTHER)
    for name, grid in {
        "k_sigmas_karras18": karras,
        "k_sigmas_exponential18": geometric,
        "k_sigmas_vp18": vp_levels,
    }.items():
        if name in golden:
            expected = torch.tensor(golden[name], dtype=torch.float64)
            process = EDM(expected[-2].item(), expected[0].item())
            torch.testing.assert_close(grid(process, len(expected) - 1), expected, rtol=3e-4, atol=0)
    for stem, process in {
        "dpm_linear_lambda": VP(),
        "dpm_discrete_lambda": DiscreteVP(linear_betas()),
    }.items():
        if stem in golden:
            t, lam = (torch.tensor(golden[stem][k], dtype=torch.float64) for k in ("t", "lam"))
            torch.testing.assert_close(-process.noise_level(t).log(), lam, rtol=1e-6, atol=1e-6)
    assert ascending(karras)(EDM(), 4).diff().gt(0).all()
