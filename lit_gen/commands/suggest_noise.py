"""What a data set says about noise levels: Techniques 1 to 4 of NCSNv2 (Song & Ermon 2020,
https://arxiv.org/abs/2006.09011) and the deviation of its pixels for EDM. Images are [-1, 1]."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from lit_gen.cli import entry_point, show, table
from lit_gen.data.images import pixels_of
from lit_gen.errors import ConfigError
from lit_gen.images import Pixels
from lit_gen.instantiate import instantiate
from lit_gen.rng import keyed_generator
from lit_gen.runs import write_json


def suggest(cfg: DictConfig) -> dict[str, Any]:
    """Measures `cfg.num` training images of `cfg.data`, prints a table and the options to type, returns the
    numbers; they are written to `cfg.out` if that is given. Raises ConfigError for settings out of range.
    """
    if cfg.num < 2 or not 0 < cfg.overlap < 1 or cfg.sigma_min <= 0 or cfg.steps_per_level < 1:
        raise ConfigError(
            f"num={cfg.num} must be at least 2, overlap={cfg.overlap} between 0 and 1, "
            f"sigma_min={cfg.sigma_min} positive and steps_per_level={cfg.steps_per_level} at least 1."
        )
    out = None if cfg.out is None else Path(cfg.out)
    if out is not None and out.exists():
        raise ConfigError(f"{out} exists: choose another out=.")
    dataset = instantiate(cfg.data).dataset("train")
    order = torch.randperm(len(dataset), generator=keyed_generator(cfg.seed, "suggest"))[: cfg.num]
    images = torch.stack([dataset[i]["image"] for i in order.tolist()])
    record = _measured(images, pixels_of(dataset), len(dataset)) | {"sigma_min": cfg.sigma_min}
    ratio = level_ratio(record["dimensions"], cfg.overlap)
    levels = math.ceil(math.log(record["sigma_max"] / cfg.sigma_min) / math.log(ratio)) + 1
    ratio = (record["sigma_max"] / cfg.sigma_min) ** (1 / (levels - 1))
    step = step_factor(ratio, cfg.steps_per_level)
    record |= {
        "level_ratio": ratio,
        "num_levels": levels,
        "steps_per_level": cfg.steps_per_level,
        "step_size": step * cfg.sigma_min**2,
        "variance_ratio": variance_ratio(ratio, step, cfg.steps_per_level),
    }
    _print(record)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, record)
    return record


def _measured(images: Tensor, pixels: Pixels, size: int) -> dict[str, Any]:
    half = (pixels.high - pixels.low) / 2
    x = (images.to(torch.float64) - pixels.low) / half - 1
    return {
        "images": size,
        "compared": len(images),
        "dimensions": x[0].numel(),
        "sigma_max": largest_distance(images, half=half),
        "mean": float(x.mean()),
        "sigma_data": float(x.std()),
    }


def largest_distance(pixels: Tensor, chunk: int = 1024, half: float = 127.5) -> float:
    """Technique 1: the largest Euclidean distance between two of the images (N, C, H, W), in units of [-1, 1]
    where `half` is half the range of their values.

    Exact for bytes, whose squares are whole numbers in float64.
    """
    x = pixels.flatten(1).to(torch.float64)
    norms, largest = x.square().sum(1), 0.0
    for a in range(0, len(x), chunk):
        for b in range(a, len(x), chunk):
            product = x[a : a + chunk] @ x[b : b + chunk].T
            squares = norms[a : a + chunk, None] + norms[b : b + chunk] - 2 * product
            largest = max(largest, float(squares.max()))
    return math.sqrt(largest) / half


def level_overlap(ratio: float, dimensions: int) -> float:
    """Technique 2: how much of the noise of one level lies where that of the next one, `ratio` times
    larger, does,

    Phi(sqrt(2 D) (ratio - 1) + 3 ratio) - Phi(sqrt(2 D) (ratio - 1) - 3 ratio), Phi the normal distribution
    function.
    """
    shift = math.sqrt(2 * dimensions) * (ratio - 1)
    return (math.erf((shift + 3 * ratio) / math.sqrt(2)) - math.erf((shift - 3 * ratio) / math.sqrt(2))) / 2


def level_ratio(dimensions: int, overlap: float = 0.5) -> float:
    """The ratio of neighboring noise levels at which `level_overlap` is `overlap`."""
    if level_overlap(100.0, dimensions) > overlap:
        raise ConfigError(
            f"overlap={overlap} is too small for images of {dimensions} numbers: any two levels overlap more."
        )
    return cast(float, brentq(lambda ratio: level_overlap(ratio, dimensions) - overlap, 1.0, 100.0))


def variance_ratio(ratio: float, step: float, steps_per_level: int) -> float:
    """Technique 4: the variance after `steps_per_level` Langevin steps of step size `step` sigma^2, in
    units of the level's own, which it should be: with q = 2 / (2 - step), (1 - step)^(2 T) (ratio^2 - q) + q.
    """
    stationary = 2 / (2 - step)
    return (1 - step) ** (2 * steps_per_level) * (ratio**2 - stationary) + stationary


def step_factor(ratio: float, steps_per_level: int) -> float:
    """The step size, in units of sigma^2, whose `variance_ratio` is nearest to 1."""
    found = minimize_scalar(
        lambda step: abs(variance_ratio(ratio, step, steps_per_level) - 1),
        bounds=(1e-6, 1.0),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(found.x)


def _print(r: dict[str, Any]) -> None:
    bound = "" if r["compared"] == r["images"] else ", a lower bound"
    title = f"{r['compared']:,} of {r['images']:,} images, of {r['dimensions']:,} numbers in [-1, 1]"
    levels = f"noise levels down to {r['sigma_min']:g} (Technique 3: the network's output divided by sigma)"
    step = f"step size at the last level, {r['steps_per_level']} steps each (Technique 4)"
    numbers = {
        f"largest distance of two images (Technique 1{bound})": f"{r['sigma_max']:.4g}",
        "ratio of noise levels (Technique 2)": f"{r['level_ratio']:.5f}",
        levels: str(r["num_levels"]),
        step: f"{r['step_size']:.3g}",
        "  its variance over the level's": f"{r['variance_ratio']:.3f}",
        "standard deviation of the pixels (sigma_data)": f"{r['sigma_data']:.4f}",
    }
    sigmas = f"model.process.sigma_max={r['sigma_max']:.4g} model.process.sigma_min={r['sigma_min']:g}"
    show(
        table(title, ("", ""), numbers.items()),
        f"model=ve {sigmas}",
        f"model=ncsnv2 {sigmas} model.loss.noise_distribution.num_steps={r['num_levels']} sampler=langevin "
        f"sampler.num_steps={r['num_levels']} sampler.steps_per_level={r['steps_per_level']} "
        f"sampler.step_size={r['step_size']:.3g}",
        f"model=edm model.precondition.sigma_data={r['sigma_data']:.3f} "
        f"model.loss.sigma_data={r['sigma_data']:.3f}",
    )


main = entry_point("suggest_noise")(suggest)

if __name__ == "__main__":
    main()
