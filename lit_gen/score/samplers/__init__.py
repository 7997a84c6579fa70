"""Samplers: `sampler(denoiser, x, *, num_steps, label=None, generator=None, trace=None, ...) -> x_0`, for any
process.
"""

from lit_gen.score.samplers.consistency import *
from lit_gen.score.samplers.ddim import *
from lit_gen.score.samplers.dpm_solver import *
from lit_gen.score.samplers.grids import *
from lit_gen.score.samplers.heun import *
from lit_gen.score.samplers.interpolant import *
from lit_gen.score.samplers.langevin import *
from lit_gen.score.samplers.meanflow import *
from lit_gen.score.samplers.ode import *
from lit_gen.score.samplers.predictor_corrector import *
from lit_gen.score.samplers.rk45 import *
from lit_gen.score.samplers.unipc import *
