"""Measure a few-shot translator: `lit-gen evaluate-translation run=<FUNIT run> k=[1,5,10,15,20]`."""

from pathlib import Path

from omegaconf import DictConfig

from lit_gen.cli import entry_point
from lit_gen.devices import undivided
from lit_gen.evaluation.translation import evaluate_translator


@entry_point("evaluate_translation")
def main(cfg: DictConfig) -> None:
    """The command line's."""
    undivided("The evaluation of a translator")
    evaluate_translator(cfg, Path(cfg.out))


if __name__ == "__main__":
    main()
