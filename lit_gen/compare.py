"""Trained runs side by side: `python -m lit_gen.compare runs=[A,B] [num=...] [extractor=...]`."""

from typing import Any

from lit_gen.cli import entry_point


@entry_point("compare")
def main(cfg: Any) -> None:
    from lit_gen import comparing, devices

    devices.divided(comparing.compare_runs, cfg)


if __name__ == "__main__":
    main()
