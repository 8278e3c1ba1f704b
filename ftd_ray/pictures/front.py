"""Several objectives: accuracy against what it costs, with the Pareto front."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ftd_ray.pictures.drawing import ACCURACY, BEST, PLAIN, new_figure, percent, whole_numbers
from ftd_ray.search import Ended

WORDS = {
    "accuracy": "val accuracy (%)",
    "gpu_seconds": "GPU seconds",
    "cpu_seconds": "CPU seconds",
    "ipc": "images per class",
}
"""Objective -> what users read."""

APART = 0.06
"""Of an axis, between trials that have their numbers beside them."""


def words(objective: str) -> str:
    return WORDS.get(objective, objective.replace("_", " "))


def dominated(values: np.ndarray) -> np.ndarray:
    """Which of (n, k) costs are no better anywhere and worse somewhere than another's."""
    no_better = np.all(values[:, None] >= values[None, :], axis=2)
    worse = np.any(values[:, None] > values[None, :], axis=2)
    return np.asarray(np.any(no_better & worse, axis=1))


def front(trials: Sequence[Ended], costs: Sequence[str]) -> Any:
    """A panel a cost. A front of two objectives is a stair; full dots are on that of all."""
    valued = [t for t in trials if t.values.keys() >= set(costs)]
    table = np.array([[-percent(t), *(t.values[c] for c in costs)] for t in valued])
    on_front = ~dominated(table)
    figure = new_figure(max(6.5, 5.2 * len(costs) + 0.6), 4.6)
    of_all = " of all objectives" if len(costs) > 1 else ""
    grid = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for k, (axes, cost) in enumerate(zip(grid, costs, strict=True), start=1):
        score, price = -table[:, 0], table[:, k]
        axes.margins(0.08)
        axes.scatter(
            price[~on_front],
            score[~on_front],
            s=28,
            facecolors="none",
            edgecolors=PLAIN,
            linewidths=1.1,
            label="not on the front",
            zorder=3,
        )
        axes.scatter(
            price[on_front],
            score[on_front],
            s=36,
            color=BEST,
            zorder=4,
            label=f"on the Pareto front{of_all}",
        )
        beaten = dominated(table[:, [0, k]])
        stair = [i for i in np.lexsort((-score, price)) if not beaten[i]]
        axes.step(
            price[stair],
            score[stair],
            where="post",
            color=BEST,
            linewidth=1.3,
            zorder=2,
            label="front of the two that are shown" if len(costs) > 1 else None,
        )
        _scale(axes, price)
        _numbers(axes, [(valued[i].number, price[i], score[i]) for i in reversed(stair)])
        axes.set_xlabel(words(cost))
        axes.grid(color="0.93")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel(ACCURACY)
    figure.suptitle("Accuracy against its costs; numbers are trials")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _numbers(axes: Any, points: Sequence[tuple[int, float, float]]) -> None:
    """Writes trials' numbers, the first points first, where there is room."""
    written: list[np.ndarray] = []
    for number, x, y in points:
        here = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        if all(abs(here - other).max() > APART for other in written):
            axes.annotate(
                str(number), (x, y), (4, 5), textcoords="offset points", fontsize=8, color="0.25"
            )
            written.append(here)


def _scale(axes: Any, price: np.ndarray) -> None:
    values = np.unique(price)
    if values[0] > 1e-3 and values[-1] > 20 * values[0]:  # below it a logarithm shows noise
        axes.set_xscale("log")
    if (values % 1 == 0).all():
        if len(values) <= 6:
            axes.set_xticks(values, [f"{v:g}" for v in values], minor=False)
            axes.minorticks_off()
        elif axes.get_xscale() == "linear":
            whole_numbers(axes.xaxis)
