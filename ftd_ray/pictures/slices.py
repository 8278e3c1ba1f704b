"""Small multiples: validation accuracy against each dimension on its own."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ftd_ray.pictures.drawing import (
    ACCURACY,
    BEST,
    MARKS,
    OTHER,
    new_figure,
    percent,
    states_of,
)
from ftd_ray.pictures.places import (
    ABSENT,
    ABSENT_PLACE,
    in_reading_order,
    place,
    place_of,
    short_names,
    ticks,
)
from ftd_ray.search import Ended
from ftd_ray.space import Dimension

COLUMNS = 4
ROOM = 26
"""Characters that stand side by side below a panel."""


def slices(trials: Sequence[Ended], space: Sequence[Dimension], best: Ended | None) -> Any:
    """A panel a dimension, all with one scale of accuracy, so that what matters stands out."""
    names = short_names(space)
    columns = min(COLUMNS, len(space))
    rows = -(-len(space) // columns)
    figure = new_figure(max(5.0, 3.1 * columns + 0.4), 2.9 * rows + 0.8)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for k, (axes, d) in enumerate(zip(panels, in_reading_order(space), strict=False)):
        _panel(axes, trials, d, names[d.key], best)
        if k % columns == 0:
            axes.set_ylabel(ACCURACY)
    for axes in panels[len(space) :]:
        axes.set_axis_off()
    figure.suptitle("Validation accuracy against each hyperparameter")
    handles, labels = panels[0].get_legend_handles_labels()
    for axes in panels[1 : len(space)]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        frameon=False,
        ncols=len(labels) if columns > 2 else 3,
    )
    return figure


def _panel(axes: Any, trials: Sequence[Ended], d: Dimension, name: str, best: Ended | None) -> None:
    for state in states_of(trials):
        some = [t for t in trials if t.state == state]
        axes.scatter(
            [place(d, t) + _jitter(d, t) for t in some],
            [percent(t) for t in some],
            label=state,
            zorder=3,
            **MARKS.get(state, OTHER),
        )
    if d.discrete:
        _means(axes, [t for t in trials if t.state == "complete"], d)
    if best is not None:
        axes.scatter(
            [place(d, best) + _jitter(d, best)],
            [percent(best)],
            s=90,
            zorder=4,
            facecolors="none",
            edgecolors=BEST,
            linewidths=1.6,
            label=f"best: trial {best.number}",
        )
    marks = ticks(d, most=6 if d.discrete else 4)
    if any(d.key not in t.params for t in trials):
        marks = [(ABSENT_PLACE, ABSENT), *marks]
        axes.axvline(ABSENT_PLACE / 2, color="0.8", linewidth=0.8, linestyle=":")
    axes.set_xticks([where for where, _ in marks], [text for _, text in marks])
    if sum(len(text) + 1 for _, text in marks) > ROOM:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(min(marks[0][0], 0) - 0.1, 1.1)
    axes.set_xlabel(f"{name} (log)" if d.log and not d.discrete else name, fontweight="bold")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _means(axes: Any, complete: Sequence[Ended], d: Dimension) -> None:
    label: str | None = "mean of complete"
    half = max(0.3 * _spacing(d), 0.02)
    for where in sorted({place(d, t) for t in complete}):
        here = [percent(t) for t in complete if place(d, t) == where]
        if len(here) > 1:
            axes.plot(
                [where - half, where + half],
                [np.mean(here)] * 2,
                color="0.2",
                linewidth=1.4,
                zorder=3.5,
                label=label,
            )
            label = None


def _spacing(d: Dimension) -> float:
    """Between neighbouring values, at most as much as looks good."""
    step = place_of(d, d.values[1]) - place_of(d, d.values[0]) if len(d.values) > 1 else 0.25
    return min(step, 0.25)


def _jitter(d: Dimension, trial: Ended) -> float:
    """Moves a trial of a discrete value aside, always the same way: equal points stay apart."""
    return 0.4 * _spacing(d) * ((0.618034 * trial.number + 0.5) % 1 - 0.5) if d.discrete else 0.0
