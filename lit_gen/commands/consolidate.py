"""The sharded checkpoint of a training by `trainer=fsdp` as one file."""

from pathlib import Path

from omegaconf import DictConfig

from lit_gen import checkpoints
from lit_gen.cli import entry_point
from lit_gen.errors import ConfigError


def consolidate(cfg: DictConfig) -> Path:
    """Writes what `cfg.checkpoint` of the run holds, or the checkpoint `cfg.run` itself: weights, averages,
    optimizer state. Every command takes the file as `run=`. Raises ConfigError where there is no sharded
    checkpoint, and where the file is there already.
    """
    run = Path(cfg.run)
    source = run if checkpoints.is_checkpoint(run) else checkpoints.folder(run) / f"{cfg.checkpoint}.ckpt"
    if source.is_file():
        raise ConfigError(f"{source} is one file already: run={source}")
    out = Path(cfg.out or source.parent.parent / source.name)
    if out.exists():
        raise ConfigError(f"{out} exists: choose another out=.")
    checkpoints.AtomicCheckpointIO().save_checkpoint(checkpoints.read(source), out)
    print(f"{source} -> {out}, {out.stat().st_size / 2**20:,.1f} MiB")
    print(f"samples of it: lit-gen sample run={out}")
    return out


main = entry_point("consolidate")(consolidate)

if __name__ == "__main__":
    main()
