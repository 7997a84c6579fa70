"""Few-shot classification with translations as training images: `python -m lit_gen.classify run=<FUNIT run>
num=[1,50,100]`."""

from pathlib import Path
from typing import Any

from lit_gen.cli import entry_point


@entry_point("classify")
def main(cfg: Any) -> None:
    from lit_gen import classifying

    classifying.classify(cfg, Path(cfg.out))


if __name__ == "__main__":
    main()
