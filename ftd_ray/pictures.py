"""Pictures of a finished search, in the users' own values: what a sweep shows on its parent run."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna

from ftd_ray.search import Ended
from ftd_ray.space import Dimension


def study_pictures(ended: Sequence[Ended], space: Sequence[Dimension]) -> dict[str, Any]:
    """matplotlib figures by name: history, learning curves, parallel coordinates, importance.

    What too few trials cannot show is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scored = [t for t in ended if t.value is not None]
    complete = [t for t in scored if t.state == "complete"]
    drawings: dict[str, Callable[[], Any]] = {}
    if scored:
        drawings["history"] = lambda: _history(scored)
        drawings["curves"] = lambda: _curves(scored)
        if space:
            drawings["parallel_coordinates"] = lambda: _parallel_coordinates(scored, space)
    if len(complete) > 1 and len(space) > 1:
        drawings["importance"] = lambda: _importance(complete, space)
    figures = {}
    for name, make in drawings.items():
        try:
            figures[name] = make()
        except (ValueError, RuntimeError):  # importance: all trials have the same value
            continue
        finally:
            plt.close("all")
    return figures


def _history(trials: Sequence[Ended]) -> Any:
    figure, axes = _axes("Validation accuracy by trial", "trial", "validation accuracy (%)")
    for state, marker, colour in (("complete", "o", "C0"), ("pruned", "x", "0.6")):
        some = [t for t in trials if t.state == state]
        if some:
            axes.scatter([t.number for t in some], [100 * (t.value or 0) for t in some],
                         marker=marker, color=colour, label=state)  # fmt: skip
    complete = [t for t in trials if t.state == "complete"]
    if complete:
        best = np.maximum.accumulate([100 * (t.value or 0) for t in complete])
        axes.step([t.number for t in complete], best, where="post", color="C3", label="best so far")
    axes.legend(frameon=False)
    return figure


def _curves(trials: Sequence[Ended]) -> Any:
    figure, axes = _axes(
        "Validation accuracy by outer step", "outer step", "validation accuracy (%)"
    )
    best = max(trials, key=lambda t: (t.state == "complete", t.value or 0))
    for t in trials:
        style = {"color": "0.75", "linewidth": 1.0}
        if t is best:
            style = {"color": "C3", "linewidth": 2.0, "label": f"best: trial {t.number}"}
        elif t.state == "complete":
            style = {"color": "C0", "linewidth": 1.0}
        steps = sorted(t.reports)
        axes.plot(steps, [100 * t.reports[s] for s in steps], marker=".", **style)
    axes.legend(frameon=False)
    return figure


def _parallel_coordinates(trials: Sequence[Ended], space: Sequence[Dimension]) -> Any:
    """A line a trial through its values, coloured by accuracy; discrete values stand evenly."""
    import matplotlib.pyplot as plt

    names = short_names(space)
    figure, axes = plt.subplots(figsize=(max(7, 2 * len(space) + 2), 5), layout="constrained")
    low, high = (f(100 * (t.value or 0) for t in trials) for f in (min, max))
    norm = plt.Normalize(low, high if high > low else low + 1)
    colours = plt.get_cmap("viridis")
    jitter = np.linspace(-0.012, 0.012, len(trials))  # so that equal points stay apart
    for t, shift in zip(sorted(trials, key=lambda t: t.value or 0), jitter, strict=True):
        score = 100 * (t.value or 0)
        heights = [_height(d, t.params[d.key]) + shift for d in space]
        style = "-" if t.state == "complete" else ":"
        axes.plot([*range(len(space)), len(space)], [*heights, norm(score)], style,
                  color=colours(norm(score)), linewidth=2 if style == "-" else 1.2)  # fmt: skip
    for x, d in enumerate(space):
        axes.axvline(x, color="0.3", linewidth=1)
        ticks = d.values if d.discrete else d.bounds
        for value in ticks if len(ticks) <= 12 else (ticks[0], ticks[-1]):
            text = f"{value:g}" if isinstance(value, float) else str(value)
            axes.text(x - 0.03, _height(d, value), text, ha="right", va="center", fontsize=9)
    axes.axvline(len(space), color="0.3", linewidth=1)
    axes.set_xticks([*range(len(space) + 1)], [*(names[d.key] for d in space), "validation"])
    axes.set_yticks([])
    axes.set_ylim(-0.06, 1.06)
    axes.set_xlim(-0.35, len(space) + 0.1)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("Trials by their values; dotted lines were pruned")
    figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=axes, label="validation accuracy (%)")
    return figure


def _height(d: Dimension, value: Any) -> float:
    """Where a value stands on its axis, from 0 to 1."""
    if d.discrete:
        return d.values.index(value) / max(1, len(d.values) - 1)
    low, high = d.bounds
    if d.log:
        value, low, high = np.log(value), np.log(low), np.log(high)
    return float((value - low) / (high - low))


def _importance(complete: Sequence[Ended], space: Sequence[Dimension]) -> Any:
    names = short_names(space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = optuna.importance.get_param_importances(_as_study(complete, space))
    figure, axes = _axes("Importance of each hyperparameter (PED-ANOVA)", "importance", "")
    keys = list(reversed(shares))
    axes.barh([names[k] for k in keys], [shares[k] for k in keys], color="C0")
    return figure


def _as_study(complete: Sequence[Ended], space: Sequence[Dimension]) -> optuna.Study:
    """A study of the users' values: the real one sees indices where values are ordered."""
    study = optuna.create_study(direction="maximize")
    for trial in complete:
        study.add_trial(
            optuna.trial.create_trial(
                value=trial.value,
                params={d.key: trial.params[d.key] for d in space},
                distributions={d.key: d.real_distribution() for d in space},
            )
        )
    return study


def _axes(title: str, x: str, y: str) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def short_names(space: Sequence[Dimension]) -> dict[str, str]:
    """Key -> the name that users see: its last part, or the whole where two would be alike."""
    last = [d.name for d in space]
    return {d.key: d.name if last.count(d.name) == 1 else d.key for d in space}
