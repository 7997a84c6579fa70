"""Samplers: `sampler(denoiser, x, *, num_steps, label=None, generator=None, trace=None, ...) -> x_0`, for any
process.
"""

from lit_gen.score.samplers.ddim import ddim
from lit_gen.score.samplers.dpm_solver import dpm_solver_multistep, dpm_solver_singlestep
from lit_gen.score.samplers.grids import (
    Grid,
    ascending,
    geometric,
    karras,
    uniform_steps,
    uniform_time,
    vp_levels,
)
from lit_gen.score.samplers.heun import heun
from lit_gen.score.samplers.langevin import annealed_langevin
from lit_gen.score.samplers.ode import Trace, euler, probability_flow
from lit_gen.score.samplers.predictor_corrector import (
    AnnealedLangevin,
    Langevin,
    OfficialSteps,
    ancestral,
    euler_maruyama,
    exact,
    predictor_corrector,
    probability_flow_step,
    reverse_diffusion,
)
from lit_gen.score.samplers.rk45 import encode, rk45
from lit_gen.score.samplers.unipc import unipc

__all__ = [
    "AnnealedLangevin",
    "Grid",
    "Langevin",
    "OfficialSteps",
    "Trace",
    "ancestral",
    "annealed_langevin",
    "ascending",
    "ddim",
    "dpm_solver_multistep",
    "dpm_solver_singlestep",
    "encode",
    "euler",
    "euler_maruyama",
    "exact",
    "geometric",
    "heun",
    "karras",
    "predictor_corrector",
    "probability_flow",
    "probability_flow_step",
    "reverse_diffusion",
    "rk45",
    "uniform_steps",
    "uniform_time",
    "unipc",
    "vp_levels",
]
