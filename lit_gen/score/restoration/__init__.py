"""Restoration: `method(denoiser, x, operator, y, *, num_steps, label=None, generator=None, trace=None, ...)
-> x_0`.
"""

from lit_gen.score.restoration.dps import *
from lit_gen.score.restoration.latent import *
from lit_gen.score.restoration.operators import *
from lit_gen.score.restoration.pigdm import *
from lit_gen.score.restoration.repaint import *
from lit_gen.score.restoration.replacement import *
