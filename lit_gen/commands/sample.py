"""Images from a trained run, on one device or several: image i depends on the seed and i alone."""

import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from lit_gen.cli import check_at_least_1, claim, entry_point
from lit_gen.devices import divided
from lit_gen.errors import ConfigError
from lit_gen.images import grid, save_png
from lit_gen.instantiate import instantiate
from lit_gen.metrics.distributed import all_gather, from_rank_zero, gather_batches
from lit_gen.models import open_model, sample_batches


def sample(cfg: DictConfig, out: Path) -> None:
    """Writes `grid.png` and the images (`format=png`: `images/<index>.png`; `npz`: `images.npz` with arr_0,
    uint8 NHWC)."""
    if cfg.format not in ("png", "npz", "none"):
        raise ConfigError(f"format={cfg.format}: must be png, npz or none (the grid alone).")
    check_at_least_1(cfg, "num", "batch_size", "grid")
    from_rank_zero(lambda: claim(out, "samples", "grid.png", "images", "images.npz"))
    module, _, path = open_model(cfg)
    sampler = instantiate(cfg.sampler) if cfg.sampler else None
    indices = range(cfg.first, cfg.first + cfg.num)
    start = time.perf_counter()
    needed = cfg.num if cfg.format == "npz" else min(cfg.grid, cfg.num)  # by rank 0
    kept, drawn = [], torch.tensor(0)
    for rows, images in sample_batches(
        module, indices, cfg.seed, cfg.batch_size, sampler, cfg.label, progress=True
    ):
        if cfg.format == "png":
            for i, image in zip(indices[rows.start : rows.stop], images, strict=True):
                save_png(image, out / "images" / f"{i:06d}.png")
        if rows.start < needed:
            kept.append(images[: needed - rows.start])
        drawn += len(images)
    total = int(all_gather(drawn).sum())  # waits for the slowest rank
    seconds = time.perf_counter() - start
    images = gather_batches(kept, needed, cfg.batch_size)
    if images is None:
        return  # rank 0 has them
    save_png(grid(images[: cfg.grid], scale=0), out / "grid.png")
    if cfg.format == "npz":
        np.savez_compressed(out / "images.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    print(f"{total} images of {path} in {seconds:.1f} s ({total / seconds:.1f} images/s) -> {out}")


main = entry_point("sample")(lambda cfg: divided(sample, cfg, images=cfg.num))

if __name__ == "__main__":
    main()
