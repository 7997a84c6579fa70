"""Images as latents of the probability flow, back again, and the way between them:
`python -m lit_gen.encode run=<run folder> interpolate=8`."""

from pathlib import Path
from typing import Any

from lit_gen.cli import entry_point


@entry_point("encode")
def main(cfg: Any) -> None:
    from lit_gen import encoding

    encoding.encode(cfg, Path(cfg.out))


if __name__ == "__main__":
    main()
