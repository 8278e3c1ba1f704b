"""Rules that speak of several sections of a sweep, checked for every point of its space."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ftd.errors import UserError
from ftd_ray.presets import start_points
from ftd_ray.space import Dimension, count_points

if TYPE_CHECKING:
    from ftd_ray.config import SweepConfig

WILCOXON_PAIRS = 4
"""Paired networks below which the test's p-value cannot fall under Optuna's 0.1."""

UNFIT = {
    "grid": ("continuous", "conditional"),
    "qmc": ("unordered", "conditional"),
    "cmaes": ("unordered", "conditional"),
    "gp": ("conditional",),
    "nsga2": ("conditional",),
}
"""Dimensions that a sampler of Optuna has no use for."""


def check(config: "SweepConfig") -> None:
    """Raises UserError for the first rule that the sweep breaks."""
    for params in config.telling_points():
        point = config.at(params)
        point.distill.check(epochs=point.experts.epochs, per_class=None)
    search, evaluate = config.search, config.evaluate
    iterations = min(config.values_of("distill.iterations"))
    if evaluate.every > iterations:
        raise UserError(
            f"evaluate.every={evaluate.every} is above distill.iterations={iterations}, so a trial "
            "would never report. Lower it."
        )
    if search.grace is not None and search.grace >= iterations * search.repeats:
        raise UserError(
            f"search.grace={search.grace} is not below distill.iterations={iterations} times "
            f"search.repeats={search.repeats}, so nothing would ever be pruned. Lower it, or take "
            "search.pruner=none."
        )
    pairs = evaluate.search_networks * (search.repeats - 1)
    if search.pruner == "wilcoxon" and pairs < WILCOXON_PAIRS:
        raise UserError(
            f"search.pruner=wilcoxon compares {pairs} fresh networks before the last of search."
            f"repeats={search.repeats} distillations (evaluate.search_networks="
            f"{evaluate.search_networks} each), and fewer than {WILCOXON_PAIRS} can never be "
            "telling. Raise either."
        )
    if search.pruner == "wilcoxon" and search.warm_start is not None:
        raise UserError(
            "search.pruner=wilcoxon compares networks with those of the best trial, and trials of "
            f"search.warm_start={search.warm_start} have none. Take another pruner."
        )
    _check_sampler(config)
    _check_duplicates(config)
    _check_objectives(config)
    start_points(config)


def _check_sampler(config: "SweepConfig") -> None:
    """Refuses samplers that would silently draw some dimension at random, or visit points again."""
    sampler, space = config.search.sampler, config.space
    unfit: dict[str, tuple[Callable[[Dimension], bool], str]] = {
        "continuous": (lambda d: not d.discrete, "it is continuous. Give it levels: n"),
        "unordered": (lambda d: not d.ordered, "its values have no order. Take numbers"),
        "conditional": (lambda d: bool(d.when), "it exists only under a condition. Drop its when"),
    }
    for kind in UNFIT.get(sampler, ()):
        is_unfit, reason = unfit[kind]
        if found := next((d for d in space if is_unfit(d)), None):
            does = "cannot enumerate" if sampler == "grid" else "would draw at random"
            raise UserError(
                f"search.sampler={sampler} {does} {found.key}: {reason}, or take tpe or random."
            )
    if sampler == "cmaes" and len(space) == 1:
        raise UserError(
            f"search.sampler=cmaes needs two dimensions or more, and would draw {space[0].key} at "
            "random. Take tpe or gp."
        )


def _check_duplicates(config: "SweepConfig") -> None:
    search, space = config.search, config.space
    if search.duplicates == "repeat":
        return
    endless = next((d.key for d in space if not d.discrete and not d.when), None)
    if endless is not None:
        raise UserError(
            f"search.duplicates=skip has no effect: {endless} is continuous, so that no point "
            "comes twice. Leave it out, or give the dimension levels: n."
        )
    if all(d.discrete for d in space):
        many = count_points(space, search.trials)
        if many is not None and many < search.trials:
            raise UserError(
                f"search.trials={search.trials} is above the {many} points of the space, and "
                "search.duplicates=skip tries each once. Lower it, or take repeat."
            )


def _check_objectives(config: "SweepConfig") -> None:
    search, r = config.search, config.resources
    if "ipc" in search.objectives and not any(d.key == "distill.ipc" for d in config.space):
        raise UserError(
            f"search.objectives holds ipc, and distill.ipc={config.distill.ipc} is the same for "
            "all trials. Make it a dimension, or take ipc out."
        )
    if "gpu_seconds" in search.objectives and not r.gpus_per_trial:
        raise UserError(
            "search.objectives holds gpu_seconds, and resources.gpus_per_trial=0 uses none. Take "
            "cpu_seconds, or give trials a GPU."
        )
    if search.max_gpu_hours is not None and not (r.gpus_per_trial or r.gpus_per_expert):
        raise UserError(
            f"search.max_gpu_hours={search.max_gpu_hours:g} has no effect: neither experts nor "
            "trials use a GPU. Take search.max_hours."
        )
