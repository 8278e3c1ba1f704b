"""Pictures of a finished search, by Optuna and matplotlib, in the users' own values."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import optuna

from ftd_ray.search import Ended
from ftd_ray.space import Dimension

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def study_pictures(ended: Sequence[Ended], space: Sequence[Dimension]) -> dict[str, "Figure"]:
    """History, parallel coordinates and importance; what too few trials cannot show is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import warnings

    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as draw

    study = _in_real_values(ended, space)
    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    wanted = {}
    if complete:
        wanted["history"] = draw.plot_optimization_history
        wanted["intermediate"] = draw.plot_intermediate_values
    if len(complete) > 1 and len(space) > 1:
        wanted["parallel_coordinates"] = draw.plot_parallel_coordinate
        wanted["importance"] = draw.plot_param_importances
    figures = {}
    for name, plot in wanted.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                axes = plot(study)
            except (ValueError, RuntimeError):  # such as: all trials have the same value
                plt.close("all")
                continue
            figure = axes.figure
            figure.set_size_inches(10, 5.5)
            figure.tight_layout()
        figures[name] = figure
        plt.close(figure)
    return figures


def _in_real_values(ended: Sequence[Ended], space: Sequence[Dimension]) -> optuna.Study:
    """The study sees indices of ordered values; a picture should show the values."""
    names = short_names(space)
    shown = optuna.create_study(direction="maximize")
    for trial in ended:
        if trial.state == "failed":
            continue
        params = {names[d.key]: trial.params[d.key] for d in space}
        state = (
            optuna.trial.TrialState.COMPLETE
            if trial.state == "complete"
            else optuna.trial.TrialState.PRUNED
        )
        shown.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=trial.value,
                params=params,
                distributions={names[d.key]: d.real_distribution() for d in space},
                intermediate_values=trial.reports,
            )
        )
    return shown


def short_names(space: Sequence[Dimension]) -> dict[str, str]:
    """Key -> the name that users see: its last part, or the whole where two would be alike."""
    last = [d.name for d in space]
    return {d.key: d.name if last.count(d.name) == 1 else d.key for d in space}
