"""Diverged trials as samplers and pruners see them: imputed, as the worst of all that ended.

In the study a diverged trial is FAIL, and Optuna's samplers and pruners pass over it: they would
come back to a bad corner of the space again and again. So the storage through which trials are
asked for and pruned shows it otherwise, derived from the study alone, so that a study that is
opened again shows the same:

- COMPLETE, with values a little beyond the worst of all trials that lived, in each objective: gp
  models them, nsga2 and cmaes count them to their generation.
- Infeasible, by a constraint above 0, which the complete trials keep: tpe ranks it behind pruned
  trials too, nsga2 behind every feasible one, gp models where trials live. (Of values alone, tpe
  would rank it before every pruned trial.)
- With reports a little below all others, at every step that any trial reported after its own last
  one: so it counts in the median.
- With such a value in the rung of successive halving that it would have come to next, as a trial
  that is stopped there; so in the bracket of Hyperband. Wilcoxon's best trial is a feasible one.

Trials that failed for another reason stay FAIL here too: they say nothing about their point.
"""

import copy
from collections.abc import Container, Sequence

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

DIVERGED = "diverged"
"""User attribute of failed trials: whether it was because a training diverged."""

MARGIN = 0.1
"""How far beyond the worst an imputed value lies, as a share of the range."""

RUNG = "completed_rung_"
"""Begins the system attributes in which Optuna's successive halving keeps values by rung."""

LIVED, DIED = (
    create_trial(state=TrialState.FAIL, constraints={DIVERGED: sign}).system_attrs
    for sign in (-1.0, 1.0)
)
"""System attributes of a feasible and of an infeasible trial."""


class ImputingStorage(JournalStorage):
    """A journal whose lists of trials show diverged ones as ``impute`` does."""

    def __init__(self, backend: BaseJournalBackend, *, per_lived: int | None = None):
        """``per_lived`` as in ``impute``."""
        super().__init__(backend)
        self._per_lived = per_lived

    def recorded(self, study_id: int) -> list[FrozenTrial]:
        """The trials as they are in the journal."""
        return super().get_all_trials(study_id, deepcopy=False)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        trials = impute(
            self.recorded(study_id), self.get_study_directions(study_id), self._per_lived
        )
        found = [t for t in trials if states is None or t.state in states]
        return copy.deepcopy(found) if deepcopy else found


def impute(
    trials: Sequence[FrozenTrial],
    directions: Sequence[StudyDirection],
    per_lived: int | None = None,
) -> list[FrozenTrial]:
    """The trials, with each diverged one in the form that samplers and pruners are to see.

    At most ``per_lived`` of them for each trial that lived, the latest, are shown as complete.
    """
    diverged = [t for t in trials if t.state is TrialState.FAIL and t.user_attrs.get(DIVERGED)]
    if not diverged:
        return list(trials)
    lived = [t for t in trials if t.values and t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    signs = [1.0 if d is StudyDirection.MAXIMIZE else -1.0 for d in directions]
    values = [s * _below([s * t.values[i] for t in lived]) for i, s in enumerate(signs)]
    reports = [signs[0] * v for t in trials for v in t.intermediate_values.values()]
    worst = signs[0] * _below(reports)
    steps = sorted({step for t in trials for step in t.intermediate_values})
    most = len(diverged) if per_lived is None else per_lived * len(lived)
    counted = {t.number for t in diverged[max(0, len(diverged) - most) :]}
    shown = {t.number: _with_reports(t, steps, worst) for t in diverged}
    for number in counted:
        shown[number].state = TrialState.COMPLETE
        shown[number].values = values
        shown[number].system_attrs = shown[number].system_attrs | DIED
    return [shown[t.number] if t.number in shown else _feasible(t) for t in trials]


def _below(values: Sequence[float]) -> float:
    """A value below all others, by a part of their range."""
    if not values:
        return 0.0
    low, high = min(values), max(values)
    return low - MARGIN * ((high - low) or abs(low) or 1.0)


def _with_reports(trial: FrozenTrial, steps: Sequence[int], worst: float) -> FrozenTrial:
    shown = copy.copy(trial)
    last = -1 if trial.last_step is None else trial.last_step
    missed = {step: worst for step in steps if step > last}
    shown.intermediate_values = trial.intermediate_values | missed
    rung = sum(key.startswith(RUNG) for key in trial.system_attrs)
    shown.system_attrs = trial.system_attrs | {f"{RUNG}{rung}": worst}
    return shown


def _feasible(trial: FrozenTrial) -> FrozenTrial:
    if trial.state is not TrialState.COMPLETE:
        return trial
    shown = copy.copy(trial)
    shown.system_attrs = trial.system_attrs | LIVED
    return shown
