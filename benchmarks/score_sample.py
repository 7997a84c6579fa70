"""Quality and cost of samplers on a trained run of digits: Frechet distance, network evaluations, CPU time.

    python benchmarks/score_sample.py <run folder> [--seeds 5] [--only "2M"] [--no-peer]
    python benchmarks/score_sample.py <run folder> --few-steps <run folder> ... --figure fd_against_nfe.png

The first run is a diffusion model; those of --few-steps are of digits_ect, digits_meanflow, digits_scm. Every
sampler draws as many images as the training split has, from the same seeds; the distance is to the test
split. One thread. The peer is EDM's own sampler (Algorithm 1, 18 steps) as its code has it, around the
network in the plain operations of `score_step.Reference`, on the same weights; its images must be ours.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from score_step import Reference
from torch import Tensor

from lit_gen import models
from lit_gen.instantiate import instantiate
from lit_gen.metrics import Moments, digits64, frechet_distance, moments
from lit_gen.models import sample_images
from lit_gen.rng import PerSample
from lit_gen.score.samplers import (
    dpm_solver_multistep,
    dpm_solver_singlestep,
    euler,
    geometric,
    heun,
    karras,
    unipc,
)

FAMILIES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "Heun": (heun, (18, 3, 5, 8)),
    "Heun, S_churn 10": (partial(heun, S_churn=10), (18,)),
    "Euler (DDIM)": (euler, (5, 10, 15, 35)),
    "DPM-Solver++ (2M)": (dpm_solver_multistep, (5, 8, 10, 12, 15)),
    "DPM-Solver++ (2M), geometric grid": (partial(dpm_solver_multistep, grid=geometric), (5, 8, 10, 15)),
    "DPM-Solver++ (3M)": (partial(dpm_solver_multistep, order=3), (15,)),
    "DPM-Solver++ (3S)": (dpm_solver_singlestep, (15,)),
    "UniPC-2": (unipc, (5, 8, 10, 15)),
}
"""Samplers of a diffusion model and their numbers of steps, the reference first; Karras' grid unless another
is named; deterministic but for S_churn."""
FEW = (1, 2, 3, 4)
"""Numbers of steps of a few-step model, by the sampler of its own run."""


class Row(NamedTuple):
    family: str
    steps: int
    evaluations: int
    mean: float
    spread: float
    milliseconds: float


class Bench:
    """A run, its test split's moments, and how many images to draw."""

    def __init__(self, run: str, num: int | None, batch_size: int):
        self.module, cfg, _ = models.load(run, device="cpu")
        self.name = str(cfg.name)
        data = instantiate(cfg.data)
        self.num, self.batch_size = num or len(data.train), batch_size
        self.extractor = digits64()
        test = data.dataset("test")
        self.reference: Moments = moments(self.extractor(test.batch(range(len(test)))["image"]))

    def measure(self, sampler: Callable[..., Tensor], seeds: range) -> tuple[list[float], int, float]:
        """A distance each seed, evaluations, CPU milliseconds an image."""
        evaluations = 0

        def count(*_: object) -> None:
            nonlocal evaluations
            evaluations += 1

        hook = self.module.denoiser.net.register_forward_hook(count)
        self.module.sample(range(2), 0, sampler)
        hook.remove()
        distances, seconds = [], 0.0
        for seed in seeds:
            start = time.process_time()
            images = sample_images(self.module, range(self.num), seed, self.batch_size, sampler)
            seconds += time.process_time() - start
            distances.append(float(frechet_distance(self.reference, moments(self.extractor(images)))))
        return distances, evaluations, 1000 * seconds / len(distances) / self.num


def figure(rows: list[Row], few: set[str], path: str) -> None:
    """Distances against evaluations, a line for each family."""
    plt.figure(figsize=(7.5, 4.5))
    plt.gca().set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for family in dict.fromkeys(row.family for row in rows):
        points = sorted((row.evaluations, row.mean, row.spread) for row in rows if row.family == family)
        nfe, mean, spread = zip(*points, strict=True)
        style = {"linewidth": 2, "marker": "s"} if family in few else {"linewidth": 1, "marker": "o"}
        plt.errorbar(nfe, mean, spread, label=family, markersize=4, capsize=2, **style)
    plt.axhline(rows[0].mean, color="black", linewidth=0.8, linestyle=":")
    plt.loglog()
    ticks = [1, 2, 3, 4, 5, 8, 10, 15, 35]
    plt.xticks(ticks, [str(tick) for tick in ticks])
    plt.minorticks_off()
    plt.xlabel("network evaluations per image")
    plt.ylabel("Fréchet distance to the test images")
    plt.grid(alpha=0.3)
    plt.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(path, dpi=110)


@torch.no_grad()
def plain_heun(net: Any, x: Tensor, label: Tensor | None, sigma_data: float, levels: Tensor) -> Tensor:
    """Algorithm 1 on a network in EDM's precondition, as edm/generate.py and training/networks.py have it."""

    def denoise(x: Tensor, s: Tensor) -> Tensor:
        x, s = x.to(torch.float32), s.to(torch.float32).reshape(-1, 1, 1, 1)
        c_skip = sigma_data**2 / (s**2 + sigma_data**2)
        c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
        c_in = 1 / (sigma_data**2 + s**2).sqrt()
        f = net((c_in * x), (s.log() / 4).flatten().expand(len(x)), label)
        return (c_skip * x + c_out * f).to(torch.float64)

    x_next = x.to(torch.float64)
    for i, (s, s_next) in enumerate(pairwise(levels)):
        x_now = x_next
        d = (x_now - denoise(x_now, s)) / s
        x_next = x_now + (s_next - s) * d
        if i < len(levels) - 2:
            d_next = (x_next - denoise(x_next, s_next)) / s_next
            x_next = x_now + (s_next - s) * (d + d_next) / 2
    return x_next


def peer(bench: Bench, rounds: int = 3) -> str:
    """CPU time an image and evaluation of ours and of the peer, in turn, and whether their images agree."""
    module, n = bench.module, bench.batch_size
    denoiser, process = module.denoiser, module.denoiser.process
    x = process.prior_sample((n, *module.image_shape), PerSample.keyed(0, range(n)))
    classes = torch.arange(n) % module.num_classes if module.num_classes else None
    rows = None if classes is None else torch.nn.functional.one_hot(classes, module.num_classes).float()
    plain, levels = Reference(denoiser.net).eval(), karras(process, 18)
    sides = {
        "lit_gen": lambda: heun(denoiser, x, num_steps=18, label=classes),
        "the plain way": lambda: plain_heun(plain, x, rows, denoiser.precondition.sigma_data, levels),
    }
    results = {name: side() for name, side in sides.items()}
    gap = float((results["lit_gen"] - results["the plain way"]).abs().max())
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.process_time()
            side()
            seconds[name].append(time.process_time() - start)
    cost = {name: 1000 * statistics.median(values) / n / 35 for name, values in seconds.items()}
    ours, theirs = cost.values()
    return (
        f"CPU ms an image and evaluation: lit_gen {ours:.3f}, the plain way {theirs:.3f}, ratio "
        f"{ours / theirs:.2f}; end points differ by {gap:.1e} at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="run folder or checkpoint of a digits experiment, a diffusion model")
    parser.add_argument("--few-steps", nargs="*", default=[], help="runs of few-step models")
    parser.add_argument("--figure", help="where to draw distance against evaluations")
    parser.add_argument("--num", type=int, help="images each seed; as many as the training split has")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=480)
    parser.add_argument("--only", default="", help="samplers whose name contains this, beside Heun")
    parser.add_argument("--no-peer", action="store_true", help="leave out the comparison with EDM's own code")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.run, arguments.num, arguments.batch)
    jobs = [(bench, name, *family) for name, family in FAMILIES.items()]
    for run in arguments.few_steps:
        other = Bench(run, arguments.num, arguments.batch)
        name = other.name
        if name in [family for _, family, *_ in jobs]:
            name += f", {Path(run).name}"
        jobs.append((other, name, other.module.sampler, FEW))
    few = {name for _, name, *_ in jobs[len(FAMILIES) :]}
    print(f"| family | steps | NFE | FD, mean ± s.d. of {arguments.seeds} seeds | ratio | CPU ms/image |")
    print("|---|---|---|---|---|---|")
    rows: list[Row] = []
    for side, family, sampler, counts in jobs:
        for steps in counts:
            if rows and arguments.only not in family:
                continue
            seeds = range(1, arguments.seeds + 1)
            distances, calls, cost = side.measure(partial(sampler, num_steps=steps), seeds)
            spread = statistics.stdev(distances) if len(distances) > 1 else 0.0
            row = Row(family, steps, calls, statistics.mean(distances), spread, cost)
            rows.append(row)
            cells = (family, steps, calls, f"{row.mean:.4f} ± {spread:.4f}")
            cells += (f"{row.mean / rows[0].mean:.2f}", f"{cost:.2f}")
            print("|", " | ".join(map(str, cells)), "|", flush=True)
    if arguments.figure:
        figure(rows, few, arguments.figure)
    if not arguments.no_peer:
        print("\n" + peer(bench))


if __name__ == "__main__":
    main()
