"""Restoration: `method(denoiser, x, operator, y, *, num_steps, label=None, generator=None, trace=None, ...)
-> x_0`.
"""

from lit_gen.score.restoration.dps import dps
from lit_gen.score.restoration.latent import slerp
from lit_gen.score.restoration.operators import (
    Blur,
    Colorization,
    Denoising,
    Inpainting,
    LinearOperator,
    SuperResolution,
    box_mask,
    gaussian_kernel,
    motion_kernel,
)
from lit_gen.score.restoration.pigdm import PosteriorDenoiser, pigdm
from lit_gen.score.restoration.repaint import repaint
from lit_gen.score.restoration.replacement import Replace, replacement

__all__ = [
    "Blur",
    "Colorization",
    "Denoising",
    "Inpainting",
    "LinearOperator",
    "PosteriorDenoiser",
    "Replace",
    "SuperResolution",
    "box_mask",
    "dps",
    "gaussian_kernel",
    "motion_kernel",
    "pigdm",
    "repaint",
    "replacement",
    "slerp",
]
