"""Quality and cost of samplers on a trained run of digits: Frechet distance, network evaluations, CPU time.

    python benchmarks/score_sample.py <run folder> [--seeds 5] [--only "2M"] [--no-peer]

Every sampler draws as many images as the training split has, from the same seeds; the distance is to the test
split. One thread. The peer is EDM's own sampler (Algorithm 1, 18 steps) as its code has it, around the
network in the plain operations of `score_step.Reference`, on the same weights; its images must be ours.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from score_step import Reference
from torch import Tensor

from lit_gen import models
from lit_gen.instantiate import instantiate
from lit_gen.metrics import Moments, digits64, frechet_distance, moments
from lit_gen.models import sample_images
from lit_gen.rng import PerSample
from lit_gen.score.denoiser import CountingDenoiser
from lit_gen.score.samplers import (
    dpm_solver_multistep,
    dpm_solver_singlestep,
    euler,
    geometric,
    heun,
    karras,
    unipc,
)

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "Heun, 18 steps": partial(heun, num_steps=18),
    "Heun, 18 steps, S_churn 10": partial(heun, num_steps=18, S_churn=10),
    "Heun, 8 steps": partial(heun, num_steps=8),
    "Euler (DDIM), 15 steps": partial(euler, num_steps=15),
    "DPM-Solver++ (2M), 8 steps": partial(dpm_solver_multistep, num_steps=8),
    "DPM-Solver++ (2M), 10 steps": partial(dpm_solver_multistep, num_steps=10),
    "DPM-Solver++ (2M), 12 steps": partial(dpm_solver_multistep, num_steps=12),
    "DPM-Solver++ (2M), 15 steps": partial(dpm_solver_multistep, num_steps=15),
    "DPM-Solver++ (2M), 10 steps, geometric grid": partial(
        dpm_solver_multistep, num_steps=10, grid=geometric
    ),
    "DPM-Solver++ (2M), 15 steps, geometric grid": partial(
        dpm_solver_multistep, num_steps=15, grid=geometric
    ),
    "DPM-Solver++ (3M), 15 steps": partial(dpm_solver_multistep, num_steps=15, order=3),
    "DPM-Solver++ (3S), 15 steps": partial(dpm_solver_singlestep, num_steps=15),
    "UniPC-2, 10 steps": partial(unipc, num_steps=10),
    "UniPC-2, 15 steps": partial(unipc, num_steps=15),
}
"""Karras' grid unless another is named; deterministic but for S_churn."""
REFERENCE = "Heun, 18 steps"


class Bench:
    """A run, its test split's moments, and how many images to draw."""

    def __init__(self, run: str, num: int | None, batch_size: int):
        self.module, cfg, _ = models.load(run, device="cpu")
        data = instantiate(cfg.data)
        self.num, self.batch_size = num or len(data.train), batch_size
        self.extractor = digits64()
        test = data.dataset("test")
        self.reference: Moments = moments(self.extractor(test.batch(range(len(test)))["image"]))

    def measure(self, sampler: Callable[..., Tensor], seeds: range) -> tuple[list[float], int, float]:
        """A distance each seed, evaluations, CPU milliseconds an image."""
        counted = self.module.denoiser = CountingDenoiser(denoiser := self.module.denoiser)
        self.module.sample(range(2), 0, sampler)
        self.module.denoiser = denoiser
        distances, seconds = [], 0.0
        for seed in seeds:
            start = time.process_time()
            images = sample_images(self.module, range(self.num), seed, self.batch_size, sampler)
            seconds += time.process_time() - start
            distances.append(float(frechet_distance(self.reference, moments(self.extractor(images)))))
        return distances, counted.calls, 1000 * seconds / len(distances) / self.num


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
    parser.add_argument("run", help="run folder or checkpoint of a digits experiment")
    parser.add_argument("--num", type=int, help="images each seed; as many as the training split has")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=480)
    parser.add_argument("--only", default="", help="samplers whose name contains this, beside Heun")
    parser.add_argument("--no-peer", action="store_true", help="leave out the comparison with EDM's own code")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.run, arguments.num, arguments.batch)
    print(f"| sampler | NFE | FD, mean ± s.d. of {arguments.seeds} seeds | to Heun's | CPU ms/image |")
    print("|---|---|---|---|---|")
    base = None
    for name, sampler in SAMPLERS.items():
        if name != REFERENCE and arguments.only not in name:
            continue
        distances, calls, cost = bench.measure(sampler, range(1, arguments.seeds + 1))
        mean = statistics.mean(distances)
        spread = statistics.stdev(distances) if len(distances) > 1 else 0.0
        base = base or mean
        print(
            f"| {name} | {calls} | {mean:.4f} ± {spread:.4f} | {mean / base:.2f} | {cost:.2f} |", flush=True
        )
    if not arguments.no_peer:
        print("\n" + peer(bench))


if __name__ == "__main__":
    main()
