"""How much each dimension accounts for (PED-ANOVA, Watanabe et al., IJCAI 2023)."""

import textwrap
import warnings
from collections.abc import Sequence
from math import isfinite
from typing import Any

import optuna

from ftd_ray.pictures.drawing import PLAIN, new_figure, single_axes
from ftd_ray.pictures.places import short_names
from ftd_ray.search import Ended
from ftd_ray.space import Dimension


def importance(complete: Sequence[Ended], space: Sequence[Dimension]) -> Any:
    """Bars of the dimensions that all complete trials have; a note says what they leave out.

    Shares of trials that differ in what is active would not add up to one.
    """
    names = short_names(space)
    common = [d for d in space if all(d.key in t.params for t in complete)]
    left_out = [names[d.key] for d in space if d not in common]
    note = f"Without {', '.join(left_out)}: not active in every trial." if left_out else ""
    if len({t.value for t in complete}) < 2:
        return _only_a_note("all complete trials have the same validation accuracy")
    if len(common) < 2:
        return _only_a_note("fewer than two hyperparameters were active in every trial")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shares = optuna.importance.get_param_importances(_as_study(complete, common))
    except (ValueError, RuntimeError) as error:
        return _only_a_note(str(error))
    if not all(map(isfinite, shares.values())):
        return _only_a_note("the trials are too few")
    figure, axes = single_axes("Importance of each hyperparameter (PED-ANOVA)", "importance", "")
    figure.set_figheight(1.4 + 0.42 * len(shares))
    keys = list(reversed(shares))
    bars = axes.barh([names[k] for k in keys], [shares[k] for k in keys], color=PLAIN)
    axes.bar_label(bars, [f"{shares[k]:.2f}" for k in keys], padding=4, fontsize=9)
    axes.set_xlim(0, 1.1 * max(*shares.values(), 0.01))
    if note:
        figure.supxlabel("\n".join(textwrap.wrap(note, 100)), fontsize=9, color="0.35")
    return figure


def _only_a_note(reason: str) -> Any:
    figure = new_figure(8, 1.2)
    figure.text(0.02, 0.68, "Importance of each hyperparameter", fontsize=12, va="center")
    figure.text(0.02, 0.3, f"Cannot be told: {reason}.", fontsize=10, va="center", color="0.35")
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
