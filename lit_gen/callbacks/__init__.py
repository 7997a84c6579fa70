"""What happens around a training: averaging, measuring, pictures, checkpoints, guards."""

from lit_gen.callbacks.checkpoint import Checkpoint
from lit_gen.callbacks.ema import EMA, HalfLife, Power, evaluating
from lit_gen.callbacks.grid import SampleGrid
from lit_gen.callbacks.guards import NaNGuard, NotFiniteError, Signals, Stopped
from lit_gen.callbacks.progress import ProgressBar
from lit_gen.callbacks.quality import SampleQuality
from lit_gen.callbacks.validation import ValidationLoss

__all__ = [
    "EMA",
    "Checkpoint",
    "HalfLife",
    "NaNGuard",
    "NotFiniteError",
    "Power",
    "ProgressBar",
    "SampleGrid",
    "SampleQuality",
    "Signals",
    "Stopped",
    "ValidationLoss",
    "evaluating",
]
