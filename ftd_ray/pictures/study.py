"""All pictures of a study by name, and those of its course: history and learning curves."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ftd_ray.pictures.coordinates import parallel_coordinates
from ftd_ray.pictures.drawing import (
    ACCURACY,
    BEST,
    MARKS,
    OTHER,
    PLAIN,
    best_of,
    percent,
    single_axes,
    states_of,
    whole_numbers,
)
from ftd_ray.pictures.front import front
from ftd_ray.pictures.importance import importance
from ftd_ray.pictures.joint import joint, joint_dimensions
from ftd_ray.pictures.slices import slices
from ftd_ray.search import Ended
from ftd_ray.space import Dimension


def study_pictures(
    ended: Sequence[Ended],
    space: Sequence[Dimension],
    objectives: Sequence[str] = ("accuracy",),
    best: int | None = None,
) -> dict[str, Any]:
    """matplotlib figures by name, in the order in which they are read.

    history, curves, slices, joint (rho, syn_steps and expert_epochs together),
    parallel_coordinates, importance, and of several objectives their front. ``best`` is the trial
    that won; else that of the highest accuracy is marked. What too few trials cannot show is left
    out; so is a picture that fails, since none is worth a sweep's end.
    """
    scored = [t for t in ended if t.value is not None]
    complete = [t for t in scored if t.state == "complete"]
    winner = next((t for t in complete if t.number == best), best_of(scored))
    costs = [o for o in objectives if o != "accuracy"]
    drawings: dict[str, Callable[[], Any]] = {}
    if scored:
        drawings["history"] = lambda: history(scored)
        drawings["curves"] = lambda: curves(scored, winner)
        if space:
            drawings["slices"] = lambda: slices(scored, space, winner)
    if complete and joint_dimensions(space):
        drawings["joint"] = lambda: joint(ended, space)
    if scored and space:
        drawings["parallel_coordinates"] = lambda: parallel_coordinates(scored, space)
    if len(complete) > 1 and len(space) > 1:
        drawings["importance"] = lambda: importance(complete, space)
    if costs and any(t.values.keys() >= set(costs) for t in complete):
        drawings["front"] = lambda: front(complete, costs)
    figures = {}
    for name, draw in drawings.items():
        try:
            figures[name] = draw()
        except Exception as error:
            warnings.warn(f"the picture {name} was left out: {error!r}", stacklevel=2)
    return figures


def history(trials: Sequence[Ended]) -> Any:
    """Accuracy by trial, and the best so far."""
    figure, axes = single_axes("Validation accuracy by trial", "trial", ACCURACY)
    for state in states_of(trials):
        some = [t for t in trials if t.state == state]
        axes.scatter(
            [t.number for t in some],
            [percent(t) for t in some],
            label=state,
            zorder=3,
            **MARKS.get(state, OTHER),
        )
    complete = sorted((t for t in trials if t.state == "complete"), key=lambda t: t.number)
    if complete:
        so_far = np.maximum.accumulate([percent(t) for t in complete])
        last = max(t.number for t in trials)
        axes.step(
            [*(t.number for t in complete), last],
            [*so_far, so_far[-1]],
            where="post",
            color=BEST,
            label="best so far",
        )
    whole_numbers(axes.xaxis)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def curves(trials: Sequence[Ended], best: Ended | None) -> Any:
    """Accuracy of every trial as its set grew."""
    figure, axes = single_axes("Validation accuracy by outer step", "outer step", ACCURACY)
    labelled: set[str] = set()
    dot = "." if len(trials) < 100 else ""
    faint = max(0.1, min(0.7, 40 / len(trials)))  # so that many lines show where they are dense
    for t in sorted(trials, key=lambda t: (t is best, t.state == "complete")):
        style: dict[str, Any] = {"color": "0.78", "linewidth": 1.0, "label": "not complete"}
        if t is best:
            style = {"color": BEST, "linewidth": 2.0, "label": f"best: trial {t.number}"}
        elif t.state == "complete":
            style = {"color": PLAIN, "linewidth": 1.0, "label": "complete", "alpha": faint}
        if style["label"] in labelled:
            del style["label"]
        else:
            labelled.add(style["label"])
        steps = sorted(t.reports)
        axes.plot(steps, [100 * t.reports[s] for s in steps], marker=dot, **style)
    reported = sorted({s for t in trials for s in t.reports})
    if len(reported) <= 10:
        axes.set_xticks(reported)
    else:
        whole_numbers(axes.xaxis)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
