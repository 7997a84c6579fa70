"""Post-hoc averages: from the power-function averages that a run kept, one of any other length (Karras et al.
2024, Section 3.2, https://arxiv.org/abs/2312.02696)."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lit_gen import checkpoints
from lit_gen.cli import entry_point
from lit_gen.errors import ConfigError
from lit_gen.score.phema import exponent, post_hoc_average, post_hoc_coefficients


def average(cfg: DictConfig) -> Path:
    """Writes a checkpoint of the run whose averaged weights are those of `cfg.std` at `cfg.batch`; `run=` of
    the other commands takes it."""
    run = Path(cfg.run)
    weights, batch = reconstruct(run / "averages", cfg.std, cfg.batch)
    out = Path(cfg.out or run / "averages" / f"{cfg.std:.4f}_{batch:09d}.ckpt")
    if out.exists():
        raise ConfigError(f"{out} exists: choose another out=.")
    _, state = checkpoints.of_run(run, cfg.checkpoint)
    shadows = [v for k, v in state["callbacks"].items() if k.startswith("EMA")]
    shadows[0]["shadow"] = weights
    checkpoints.AtomicCheckpointIO().save_checkpoint(state, out)
    print(f"average of relative deviation {cfg.std:g} at batch {batch:,} -> {out}")
    print(f"samples of it: lit-gen sample run={out}")
    return out


def reconstruct(folder: str | Path, std: float, batch: int | None = None) -> tuple[dict[str, Tensor], int]:
    """(weights, batch) of the average of relative deviation `std` at `batch` (None: the last one stored),
    the least-squares combination of those stored up to then.

    Raises ConfigError where nothing was stored, not at that batch, or `std` is out of range.
    """
    exponent(std)
    stored = sorted(Path(folder).glob("*.safetensors"))
    if not stored:
        raise ConfigError(f"{folder} holds no averages: train with callbacks/averages=[decay,power].")
    kept: list[tuple[int, dict[str, Any], Path]] = []
    for path in stored:
        with safe_open(path, "pt") as file:
            told = file.metadata()
        kept.append((int(path.stem.rpartition("_")[2]), told, path))
    batches = sorted({b for b, *_ in kept})
    batch = batches[-1] if batch is None else batch
    if batch not in batches:
        raise ConfigError(f"batch={batch}: averages were stored at {', '.join(map(str, batches))}.")
    kept = [k for k in kept if k[0] <= batch]
    times = [float(told["updates"]) for _, told, _ in kept]
    stds = [float(told["std"]) for _, told, _ in kept]
    coefficients = post_hoc_coefficients(times, stds, max(times), std)
    snapshots = [load_file(path) for *_, path in kept]
    return {
        k: torch.as_tensor(v) for k, v in post_hoc_average(snapshots, coefficients.tolist()).items()
    }, batch


main = entry_point("average")(average)

if __name__ == "__main__":
    main()
