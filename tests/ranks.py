"""A training by the processes of `on_ranks`."""

import os
from pathlib import Path

from torch import distributed as dist


def trained(compose, folder: Path, *options: str, by: list[str], resume: bool = False) -> None:
    """Trains in this process, one of those of `on_ranks` or the only one, as torchrun would have started
    it."""
    from lit_gen.commands import train as training

    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if dist.is_initialized():
        names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE")
        os.environ |= dict(zip(names, map(str, (world, world, rank, rank, 0, 1)), strict=True))
        os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        by = [*by, f"trainer.devices={world}"]
    overrides = [f"resume={folder}"] if resume else []
    cfg = compose(*by, *overrides, f"logger.csv.save_dir={folder}", *options)
    changes = []
    if resume:
        changes = [f"trainer.devices={world}"] + ["trainer.strategy=auto"] * (not dist.is_initialized())
    training.train(cfg, folder, changes, main=rank == 0)
