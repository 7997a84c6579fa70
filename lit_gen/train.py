"""Train an experiment: `python -m lit_gen.train [experiment=...] [resume=<run folder>|auto] [-m ...]`."""

from pathlib import Path
from typing import Any

from lit_gen.cli import entry_point, is_main_process


@entry_point("train")
def main(cfg: Any) -> float | None:
    """One training, or the trial of a sweep: then the value of `metrics.objective`."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode == RunMode.MULTIRUN:
        from lit_gen.sweeps.trials import run_trial

        return run_trial(list(hydra_cfg.overrides.task), Path(hydra_cfg.runtime.output_dir))

    from lit_gen.commands import train as training

    return training.train(
        cfg, Path(hydra_cfg.runtime.output_dir), list(hydra_cfg.overrides.task), main=is_main_process()
    )


if __name__ == "__main__":
    main()
