"""Search for an augmentation policy: `python -m lit_gen.search [strategy=...] [reward=...] [data=...]`."""

from pathlib import Path
from typing import Any

from lit_gen.cli import entry_point


@entry_point("search")
def main(cfg: Any) -> None:
    from lit_gen import searching

    searching.search(cfg, Path(cfg.out))


if __name__ == "__main__":
    main()
