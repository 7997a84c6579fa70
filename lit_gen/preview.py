"""See what an augmentation does: `python -m lit_gen.preview augment=detection_v1 images=<picture>` or
`data=...`."""

from pathlib import Path
from typing import Any

from lit_gen.cli import entry_point


@entry_point("preview")
def main(cfg: Any) -> None:
    from lit_gen import previewing

    previewing.preview(cfg, Path(cfg.out))


if __name__ == "__main__":
    main()
