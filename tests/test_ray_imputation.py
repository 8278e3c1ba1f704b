"""Diverged trials: what samplers and pruners learn from them, and that they stay failed."""

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from ftd_ray.config import SearchConfig
from ftd_ray.imputation import DIVERGED, impute
from ftd_ray.journal import STUDY_FILE
from ftd_ray.search import Ended, Suggestion, SweepStudy, read_study
from ftd_ray.space import Dimension, parse_dimension

RHO = parse_dimension("experts.rho", {"choice": [0.0, 0.01, 0.02, 0.05]})
LR_IMG = parse_dimension("distill.lr_img", {"float": [10, 10000], "log": True, "levels": 7})
LR_LR = parse_dimension("distill.lr_lr", {"float": [1e-7, 1e-3], "log": True})
SPACE = (RHO, LR_IMG, LR_LR)
TWO = ("accuracy", "cpu_seconds")
STEPS = range(10, 91, 10)

UP, DOWN = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE


@pytest.fixture(autouse=True)
def _verbosity() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    yield
    optuna.logging.set_verbosity(before)


def opened(
    folder: Path,
    *,
    space: Sequence[Dimension] = SPACE,
    seed: int = 0,
    earlier: Sequence[Ended] = (),
    **search: Any,
) -> SweepStudy:
    folder.mkdir(exist_ok=True)
    return SweepStudy(
        str(folder),
        name="study",
        space=space,
        search=SearchConfig(**({"trials": 30, "pruner": "none"} | search)),
        seed=seed,
        every=10,
        steps=90,
        earlier=earlier,
    )


@pytest.fixture
def open_study(tmp_path) -> Callable[..., SweepStudy]:
    """Opens the study of this test, or another one by its folder; again, when it is there."""

    def open_(*, folder: str = "study", **settings: Any) -> SweepStudy:
        return opened(tmp_path / folder, **settings)

    return open_


def place(params: dict[str, Any]) -> tuple[float, float]:
    """Where a point lies between the bounds of the two learning rates, from 0 to 1 each."""
    return (
        math.log10(params["distill.lr_img"] / 10) / 3,
        math.log10(params["distill.lr_lr"] / 1e-7) / 4,
    )


def diverges(params: dict[str, Any]) -> bool:
    """At half of the points: where both learning rates together are too large."""
    return sum(place(params)) > 1


def accuracy(params: dict[str, Any]) -> float:
    x, y = place(params)
    return 0.7 - (x - 0.3) ** 2 - (y - 0.3) ** 2 - params["experts.rho"]


def carry_out(study: SweepStudy, suggestion: Suggestion) -> Ended:
    """Brings a trial to the end that its point has."""
    if diverges(suggestion.params):
        return study.fail(suggestion.number, "eta became -1", diverged=True)
    value = accuracy(suggestion.params)
    study.report(suggestion.number, 90, value, seconds=1 + 10 * value)
    return study.complete(suggestion.number)


def carry_out_all(study: SweepStudy) -> list[Suggestion]:
    done = []
    while (suggestion := study.next()) is not None:
        carry_out(study, suggestion)
        done.append(suggestion)
    return done


def hand_out(study: SweepStudy) -> Suggestion:
    suggestion = study.next()
    assert suggestion is not None
    return suggestion


# --- samplers -------------------------------------------------------------------------------


def share(folder: Path, seeds: int, **search: Any) -> float:
    """How many suggestions after the start-up of ten trials diverge, over several searches."""
    late = []
    for seed in range(seeds):
        late += carry_out_all(opened(folder / f"seed-{seed}", seed=seed, **search))[10:]
    return sum(diverges(s.params) for s in late) / len(late)


@pytest.fixture(scope="module")
def at_random(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The share of a random search."""
    return share(tmp_path_factory.mktemp("random"), 3, sampler="random", trials=35)


@pytest.mark.parametrize(("sampler", "seeds", "trials"), [("tpe", 3, 35), ("gp", 2, 18)])
def test_suggestions_that_diverge_become_far_fewer_than_at_random(
    at_random, tmp_path, sampler, seeds, trials
):
    assert 0.35 < at_random < 0.65
    assert share(tmp_path, seeds, sampler=sampler, trials=trials) < at_random / 2


@pytest.mark.parametrize(
    ("sampler", "trials"), [("tpe", 35), pytest.param("gp", 20, marks=pytest.mark.heavy)]
)
def test_with_several_objectives_too(at_random, tmp_path, sampler, trials):
    search = {"sampler": sampler, "trials": trials, "objectives": TWO}
    assert share(tmp_path, 2, **search) < 0.6 * at_random


def test_diverged_trial_counts_to_the_start_up(open_study):
    study = open_study(startup_trials=4)
    for _ in range(3):
        study.fail(hand_out(study).number, "eta became -1", diverged=True)
    carried = hand_out(study)
    study.report(carried.number, 90, 0.5)
    study.complete(carried.number)
    at_random = open_study(folder="random", sampler="random")
    drawn = [hand_out(at_random).params for _ in range(5)]
    assert hand_out(study).params != drawn[4]


def test_as_long_as_nothing_has_lived_tpe_goes_on_at_random(open_study):
    ignored = open_study(folder="ignored", trials=20)
    study = open_study(trials=20)
    for _ in range(19):
        study.fail(hand_out(study).number, "eta became -1", diverged=True)
        ignored.fail(hand_out(ignored).number, "its worker was lost")
    assert hand_out(study) == hand_out(ignored)


def test_tpe_takes_no_diverged_trial_for_good_however_few_lived(open_study):
    """Two trials of an earlier sweep, and the search comes back to where they lived."""
    space = (parse_dimension("distill.lr_img", {"float": [0.0, 1.0]}),)
    earlier = [
        Ended(i, "complete", {"distill.lr_img": 0.9 + i / 100}, 0.5, None, {}, values={TWO[0]: 0.5})
        for i in range(2)
    ]
    study = open_study(space=space, trials=60, startup_trials=1, earlier=earlier)
    late = []
    for number in range(60):
        params = hand_out(study).params
        late += [params["distill.lr_img"]] if number >= 30 else []
        study.fail(number, "eta became -1", diverged=True)
    assert sum(v > 0.7 for v in late) > len(late) / 2


def test_tpe_prefers_where_trials_were_pruned_to_where_they_diverged(open_study):
    space = (parse_dimension("distill.lr_img", {"float": [0.0, 1.0]}),)
    study = open_study(space=space, trials=60, startup_trials=1)
    late = []
    while (suggestion := study.next()) is not None:
        low = suggestion.params["distill.lr_img"] < 0.5
        late.append(low)
        if low:
            study.report(suggestion.number, 10, 0.1)
            study.prune(suggestion.number)
        else:
            study.fail(suggestion.number, "eta became -1", diverged=True)
    assert sum(late[20:]) > 0.8 * len(late[20:])


def test_other_failures_are_passed_over(open_study):
    """A search goes on as if such a trial had never told anything."""
    study, told = open_study(startup_trials=2), open_study(folder="told", startup_trials=2)
    for s in (study, told):
        for value in (0.3, 0.4, 0.5):
            number = hand_out(s).number
            s.report(number, 90, value)
            s.complete(number)
    study.fail(hand_out(study).number, "its worker was lost 4 times")
    told.fail(hand_out(told).number, "eta became -1", diverged=True)
    (seen,) = (t for t in study.study.get_trials() if t.number == 3)
    assert seen.state is TrialState.FAIL
    assert not any(t.constraints for t in study.study.get_trials())
    assert hand_out(study).params != hand_out(told).params


def test_grid_visits_every_point_once_also_those_that_diverge(open_study):
    space = (RHO, LR_IMG)
    study, seen = open_study(space=space, trials=28, sampler="grid"), []
    while (suggestion := study.next()) is not None:
        seen.append(tuple(suggestion.params.values()))
        if suggestion.params["distill.lr_img"] > 1000:
            study.fail(suggestion.number, "eta became -1", diverged=True)
        else:
            study.report(suggestion.number, 90, 0.5)
            study.complete(suggestion.number)
    assert len(set(seen)) == len(seen) == 28


def test_points_that_diverged_are_not_tried_again_when_duplicates_are_skipped(open_study):
    study = open_study(space=(RHO,), trials=4, duplicates="skip", startup_trials=1)
    done = []
    while (suggestion := study.next()) is not None:
        done.append(suggestion.params["experts.rho"])
        study.fail(suggestion.number, "eta became -1", diverged=True)
    assert sorted(done) == list(RHO.values)


SAMPLERS: dict[str, dict[str, Any]] = {
    "tpe": {"startup_trials": 3},
    "gp": {"startup_trials": 9},
    "cmaes": {},
    "nsga2": {"objectives": TWO, "population": 3},
    "random": {},
    "qmc": {},
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_search_that_loses_its_driver_in_every_trial_makes_the_same_suggestions(
    open_study, sampler
):
    search = {"trials": 11, "sampler": sampler, **SAMPLERS[sampler]}
    whole = carry_out_all(open_study(folder="whole", **search))
    assert any(diverges(s.params) for s in whole[:9])
    for expected in whole:
        lost = hand_out(open_study(**search))  # and the driver died
        study = open_study(**search)
        assert hand_out(study) == lost == expected
        carry_out(study, lost)
    assert open_study(**search).next() is None


# --- in the study ---------------------------------------------------------------------------


def test_diverged_trial_stays_failed_for_whoever_reads_the_study(open_study, tmp_path):
    study = open_study(trials=2)
    number = hand_out(study).number
    study.report(number, 10, 0.4)
    ended = study.fail(number, "eta became -1", diverged=True)
    assert (ended.state, ended.reason, ended.reports) == ("failed", "eta became -1", {10: 0.4})
    assert (study.ended(), study.best(), study.front()) == ([ended], [], [])
    assert study.frozen(number).state is TrialState.FAIL
    folder = tmp_path / "study"
    assert read_study(str(folder)) == ([ended], None)
    assert open_study(trials=2).ended() == [ended]
    storage = JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))
    (trial,) = optuna.load_study(study_name="study", storage=storage).trials
    assert (trial.state, trial.values, trial.constraints) == (TrialState.FAIL, None, {})
    assert trial.intermediate_values == {10: 0.4}


def test_study_of_older_failures_opens_and_passes_over_them(open_study):
    study = open_study(trials=3)
    suggestion = hand_out(study)
    study.study.tell(suggestion.number, state=TrialState.FAIL)
    again = open_study(trials=3)
    assert [t.state for t in again.ended()] == ["failed"]
    assert [t.state for t in again.study.get_trials()] == [TrialState.FAIL]
    assert hand_out(again).number == 1


def test_trials_of_an_earlier_sweep_lived(open_study):
    """They stand before this sweep's own, and what diverges here is worse than they."""
    point = {"experts.rho": 0.0, "distill.lr_img": 10.0, "distill.lr_lr": 1e-5}
    earlier = [
        Ended(7, "complete", point, v, None, {90: v}, values={"accuracy": v}) for v in (0.3, 0.2)
    ]
    study = open_study(earlier=earlier)
    number = hand_out(study).number
    study.fail(number, "eta became -1", diverged=True)
    assert [(t.number, t.state) for t in study.ended()] == [(0, "failed")]
    assert [t.value for t in study.study.get_trials()] == [0.3, 0.2, pytest.approx(0.19)]


# --- values ---------------------------------------------------------------------------------


def trials_of(*rows: dict[str, Any]) -> list[FrozenTrial]:
    """Trials by number; one with ``diverged`` failed."""
    trials = []
    for number, row in enumerate(rows):
        diverged = row.pop("diverged", False)
        state = TrialState.FAIL if diverged else row.pop("state", TrialState.COMPLETE)
        trial = create_trial(state=state, user_attrs={DIVERGED: diverged}, **row)
        trial.number = number
        trials.append(trial)
    return trials


def test_imputed_value_lies_a_tenth_of_the_range_beyond_the_worst_that_lived_or_was_pruned():
    rows = ({"value": 0.9}, {"value": 0.5}, {"value": 0.4, "state": TrialState.PRUNED})
    *_, seen = impute(trials_of(*rows, {"diverged": True}), [UP])
    assert (seen.state, seen.value) == (TrialState.COMPLETE, pytest.approx(0.35))


def test_imputed_values_are_the_worst_in_each_objective():
    rows = ({"values": [0.9, 30.0]}, {"values": [0.5, 10.0]})
    *_, seen = impute(trials_of(*rows, {"diverged": True}), [UP, DOWN])
    assert seen.values == pytest.approx([0.46, 32.0])


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_imputed_value_is_worse_than_equal_ones_too(value, direction):
    seen = impute(trials_of({"value": value}, {"diverged": True}), [direction])[1]
    assert seen.value < value if direction is UP else seen.value > value


def test_imputed_trials_are_infeasible_and_complete_ones_feasible():
    rows = ({"value": 0.9}, {"diverged": True}, {"state": TrialState.RUNNING})
    constraints = [list(t.constraints.values()) for t in impute(trials_of(*rows), [UP])]
    assert constraints == [[-1.0], [1.0], []]


def test_without_a_diverged_trial_all_are_shown_as_they_are():
    trials = trials_of({"value": 0.9}, {"value": 0.8, "state": TrialState.PRUNED})
    assert all(a is b for a, b in zip(impute(trials, [UP]), trials, strict=True))


def test_imputation_leaves_the_recorded_trials_alone():
    trials = trials_of({"value": 0.9, "intermediate_values": {10: 0.9}}, {"diverged": True})
    impute(trials, [UP])
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.FAIL]
    assert [dict(t.system_attrs) for t in trials] == [{}, {}]
    assert trials[1].intermediate_values == {}


# --- pruners --------------------------------------------------------------------------------


def decisions(study: SweepStudy, values: Sequence[float], *, dies: bool, at: int) -> list[Any]:
    """The steps at which trials of these accuracies are pruned; None of those that are not.

    From step ``at`` on the second trial is the worst of all, or ``dies`` of divergence.
    """
    said: list[int | None] = []
    for i, value in enumerate(values):
        number = hand_out(study).number
        for step in STEPS:
            worst = i == 1 and step > at
            if worst and dies:
                study.fail(number, "eta became -1", diverged=True)
                said.append(None)
                break
            if study.report(number, step, -0.05 if worst else value + step / 1000):
                study.prune(number)
                said.append(None if worst else step)
                break
        else:
            study.complete(number)
            said.append(None)
    return said


@pytest.mark.parametrize("at", [0, 20, 40])
@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median"])
def test_pruner_says_what_it_would_say_after_a_trial_below_all_others(open_study, pruner, at):
    rng = random.Random(0)
    values = [0.5, 0.9, *(rng.uniform(0.1, 0.8) for _ in range(14))]
    search = {"pruner": pruner, "sampler": "random"}
    low = decisions(open_study(folder="low", **search), values, dies=False, at=at)
    assert decisions(open_study(**search), values, dies=True, at=at) == low
    assert any(low)


def test_diverged_trials_let_better_ones_pass_the_rungs_of_asha(open_study):
    """Of six trials two may go on, also when four of the six never reached the rung."""
    study = open_study(pruner="asha", sampler="random")
    for _ in range(4):
        study.fail(hand_out(study).number, "eta became -1", diverged=True)
    assert not study.report(hand_out(study).number, 10, 0.9)
    assert not study.report(hand_out(study).number, 10, 0.5)
    assert study.report(hand_out(study).number, 10, 0.4)


def test_diverged_trials_count_in_the_median(open_study):
    study = open_study(pruner="median", sampler="random")
    for value in (0.2, 0.6, 0.7):
        number = hand_out(study).number
        for step in STEPS:
            study.report(number, step, value)
        study.complete(number)
    number = hand_out(study).number
    assert not study.report(number, 20, 0.3), "three are too few to tell"
    for _ in range(2):
        study.fail(hand_out(study).number, "eta became -1", diverged=True)
    assert not study.report(number, 30, 0.3), "above two that diverged, and one that lived"
    other = hand_out(study).number
    assert study.report(other, 30, 0.1)


def test_wilcoxon_never_pairs_with_a_diverged_trial(open_study):
    study = open_study(pruner="wilcoxon", repeats=3, sampler="random")
    study.fail(hand_out(study).number, "eta became -1", diverged=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mean in (0.9, 0.3):
            number, said = hand_out(study).number, []
            for step in (30, 60, 90):
                networks = {i: mean + i / 1000 for i in (step // 15 - 2, step // 15 - 1)}
                said.append(study.report(number, step, mean, networks=networks))
            assert any(said) == (mean == 0.3)
            study.complete(number)


def test_pruner_remembers_diverged_trials_across_a_crash(open_study):
    search = {"pruner": "asha", "sampler": "random"}
    study = open_study(**search)
    for _ in range(4):
        study.fail(hand_out(study).number, "eta became -1", diverged=True)
    study.report(hand_out(study).number, 10, 0.9)
    again = open_study(**search)
    hand_out(again)
    assert not again.report(hand_out(again).number, 10, 0.5)


def test_journal_grows_by_no_imputed_line(open_study, tmp_path):
    study = open_study(trials=20, startup_trials=2)
    carry_out_all(study)
    text = Path(tmp_path, "study", STUDY_FILE).read_text()
    assert '"constraints' not in text and "completed_rung" not in text
