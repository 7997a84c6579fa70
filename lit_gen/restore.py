"""Restore images with a trained run: `python -m lit_gen.restore run=<run folder> operator=inpaint
method=pigdm`."""

from typing import Any

from lit_gen.cli import entry_point


@entry_point("restore")
def main(cfg: Any) -> None:
    from lit_gen import devices, restoring

    devices.divided(restoring.restore, cfg, images=cfg.num * cfg.samples)


if __name__ == "__main__":
    main()
