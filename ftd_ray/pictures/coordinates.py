"""Parallel coordinates: every trial as a line through its values."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ftd_ray.pictures.drawing import colour_norm, new_figure, percent
from ftd_ray.pictures.places import ABSENT, ABSENT_PLACE, place, short_names, ticks
from ftd_ray.search import Ended
from ftd_ray.space import Dimension


def parallel_coordinates(trials: Sequence[Ended], space: Sequence[Dimension]) -> Any:
    """Lines coloured by accuracy; where a dimension is inactive they pass below its axis."""
    import matplotlib
    from matplotlib.cm import ScalarMappable

    names = short_names(space)
    figure = new_figure(max(7.0, 1.5 * len(space) + 3), 5)
    axes = figure.subplots()
    norm, opening = colour_norm([percent(t) for t in trials])
    low, high = min(map(percent, trials)), max(map(percent, trials))
    colours = matplotlib.colormaps["viridis"]
    jitter = np.linspace(-0.012, 0.012, len(trials))  # so that equal points stay apart
    width = 2.0 if len(trials) <= 30 else 1.2 if len(trials) <= 150 else 0.6
    for t, shift in zip(sorted(trials, key=percent), jitter, strict=True):
        score = (percent(t) - low) / (high - low) if high > low else 0.5
        heights = [place(d, t) + shift for d in space]
        whole = t.state == "complete"
        axes.plot(
            range(len(space) + 1),
            [*heights, score],
            "-" if whole else ":",
            color=colours(norm(percent(t))),
            linewidth=width if whole else 0.6 * width,
        )
    for x, d in enumerate(space):
        axes.plot([x, x], [0, 1], color="0.3", linewidth=1)
        if any(d.key not in t.params for t in trials):
            axes.annotate(
                ABSENT,
                (x, ABSENT_PLACE),
                (0, -4),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=10,
            )
        for where, text in ticks(d, most=12 if d.discrete else 7):
            axes.annotate(
                text,
                (x, where),
                (-5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=9,
                zorder=4,
                bbox=HALO,
            )
    axes.plot([len(space)] * 2, [0, 1], color="0.3", linewidth=1)
    axes.set_xticks(range(len(space) + 1), [*(names[d.key] for d in space), "validation"])
    axes.tick_params(axis="x", length=0)
    if len(space) > 4:
        for label in axes.get_xticklabels():
            label.set(rotation=20, ha="right", rotation_mode="anchor")
    absent = any(d.key not in t.params for t in trials for d in space)
    axes.set_ylim(ABSENT_PLACE - 0.08 if absent else -0.06, 1.06)
    axes.set_yticks([])
    axes.set_xlim(-0.45, len(space) + 0.05)
    axes.spines[:].set_visible(False)
    title = "Trials by their values; dotted lines did not complete"
    axes.set_title(f"{title}; {ABSENT}: inactive" if absent else title)
    figure.colorbar(
        ScalarMappable(norm, colours),
        ax=axes,
        label="validation accuracy (%)",
        pad=0.02,
        extend=opening,
    )
    return figure


HALO = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
