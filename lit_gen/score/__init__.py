"""Score-based models: processes, denoisers and their preconditioning, losses, guidance, likelihoods.

Networks, samplers, and restoration are the sub-packages `networks`, `samplers`, and `restoration`.
"""

from typing import TYPE_CHECKING, Any

from lit_gen.score import networks, restoration, samplers
from lit_gen.score.denoiser import (
    AbstractDenoiser,
    ClippedDenoiser,
    CountingDenoiser,
    Denoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    IdealDenoiser,
    ReparameterizedDenoiser,
)
from lit_gen.score.guidance import ClassifierGuidance, Guidance, Unconditional, classifier_free_guidance
from lit_gen.score.likelihood import bits_per_dim, log_likelihood, variational_bound
from lit_gen.score.losses import DenoisingLoss, SlicedScoreLoss, UncertaintyLoss, edm_loss
from lit_gen.score.precondition import (
    EDMPrecondition,
    PredictFlow,
    PredictImage,
    PredictNoise,
    PredictScaledScore,
    PredictScore,
    PredictVelocity,
)
from lit_gen.score.sde import EDM, VE, VP, DiscreteVP, Flow, Process, SubVP

if TYPE_CHECKING:
    from lit_gen.score.classifier import ClassifierModule
    from lit_gen.score.module import ScoreModule

__all__ = [
    "EDM",
    "VE",
    "VP",
    "AbstractDenoiser",
    "ClassifierGuidance",
    "ClassifierModule",
    "ClippedDenoiser",
    "CountingDenoiser",
    "Denoiser",
    "DenoisingLoss",
    "DiscreteVP",
    "EDMPrecondition",
    "Flow",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "Guidance",
    "IdealDenoiser",
    "PredictFlow",
    "PredictImage",
    "PredictNoise",
    "PredictScaledScore",
    "PredictScore",
    "PredictVelocity",
    "Process",
    "ReparameterizedDenoiser",
    "ScoreModule",
    "SlicedScoreLoss",
    "SubVP",
    "UncertaintyLoss",
    "Unconditional",
    "bits_per_dim",
    "classifier_free_guidance",
    "edm_loss",
    "log_likelihood",
    "networks",
    "restoration",
    "samplers",
    "variational_bound",
]


def __getattr__(name: str) -> Any:
    """The modules that need Lightning are imported when they are asked for."""
    if name == "ClassifierModule":
        from lit_gen.score.classifier import ClassifierModule

        return ClassifierModule
    if name == "ScoreModule":
        from lit_gen.score.module import ScoreModule

        return ScoreModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
