"""The search space: dimensions, how they are written, and how a sampler sees them.

    rho: {choice: [0.0, 0.01, 0.03]}
    syn_steps: {int: [10, 50], step: 10}
    lr_img: {float: [10, 1000], log: true, levels: 5}

Ordered values (numeric choices, levels) are sampled as an index, so that order means something
to the sampler; other choices are categories.
"""

from dataclasses import dataclass
from math import isfinite, log
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.trial import Trial

from ftd.errors import UserError

MAX_VALUES = 10_000
"""Values of a discrete dimension at most."""


@dataclass(frozen=True)
class Dimension:
    """One searched key. ``values`` of a discrete dimension, ``bounds`` of a continuous one."""

    key: str
    """Its path in the configuration, as in ``experts.rho``."""
    values: tuple[Any, ...] = ()
    bounds: tuple[float, float] = (0.0, 0.0)
    log: bool = False

    @property
    def name(self) -> str:
        """The short name under which users see it: the last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def discrete(self) -> bool:
        return bool(self.values)

    @property
    def ordered(self) -> bool:
        """Whether its values have an order: numbers do."""
        return not self.values or all(_is_number(v) for v in self.values)

    def suggest(self, trial: Trial) -> Any:
        """A value, sampled by a trial."""
        if not self.discrete:
            return trial.suggest_float(self.key, *self.bounds, log=self.log)
        if self.ordered:
            return self.values[trial.suggest_int(self.key, 0, len(self.values) - 1)]
        return trial.suggest_categorical(self.key, self.values)

    def encode(self, value: Any) -> Any:
        """What the sampler draws for ``value``."""
        return self.values.index(value) if self.discrete and self.ordered else value

    def real_distribution(self) -> BaseDistribution:
        """The distribution of the values themselves, for pictures."""
        if not self.ordered:
            return CategoricalDistribution(self.values)
        low, high = (self.values[0], self.values[-1]) if self.discrete else self.bounds
        return FloatDistribution(float(low), float(high), log=self._looks_log(low, high))

    def extremes(self) -> tuple[Any, ...]:
        """Values that stand for all of them when a rule is checked."""
        return self.values or self.bounds

    def __str__(self) -> str:
        if self.discrete:
            return " | ".join(_text(v) for v in self.values)
        return f"{_text(self.bounds[0])} … {_text(self.bounds[1])}{' (log)' if self.log else ''}"

    def _looks_log(self, low: float, high: float) -> bool:
        if not self.discrete:
            return self.log
        if low <= 0 or len(self.values) < 3:
            return False
        steps = np.diff([log(v) for v in self.values])
        return bool(steps.max() < 1.5 * steps.min()) and high / low > 5


def is_dimension(value: Any) -> bool:
    """Whether a configuration value is meant as a search dimension: a mapping."""
    return isinstance(value, dict)


def parse_dimension(key: str, value: dict[Any, Any]) -> Dimension:
    """Reads a dimension. Raises UserError with the key, the rule and the remedy."""
    kinds = [k for k in value if k in _PARSERS]
    if len(kinds) != 1:
        raise UserError(
            f"{key}={value!r}: a search dimension has exactly one of choice, int and float. Write "
            "{choice: [a, b]}, {int: [low, high]} or {float: [low, high], log: true}."
        )
    kind = kinds[0]
    options, parser = _PARSERS[kind]
    for option in value:
        if option != kind and option not in options:
            allowed = f"may have {', '.join(options)}" if options else "has no further options"
            raise UserError(f"{key}: {option!r} is not an option of {kind}, which {allowed}.")
    return parser(key, value)


def _choice(key: str, value: dict[Any, Any]) -> Dimension:
    values = value["choice"]
    if not isinstance(values, list) or not values:
        raise UserError(f"{key}: choice={values!r} must be a list of at least one value.")
    if any(isinstance(v, dict | list) for v in values):
        raise UserError(f"{key}: choice={values!r} must hold plain values, not lists or mappings.")
    if len({(type(v), v) for v in values}) != len(values):
        raise UserError(f"{key}: choice={values!r} names a value twice. Name each once.")
    if len(values) > MAX_VALUES:
        raise UserError(f"{key}: choice has {len(values)} values; the limit is {MAX_VALUES}.")
    if all(_is_number(v) for v in values):
        values = sorted(values)
        if len({float(v) for v in values}) != len(values):
            raise UserError(f"{key}: choice={values!r} names a value twice. Name each once.")
    return Dimension(key, values=tuple(values))


def _int(key: str, value: dict[Any, Any]) -> Dimension:
    low, high = _bounds(key, value["int"], whole=True)
    step = value.get("step", 1)
    if not _is_whole(step) or step < 1:
        raise UserError(f"{key}: step={step!r} must be a whole number of at least 1.")
    if (high - low) // step >= MAX_VALUES:
        raise UserError(
            f"{key}: int={value['int']!r} has over {MAX_VALUES} values. Raise its step."
        )
    return Dimension(key, values=tuple(range(int(low), int(high) + 1, step)))


def _float(key: str, value: dict[Any, Any]) -> Dimension:
    low, high = _bounds(key, value["float"], whole=False)
    use_log = value.get("log", False)
    if not isinstance(use_log, bool):
        raise UserError(f"{key}: log={use_log!r} must be true or false.")
    if use_log and low <= 0:
        raise UserError(f"{key}: log: true needs bounds above 0, not {low:g}.")
    if "levels" not in value:
        return Dimension(key, bounds=(float(low), float(high)), log=use_log)
    levels = value["levels"]
    if not _is_whole(levels) or not 2 <= levels <= MAX_VALUES:
        raise UserError(f"{key}: levels={levels!r} must be a whole number from 2 to {MAX_VALUES}.")
    spaced = np.geomspace(low, high, levels) if use_log else np.linspace(low, high, levels)
    rounded = tuple(float(f"{v:.4g}") for v in spaced)
    return Dimension(key, values=tuple(dict.fromkeys(rounded)), log=use_log)


def _bounds(key: str, value: Any, *, whole: bool) -> tuple[float, float]:
    check = _is_whole if whole else _is_number
    if not (isinstance(value, list) and len(value) == 2 and all(check(v) for v in value)):
        kind = "whole numbers" if whole else "finite numbers"
        raise UserError(f"{key}: {value!r} must be [low, high], two {kind}.")
    low, high = value
    if low >= high:
        raise UserError(f"{key}: [{low}, {high}] must go from low to high.")
    return low, high


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_PARSERS = {
    "choice": ((), _choice),
    "int": (("step",), _int),
    "float": (("log", "levels"), _float),
}
