"""Translate images into classes that a few images show: `python -m lit_gen.translate run=<run folder>
content=<image or folder> classes=<folder>`."""

from pathlib import Path
from typing import Any

from lit_gen.cli import entry_point


@entry_point("translate")
def main(cfg: Any) -> None:
    from lit_gen import translating

    translating.translate(cfg, Path(cfg.out))


if __name__ == "__main__":
    main()
