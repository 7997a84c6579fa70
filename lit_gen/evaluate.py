"""Measure a trained run: `python -m lit_gen.evaluate run=<run folder> [num=...] [sampler=...]`."""

from pathlib import Path
from typing import Any

from lit_gen.cli import entry_point


@entry_point("evaluate")
def main(cfg: Any) -> None:
    from lit_gen import evaluation, translation_evaluation

    if translation_evaluation.concerns(cfg):
        translation_evaluation.evaluate_translator(cfg, Path(cfg.out))
    else:
        evaluation.evaluate(cfg, Path(cfg.out))


if __name__ == "__main__":
    main()
