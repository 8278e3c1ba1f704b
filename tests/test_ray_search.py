"""The study: what it hands out, what it hears, and what is left of it after a crash."""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune import TuneError
from ray.tune.search import Searcher

from ftd.distill import DistillConfig
from ftd.errors import UserError
from ftd_ray.bridge import Course, StudySearcher, _own_error
from ftd_ray.config import SearchConfig
from ftd_ray.journal import STUDY_FILE
from ftd_ray.presets import StartPoint
from ftd_ray.search import EARLIER, Ended, Suggestion, SweepStudy
from ftd_ray.space import Dimension, in_order, parse_dimension, points

SPACE = (
    parse_dimension("experts.rho", {"choice": [0.0, 0.01, 0.05]}),
    parse_dimension("distill.lr_img", {"float": [10, 1000], "log": True, "levels": 3}),
)
CATEGORIES = (*SPACE, parse_dimension("experts.sharpness", {"choice": ["sam", "asam"]}))
CONTINUOUS = (*SPACE, parse_dimension("distill.lr_lr", {"float": [1e-7, 1e-3], "log": True}))


@pytest.fixture(autouse=True)
def _verbosity() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def open_study(tmp_path) -> Callable[..., SweepStudy]:
    """Opens the study of this test; again, when it is there."""

    def open_(
        *,
        space: tuple[Dimension, ...] = SPACE,
        seed: int = 0,
        every: int = 10,
        iterations: int = 90,
        folder: Any = tmp_path,
        study: dict[str, Any] | None = None,
        **search: Any,
    ) -> SweepStudy:
        if isinstance(folder, Path):
            folder.mkdir(exist_ok=True)
        return SweepStudy(
            str(folder),
            name="study",
            space=space,
            search=SearchConfig(**({"trials": 6, "pruner": "none"} | search)),
            seed=seed,
            every=every,
            steps=iterations,
            **(study or {}),
        )

    return open_


def hand_out(study: SweepStudy) -> Suggestion:
    suggestion = study.next()
    assert suggestion is not None
    return suggestion


def run_one(study: SweepStudy, value: float = 0.5) -> Suggestion:
    """Hands out a trial and brings it to its end."""
    suggestion = hand_out(study)
    study.report(suggestion.number, 90, value)
    study.complete(suggestion.number)
    return suggestion


def run_all(study: SweepStudy, value: Callable[[Suggestion], float]) -> list[Suggestion]:
    done = []
    while (suggestion := study.next()) is not None:
        study.report(suggestion.number, 90, value(suggestion))
        study.complete(suggestion.number)
        done.append(suggestion)
    return done


def score(suggestion: Suggestion) -> float:
    """Any smooth function with one maximum, so that samplers have something to learn."""
    p = suggestion.params
    return 0.9 - p["experts.rho"] - abs(math.log10(p["distill.lr_img"]) - 2) / 10


# --- handing out ----------------------------------------------------------------------------


def test_exactly_as_many_trials_are_handed_out_as_are_asked_for(open_study):
    study = open_study(trials=5)
    assert [s.number for s in run_all(study, score)] == [0, 1, 2, 3, 4]
    assert study.next() is None


def test_trials_at_the_same_time_count_too(open_study):
    study = open_study(trials=3)
    assert [hand_out(study).number for _ in range(3)] == [0, 1, 2]
    assert study.next() is None


def test_suggestion_holds_a_value_of_every_dimension(open_study):
    for suggestion in run_all(open_study(trials=8), score):
        assert list(suggestion.params) == [d.key for d in SPACE]
        assert all(suggestion.params[d.key] in d.values for d in SPACE)


def test_failed_trial_counts_and_is_not_replaced(open_study):
    study = open_study(trials=2)
    study.fail(hand_out(study).number, "eta became -1")
    run_one(study)
    assert study.next() is None
    assert [e.state for e in study.ended()] == ["failed", "complete"]


def test_repeats_of_a_point_are_counted(open_study):
    few = (parse_dimension("experts.rho", {"choice": [0.0, 0.01]}),)
    seen: list[dict[str, Any]] = []
    for suggestion in run_all(open_study(space=few, trials=6, sampler="random"), lambda s: 0.5):
        assert suggestion.repeat == seen.count(suggestion.params)
        seen.append(suggestion.params)
    assert any(seen.count(p) > 1 for p in seen)


def test_trials_without_a_space_are_repeats_of_the_one_point(open_study):
    done = run_all(open_study(space=(), trials=3), lambda s: 0.5)
    assert [(s.params, s.repeat) for s in done] == [({}, 0), ({}, 1), ({}, 2)]


# --- hearing back ---------------------------------------------------------------------------


def test_complete_trial_has_the_value_of_its_last_report(open_study):
    study = open_study()
    number = hand_out(study).number
    for step, value in ((10, 0.1), (20, 0.6), (90, 0.4)):
        assert not study.report(number, step, value)
    ended = study.complete(number)
    assert (ended.state, ended.value) == ("complete", 0.4)
    assert ended.reports == {10: 0.1, 20: 0.6, 90: 0.4}
    assert study.frozen(number).state is TrialState.COMPLETE
    assert study.frozen(number).value == 0.4


def test_failed_trial_is_an_optuna_fail_with_its_reason(open_study):
    study = open_study()
    number = hand_out(study).number
    study.report(number, 10, 0.3)
    ended = study.fail(number, "eta became -1")
    assert (ended.state, ended.reason) == ("failed", "eta became -1")
    assert study.frozen(number).state is TrialState.FAIL


def test_pruned_trial_is_an_optuna_pruned_that_keeps_its_reports(open_study):
    study = open_study()
    number = hand_out(study).number
    study.report(number, 10, 0.3)
    ended = study.prune(number)
    assert (ended.state, ended.value, ended.reports) == ("pruned", 0.3, {10: 0.3})
    assert study.frozen(number).state is TrialState.PRUNED


def test_report_of_a_step_that_is_known_changes_nothing(open_study):
    study = open_study()
    number = hand_out(study).number
    study.report(number, 10, 0.3)
    study.report(number, 10, 0.9)
    assert study.complete(number).reports == {10: 0.3}


def test_trial_is_live_between_its_start_and_its_end(open_study):
    study = open_study()
    number = hand_out(study).number
    assert study.is_live(number)
    study.report(number, 90, 0.5)
    study.complete(number)
    assert not study.is_live(number)


def test_best_is_the_best_complete_trial_never_a_pruned_one(open_study):
    study = open_study(trials=4)
    assert study.best() == []
    a, b, c = (hand_out(study).number for _ in range(3))
    study.report(a, 10, 0.99)
    study.prune(a)
    study.report(b, 90, 0.5)
    study.complete(b)
    study.fail(c, "lost")
    assert study.best()[0].number == b


def test_of_equal_trials_the_earliest_is_the_best(open_study):
    study = open_study(trials=3)
    run_all(study, lambda s: 0.5)
    assert study.best()[0].number == 0


def test_study_remembers_a_value_after_reopening(open_study):
    open_study().remember("mlflow_run", "abc")
    assert open_study().recall("mlflow_run") == "abc"
    assert open_study().recall("nothing") is None


# --- lost on the way ------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_trial_that_is_taken_up_is_the_next_one_and_the_others_are_as_ever(
    open_study, tmp_path, sampler
):
    settings = {"sampler": sampler, "trials": 5}
    whole = run_all(open_study(folder=tmp_path / "whole", **settings), score)
    study, done = open_study(folder=tmp_path / "lost", **settings), []
    while (suggestion := study.next()) is not None:
        study.report(suggestion.number, 10, 0.3)
        study.take_up(suggestion.number)
        assert not study.is_live(suggestion.number)
        assert study.next() == suggestion
        study.report(suggestion.number, 90, score(suggestion))
        assert study.complete(suggestion.number).reports == {10: 0.3, 90: score(suggestion)}
        done.append(suggestion)
    assert done == whole
    assert [e.state for e in study.ended()] == ["complete"] * 5


def test_lost_trials_come_by_number_before_new_ones(open_study):
    study = open_study(sampler="random", trials=4)
    handed = [hand_out(study) for _ in range(3)]
    for number in (2, 0):
        study.take_up(number)
    assert [hand_out(study) for _ in range(2)] == [handed[0], handed[2]]
    assert hand_out(study).number == 3


def test_search_is_not_over_before_what_is_under_way_has_ended(open_study):
    started = []

    class Listener:
        def trial_started(self, suggestion: Suggestion) -> None:
            started.append(suggestion.number)

    study = open_study(trials=2)
    ask = StudySearcher(study, lambda s: s, Listener(), lambda: False, Course()).suggest
    assert [ask(t)["order"].number for t in "ab"] == [0, 1]
    assert ask("c") is None
    study.take_up(1)
    assert ask("d")["order"].number == 1
    for number in range(2):
        assert ask("e") is None
        study.report(number, 90, 0.5)
        study.complete(number)
    assert ask("f") == Searcher.FINISHED
    assert started == [0, 1]


# --- after a crash --------------------------------------------------------------------------


def test_reopened_study_hands_orphans_out_under_their_own_number_with_their_reports(open_study):
    study = open_study()
    run_one(study)
    first, second = hand_out(study), hand_out(study)
    study.report(first.number, 10, 0.3)
    again = open_study()
    assert [hand_out(again), hand_out(again)] == [first, second]
    again.report(first.number, 90, 0.7)
    assert again.complete(first.number).reports == {10: 0.3, 90: 0.7}
    assert hand_out(again).number == 3


def test_reopened_study_ends_with_exactly_the_trials_asked_for(open_study):
    study = open_study(trials=5)
    run_one(study)
    hand_out(study)
    study = open_study(trials=5)
    hand_out(study)
    hand_out(study)
    study = open_study(trials=5)
    assert [s.number for s in run_all(study, score)] == [1, 2, 3, 4]
    assert [e.number for e in study.ended()] == [0, 1, 2, 3, 4]


def test_finished_study_asked_for_more_goes_on(open_study):
    run_all(open_study(trials=2), score)
    assert [s.number for s in run_all(open_study(trials=4), score)] == [2, 3]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_reopened_study_does_not_repeat_its_first_points(open_study, sampler):
    study = open_study(space=CONTINUOUS, trials=8, sampler=sampler)
    first = [run_one(study) for _ in range(4)]
    second = run_all(open_study(space=CONTINUOUS, trials=8, sampler=sampler), score)
    points = [s.params["distill.lr_lr"] for s in (*first, *second)]
    assert len(set(points)) == 8


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "qmc"])
@pytest.mark.parametrize("crash_after", [1, 13])
def test_interrupted_search_makes_the_suggestions_of_an_undisturbed_one(
    open_study, tmp_path, sampler, crash_after
):
    space = SPACE if sampler == "grid" else CONTINUOUS
    settings = {"trials": 18, "sampler": sampler, "space": space}
    whole = run_all(open_study(folder=tmp_path / "whole", **settings), score)
    study = open_study(**settings)
    done = [run_one(study, score(s)) for s in whole[:crash_after]]
    hand_out(study)  # lost with its driver
    done += run_all(open_study(**settings), score)
    assert [s.params for s in done] == [s.params for s in whole]
    assert [s.repeat for s in done] == [s.repeat for s in whole]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "qmc"])
@pytest.mark.parametrize("crash_after", [1, 13])
def test_trial_asked_for_but_not_written_down_gets_the_point_it_would_have_had(
    open_study, tmp_path, sampler, crash_after
):
    space = SPACE if sampler == "grid" else CONTINUOUS
    settings = {"trials": 15, "sampler": sampler, "space": space}
    whole = run_all(open_study(folder=tmp_path / "whole", **settings), score)
    study = open_study(**settings)
    for s in whole[:crash_after]:
        run_one(study, score(s))
    study._seed_sampler(crash_after)
    study.study.ask()  # and the driver died before it suggested anything
    reopened = hand_out(open_study(**settings))
    assert reopened == whole[crash_after]


def test_torn_last_line_of_the_journal_loses_no_trial(open_study, tmp_path):
    study = open_study()
    run_one(study)
    with open(tmp_path / STUDY_FILE, "ab") as f:
        f.write(b'{"op_code": 4, "worker_id": "x", "tri')
    again = open_study()
    assert [e.number for e in again.ended()] == [0]
    assert [s.number for s in run_all(again, score)] == [1, 2, 3, 4, 5]


# --- samplers -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "qmc"])
def test_equal_seeds_give_equal_searches(open_study, tmp_path, sampler):
    runs = [
        run_all(open_study(folder=tmp_path / str(i), trials=14, sampler=sampler), score)
        for i in range(2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_other_seed_gives_another_search(open_study, tmp_path, sampler):
    a, b = (
        run_all(open_study(folder=tmp_path / str(i), trials=10, seed=i, sampler=sampler), score)
        for i in range(2)
    )
    assert [s.params for s in a] != [s.params for s in b]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("space", [CATEGORIES, CONTINUOUS], ids=["categories", "continuous"])
def test_sampler_takes_every_kind_of_dimension(open_study, space, sampler):
    study = open_study(space=space, trials=13, sampler=sampler)
    for suggestion in run_all(study, score):
        for d in space:
            value = suggestion.params[d.key]
            assert value in d.values if d.discrete else d.bounds[0] <= value <= d.bounds[1]


@pytest.mark.parametrize("space", [SPACE, CATEGORIES], ids=["numbers", "categories"])
def test_grid_visits_every_point_once(open_study, space):
    points = math.prod(len(d.values) for d in space)
    done = run_all(open_study(space=space, trials=points, sampler="grid"), score)
    assert len({tuple(s.params.values()) for s in done}) == points
    assert {s.repeat for s in done} == {0}


def test_grid_asked_for_more_than_its_points_repeats_them(open_study):
    done = run_all(open_study(trials=11, sampler="grid"), score)
    assert len(done) == 11
    assert len({tuple(s.params.values()) for s in done}) == 9


def test_grid_with_failed_and_pruned_trials_still_visits_every_point_once(open_study):
    study, seen = open_study(trials=9, sampler="grid"), []
    while (suggestion := study.next()) is not None:
        seen.append(tuple(suggestion.params.values()))
        study.report(suggestion.number, 10, 0.5)
        end = (study.complete, study.prune, lambda n: study.fail(n, "lost"))
        end[suggestion.number % 3](suggestion.number)
    assert len(set(seen)) == 9


def test_grid_with_two_trials_at_a_time_visits_every_point_once(open_study):
    study, seen, live = open_study(trials=9, sampler="grid"), [], []
    while (suggestion := study.next()) is not None:
        seen.append(tuple(suggestion.params.values()))
        live.append(suggestion.number)
        if len(live) == 2:
            study.report(live[0], 90, 0.5)
            study.complete(live.pop(0))
    for number in live:
        study.report(number, 90, 0.5)
        study.complete(number)
    assert len(set(seen)) == 9


def test_quasi_random_search_spreads_over_the_levels(open_study):
    done = run_all(open_study(trials=18, sampler="qmc"), score)
    for d in SPACE:
        counts = [sum(s.params[d.key] == v for s in done) for v in d.values]
        assert min(counts) >= 3


def test_tpe_comes_back_to_what_was_good(open_study):
    done = run_all(open_study(trials=40, sampler="tpe"), score)
    best = max(SPACE[1].values, key=lambda v: -abs(math.log10(v) - 2))
    late = [s.params["distill.lr_img"] for s in done[20:]]
    assert late.count(best) > len(late) / 3


# --- pruners --------------------------------------------------------------------------------


def pruned_against_good_ones(study: SweepStudy, good: int, steps: range) -> list[bool]:
    """What the pruner says to a trial far below ``good`` others, step by step."""
    for _ in range(good):
        number = hand_out(study).number
        for step in steps:
            study.report(number, step, 0.9)
        study.complete(number)
    number = hand_out(study).number
    return [study.report(number, step, 0.1) for step in steps]


@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median"])
def test_pruner_stops_a_trial_far_below_the_others(open_study, pruner):
    study = open_study(pruner=pruner, trials=20)
    assert any(pruned_against_good_ones(study, 12, range(10, 91, 10)))


def test_without_a_pruner_nothing_is_stopped(open_study):
    study = open_study(pruner="none", trials=20)
    assert not any(pruned_against_good_ones(study, 12, range(10, 91, 10)))


@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median"])
def test_nothing_is_pruned_before_the_grace_period(open_study, pruner):
    study = open_study(pruner=pruner, grace=40, trials=20)
    said = pruned_against_good_ones(study, 12, range(10, 91, 10))
    assert not any(said[:3])


@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median"])
def test_the_best_trial_is_never_pruned(open_study, pruner):
    study = open_study(pruner=pruner, trials=20)
    for i in range(10):
        number = hand_out(study).number
        assert not any(study.report(number, step, 0.1 + i / 20) for step in range(10, 91, 10))
        study.complete(number)


@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median"])
def test_pruner_remembers_across_a_crash(open_study, pruner):
    study = open_study(pruner=pruner, trials=20)
    for _ in range(12):
        number = hand_out(study).number
        for step in range(10, 91, 10):
            study.report(number, step, 0.9)
        study.complete(number)
    study = open_study(pruner=pruner, trials=20)
    number = hand_out(study).number
    assert any(study.report(number, step, 0.1) for step in range(10, 91, 10))


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "qmc"])
@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median", "none"])
def test_every_sampler_works_with_every_pruner(open_study, sampler, pruner):
    rungs = {"reduction_factor": 2} if pruner in ("asha", "hyperband") else {}
    study = open_study(sampler=sampler, pruner=pruner, trials=9, **rungs)
    while (suggestion := study.next()) is not None:
        for step in range(10, 91, 10):
            if study.report(suggestion.number, step, score(suggestion) * step / 90):
                study.prune(suggestion.number)
                break
        else:
            study.complete(suggestion.number)
    ended = study.ended()
    assert [e.number for e in ended] == list(range(9))
    assert any(e.state == "complete" for e in ended)


# --- every sampler --------------------------------------------------------------------------

TWO = ("accuracy", "cpu_seconds")
FITTING: dict[str, dict[str, Any]] = {
    "tpe": {"space": CONTINUOUS, "startup_trials": 3},
    "random": {"space": CONTINUOUS},
    "grid": {"space": CATEGORIES},
    "qmc": {"space": CONTINUOUS},
    "cmaes": {"space": CONTINUOUS},
    "gp": {"space": CONTINUOUS, "startup_trials": 5},
    "nsga2": {"space": CONTINUOUS, "objectives": TWO, "population": 3},
}
"""A space that each sampler can do with, and a short random phase."""


def carry_out(study: SweepStudy, suggestion: Suggestion) -> Ended:
    """Brings a trial to its end, with an accuracy and seconds that follow from its point."""
    seconds = 1 + 10 * suggestion.params.get("experts.rho", 0.0)
    study.report(suggestion.number, 90, score(suggestion), seconds=seconds)
    return study.complete(suggestion.number)


def carry_out_all(study: SweepStudy) -> list[Suggestion]:
    done = []
    while (suggestion := study.next()) is not None:
        carry_out(study, suggestion)
        done.append(suggestion)
    return done


@pytest.mark.parametrize("sampler", FITTING)
def test_sampler_that_loses_its_driver_in_every_trial_makes_the_suggestions_of_an_undisturbed_one(
    open_study, tmp_path, sampler
):
    settings = {"trials": 8, "sampler": sampler, **FITTING[sampler]}
    whole = carry_out_all(open_study(folder=tmp_path / "whole", **settings))
    assert [s.number for s in whole] == list(range(8))
    done = []
    for _ in range(8):
        study = open_study(**settings)
        study._seed_sampler(len(done))
        study.study.ask()  # and the driver died before it suggested anything
        lost = hand_out(open_study(**settings))  # and again before anything was heard of it
        study = open_study(**settings)
        done.append(hand_out(study))
        assert done[-1] == lost
        carry_out(study, lost)
    assert done == whole
    assert open_study(**settings).next() is None


@pytest.mark.parametrize("sampler", ["gp", "cmaes", "nsga2"])
def test_equal_seeds_give_equal_searches_and_other_seeds_others(open_study, tmp_path, sampler):
    settings = {"trials": 6, "sampler": sampler, **FITTING[sampler]}
    runs = [
        carry_out_all(open_study(folder=tmp_path / str(i), seed=seed, **settings))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert runs[0] == runs[1]
    assert [s.params for s in runs[0]] != [s.params for s in runs[2]]


@pytest.mark.parametrize("sampler", ["gp", "nsga2"])
def test_sampler_takes_words_too(open_study, sampler):
    settings = {**FITTING[sampler], "space": CATEGORIES}
    done = carry_out_all(open_study(trials=7, sampler=sampler, **settings))
    assert all(s.params[d.key] in d.values for s in done for d in CATEGORIES)
    assert [list(s.params) for s in done] == [[d.key for d in CATEGORIES]] * 7


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_sampler_that_learns_comes_nearer_to_the_best_point(open_study, sampler):
    def distance(s: Suggestion) -> float:
        return abs(math.log10(s.params["distill.lr_lr"]) + 5)

    space = (*CONTINUOUS, parse_dimension("distill.lr_init", {"float": [0.01, 0.1]}))
    study, done = open_study(space=space, trials=40, sampler=sampler), []
    while (suggestion := study.next()) is not None:
        study.report(suggestion.number, 90, 1 - distance(suggestion) / 10)
        study.complete(suggestion.number)
        done.append(distance(suggestion))
    assert sum(done[-10:]) < 0.7 * sum(done[:10])


# --- conditions -----------------------------------------------------------------------------

CONDITIONAL = in_order(
    (
        parse_dimension("experts.sharpness", {"choice": ["sam", "gsam"]}),
        parse_dimension("experts.rho", {"choice": [0.0, 0.01], "when": {"sharpness": "sam"}}),
        parse_dimension("experts.gsam_alpha", {"choice": [1, 2], "when": {"sharpness": "gsam"}}),
        parse_dimension("experts.epochs", {"int": [3, 5], "when": {"gsam_alpha": 2}}),
        parse_dimension(
            "distill.lr_lr", {"float": [1e-7, 1e-3], "log": True, "when": {"experts.epochs": 4}}
        ),
    )
)


@pytest.mark.parametrize("skip", ["repeat", "skip"])
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_suggestion_holds_exactly_the_dimensions_that_exist_at_its_point(open_study, sampler, skip):
    startup = {"startup_trials": 4} if sampler == "tpe" else {}
    settings = {"space": CONDITIONAL, "sampler": sampler, "trials": 16, "duplicates": skip}
    seen = set()
    for crash in (False, True) * 8:
        study = open_study(**settings, **startup)
        suggestion = hand_out(study)
        if crash:
            study = open_study(**settings, **startup)
            assert hand_out(study) == suggestion
        params = suggestion.params
        expected = ["experts.sharpness"]
        if params["experts.sharpness"] == "sam":
            expected.append("experts.rho")
        else:
            expected.append("experts.gsam_alpha")
            if params["experts.gsam_alpha"] == 2:
                expected.append("experts.epochs")
                if params["experts.epochs"] == 4:
                    expected.append("distill.lr_lr")
        assert list(params) == expected
        assert set(study.frozen(suggestion.number).params) == set(expected)
        study.report(suggestion.number, 90, len(params) / 10)
        assert study.complete(suggestion.number).params == params
        seen.add(tuple(params))
    assert len(seen) >= 3


# --- no point twice -------------------------------------------------------------------------

NINE = {
    "tpe": {"startup_trials": 3},
    "random": {},
    "grid": {},
    "qmc": {},
    "cmaes": {},
    "gp": {"startup_trials": 7},
    "nsga2": {"objectives": TWO, "population": 3},
}


@pytest.mark.parametrize("sampler", NINE)
def test_no_point_comes_twice_until_the_space_is_exhausted_also_over_crashes(open_study, sampler):
    settings = {"trials": 9, "sampler": sampler, "duplicates": "skip", **NINE[sampler]}
    done = []
    for _ in range(9):
        lost = hand_out(open_study(**settings))
        study = open_study(**settings)
        done.append(hand_out(study))
        assert done[-1] == lost
        study.report(lost.number, 90, 0.5, seconds=1.0)
        study.complete(lost.number)
    assert open_study(**settings).next() is None
    assert sorted(tuple(s.params.values()) for s in done) == sorted(
        itertools.product(*(d.values for d in SPACE))
    )


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_point_of_a_conditional_space_comes_twice(open_study, sampler):
    space = CONDITIONAL[:-1]
    every = list(points(space))
    settings = {"space": space, "sampler": sampler, "duplicates": "skip", "trials": len(every)}
    done = [s.params for s in run_all(open_study(**settings), lambda s: 0.5)]
    assert len(done) == len(every) and all(p in done for p in every)


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_no_point_comes_twice_among_trials_at_the_same_time(open_study, sampler):
    study = open_study(trials=9, sampler=sampler, duplicates="skip")
    done = [hand_out(study).params for _ in range(9)]
    assert all(done.count(p) == 1 for p in done)


def test_points_of_failed_and_pruned_trials_are_not_tried_again_either(open_study):
    study, done = open_study(trials=9, sampler="random", duplicates="skip"), []
    while (suggestion := study.next()) is not None:
        done.append(suggestion.params)
        study.report(suggestion.number, 10, 0.5)
        end = (study.prune, lambda n: study.fail(n, "lost"))
        end[suggestion.number % 2](suggestion.number)
    assert len(done) == 9 and all(done.count(p) == 1 for p in done)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_points_that_begin_a_search_are_not_drawn_again(open_study, sampler):
    start = [StartPoint("a", {"experts.rho": 0.01, "distill.lr_img": 100.0}, {})]
    study = open_study(trials=9, sampler=sampler, duplicates="skip", study={"start": start})
    done = [s.params for s in run_all(study, lambda s: 0.5)]
    assert done[0] == start[0].params
    assert all(done.count(p) == 1 for p in done)


@pytest.mark.parametrize("seed", range(8))
def test_partial_point_is_completed_to_one_that_is_new(open_study, seed):
    levels = parse_dimension("distill.lr_img", {"float": [10, 1000], "levels": 10})
    space = (parse_dimension("experts.rho", {"choice": [0.0, 0.01]}), levels)
    start = [
        StartPoint("full", {"experts.rho": 0.0, "distill.lr_img": v}, {}) for v in levels.values[1:]
    ]
    start.append(StartPoint("partial", {"experts.rho": 0.0}, {}))
    study = open_study(
        space=space,
        trials=10,
        seed=seed,
        sampler="random",
        duplicates="skip",
        study={"start": start},
    )
    done = run_all(study, lambda s: 0.5)
    assert done[-1].params == {"experts.rho": 0.0, "distill.lr_img": levels.values[0]}


# --- points to begin with -------------------------------------------------------------------

START = (
    StartPoint("ftd-cifar10-ipc10", {"experts.rho": 0.01, "distill.lr_img": 100.0}, {}),
    StartPoint("{experts.rho: 0.05}", {"experts.rho": 0.05}, {}),
    StartPoint("{distill.lr_img: 10}", {"distill.lr_img": 10.0}, {}),
)


@pytest.mark.parametrize("sampler", [s for s in FITTING if s != "grid"])
def test_first_trials_are_the_points_to_begin_with(open_study, sampler):
    settings = {"trials": 6, "sampler": sampler, **FITTING[sampler]}
    done = carry_out_all(open_study(**settings, study={"start": START}))
    labels = [*(p.label for p in START), None, None, None]
    assert [s.start_from for s in done] == labels
    assert [e.start_from for e in open_study(**settings).ended()] == labels
    for suggestion, point in zip(done, START, strict=False):
        assert suggestion.params.items() >= point.params.items()
        assert list(suggestion.params) == [d.key for d in CONTINUOUS]
    assert [s.number for s in done] == list(range(6))


def test_point_to_begin_with_under_a_condition_is_completed_by_what_exists_there(open_study):
    start = [
        StartPoint("a", {"experts.sharpness": "gsam", "experts.gsam_alpha": 2}, {}),
        StartPoint("b", {"experts.sharpness": "sam"}, {}),
    ]
    study = open_study(space=CONDITIONAL, trials=2, study={"start": start})
    a, b = run_all(study, lambda s: 0.5)
    assert list(a.params)[:3] == ["experts.sharpness", "experts.gsam_alpha", "experts.epochs"]
    assert a.params["experts.gsam_alpha"] == 2
    assert list(b.params) == ["experts.sharpness", "experts.rho"]


def test_points_to_begin_with_go_into_a_new_study_alone(open_study):
    run_one(open_study(trials=5))
    done = run_all(open_study(trials=5, study={"start": START}), score)
    assert [s.start_from for s in done] == [None] * 4


def earlier_trials(count: int = 12) -> list[Ended]:
    """Complete trials of an earlier sweep over the same space, best at lr_img = 1000."""
    found = []
    for i in range(count):
        lr_img = SPACE[1].values[i % 3]
        value = 0.3 + 0.2 * (lr_img == 1000.0) + i / 1000
        found.append(
            Ended(
                number=3 + 2 * i,
                state="complete",
                params={"experts.rho": SPACE[0].values[i % 2], "distill.lr_img": lr_img},
                value=value,
                reason=None,
                reports={90: value},
                values={"accuracy": value, "cpu_seconds": 5.0},
                seconds=5.0,
            )
        )
    return found


@pytest.mark.parametrize("earlier", [0, 2])
def test_crash_at_any_line_of_a_studys_beginning_loses_and_doubles_no_point(
    open_study, tmp_path, earlier
):
    settings = {"trials": 5, "study": {"start": START, "earlier": earlier_trials(earlier)}}
    whole = run_all(open_study(folder=tmp_path / "whole", **settings), score)
    open_study(folder=tmp_path / "begun", **settings)
    lines = (tmp_path / "begun" / STUDY_FILE).read_bytes().splitlines(keepends=True)
    assert len(lines) > len(START) + earlier
    for kept in range(len(lines)):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / STUDY_FILE).write_bytes(b"".join(lines[:kept]) + lines[kept][:7])
        study = open_study(folder=folder, **settings)
        assert sum(EARLIER in t.user_attrs for t in study.study.get_trials()) == earlier
        assert run_all(study, score) == whole


def test_crash_within_the_first_trial_leaves_it_the_point_to_begin_with(open_study):
    settings = {"trials": 4, "sampler": "random", "study": {"start": START}}
    for point in START:
        study = open_study(**settings)
        study._seed_sampler(0)
        study.study.ask()
        lost = hand_out(open_study(**settings))
        study = open_study(**settings)
        assert hand_out(study) == lost
        assert lost.start_from == point.label
        carry_out(study, lost)
    assert hand_out(open_study(**settings)).start_from is None


# --- trials of an earlier sweep -------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_trials_of_an_earlier_sweep_are_none_of_this_one(open_study, sampler):
    settings = {"trials": 4, "sampler": sampler, "study": {"earlier": earlier_trials()}}
    study = open_study(**settings)
    assert (study.ended(), study.best(3), study.front()) == ([], [], [])
    assert (study.trial_seconds(), study.interrupted()) == (0.0, 0)
    first = run_one(study, 0.2)
    assert (first.number, first.repeat) == (0, 0)
    lost = hand_out(study)
    study = open_study(**settings)
    assert study.interrupted() == 1
    again = hand_out(study)
    assert again == lost and again.number == 1
    study.fail(1, "lost")
    done = run_all(study, lambda s: 0.1)
    assert [s.number for s in done] == [2, 3]
    assert [(e.number, e.state) for e in study.ended()] == [
        (0, "complete"), (1, "failed"), (2, "complete"), (3, "complete")
    ]  # fmt: skip
    assert study.best()[0].number == 0 and study.best()[0].value == 0.2
    assert open_study(**settings).best()[0].number == 0


def test_tpe_begins_to_learn_at_once_from_earlier_trials(open_study, tmp_path):
    def share(earlier: list[Ended]) -> float:
        """How many of the first eight trials, which all are equally bad, are at lr_img = 1000."""
        study = open_study(
            folder=tmp_path / str(len(earlier)), trials=8, study={"earlier": earlier}
        )
        done = [hand_out(study) for _ in range(8)]
        return sum(s.params["distill.lr_img"] == 1000.0 for s in done) / 8

    assert share(earlier_trials(30)) > 0.6 > share([])


def test_repetitions_of_earlier_points_are_no_repetitions_here(open_study):
    one = (parse_dimension("experts.rho", {"choice": [0.0, 0.01]}),)
    earlier = [replace(e, params={"experts.rho": 0.0}) for e in earlier_trials(3)]
    done = run_all(
        open_study(space=one, trials=2, duplicates="skip", study={"earlier": earlier}),
        lambda s: 0.5,
    )
    assert {s.params["experts.rho"] for s in done} == {0.0, 0.01}
    assert [s.repeat for s in done] == [0, 0]


# --- several objectives ---------------------------------------------------------------------

THREE = ("cpu_seconds", "accuracy", "ipc")
IPC = (*SPACE, parse_dimension("distill.ipc", {"choice": [1, 10, 50]}))


def test_objectives_are_the_last_accuracy_the_share_of_seconds_and_the_images(open_study):
    settings = {"objectives": THREE, "space": IPC, "study": {"shares": {"cpu_seconds": 0.5}}}
    study = open_study(**settings)
    assert [d.name for d in study.study.directions] == ["MINIMIZE", "MAXIMIZE", "MINIMIZE"]
    suggestion = hand_out(study)
    for step, value in ((10, 0.8), (20, 0.6)):
        assert study.report(suggestion.number, step, value, seconds=3.0) is False
    study = open_study(**settings)
    hand_out(study)
    assert study.report(suggestion.number, 20, 0.9, seconds=100.0) is False  # heard before
    assert study.report(suggestion.number, 90, 0.7, seconds=1.0) is False
    ended = study.complete(suggestion.number)
    assert ended.reports == {10: 0.8, 20: 0.6, 90: 0.7}
    assert ended.value == 0.7 and ended.seconds == 7.0
    ipc = float(suggestion.params["distill.ipc"])
    assert ended.values == {"cpu_seconds": 3.5, "accuracy": 0.7, "ipc": ipc}
    assert open_study(**settings).ended() == [ended]


def test_images_are_the_default_where_their_dimension_does_not_exist(open_study):
    space = in_order(
        (
            parse_dimension("distill.labels", {"choice": ["hard", "soft"]}),
            parse_dimension("distill.ipc", {"choice": [2, 3], "when": {"labels": "soft"}}),
        )
    )
    start = [StartPoint("hard", {"distill.labels": "hard"}, {})]
    study = open_study(space=space, objectives=("accuracy", "ipc"), study={"start": start})
    run_one(study)
    assert study.ended()[0].values["ipc"] == DistillConfig().ipc


def test_front_is_what_no_other_trial_beats_and_the_best_its_most_accurate(open_study):
    rng = random.Random(0)
    study = open_study(objectives=TWO, trials=40, sampler="random")
    while (suggestion := study.next()) is not None:
        better = rng.randint(1, 9)  # and it costs more
        accuracy, seconds = better / 10, float(better + rng.randint(0, 3))
        study.report(suggestion.number, 90, accuracy, seconds=seconds)
        if suggestion.number % 10 == 9:
            study.fail(suggestion.number, "lost")
        else:
            study.complete(suggestion.number)
    done = [e for e in study.ended() if e.state == "complete"]
    naive = []
    for t in done:
        a, s = t.values["accuracy"], t.values["cpu_seconds"]
        others = [(o.values["accuracy"], o.values["cpu_seconds"]) for o in done]
        if not any(b >= a and r <= s and (b, r) != (a, s) for b, r in others):
            naive.append(t)
    assert study.front() == naive and len(naive) > 2
    assert {t.number for t in naive} == {t.number for t in study.study.best_trials}
    ranked = sorted(naive, key=lambda t: (-t.values["accuracy"], t.number))
    assert study.best() == ranked[:1] and study.best(100) == ranked
    assert study.best()[0].value == max(t.values["accuracy"] for t in done)


def test_front_of_one_objective_is_the_most_accurate(open_study):
    study = open_study(trials=4, sampler="random")
    for value in (0.1, 0.7, 0.7, 0.3):
        run_one(study, value)
    assert [t.number for t in study.front()] == [1, 2]
    assert [t.number for t in study.best(3)] == [1, 2, 3]


# --- Wilcoxon -------------------------------------------------------------------------------


def three_repeats(study: SweepStudy, mean: float, spread: float = 0.01) -> list[bool]:
    """A trial of three distillations of 30 steps with two fresh networks each."""
    number, said = hand_out(study).number, []
    for step in range(10, 91, 10):
        networks = {}
        if step % 30 == 0:
            first = 2 * (step // 30 - 1)
            networks = {i: mean + spread * (i % 3) for i in (first, first + 1)}
        said.append(study.report(number, step, mean, networks=networks, seconds=1.0))
        if said[-1]:
            study.prune(number)
            return said
    study.complete(number)
    return said


WILCOXON = {"pruner": "wilcoxon", "repeats": 3, "trials": 20, "sampler": "random"}


def test_wilcoxon_prunes_a_clearly_worse_trial_when_enough_networks_are_paired(open_study):
    study = open_study(**WILCOXON)
    assert not any(three_repeats(study, 0.9))
    assert three_repeats(study, 0.3) == [False] * 5 + [True]
    worse = study.ended()[1]
    assert worse.state == "pruned"
    assert worse.reports == dict.fromkeys(range(10, 61, 10), 0.3)
    assert (worse.value, worse.seconds) == (0.3, 6.0)


def test_wilcoxon_never_prunes_the_best_trial(open_study):
    study = open_study(**WILCOXON)
    for i in range(8):
        assert not any(three_repeats(study, 0.1 + i / 10))
    assert study.best()[0].number == 7
    assert not any(three_repeats(study, 0.8))  # as good as the best


def test_wilcoxon_remembers_across_a_crash(open_study):
    three_repeats(open_study(**WILCOXON), 0.9)
    study = open_study(**WILCOXON)
    number = hand_out(study).number
    for step in (10, 20, 30):
        assert not study.report(number, step, 0.3, networks={0: 0.3, 1: 0.3} if step == 30 else {})
    study = open_study(**WILCOXON)
    assert hand_out(study).number == number
    assert not study.report(number, 30, 0.9, networks={0: 0.9, 1: 0.9})  # heard before
    assert study.report(number, 60, 0.3, networks={2: 0.3, 3: 0.3})
    assert study.prune(number).reports == {10: 0.3, 20: 0.3, 30: 0.3, 60: 0.3}


# --- seconds --------------------------------------------------------------------------------


def test_seconds_add_up_over_reports_and_a_crash(open_study):
    study = open_study(trials=3)
    number = hand_out(study).number
    study.report(number, 10, 0.1, seconds=1.5)
    study.report(number, 20, 0.1, seconds=2.25)
    study.report(number, 20, 0.1, seconds=50.0)  # heard before
    study = open_study(trials=3)
    assert study.trial_seconds() == 3.75
    hand_out(study)
    study.report(number, 90, 0.1, seconds=0.25)
    assert study.complete(number).seconds == 4.0
    failed = hand_out(study).number
    study.report(failed, 10, 0.1, seconds=1.0)
    assert study.fail(failed, "lost").seconds == 1.0
    assert study.trial_seconds() == open_study(trials=3).trial_seconds() == 5.0


# --- another place --------------------------------------------------------------------------


def test_file_uri_is_the_folder_itself(open_study, tmp_path):
    run_one(open_study(folder=f"file://{tmp_path}"))
    assert (tmp_path / STUDY_FILE).exists()
    assert len(open_study().ended()) == 1


def test_study_whose_disk_was_full_is_whole_when_there_is_room_again(open_study, small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(200_000))
    folder = small_disk / "run"
    study = open_study(folder=folder)
    run_one(study)

    def fill() -> None:
        for i in range(100_000):
            study.remember(f"key {i}", "x" * 300)

    with pytest.raises(OSError, match="No space"):
        fill()
    ballast.unlink()
    study.remember("after", 1)  # what a sweep does on its way out
    again = open_study(folder=folder)
    assert again.recall("after") == 1
    assert [e.number for e in again.ended()] == [0]


def test_search_that_is_over_hands_out_no_further_trial(open_study):
    class Nobody:
        def trial_started(self, suggestion: Suggestion) -> None:
            raise AssertionError(suggestion)

    study = open_study()
    searcher = StudySearcher(study, lambda s: None, Nobody(), lambda: True, Course())
    assert searcher.suggest("a") == Searcher.FINISHED
    assert study.interrupted() == 0


@pytest.mark.parametrize("cause", [OSError(28, "No space left on device"), UserError("s3 is gone")])
def test_error_of_our_own_is_found_in_what_tune_makes_of_it(cause):
    def wrapped() -> None:
        try:
            try:
                raise cause
            except Exception:
                raise TuneError("a traceback as text")  # noqa: B904  (as Tune does)
        except TuneError as error:
            raise TuneError("the run failed") from error

    with pytest.raises(TuneError) as caught:
        wrapped()
    assert _own_error(caught.value) is cause
    assert _own_error(TuneError("of another kind")) is None
