"""Sample from a trained run or from official weights.

python -m lit_gen.sample run=<run folder> num=64 [sampler=heun] [out=<folder>]
python -m lit_gen.sample weights=<official checkpoint> model=ve sampler=pc num=64
"""

from typing import Any

from lit_gen.cli import entry_point


@entry_point("sample")
def main(cfg: Any) -> None:
    from lit_gen import devices, sampling

    devices.divided(sampling.sample, cfg, images=cfg.num)


if __name__ == "__main__":
    main()
