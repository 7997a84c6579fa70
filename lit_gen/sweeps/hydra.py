"""From Hydra's multirun to a sweep."""

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_gen.errors import ConfigError
from lit_gen.instantiate import allowing, config_dict, instantiate
from lit_gen.sweeps.space import parse
from lit_gen.sweeps.study import Sweep
from lit_gen.sweeps.summary import summarize


def run(
    arguments: Sequence[str], folder: Path, loader: Any, config: DictConfig, options: Mapping[str, Any]
) -> float | None:
    """Sweeps over the command line's `arguments`; the best value. `options` are those of
    conf/hydra/sweeper/optuna.yaml.

    Raises ConfigError if no trial ended well.
    """
    fixed, axes = parse(arguments, loader)
    # A misspelt key would otherwise be found by every trial anew.
    first = [axis.override(_some(axis.distribution)) for axis in axes]
    metrics = loader.load_sweep_config(master_config=config, sweep_overrides=[*fixed, *first]).metrics
    options = config_dict(OmegaConf.create(dict(options)))
    options["direction"] = options["direction"] or f"{metrics.mode}imize"
    options["watch"] = options["watch"] or metrics.objective or "fd"
    with allowing(["optuna."]):
        for name in ("sampler", "pruner"):
            options[name] = options[name] and instantiate(options[name])
    sweep = Sweep(folder, fixed, axes, **options)
    print(f"sweep in {folder}; to resume it: the same command and hydra.sweep.dir={folder}", flush=True)
    before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        study = sweep.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    record = summarize(sweep)
    if record["best"] is None:
        errors = [t["error"] for t in record["trials"] if t["error"]]
        raise ConfigError(
            f"None of the {len(record['trials'])} trials in {folder} ended well"
            + (f"; the first error: {errors[0]}" if errors else ".")
        )
    return study.best_value


def _some(distribution: Any) -> Any:
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low
