"""What models generate, in batches divided among ranks; a number or index and the seed decide every image."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from lit_gen.errors import ConfigError
from lit_gen.funit import translator
from lit_gen.images import to_float
from lit_gen.metrics.distributed import gather_batches, own_batches, rank
from lit_gen.rng import PerSample, keyed_generator
from lit_gen.score.condition import Condition, Label, rows_of
from lit_gen.score.denoiser import bound, network_precision
from lit_gen.score.module import ScoreModule
from lit_gen.score.restoration import LinearOperator, Noise, Observation, ddnm, deviation

Told = Callable[[Sequence[int]], Condition]
"""Indices of images -> what the model is told of them, a row each."""

__all__ = ["check_label", "classes", "restore_images", "sample_batches", "sample_images", "translate_images"]


def check_label(module: ScoreModule, label: int | None) -> None:
    """Raises ConfigError for a class that the model does not have."""
    if label is not None and not 0 <= label < module.num_classes:
        known = f"0 to {module.num_classes - 1}" if module.num_classes else "none: the model is unconditional"
        raise ConfigError(f"label={label}: the model's classes are {known}.")


def classes(label: int | None, n: int) -> Tensor | None:
    """One class for n images, int64 (n,); None stays."""
    return None if label is None else torch.full((n,), label)


def sample_images(
    module: ScoreModule,
    indices: Sequence[int],
    seed: int,
    batch_size: int,
    sampler: Callable[..., Tensor] | None = None,
    told: Told | None = None,
) -> Tensor | None:
    """(N, C, H, W) on the CPU, as `sample_batches` on all ranks; of several, rank 0 has them."""
    parts = sample_batches(module, indices, seed, batch_size, sampler, told)
    return gather_batches([images for _, images, _ in parts], len(indices), batch_size)


def sample_batches(
    module: ScoreModule,
    indices: Sequence[int],
    seed: int,
    batch_size: int,
    sampler: Callable[..., Tensor] | None = None,
    told: Told | None = None,
    progress: bool = False,
) -> Iterator[tuple[range, Tensor, Condition]]:
    """This rank's batches, each with its rows among `indices`: (B, C, H, W) on the CPU, as the data are
    stored (`module.pixels`), and what they were told, by `told(indices)`; None: by the module's
    `condition_at`."""
    batches = own_batches(len(indices), batch_size)
    for rows in tqdm(batches, "sampling", unit="batch", disable=not progress or rank() > 0):
        part = indices[rows.start : rows.stop]
        condition = (told or module.condition_at)(part)
        yield rows, module.sample(part, seed, sampler, condition=condition).cpu(), condition


@torch.no_grad()
def restore_images(
    module: ScoreModule,
    operator: LinearOperator | Observation,
    measured: Tensor,
    method: Callable[..., Tensor],
    samples: int,
    seed: int = 0,
    batch_size: int = 64,
    labels: Label = None,
    noise_std: Noise = 0.0,
) -> Tensor | None:
    """(N, K, C, H, W) as the data are stored (`module.pixels`): K = `samples` restorations of each of the N
    measurements `measured` (N, ...).

    `labels`, int64 (N,) or a `Condition`, are what a conditional model is told. `noise_std` is the deviation
    of the noise on the measurements, or a map that broadcasts to one of them; 0 says nothing, and a method
    may have its own. Raises ConfigError for what the method refuses. Of several ranks each restores whole
    batches, and rank 0 has all; the others get None.
    """
    module.refuse_latents("Restoration")
    if getattr(method, "func", None) is not ddnm or getattr(method, "keywords", {}).get("eta") != 1:
        module.refuse_consistency("This method", "take method=ddnm method.eta=1, its own way to restore")
    rows = [(i, k) for i in range(len(measured)) for k in range(samples)]
    process, device, parts = module.denoiser.process, module.device, []
    noise_std = deviation(noise_std, measured[:1])
    known = {"noise_std": noise_std} if isinstance(noise_std, Tensor) or noise_std > 0 else {}
    batches = own_batches(len(rows), batch_size)
    for own in tqdm(batches, "restoring", unit="batch", disable=rank() > 0):
        part = rows[own.start : own.stop]
        generator = PerSample([keyed_generator(seed, "restore", i, k) for i, k in part])
        x = process.prior_sample((len(part), *module.image_shape), generator, device=device)
        which = [i for i, _ in part]
        y = measured[which].to(device)
        denoiser, label = bound(module.denoiser, rows_of(labels, which, device))
        with network_precision(denoiser, module.sampling_precision):
            x_0 = method(denoiser, x, operator, y, label=label, generator=generator, **known)
        parts.append(module.pixels.from_model(x_0).cpu())
    restored = gather_batches(parts, len(rows), batch_size)
    return None if restored is None else restored.unflatten(0, (len(measured), samples))


def translate_images(
    generator: translator.Generator, content: Tensor, code: Tensor, batch_size: int = 64
) -> Tensor:
    """uint8 (N, C, H, W) on the CPU: the content, uint8 (N, C, H, W), in the class of the code
    (`lit_gen.funit.translator.class_code`)."""
    parts = [translator.translate(generator, to_float(x), code).cpu() for x in content.split(batch_size)]
    return torch.cat(parts)
