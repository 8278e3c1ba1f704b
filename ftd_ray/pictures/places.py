"""Where a value of a dimension stands on an axis from 0 to 1, and what is written there.

Discrete values stand evenly, continuous ones by their (logarithmic) size. A trial in which a
dimension is inactive has no value of it, and a place of its own below the axis.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ftd_ray.search import Ended
from ftd_ray.space import Dimension

ABSENT = "–"
"""Written where a trial has no value of a dimension."""

ABSENT_PLACE = -0.16

LONGEST = 14
"""Characters of a value that an axis shows."""


def short_names(space: Sequence[Dimension]) -> dict[str, str]:
    """Key -> the name that users see: its last part, or the whole where two would be alike."""
    last = [d.name for d in space]
    return {d.key: d.name if last.count(d.name) == 1 else d.key for d in space}


def in_reading_order(space: Sequence[Dimension]) -> list[Dimension]:
    """What the method is about comes first: rho, the synthetic steps, the expert epochs."""
    return sorted(space, key=lambda d: LEADING.index(d.key) if d.key in LEADING else len(LEADING))


LEADING = ("experts.rho", "distill.syn_steps", "distill.expert_epochs")


def place(d: Dimension, trial: Ended) -> float:
    """Where a trial stands on the axis of a dimension."""
    return place_of(d, trial.params[d.key]) if d.key in trial.params else ABSENT_PLACE


def place_of(d: Dimension, value: Any) -> float:
    """Where a value stands, from 0 to 1; one that stands alone in the middle."""
    if d.discrete:
        return d.values.index(value) / (len(d.values) - 1) if len(d.values) > 1 else 0.5
    low, high = d.bounds
    if d.log:
        value, low, high = np.log(value), np.log(low), np.log(high)
    return float(np.clip((value - low) / (high - low), 0, 1))


def value_at(d: Dimension, where: float) -> float:
    """The value of a continuous dimension at a place."""
    low, high = d.bounds
    if d.log:
        return float(np.exp(np.log(low) + where * (np.log(high) - np.log(low))))
    return low + where * (high - low)


def ticks(d: Dimension, most: int) -> list[tuple[float, str]]:
    """Places and what is written there: both ends, and of the values between what has room."""
    if d.discrete:
        values: Sequence[Any] = d.values
        if len(values) > most:
            step = -(-(len(values) - 1) // (most - 1))
            kept = list(range(0, len(values), step))
            if kept[-1] != len(values) - 1:  # the last one shows how far it goes
                kept = [k for k in kept if len(values) - 1 - k > step / 2] + [len(values) - 1]
            values = [values[k] for k in kept]
        return [(place_of(d, v), axis_text(v)) for v in values]
    least = 0.999 / most
    shown = [(0.0, value_text(d.bounds[0])), (1.0, value_text(d.bounds[1]))]
    for value in _round_values(d):
        where = place_of(d, value)
        if all(abs(where - other) > least for other, _ in shown):
            shown.append((where, value_text(value)))
    return sorted(shown)


def _round_values(d: Dimension) -> Iterator[float]:
    """Round values between the bounds, the roundest first."""
    low, high = d.bounds
    if d.log:
        decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        candidates = [m * 10.0**k for m in (1, 3) for k in decades]
    else:
        size = 10.0 ** np.floor(np.log10(high - low))
        first = np.ceil(low / size)
        candidates = [
            (first + k * step) * size for step in (1, 0.5) for k in range(-2, int(11 / step))
        ]
    return (float(c) for c in candidates if low < c < high)


def axis_text(value: Any, longest: int = LONGEST) -> str:
    """A value beside an axis, where matplotlib would take dollars for mathematics."""
    return value_text(value, longest).replace("$", r"\$")


def value_text(value: Any, longest: int = LONGEST) -> str:
    """A value in few characters: 0.01, 10000, 1e-5, gsam."""
    text = str(value)
    if isinstance(value, float):
        text = f"{value:.4g}"
        if "e" in text:
            digits, _, power = text.partition("e")
            text = f"{value:.0f}" if 0 < int(power) < 6 else f"{digits}e{int(power)}"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
