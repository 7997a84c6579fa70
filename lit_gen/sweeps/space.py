"""The search space, in the words of Hydra's command line.

`key=a,b` and `key=choice(a,b)` choose; `key=interval(0.1,1)` is a range of reals, `key=int(interval(1,8))` of
whole numbers, `key=range(0,10,2)` has steps; `key=tag(log,interval(1e-4,1e-2))` is searched by its logarithm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lit_gen.errors import ConfigError


@dataclass(frozen=True)
class Axis:
    """One searched key as it stands on the command line (with its + or ++), and where its values lie."""

    key: str
    distribution: BaseDistribution

    def override(self, value: Any) -> str:
        """What to type for a value."""
        return f"{self.key}={value if isinstance(value, str) else repr(value)}"


def parse(arguments: Sequence[str], config_loader: Any = None) -> tuple[list[str], list[Axis]]:
    """The overrides that are the same in every trial, and the axes of the space. Raises ConfigError without
    any axis."""
    parsed = OverridesParser.create(config_loader=config_loader).parse_overrides(list(arguments))
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    axes = [Axis(o.get_key_element(), _distribution(o)) for o in parsed if o.is_sweep_override()]
    if not axes:
        raise ConfigError(
            "Nothing to search: give some key several values, "
            "'model.optimizer.lr=tag(log,interval(1e-4,1e-2))' or data.batch_size=64,128."
        )
    return fixed, axes


def _distribution(override: Override) -> BaseDistribution:
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        low, high, log = sweep.start, sweep.end, "log" in sweep.tags
        assert low is not None and high is not None  # Hydra's grammar
        try:
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=log)
            return FloatDistribution(low, high, log=log)
        except ValueError as error:
            raise ConfigError(f"{override.input_line}: {error}") from error
    if isinstance(sweep, RangeSweep):
        values, step = list(sweep.range()), abs(sweep.step)
        if not values:
            raise ConfigError(f"{override.input_line}: there is no value in this range.")
        low, high = min(values), max(values)
        if isinstance(low, int) and isinstance(high, int) and isinstance(step, int):
            return IntDistribution(low, high, step=step)
        return FloatDistribution(low, high, step=step)
    return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))
