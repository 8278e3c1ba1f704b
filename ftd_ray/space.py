"""The search space: dimensions, how they are written, and how a sampler sees them.

    rho: {choice: [0.0, 0.01, 0.03]}
    syn_steps: {int: [10, 50], step: 10}
    lr_img: {float: [10, 1000], log: true, levels: 5}
    gsam_alpha: {choice: [0.1, 0.4], when: {experts.sharpness: [gsam]}}

Ordered values (numeric choices, levels) are sampled as an index, so that order means something
to the sampler; other choices are categories. A dimension with ``when`` exists only at points where
other dimensions have the values that it names; elsewhere its key has its default.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import isfinite, log, prod
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
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
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Keys of other dimensions, each with the values at which this one exists."""

    def active(self, params: dict[str, Any]) -> bool:
        """Whether it exists at a point; dimensions that it depends on come before it."""
        return all(
            key in params and any(is_same(params[key], v) for v in values)
            for key, values in self.when
        )

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
            return self.decode(trial.suggest_int(self.key, 0, len(self.values) - 1))
        return trial.suggest_categorical(self.key, self.values)

    def decode(self, drawn: Any) -> Any:
        """The value that a sampler's draw stands for."""
        return self.values[drawn] if self.discrete and self.ordered else drawn

    def encode(self, value: Any) -> Any:
        """What the sampler draws for ``value``."""
        return self.values.index(value) if self.discrete and self.ordered else value

    def distribution(self) -> BaseDistribution:
        """What the sampler draws from."""
        if not self.discrete:
            return FloatDistribution(*self.bounds, log=self.log)
        if self.ordered:
            return IntDistribution(0, len(self.values) - 1)
        return CategoricalDistribution(self.values)

    def member(self, value: Any) -> Any:
        """The dimension's own value that equals ``value``, or None: 1e-5 is 0.00001."""
        if self.discrete:
            return next((v for v in self.values if is_same(v, value)), None)
        low, high = self.bounds
        return float(value) if _is_number(value) and low <= value <= high else None

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
            text = " | ".join(_text(v) for v in self.values)
        else:
            low, high = self.bounds
            text = f"{_text(low)} … {_text(high)}{' (log)' if self.log else ''}"
        conditions = (f"{k} is {' or '.join(map(_text, values))}" for k, values in self.when)
        return f"{text}  when {' and '.join(conditions)}" if self.when else text

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
        if option not in (kind, "when", *options):
            allowed = ", ".join((*options, "when"))
            raise UserError(
                f"{key}: {option!r} is not an option of {kind}, which may have {allowed}."
            )
    return replace(parser(key, value), when=_when(key, value.get("when", {})))


def _when(key: str, written: Any) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    rule = "{when: {experts.sharpness: [gsam]}}"
    if not isinstance(written, dict) or not all(isinstance(k, str) for k in written):
        raise UserError(
            f"{key}: when={written!r} must map other dimensions to values, as in {rule}."
        )
    conditions = []
    for parent, values in written.items():
        parent = parent if "." in parent else f"{key.partition('.')[0]}.{parent}"
        values = values if isinstance(values, list) else [values]
        if not values or any(isinstance(v, dict | list | set) for v in values):
            raise UserError(f"{key}: when {parent}={values!r} must be plain values, as in {rule}.")
        conditions.append((parent, tuple(values)))
    return tuple(conditions)


def in_order(space: Iterable[Dimension]) -> tuple[Dimension, ...]:
    """The dimensions, each after those that it depends on; otherwise as given.

    Raises UserError for conditions on what is no discrete dimension or has no such value, and for
    dimensions that depend on each other.
    """
    waiting = list(space)
    known = {d.key: d for d in waiting}
    for d in waiting:
        for parent, values in d.when:
            if parent not in known or not known[parent].discrete:
                kind = "continuous" if parent in known else "not searched"
                raise UserError(
                    f"{d.key}: when names {parent}, which is {kind}. Name a dimension of the "
                    "search that has single values."
                )
            for value in values:
                if known[parent].member(value) is None:
                    raise UserError(
                        f"{d.key}: when {parent} is {value!r} never holds; it takes "
                        f"{' | '.join(map(_text, known[parent].values))}."
                    )
    ordered: dict[str, Dimension] = {}
    while waiting:
        ready = next((d for d in waiting if all(k in ordered for k, _ in d.when)), None)
        if ready is None:
            keys = ", ".join(d.key for d in waiting)
            raise UserError(f"{waiting[0].key}: when goes in a circle ({keys}). Break it.")
        waiting.remove(ready)
        ordered[ready.key] = ready
    return tuple(ordered.values())


def with_parents(dims: Iterable[Dimension], space: Sequence[Dimension]) -> list[Dimension]:
    """Some dimensions of an ordered space and all that they depend on, in its order."""
    wanted = {d.key for d in dims}
    for d in reversed(space):
        if d.key in wanted:
            wanted |= {key for key, _ in d.when}
    return [d for d in space if d.key in wanted]


def points(dims: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """Every combination of the extremes of ordered dimensions, each at the points where it is."""

    def grown(params: dict[str, Any], rest: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
        if not rest:
            yield params
        elif not rest[0].active(params):
            yield from grown(params, rest[1:])
        else:
            for value in rest[0].extremes():
                yield from grown({**params, rest[0].key: value}, rest[1:])

    return grown({}, dims)


def count_points(dims: Sequence[Dimension], limit: int) -> int | None:
    """How many points a space has; None for more than ``limit``, or infinitely many."""
    if not all(d.discrete for d in dims):
        return None
    if not any(d.when for d in dims):
        return many if (many := prod(len(d.values) for d in dims)) <= limit else None
    many = sum(1 for _ in islice(points(dims), limit + 1))
    return many if many <= limit else None


def _choice(key: str, value: dict[Any, Any]) -> Dimension:
    values = value["choice"]
    if not isinstance(values, list) or not values:
        raise UserError(f"{key}: choice={values!r} must be a list of at least one value.")
    if any(isinstance(v, dict | list | set) for v in values):
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


def is_same(a: Any, b: Any) -> bool:
    """Whether two configuration values are one: 1 is 1.0, but true is not 1."""
    if _is_number(a) and _is_number(b):
        return float(a) == float(b)
    return type(a) is type(b) and bool(a == b)


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
