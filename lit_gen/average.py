"""An average of the weights of any length, after training (EDM2's post-hoc reconstruction).

python -m lit_gen.average run=<run folder> std=0.15
"""

from typing import Any

from lit_gen.cli import entry_point


@entry_point("average")
def main(cfg: Any) -> None:
    from lit_gen import averaging

    averaging.average(cfg)


if __name__ == "__main__":
    main()
