"""Optuna's samplers and pruners as the ``search`` section names them.

Samplers are made anew for every trial, seeded by its number: their own random state is not stored,
and a study that is opened again would repeat its first points.
"""

import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
    WilcoxonPruner,
)
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState

from ftd.seeds import derive_seed
from ftd_ray.sections import SearchConfig
from ftd_ray.space import Dimension, points

DRAWS = 20
"""Points that a sampler may draw until one is new; then any new one is taken."""

ENUMERATED = 100_000
"""Points among which that one is looked for."""

DIVERGED_PER_LIVED = {"tpe": 9}
"""Diverged trials that a sampler sees, for each that lived. tpe takes the best tenth of all trials
for good, also when all have diverged; so none that diverged is ever among them."""


def sampler_of(
    search: SearchConfig, space: Sequence[Dimension], seed: int, number: int
) -> BaseSampler:
    """The sampler for trial ``number`` of a sweep."""
    here = derive_seed(seed, "sampler", number) % 2**32
    match search.sampler:
        case "tpe":
            return TPESampler(
                seed=here,
                n_startup_trials=search.startup,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
        case "gp":
            return GPSampler(seed=here, n_startup_trials=search.startup)
        case "cmaes":  # with margin: whole numbers do not collapse onto one
            return CmaEsSampler(seed=here, with_margin=True, warn_independent_sampling=False)
        case "nsga2":
            return NSGAIISampler(seed=here, population_size=search.population_size)
        case "random":
            return RandomSampler(seed=here)
        case "qmc":  # stores its place in the study; one seed for the whole sequence
            return QMCSampler(seed=seed % 2**32, scramble=True, warn_independent_sampling=False)
        case "grid":
            values = {d.key: [d.encode(v) for v in d.values] for d in space}
            return _Grid(values, seed=seed % 2**32)


class _Grid(GridSampler):
    """Without stopping the study at the last point, which only works inside ``optimize``."""

    def after_trial(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the number of trials is the sweep's."""


class DistinctSampler(BaseSampler):
    """Draws from another sampler until the point is none of ``tried``."""

    def __init__(
        self,
        inner: BaseSampler,
        space: Sequence[Dimension],
        tried: Sequence[dict[str, Any] | None],
        seed: int,
    ):
        self._inner, self._space = inner, space
        self._tried = {tuple(p.items()) for p in tried if p is not None}
        self._random = random.Random(seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {d.key: d.distribution() for d in self._space}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        fixed = trial.system_attrs.get("fixed_params", {})
        for _ in range(DRAWS):
            params = self._draw(study, trial, fixed)
            if tuple(params.items()) not in self._tried:
                return self._encoded(params)
        new = [
            p
            for p in islice(points(self._space), ENUMERATED)
            if tuple(p.items()) not in self._tried and fixed.items() <= self._encoded(p).items()
        ]
        return self._encoded(self._random.choice(new) if new else params)

    def _draw(
        self, study: optuna.Study, trial: FrozenTrial, fixed: dict[str, Any]
    ) -> dict[str, Any]:
        known = self._inner.infer_relative_search_space(study, trial)
        drawn = self._inner.sample_relative(study, trial, known) | fixed
        params: dict[str, Any] = {}
        for d in self._space:
            if not d.active(params):
                continue
            if d.key not in drawn:
                drawn[d.key] = self._inner.sample_independent(study, trial, d.key, d.distribution())
            params[d.key] = d.decode(drawn[d.key])
        return params

    def _encoded(self, params: dict[str, Any]) -> dict[str, Any]:
        return {d.key: d.encode(params[d.key]) for d in self._space if d.key in params}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._inner.after_trial(study, trial, state, values)


def pruner_of(search: SearchConfig, *, every: int, steps: int) -> BasePruner:
    """The pruner of trials that report ``every`` outer steps, ``steps`` at most."""
    grace, factor = search.grace or every, search.reduction_factor or 3
    match search.pruner:
        case "asha":
            return SuccessiveHalvingPruner(min_resource=grace, reduction_factor=factor)
        case "hyperband":
            return HyperbandPruner(min_resource=grace, max_resource=steps, reduction_factor=factor)
        case "median":
            return MedianPruner(n_startup_trials=4, n_warmup_steps=grace, n_min_trials=4)
        case "wilcoxon":
            return WilcoxonPruner()
        case "none":
            return NopPruner()
