"""The study: what it hands out, what it hears, and what is left of it after a crash."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from ftd_ray.config import SearchConfig
from ftd_ray.search import STUDY_FILE, Suggestion, SweepStudy
from ftd_ray.space import Dimension, parse_dimension

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


# --- another place --------------------------------------------------------------------------


def test_file_uri_is_the_folder_itself(open_study, tmp_path):
    run_one(open_study(folder=f"file://{tmp_path}"))
    assert (tmp_path / STUDY_FILE).exists()
    assert len(open_study().ended()) == 1
