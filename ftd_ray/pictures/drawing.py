"""What all pictures have in common: figures, colours, and the marks of a trial's state."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ftd_ray.search import Ended

PLAIN, BEST, QUIET = "#1f77b4", "#c0392b", "0.6"

MARKS = {
    "complete": {"marker": "o", "color": PLAIN, "s": 26, "linewidths": 0.8, "edgecolors": "white"},
    "pruned": {"marker": "x", "color": QUIET, "s": 22, "linewidths": 1.2},
    "failed": {"marker": "+", "color": "#b35900", "s": 34, "linewidths": 1.2},
}
OTHER = {"marker": "d", "color": QUIET, "s": 18}
"""The mark of any other state."""

ACCURACY = "validation accuracy (%)"


def percent(trial: Ended) -> float:
    return 100 * (trial.value or 0.0)


def best_of(trials: Sequence[Ended]) -> Ended | None:
    """The complete trial of the highest accuracy; of equals the earliest."""
    complete = [t for t in trials if t.state == "complete"]
    return max(complete, key=lambda t: (t.value or 0.0, -t.number), default=None)


def colour_norm(percents: Sequence[float]) -> tuple[Any, str]:
    """Accuracies -> colours, and which end of the colour bar is open.

    Trials that went astray get the lowest colour: they would leave none for the differences
    between good ones.
    """
    from matplotlib.colors import Normalize

    low, middle, high = min(percents), float(np.median(percents)), max(percents)
    floor = middle - 3 * max(high - middle, 0.5)
    if high - low < 0.1:
        return Normalize(low - 0.5, high + 0.5), "neither"
    return Normalize(max(low, floor), high, clip=True), "min" if low < floor else "neither"


def states_of(trials: Sequence[Ended]) -> list[str]:
    """The states that occur, the usual ones first."""
    there = {t.state for t in trials}
    return [s for s in MARKS if s in there] + sorted(there - MARKS.keys())


def new_figure(width: float, height: float) -> Any:
    """A figure that belongs to no window and to no list of pyplot's."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def single_axes(title: str, x: str, y: str) -> Any:
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers only: there is no trial 0.5."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
