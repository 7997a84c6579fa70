"""Searching for good values of a configuration: Optuna suggests, fresh processes train."""

from lit_gen.sweeps.space import Axis, parse
from lit_gen.sweeps.study import Sweep
from lit_gen.sweeps.summary import summarise

__all__ = ["Axis", "Sweep", "parse", "summarise"]
