"""Why trials failed: reasons that are one, what tells those that failed apart, and the words."""

from typing import Any

import pytest

from ftd_ray.failures import Failure, diagnose, in_common, most_failed, patterns
from ftd_ray.search import Ended
from ftd_ray.space import Dimension, parse_dimension

LR_IMG = parse_dimension("distill.lr_img", {"float": [10, 10000], "log": True, "levels": 4})
LR_LR = parse_dimension("distill.lr_lr", {"float": [1e-7, 1e-3], "log": True})
SHARPNESS = parse_dimension("experts.sharpness", {"choice": ["sam", "gsam"]})
ALPHA = parse_dimension("experts.gsam_alpha", {"choice": [1, 2], "when": {"sharpness": "gsam"}})
SPACE = (LR_IMG, LR_LR, SHARPNESS)

ETA = (
    "step {}: eta became {}, and a learning rate must stay above 0. "
    "Lower distill.lr_lr={}, or raise lr_init=0.01."
)


def point(lr_img: float, lr_lr: float = 1e-5, sharpness: str = "sam") -> dict[str, Any]:
    return {LR_IMG.key: lr_img, LR_LR.key: lr_lr, SHARPNESS.key: sharpness}


def failed(number: int, params: dict[str, Any], reason: str | None = "it diverged") -> Ended:
    return Ended(number, "failed", params, None, reason, {})


def lived(number: int, params: dict[str, Any], state: str = "complete") -> Ended:
    return Ended(number, state, params, 0.5, None, {90: 0.5})


# --- reasons --------------------------------------------------------------------------------


def test_reasons_that_differ_in_numbers_alone_are_one():
    ended = [
        failed(0, point(10), ETA.format(4, -0.000618351, 1e-05)),
        failed(3, point(100), ETA.format(12, "-2e+08", 0.001)),
        failed(5, point(100), "step 1: the matching loss is nan and eta is 0.01. Lower it."),
        failed(8, point(100), "step 7: the matching loss is inf and eta is 3e-05. Lower it."),
        failed(9, point(100), "step 8: the matching loss is 4.5 and eta is 0.01. Lower it."),
    ]
    loss, eta = diagnose(ended, SPACE)
    assert (loss.reason, loss.trials) == ("the matching loss is … and eta is …", [5, 8, 9])
    assert (eta.reason, eta.trials) == (
        "eta became …, and a learning rate must stay above 0",
        [0, 3],
    )


def test_remedy_is_the_reasons_own_without_the_values_of_single_trials():
    ended = [failed(i, point(10), ETA.format(i, -i, i)) for i in range(3)]
    assert diagnose(ended, SPACE)[0].remedy == "Lower distill.lr_lr, or raise lr_init=0.01."


def test_reason_of_a_single_trial_keeps_its_numbers():
    (failure,) = diagnose([failed(2, point(10), ETA.format(4, -1, 0.5))], SPACE)
    assert failure.reason == "step 4: eta became -1, and a learning rate must stay above 0"
    assert failure.remedy == "Lower distill.lr_lr=0.5, or raise lr_init=0.01."


@pytest.mark.parametrize("reason", ["RuntimeError: ConvNetD3 is not for 5 images", None, ""])
def test_reason_without_a_remedy_is_told_without_one(reason):
    (failure,) = diagnose([failed(0, point(10), reason)], SPACE)
    assert failure.reason == (reason or "it did not say why")
    assert failure.remedy == ""


def test_digits_within_names_are_no_numbers():
    ended = [failed(0, point(10), "ConvNetD2 fails"), failed(1, point(10), "ConvNetD3 fails")]
    assert [f.reason for f in diagnose(ended, SPACE)] == ["ConvNetD2 fails", "ConvNetD3 fails"]


def test_trials_that_lived_are_no_failures():
    assert diagnose([lived(0, point(10)), lived(1, point(10), "pruned")], SPACE) == []


# --- what they have in common ---------------------------------------------------------------


def common(failing: list[dict[str, Any]], living: list[dict[str, Any]], said: str = "") -> str:
    return in_common(
        [failed(i, p) for i, p in enumerate(failing)],
        [lived(i, p) for i, p in enumerate(living)],
        SPACE,
        said,
    )


def test_range_that_all_failures_and_no_other_trial_lie_in_is_found():
    high, low = [point(1000), point(10000), point(1000)], [point(10), point(100)]
    assert common(high, low) == "all 3 have lr_img of 1000 or more; of those that lived, none of 2"
    assert common(low, high) == "all 2 have lr_img of 100 or less; of those that lived, none of 3"


def test_one_value_that_all_failures_have_is_named_alone():
    failing = [point(v, sharpness="gsam") for v in (10, 100, 10000)]
    living = [point(v) for v in (10, 1000, 10000)]
    assert common(failing, living) == (
        "all 3 have sharpness of gsam; of those that lived, none of 3"
    )
    assert "all 2 have lr_img of 1000;" in common([point(1000)] * 2, [point(10000)])


def test_trials_that_lived_there_too_are_counted():
    failing = [point(1000), point(10000), point(1000)]
    living = [point(10), point(100), point(1000)]
    assert common(failing, living) == (
        "all 3 have lr_img of 1000 or more; of those that lived, 1 of 3"
    )


def test_of_equally_good_dimensions_the_one_in_the_reason_is_named():
    failing, living = [point(1000, 1e-3), point(1000, 1e-4)], [point(10, 1e-6)]
    assert "lr_img" in common(failing, living)
    assert "lr_lr of 0.0001 or more" in common(failing, living, "Lower distill.lr_lr.")


def test_failures_all_over_the_space_share_nothing():
    failing = [point(10, 1e-3), point(10000, 1e-7, "gsam")]
    living = [point(100), point(1000), point(100, 1e-4)]
    assert common(failing, living) == "no dimension tells them from the trials that lived"


def test_failures_without_a_trial_that_lived_cannot_be_compared():
    assert common([point(10)] * 3, []) == "no trial has lived that they could be compared with"


def test_dimension_counts_where_it_exists_alone():
    space: tuple[Dimension, ...] = (SHARPNESS, ALPHA)
    failing = [failed(i, {SHARPNESS.key: "gsam", ALPHA.key: 2}) for i in range(3)]
    living = [lived(3, {SHARPNESS.key: "sam"}), lived(4, {SHARPNESS.key: "gsam", ALPHA.key: 1})]
    assert in_common(failing, living, space) == (
        "all 3 have gsam_alpha of 2; of those that lived, none of 2"
    )


def test_dimensions_of_one_name_are_told_by_their_keys():
    space = tuple(
        parse_dimension(f"{section}.lr", {"float": [0.1, 10]}) for section in ("experts", "distill")
    )
    failing = [failed(i, {"experts.lr": 5.0 + i, "distill.lr": 1.0}) for i in range(3)]
    living = [lived(9, {"experts.lr": 1.0, "distill.lr": 1.0})]
    assert "all 3 have experts.lr of 5 or more" in in_common(failing, living, space)


def test_few_failures_say_nothing_about_the_space():
    ended = [failed(0, point(10)), failed(1, point(10)), lived(2, point(1000))]
    assert [f.in_common for f in diagnose(ended, SPACE)] == [None]
    assert diagnose([*ended, failed(3, point(10))], SPACE)[0].in_common is not None


# --- in words -------------------------------------------------------------------------------


def test_failure_in_words_is_reason_what_is_common_and_remedy():
    failure = Failure("eta became …", [0, 1, 2], "all 3 have lr_img of 10", "Lower distill.lr_lr.")
    assert str(failure) == "Eta became …. All 3 have lr_img of 10. Lower distill.lr_lr."
    assert str(Failure("lost", [0], None, "")) == "Lost."


def test_patterns_of_a_summary_are_those_of_several_trials():
    told = [
        {"reason": "a", "trials": [0, 1, 2], "in_common": "all 3", "remedy": "Lower it."},
        {"reason": "b", "trials": [3], "in_common": None, "remedy": ""},
    ]
    assert [f.reason for f in patterns(told)] == ["a"]


def several(fail: int, live: int, reasons: int = 1) -> list[Ended]:
    bad = [failed(i, point(1000), f"reason {'abc'[i % reasons]}") for i in range(fail)]
    return bad + [lived(fail + i, point(10)) for i in range(live)]


def test_warning_says_how_many_of_the_first_trials_failed_why_and_where():
    ended = [
        *(failed(i, point(1000), ETA.format(i, -i, 1e-5 * i)) for i in range(4)),
        lived(4, point(10)),
    ]
    assert most_failed(ended, SPACE, 20) == (
        "4 of the first 5 trials failed for one reason. Eta became …, and a learning rate must "
        "stay above 0. All 4 have lr_img of 1000; of those that lived, none of 1. "
        "Lower distill.lr_lr, or raise lr_init=0.01."
    )


@pytest.mark.parametrize(
    ("ended", "trials", "warns"),
    [
        (several(3, 2), 20, True),
        (several(6, 4), 20, True),
        (several(2, 3), 20, False),
        (several(5, 4), 20, False),
        (several(3, 0), 20, False),
        (several(3, 0), 3, True),
        (several(2, 0), 2, False),
        (several(6, 0, reasons=3), 20, False),
        ([], 20, False),
    ],
)
def test_warning_is_for_most_and_at_least_three_of_five_trials(ended, trials, warns):
    assert (most_failed(ended, SPACE, trials) is not None) is warns
