"""Noise levels that suit a data set: `python -m lit_gen.suggest data=digits`."""

from typing import Any

from lit_gen.cli import entry_point


@entry_point("suggest")
def main(cfg: Any) -> None:
    from lit_gen import suggesting

    suggesting.suggest(cfg)


if __name__ == "__main__":
    main()
