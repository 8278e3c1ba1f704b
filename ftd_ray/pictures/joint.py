"""rho, the synthetic steps and the expert epochs together: mean accuracy of each combination.

The three act on each other (how far an expert is followed, by how many steps, through how flat a
landscape), so that panels of one dimension each would hide what matters.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ftd_ray.pictures.drawing import colour_norm, new_figure, percent
from ftd_ray.pictures.places import (
    ABSENT,
    LEADING,
    axis_text,
    place,
    place_of,
    short_names,
    value_at,
)
from ftd_ray.search import Ended
from ftd_ray.space import Dimension

MOST = 8
"""Values of a dimension that have a cell each; more are put together."""

CELL = (0.78, 0.55)
WIDEST = 14.0
"""Inches of a cell, and of a row of panels at most."""


@dataclass(frozen=True)
class Levels:
    """The rows, columns or panels of a dimension: values or ranges, and at the end "–"."""

    texts: tuple[str, ...]
    of: dict[int, int]
    """Trial -> its level."""


def joint_dimensions(space: Sequence[Dimension]) -> list[Dimension]:
    """Those of the three that are varied."""
    by_key = {d.key: d for d in space}
    return [by_key[key] for key in LEADING if key in by_key]


def joint(trials: Sequence[Ended], space: Sequence[Dimension]) -> Any:
    """A heat map of syn_steps and expert_epochs for each rho; of two varied one map, of one a row.

    A cell says the mean accuracy of its complete trials, and how many of how many are complete.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable

    names = short_names(space)
    panel, x, y = _roles(joint_dimensions(space))
    panels, columns, rows = (_levels(d, trials) for d in (panel, x, y))
    cells: dict[tuple[int, int, int], list[Ended]] = defaultdict(list)
    for t in trials:
        cells[panels.of[t.number], columns.of[t.number], rows.of[t.number]].append(t)
    means = {
        cell: float(np.mean([percent(t) for t in done]))
        for cell, some in cells.items()
        if (done := [t for t in some if t.state == "complete" and t.value is not None])
    }
    norm, opening = colour_norm(list(means.values()))
    colours = matplotlib.colormaps["viridis"]

    across, down = len(columns.texts), len(rows.texts)
    per_row = max(1, min(len(panels.texts), int(WIDEST / (across * CELL[0] + 0.6))))
    bands = -(-len(panels.texts) // per_row)
    figure = new_figure(
        max(6.0, per_row * (across * CELL[0] + 0.5) + 1.8), bands * (down * CELL[1] + 0.9) + 0.9
    )
    grid = figure.subplots(bands, per_row, sharex=True, sharey=True, squeeze=False)
    for k, axes in enumerate(grid.flat):
        if k >= len(panels.texts):
            axes.set_axis_off()
            continue
        for i in range(across):
            for j in range(down):
                _cell(axes, i, j, cells.get((k, i, j), []), means.get((k, i, j)), norm, colours)
        axes.set(xlim=(0, across), ylim=(0, down))
        axes.set_xticks(np.arange(across) + 0.5, columns.texts)
        axes.set_yticks(np.arange(down) + 0.5, rows.texts)
        axes.tick_params(length=0)
        axes.tick_params(labelbottom=k + per_row >= len(panels.texts))
        axes.spines[:].set_visible(False)
        if max(map(len, columns.texts)) > 7:
            for label in axes.get_xticklabels():
                label.set(rotation=30, ha="right", rotation_mode="anchor")
        if panel is not None:
            axes.set_title(f"{names[panel.key]} {panels.texts[k]}", fontsize=11)
        if k + per_row >= len(panels.texts):
            axes.set_xlabel("" if x is None else names[x.key], fontweight="bold")
        if k % per_row == 0:
            axes.set_ylabel("" if y is None else names[y.key], fontweight="bold")
    absent = any(ABSENT in levels.texts for levels in (panels, columns, rows))
    together = [names[d.key] for d in (panel, x, y) if d is not None]
    title = f"Mean validation accuracy (%) by {' × '.join(together)};\n"
    title += "below it how many trials of how many are complete"
    figure.suptitle(f"{title}; {ABSENT}: inactive" if absent else title, fontsize=11)
    figure.colorbar(
        ScalarMappable(norm, colours),
        ax=list(grid.flat),
        pad=0.02,
        extend=opening,
        aspect=7 * figure.get_figheight(),
    )
    return figure


def _cell(
    axes: Any, i: int, j: int, some: list[Ended], mean: float | None, norm: Any, colours: Any
) -> None:
    from matplotlib.patches import Rectangle

    if not some:  # nothing was tried here
        style: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.86", "hatch": "///"}
    else:
        fill = "0.94" if mean is None else colours(norm(mean))
        style = {"facecolor": fill, "edgecolor": "white"}
    axes.add_patch(Rectangle((i, j), 1, 1, linewidth=1.2, **style))
    if some:
        complete = sum(t.state == "complete" for t in some)
        share = f"{complete} of {len(some)}"
        dark = mean is not None and norm(mean) < 0.6
        if mean is not None:
            axes.text(
                i + 0.5,
                j + 0.62,
                f"{mean:.1f}",
                ha="center",
                va="center",
                fontsize=10,
                color="white" if dark else "black",
            )
        axes.text(
            i + 0.5,
            j + (0.5 if mean is None else 0.26),
            share,
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else "0.25",
        )


def _roles(
    varied: Sequence[Dimension],
) -> tuple[Dimension | None, Dimension | None, Dimension | None]:
    """What makes panels, columns and rows."""
    if len(varied) == 3:
        rho, steps, epochs = varied
        return rho, steps, epochs
    if len(varied) == 2:
        first, second = varied
        return (None, second, first) if first.key == LEADING[0] else (None, first, second)
    return None, varied[0], None


def _levels(d: Dimension | None, trials: Sequence[Ended]) -> Levels:
    if d is None:
        return Levels(("",), {t.number: 0 for t in trials})
    if d.discrete and len(d.values) <= MOST:
        edges = None
        texts = [axis_text(v, 9) for v in d.values]
    elif d.discrete:
        groups = np.array_split(np.arange(len(d.values)), MOST - 2)
        edges = [place_of(d, d.values[g[-1]]) for g in groups[:-1]]
        texts = [f"{axis_text(d.values[g[0]])}–{axis_text(d.values[g[-1]])}" for g in groups]
    else:
        bounds = np.linspace(0, 1, MOST - 2)
        edges = list(bounds[1:-1])
        ends = [f"{value_at(d, b):.2g}" for b in bounds]
        texts = [f"{a}–{b}" for a, b in pairwise(ends)]
    of = {}
    for t in trials:
        if d.key not in t.params:
            of[t.number] = len(texts)
        elif edges is None:
            of[t.number] = d.values.index(t.params[d.key])
        else:
            of[t.number] = int(np.searchsorted(edges, place(d, t)))
    if any(level == len(texts) for level in of.values()):
        texts.append(ABSENT)
    return Levels(tuple(texts), of)
