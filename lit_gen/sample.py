"""Sample from a trained run or from official weights.

python -m lit_gen.sample run=<run folder> num=64 [sampler=heun] [out=<folder>]
python -m lit_gen.sample weights=<official checkpoint> model=ve sampler=pc num=64
"""

from pathlib import Path
from typing import Any

from lit_gen.cli import entry_point


@entry_point("sample")
def main(cfg: Any) -> None:
    from lit_gen import sampling

    sampling.sample(cfg, Path(cfg.out))


if __name__ == "__main__":
    main()
