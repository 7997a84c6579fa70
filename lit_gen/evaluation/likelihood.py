"""Bits per dimension of test images, for `lit-gen evaluate`."""

from collections.abc import Callable
from typing import Any, cast

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.metrics import Estimate
from lit_gen.metrics.distributed import from_rank_zero, gather_batches, own_batches, rank
from lit_gen.metrics.functional import mean_estimate
from lit_gen.rng import PerSample
from lit_gen.score.condition import Label
from lit_gen.score.denoiser import bound
from lit_gen.score.likelihood import (
    bits_per_dim,
    dequantize,
    log_likelihood,
    random_probes,
    variational_bound,
)
from lit_gen.score.module import ScoreModule
from lit_gen.score.sde import DiscreteVP, wide

Bits = Callable[[ScoreModule, Tensor, Label, PerSample, float | None], Tensor]


def measure_likelihoods(module: Any, test: Any, cfg: DictConfig) -> dict[str, Estimate]:
    """`bits_per_dim` of the first `cfg.nll_images` images of `test` and `bound` of the first
    `cfg.elbo_images`; 0: without it. Every rank must call; each measures its share.

    Raises ConfigError for a model without a density, and for more images than there are.
    """
    kinds = {"nll_images": ("bits_per_dim", _density), "elbo_images": ("bound", _bound)}
    return {
        name: _measure(option, name, bits, module, test, cfg)
        for option, (name, bits) in kinds.items()
        if cfg[option]
    }


def _measure(option: str, name: str, bits: Bits, module: Any, test: Any, cfg: DictConfig) -> Estimate:
    n, size = cfg[option], cfg.batch_size
    if not isinstance(module, ScoreModule):
        raise ConfigError(f"{option}={n}: {type(module).__name__} has no density.")
    module.refuse_latents(f"{option}={n}: a density of images")
    module.refuse_consistency(f"{option}={n}: a density", "measure the model that it was tuned from")
    if not 2 <= n <= len(test):
        raise ConfigError(f"{option}={n}: must be between 2 and the {len(test)} test images.")
    process = module.denoiser.process
    if cfg.t_min is not None and not 0 < cfg.t_min < process.t_max:
        raise ConfigError(f"t_min={cfg.t_min}: must be between 0 and {process.t_max:g}, where the prior is.")
    if bits is _bound and not isinstance(process, DiscreteVP):
        raise ConfigError(
            f"elbo_images={n}: DDPM's bound is a sum over the steps of a discrete process, and this "
            f"model's is {type(process).__name__}. Use nll_images={n}."
        )
    if bits is _bound and module.pixels.levels is None:
        raise ConfigError(
            f"elbo_images={n}: DDPM's bound is that of integers, the data are float32. Use nll_images={n}."
        )
    own, parts = own_batches(n, size), []
    hidden = len(own) < 2 or rank() > 0
    for rows in track(own, name.replace("_", " "), console=Console(stderr=True), disable=hidden):
        items = [test[i] for i in rows]
        images = torch.stack([item["image"] for item in items]).to(module.device)
        told = {"label": torch.tensor([item["label"] for item in items])}
        if module.condition_source is not None:
            told = module.condition_source.conditions(rows)
        label = module.condition_of(told).to(module.device)
        parts.append(bits(module, images, label, PerSample.keyed(cfg.seed, rows), cfg.t_min).cpu())
    values = gather_batches(parts, n, size)  # on rank 0
    return from_rank_zero(lambda: mean_estimate(cast(Tensor, values)))


def _density(
    module: ScoreModule, images: Tensor, label: Label, generator: PerSample, t_min: float | None
) -> Tensor:
    """(B,), by the probability-flow ODE with one probe each: of integers dequantised by uniform noise, of
    floating-point pixels the density in their own unit."""
    pixels = module.pixels
    if pixels.levels is None:
        x_0, levels = wide(pixels.to_model(images)), pixels.high - pixels.low
    else:
        x_0 = dequantize(images, generator, num_levels=pixels.levels, first_level=pixels.low)
        levels = pixels.levels
    probes = random_probes(x_0, generator=generator)
    denoiser, rows = bound(module.denoiser, label)
    found = log_likelihood(denoiser, x_0, probes=probes, t_min=t_min, label=rows)
    return bits_per_dim(found.log_prob, images[0].numel(), num_levels=levels)


def _bound(
    module: ScoreModule, images: Tensor, label: Label, generator: PerSample, t_min: float | None
) -> Tensor:
    """(B,), DDPM's variational bound over all steps."""
    pixels = module.pixels
    assert pixels.levels is not None  # of a run without, the bound was refused
    x_0 = pixels.to_model(images)
    denoiser, rows = bound(module.denoiser, label)
    return variational_bound(denoiser, x_0, num_levels=pixels.levels, label=rows, generator=generator).total
