"""One HTML file of a run or a sweep: `python -m lit_gen.report run=<run or sweep folder>`."""

from typing import Any

from lit_gen.cli import entry_point


@entry_point("report")
def main(cfg: Any) -> None:
    from lit_gen import reporting

    reporting.report(cfg)


if __name__ == "__main__":
    main()
