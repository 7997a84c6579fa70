"""Images as latents of the probability flow, back again, and the way between them:
`python -m lit_gen.encode run=<run folder> interpolate=8`."""

from typing import Any

from lit_gen.cli import entry_point


@entry_point("encode")
def main(cfg: Any) -> None:
    from lit_gen import devices, encoding

    devices.divided(encoding.encode, cfg, images=cfg.num * cfg.interpolate)


if __name__ == "__main__":
    main()
