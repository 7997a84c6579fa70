"""Measure a trained run: `python -m lit_gen.evaluate run=<run folder> [num=...] [sampler=...]`."""

from pathlib import Path
from typing import Any

from lit_gen.cli import entry_point


@entry_point("evaluate")
def main(cfg: Any) -> None:
    from lit_gen import devices, evaluation, translation_evaluation

    if translation_evaluation.concerns(cfg):
        devices.undivided("The evaluation of a translator")
        translation_evaluation.evaluate_translator(cfg, Path(cfg.out))
    else:
        devices.divided(evaluation.evaluate, cfg)


if __name__ == "__main__":
    main()
