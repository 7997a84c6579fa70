"""Hydra's door to lit_gen.sweeps: it instantiates sweepers below hydra_plugins alone.

Every start of Hydra imports this file, so whatever is slow to import waits for `sweep`.
"""

from pathlib import Path
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

__all__ = ["OptunaSweeper"]


class OptunaSweeper(Sweeper):
    """`hydra/sweeper=optuna`: see conf/hydra/sweeper/optuna.yaml for the options, lit_gen.sweeps for the
    work."""

    def __init__(self, **options: Any):
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def sweep(self, arguments: list[str]) -> float | None:
        try:
            from lit_gen.sweeps.hydra import run
        except ModuleNotFoundError as error:
            from lit_gen.errors import ConfigError

            raise ConfigError(
                f"hydra/sweeper=optuna needs {error.name}: pip install 'lit-gen[search]'."
            ) from error
        folder = Path(self.config.hydra.sweep.dir)
        return run(arguments, folder, self.hydra_context.config_loader, self.config, self.options)
