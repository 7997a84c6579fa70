"""What happens around a training: averaging, measuring, pictures, checkpoints, guards."""

from lit_gen.callbacks.checkpoint import *
from lit_gen.callbacks.ema import *
from lit_gen.callbacks.grid import *
from lit_gen.callbacks.guards import *
from lit_gen.callbacks.progress import *
from lit_gen.callbacks.quality import *
from lit_gen.callbacks.validation import *
