"""A page in the browser: generate, restore, translate, augment, compare."""

import tempfile
from pathlib import Path

from omegaconf import DictConfig

from lit_gen.cli import entry_point
from lit_gen.errors import ConfigError


def demo(cfg: DictConfig) -> None:
    """Serves the page of the models of `cfg.run`, a run folder, a checkpoint, or several of them, or of the
    small models that ship with the package, until it is interrupted.

    What is uploaded lies in a folder of its own, which is removed at the end. Raises ConfigError.
    """
    if cfg.port is not None and not 1 <= cfg.port <= 65535:
        raise ConfigError(f"port={cfg.port}: a port is a number from 1 to 65535; null takes a free one.")
    if cfg.run is None and (cfg.checkpoint != "best" or not cfg.ema):
        raise ConfigError("checkpoint= and ema= are of runs: give run=, or leave them out.")
    given = [] if cfg.run is None else [cfg.run] if isinstance(cfg.run, str) else list(cfg.run)
    with tempfile.TemporaryDirectory(prefix="lit-gen-demo-") as uploads:
        from lit_gen.demo import opened, page

        gr = page.package(Path(uploads))
        models = opened.open_models(given, checkpoint=cfg.checkpoint, ema=cfg.ema, device=cfg.device)
        built = page.build(gr, models, Path(uploads), cfg.share)
        page.launch(gr, built, port=cfg.port, share=cfg.share)


main = entry_point("demo")(demo)

if __name__ == "__main__":
    main()
