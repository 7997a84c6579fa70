"""Latents of given images by the probability-flow ODE (Song et al. 2021, Section 4.3,
https://arxiv.org/abs/2011.13456): the flow is one to one, so that an image, its latent and the image decoded
from it are the same up to the solver's tolerance; between two latents lie images on the way."""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor
from torch.nn.functional import one_hot

from lit_gen import __version__
from lit_gen.cli import check_at_least_1, claim, entry_point, show, table
from lit_gen.devices import divided
from lit_gen.errors import ConfigError
from lit_gen.images import grid, save_png
from lit_gen.inputs import pictures
from lit_gen.metrics.distributed import from_rank_zero, gather_batches, own_batches, rank
from lit_gen.metrics.restored import quality
from lit_gen.models import open_model
from lit_gen.runs import write_json
from lit_gen.score import samplers
from lit_gen.score.condition import Condition, Label, class_of, rows_of
from lit_gen.score.denoiser import bound
from lit_gen.score.restoration import slerp
from lit_gen.score.sde import wide_dtype


def encode(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Encodes images, decodes them again, interpolates from each to the next; writes `latents.npz` (latents
    float64 and images as they are stored, NCHW), `strip.png` (a row each pair: the original,
    `cfg.interpolate` decoded images from its latent to the next one's, the next original) and
    `encoding.json`, prints the errors of the round trip and returns the record.

    Of several ranks each solves its share, and rank 0 writes. Raises ConfigError for what does not fit
    together.
    """
    check_at_least_1(cfg, "num", "batch_size")
    if cfg.interpolate < 2:
        raise ConfigError(f"interpolate={cfg.interpolate}: must be at least 2, the two ends.")
    if min(cfg.rtol, cfg.atol) <= 0:
        raise ConfigError(f"rtol={cfg.rtol} and atol={cfg.atol} must be positive.")
    from_rank_zero(lambda: claim(out, "latents", "latents.npz", "encoding.json", "strip.png"))
    module, run_cfg, path = open_model(cfg)
    images, labels = pictures(cfg, run_cfg, module)
    module.refuse_consistency("The probability flow", "encode with the model that it was tuned from")
    rows = _as_rows(labels, module.num_classes)
    options = {"batch_size": cfg.batch_size, "rtol": cfg.rtol, "atol": cfg.atol}

    pixels = module.pixels
    x = pixels.to_model(images).to(torch.float64)
    latents = solve(module.denoiser, x, rows, inverse=True, **options)
    decoded = solve(module.denoiser, latents, rows, **options)
    error = (decoded - x).flatten(1)
    lengths = latents.flatten(1).norm(dim=1) / (math.sqrt(x[0].numel()) * module.denoiser.process.prior_std)
    record = {
        "model": str(path),
        "images": cfg.images,
        "num": len(images),
        "labels": None if (known := class_of(labels)) is None else known.tolist(),
        "rtol": cfg.rtol,
        "atol": cfg.atol,
        "round_trip": {
            "rms": float(error.square().mean().sqrt()),
            "largest": float(error.abs().max()),
            "different_values": int((pixels.from_model(decoded) != images).sum()),
        }
        | quality(pixels.from_model(decoded), images, pixels.high - pixels.low),
        "latent_lengths": lengths.tolist(),
        "version": __version__,
    }
    strip = None
    if len(images) > 1:
        way, way_rows = between(latents, rows, cfg.interpolate)
        strip = pixels.from_model(solve(module.denoiser, way, way_rows, **options))
    if rank() > 0:
        return record
    np.savez_compressed(out / "latents.npz", latents=latents.numpy(), images=images.numpy())
    if strip is not None:
        strip = strip.unflatten(0, (len(images) - 1, cfg.interpolate))
        strip = torch.cat([images[:-1, None], strip, images[1:, None]], 1)
        strip = pixels.picture(strip)
        save_png(grid(strip.flatten(0, 1), columns=strip.shape[1], scale=0), out / "strip.png")
    write_json(out / "encoding.json", record)
    _print(record, out)
    return record


@torch.no_grad()
def solve(
    denoiser: Any,
    x: Tensor,
    labels: Label = None,
    *,
    inverse: bool = False,
    batch_size: int = 64,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    """The probability flow from latents `x` (N, C, H, W) to images at t_min, or with `inverse` from images to
    latents; float64 on the CPU, each row to the tolerance by itself, whatever its batch.

    `labels` is (N, num_classes), rows of classes, or a `Condition`. Of several ranks each solves whole
    batches and has all results.
    """
    device = next(denoiser.parameters(), x).device
    dtype = wide_dtype(device)
    own, parts = own_batches(len(x), batch_size), []
    hidden = len(own) < 2 or rank() > 0
    for rows in track(own, "encoding" if inverse else "decoding", disable=hidden):
        part = x[rows.start : rows.stop].to(device, dtype)
        bounded, label = bound(denoiser, rows_of(labels, slice(rows.start, rows.stop), device))
        if inverse:
            y = samplers.encode(bounded, part, rtol=rtol, atol=atol, label=label)
        else:
            y = samplers.rk45(bounded, part, rtol=rtol, atol=atol, denoise=False, label=label)
        parts.append(y.cpu().to(torch.float64))
    solved = gather_batches(parts, len(x), batch_size)
    return cast(Tensor, from_rank_zero(lambda: solved))  # which has all parts


def between(latents: Tensor, labels: Label, steps: int) -> tuple[Tensor, Label]:
    """`steps` points from each latent to the next, both ends among them: (N - 1) steps rows of latents along
    great circles, and of classes (N, num_classes) or conditions in straight lines.
    """
    weight = torch.linspace(0, 1, steps, dtype=latents.dtype).repeat(len(latents) - 1)
    a, b = latents[:-1].repeat_interleave(steps, 0), latents[1:].repeat_interleave(steps, 0)
    way = slerp(a, b, weight)
    if labels is None:
        return way, None
    told = labels if isinstance(labels, Condition) else Condition(class_of(labels))
    first = torch.arange(len(latents) - 1).repeat_interleave(steps)
    told = told.rows(first).lerp(told.rows(first + 1), weight)
    return way, told if isinstance(labels, Condition) else told.label


def _as_rows(labels: Label, num_classes: int) -> Label:
    """Class indices as rows (N, num_classes) in float64, which can be mixed; of a condition its own."""
    label = class_of(labels)
    hot = None if label is None else one_hot(label, num_classes).to(torch.float64)
    if isinstance(labels, Condition):
        return Condition(hot, labels.vector, labels.image)
    return hot


def _print(record: dict[str, Any], out: Path) -> None:
    error, lengths = record["round_trip"], record["latent_lengths"]
    rows = [
        ("error of a pixel of [-1, 1], RMS", f"{error['rms']:.1e}"),
        ("  the largest", f"{error['largest']:.1e}"),
        ("stored values that differ", str(error["different_values"])),
        ("length of the latents over that of noise", f"{min(lengths):.2f} to {max(lengths):.2f}"),
    ]
    show(table(f"{record['num']} images to latents and back", ("", ""), rows), f"written to {out}")


main = entry_point("encode")(lambda cfg: divided(encode, cfg, images=cfg.num * cfg.interpolate))

if __name__ == "__main__":
    main()
