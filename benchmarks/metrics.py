"""Speed and memory of the metrics beside torch-fidelity, torchmetrics and scipy, in CPU seconds of one
thread.

    python benchmarks/metrics.py [distance] [inception] [memory] [kid] [diversity]

Both sides run in one process, alternating, and the best of each counts; memory is the growth of the peak in a
fresh process.
"""

import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

D = 2048


def best(functions: dict[str, Callable], rounds: int) -> dict[str, float]:
    seconds = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def row(name: str, ours: float, theirs: dict[str, float], unit: str = "CPU s") -> None:
    others = ", ".join(f"{who} {value:.2f} ({value / ours:.1f} x)" for who, value in theirs.items())
    print(f"{name:44s} lit_gen {ours:8.2f} {unit}{'; ' if others else ''}{others}", flush=True)


def distance() -> None:
    """One evaluation against a reference whose factor is stored, d = 2048, n = 5120."""
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import _compute_fid

    from lit_gen.metrics import frechet_distance, moments

    g = torch.Generator().manual_seed(0)
    scale = torch.arange(1, D + 1) ** -0.5
    x, y = (torch.randn(5120, D, generator=g) * scale for _ in range(2))
    real, fake = moments(x), moments(1.1 * y)
    start = time.process_time()
    _ = real.factor
    print(f"{'factor of the reference, once':44s} lit_gen {time.process_time() - start:8.2f} CPU s")
    a, b = real.cov.numpy(), fake.cov.numpy()
    functions = {
        "lit_gen": lambda: frechet_distance(real, fake),
        "torchmetrics": lambda: _compute_fid(real.mean, real.cov, fake.mean, fake.cov),
    }
    seconds = best(functions, 3) | best({"scipy sqrtm": lambda: sqrtm(a @ b)}, 1)
    row("Frechet distance, d = 2048", seconds.pop("lit_gen"), seconds)


def inception() -> None:
    """Images per CPU second, batch 8, with random weights of the true network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from lit_gen.metrics import inception2015

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(Random("r", ["2048"], feature_extractor_weights_path=nothing).state_dict(), path)
        ours = inception2015(path)
        theirs = FeatureExtractorInceptionV3("f", ["2048"], feature_extractor_weights_path=path)
    for size in (32, 299):
        images = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8)
        with torch.inference_mode():
            a, b = ours(images), theirs(images)[0]
            error = float((a - b).norm() / b.norm())
            seconds = best(
                {"lit_gen": lambda x=images: ours(x), "torch-fidelity": lambda x=images: theirs(x)}, rounds=6
            )
        own, other = 8 / seconds["lit_gen"], 8 / seconds["torch-fidelity"]
        print(
            f"{f'Inception, {size} x {size} images':44s} lit_gen {own:8.2f} img / CPU s; "
            f"torch-fidelity {other:.2f}; {own / other:.2f} x, "
            f"features differ by {error:.0e}",
            flush=True,
        )


def kid() -> None:
    """The whole sets of 4000 x 4000 against 100 subsets of 1000."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    from lit_gen.metrics.kernels import kernel_distance

    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4000, D, generator=g) for _ in range(2))
    options = {"kid_subsets": 100, "kid_subset_size": 1000, "rng_seed": 2020, "verbose": False}
    seconds = best({"lit_gen": lambda: kernel_distance(x, y)}, 2)
    seconds |= best({"torch-fidelity, subsets": lambda: kid_features_to_metric(y, x, **options)}, 1)
    row("KID of 4000 x 4000, d = 2048", seconds.pop("lit_gen"), seconds)


def diversity() -> None:
    """The Vendi score of 50,000 features, and C_T of 10,000 of each set."""
    from lit_gen.metrics.copying import copying
    from lit_gen.metrics.vendi import vendi_score

    g = torch.Generator().manual_seed(0)
    features = torch.randn(50_000, D, generator=g).relu_()
    before = forget_peak()
    seconds = best({"lit_gen": lambda: vendi_score(features)}, 1)["lit_gen"]
    row(f"Vendi score, 50000 x {D}", seconds, {})
    row("peak memory beside the features", resident("VmHWM") - before, {}, "MB")
    sets = features[:30_000].split(10_000)
    row(f"C_T, 3 x 10000 x {D}", best({"lit_gen": lambda: copying(*sets)}, 1)["lit_gen"], {})


def resident(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at the peak since `forget_peak` (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1000
    raise OSError(f"/proc/self/status has no {field}")


def forget_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def streaming(n: int) -> None:
    """Moments of n features by batches of 50, and the growth of the peak: run in a process of its own."""
    from lit_gen.metrics import FeatureStatistics

    g = torch.Generator().manual_seed(0)
    batch = torch.randn(50, D, generator=g)
    _ = batch.double().T @ batch.double()[:, :8]  # what the first product allocates for itself
    before = forget_peak()
    statistics, start = FeatureStatistics(D), time.process_time()
    for _ in range(n // 50):
        statistics.update(batch.normal_(generator=g))
    seconds = time.process_time() - start
    print(resident("VmHWM") - before, seconds)


def gathered(n: int) -> None:
    """The same as torch-fidelity does it: all features, then numpy's covariance."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    g = torch.Generator().manual_seed(0)
    np.cov(np.eye(8))
    before = forget_peak()
    start = time.process_time()
    features = torch.cat([torch.randn(50, D, generator=g) for _ in range(n // 50)])
    fid_features_to_statistics(features)
    seconds = time.process_time() - start
    print(resident("VmHWM") - before, seconds)


def memory(n: int = 50_000) -> None:
    """Peak memory of the statistics of 50,000 features of width 2048."""
    peaks, seconds = {}, {}
    for name, function in (("lit_gen", "streaming"), ("torch-fidelity", "gathered")):
        line = subprocess.check_output([sys.executable, __file__, function, str(n)], text=True)
        peaks[name], seconds[name] = map(float, line.split())
    row(f"peak memory, {n} x {D}", peaks.pop("lit_gen"), peaks, "MB")
    row(f"moments, {n} x {D}, numbers drawn", seconds.pop("lit_gen"), seconds)


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    if arguments[:1] in (["streaming"], ["gathered"]):
        {"streaming": streaming, "gathered": gathered}[arguments[0]](int(arguments[1]))
        return
    parts = {
        "distance": distance,
        "inception": inception,
        "memory": memory,
        "kid": kid,
        "diversity": diversity,
    }
    for name in arguments or parts:
        parts[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
