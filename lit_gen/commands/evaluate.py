"""Measure a trained run: `lit-gen evaluate run=<run folder> [num=...] [sampler=...]`."""

from pathlib import Path

from omegaconf import DictConfig

from lit_gen.cli import entry_point
from lit_gen.devices import divided, undivided
from lit_gen.evaluation import samples, translation


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """The command line's."""
    if translation.concerns(cfg):
        undivided("The evaluation of a translator")
        translation.evaluate_translator(cfg, Path(cfg.out))
    else:
        divided(samples.evaluate, cfg)


if __name__ == "__main__":
    main()
