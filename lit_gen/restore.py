"""Restore images with a trained run: `python -m lit_gen.restore run=<run folder> operator=inpaint
method=pigdm`."""

from pathlib import Path
from typing import Any

from lit_gen.cli import entry_point


@entry_point("restore")
def main(cfg: Any) -> None:
    from lit_gen import restoring

    restoring.restore(cfg, Path(cfg.out))


if __name__ == "__main__":
    main()
