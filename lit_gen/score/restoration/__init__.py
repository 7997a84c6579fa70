"""Restoration: `method(denoiser, x, operator, y, *, noise_std=0.0, num_steps, label=None, generator=None,
trace=None, ...) -> x_0`.

`noise_std` is a number, or a map with a value for each pixel of y, which methods refuse where they cannot use
it. Every method takes every operator and process, but for what it refuses by ConfigError. PiGDM and DPS also
take an `Observation` in the operator's place, which has its own noise.
"""

from lit_gen.score.restoration.ddnm import *
from lit_gen.score.restoration.ddrm import *
from lit_gen.score.restoration.diffpir import *
from lit_gen.score.restoration.dps import *
from lit_gen.score.restoration.latent import *
from lit_gen.score.restoration.mmps import *
from lit_gen.score.restoration.noise import *
from lit_gen.score.restoration.observations import *
from lit_gen.score.restoration.operators import *
from lit_gen.score.restoration.pigdm import *
from lit_gen.score.restoration.repaint import *
from lit_gen.score.restoration.replacement import *
from lit_gen.score.restoration.solvers import *
