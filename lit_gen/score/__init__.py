"""Score-based models: processes, denoisers and their preconditioning, losses, guidance, likelihoods.

Networks, samplers, and restoration are the sub-packages `networks`, `samplers`, and `restoration`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lit_gen.score import networks as networks
from lit_gen.score import restoration as restoration
from lit_gen.score import samplers as samplers
from lit_gen.score.condition import Condition as Condition
from lit_gen.score.denoiser import *
from lit_gen.score.guidance import *
from lit_gen.score.likelihood import bits_per_dim as bits_per_dim
from lit_gen.score.likelihood import log_likelihood as log_likelihood
from lit_gen.score.likelihood import variational_bound as variational_bound
from lit_gen.score.losses import DenoisingLoss as DenoisingLoss
from lit_gen.score.losses import SlicedScoreLoss as SlicedScoreLoss
from lit_gen.score.losses import UncertaintyLoss as UncertaintyLoss
from lit_gen.score.losses import edm_loss as edm_loss
from lit_gen.score.precondition import *
from lit_gen.score.sde import *

if TYPE_CHECKING:
    from lit_gen.score.classifier import ClassifierModule as ClassifierModule
    from lit_gen.score.module import ScoreModule as ScoreModule

_NEED_LIGHTNING = {"ClassifierModule": "classifier", "ScoreModule": "module"}


def __getattr__(name: str) -> Any:
    """The modules that need Lightning are imported when they are asked for."""
    if name in _NEED_LIGHTNING:
        return getattr(importlib.import_module(f"lit_gen.score.{_NEED_LIGHTNING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
