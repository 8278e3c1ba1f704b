"""Dimensions that exist under conditions: their order, their points, and what is refused."""

import itertools
import random
from typing import Any

import pytest

from ftd.errors import UserError
from ftd_ray.space import (
    Dimension,
    count_points,
    in_order,
    is_same,
    parse_dimension,
    points,
    with_parents,
)

SHARPNESS = parse_dimension("experts.sharpness", {"choice": ["none", "sam", "gsam"]})
RHO = parse_dimension(
    "experts.rho", {"choice": [0.01, 0.1], "when": {"sharpness": ["sam", "gsam"]}}
)
ALPHA = parse_dimension(
    "experts.gsam_alpha", {"choice": [0.1, 0.2, 0.4], "when": {"sharpness": "gsam", "rho": 0.1}}
)
LR = parse_dimension("distill.lr_img", {"float": [10, 1000], "log": True})


def dimension(name: str, values: list[Any], **when: Any) -> Dimension:
    """A dimension ``experts.<name>`` of some values, under conditions on its siblings."""
    return parse_dimension(
        f"experts.{name}", {"choice": values, **({"when": when} if when else {})}
    )


# --- how conditions are written -------------------------------------------------------------


@pytest.mark.parametrize("written", ["gsam", ["gsam"]], ids=["value", "list"])
@pytest.mark.parametrize("parent", ["sharpness", "experts.sharpness"])
def test_short_name_in_a_condition_is_a_key_of_the_same_section(parent, written):
    d = parse_dimension("experts.gsam_alpha", {"choice": [0.1, 0.4], "when": {parent: written}})
    assert d.when == (("experts.sharpness", ("gsam",)),)


def test_key_of_another_section_is_written_whole():
    d = parse_dimension("distill.lr_img", {"int": [1, 3], "when": {"experts.epochs": [3, 4]}})
    assert d.when == (("experts.epochs", (3, 4)),)
    assert d.values == (1, 2, 3)


@pytest.mark.parametrize("kind", [{"choice": [1, 2]}, {"int": [1, 2]}, {"float": [1, 2]}])
def test_every_kind_of_dimension_may_have_conditions(kind):
    assert parse_dimension("distill.lr_img", {**kind, "when": {"ipc": 1}}).when


def test_no_condition_is_always_true():
    assert parse_dimension("distill.lr_img", {"choice": [1, 2], "when": {}}).active({})


@pytest.mark.parametrize(
    ("when", "rule"),
    [
        (None, "when=None must map other dimensions to values"),
        ("sharpness", "when='sharpness' must map"),
        (["sharpness"], "must map"),
        ({1: "sam"}, "must map"),
        ({"sharpness": []}, "when experts.sharpness=[] must be plain values"),
        ({"sharpness": {"a": 1}}, "must be plain values"),
        ({"sharpness": ["sam", ["gsam"]]}, "must be plain values"),
    ],
)
def test_condition_that_cannot_be_read_is_refused_by_the_key_with_an_example(when, rule):
    with pytest.raises(UserError) as caught:
        parse_dimension("experts.rho", {"choice": [0.1, 0.2], "when": when})
    message = str(caught.value)
    assert message.startswith("experts.rho: when") and rule in message
    assert "{when: {experts.sharpness: [gsam]}}" in message


def test_conditions_are_part_of_how_a_dimension_is_shown():
    assert str(RHO) == "0.01 | 0.1  when experts.sharpness is sam or gsam"
    assert str(ALPHA) == "0.1 | 0.2 | 0.4  when experts.sharpness is gsam and experts.rho is 0.1"
    assert str(LR) == "10 … 1000 (log)"
    assert str(SHARPNESS) == "none | sam | gsam"


# --- their order ----------------------------------------------------------------------------


@pytest.mark.parametrize("given", itertools.permutations([SHARPNESS, RHO, ALPHA, LR]))
def test_dimensions_come_after_those_that_they_depend_on(given):
    keys = [d.key for d in in_order(given)]
    assert sorted(keys) == sorted(d.key for d in given)
    assert keys.index(SHARPNESS.key) < keys.index(RHO.key) < keys.index(ALPHA.key)


def test_order_without_conditions_is_the_given_one():
    given = [dimension(name, [1, 2]) for name in "cadb"]
    assert list(in_order(given)) == given


@pytest.mark.parametrize(
    "circle",
    [
        [dimension("a", [1, 2], a=1)],
        [dimension("a", [1, 2], b=1), dimension("b", [1, 2], a=1)],
        [dimension("a", [1, 2], b=1), dimension("b", [1, 2], c=1), dimension("c", [1, 2], a=1)],
    ],
    ids=["itself", "two", "three"],
)
def test_circle_of_conditions_is_refused_with_all_that_are_in_it(circle):
    with pytest.raises(UserError, match=r"^experts\.a: when goes in a circle") as caught:
        in_order([dimension("free", [1, 2]), *circle])
    assert all(d.key in str(caught.value) for d in circle)
    assert "free" not in str(caught.value)


@pytest.mark.parametrize(
    ("space", "rule"),
    [
        ([RHO], "when names experts.sharpness, which is not searched"),
        (
            [LR, parse_dimension("distill.ipc", {"int": [1, 2], "when": {"lr_img": 10}})],
            "when names distill.lr_img, which is continuous",
        ),
        (
            [SHARPNESS, dimension("rho", [0.1, 0.2], sharpness=["sam", "asam"])],
            "when experts.sharpness is 'asam' never holds; it takes none | sam | gsam",
        ),
        ([dimension("a", [1, 2]), dimension("b", [1, 2], a=True)], "is True never holds"),
        ([dimension("a", [1, 2]), dimension("b", [1, 2], a="1")], "is '1' never holds"),
    ],
)
def test_condition_that_says_nothing_is_refused_with_the_reason(space, rule):
    with pytest.raises(UserError) as caught:
        in_order(space)
    assert rule in str(caught.value) and str(caught.value).startswith(space[-1].key)


def test_parents_come_with_what_they_themselves_depend_on():
    space = in_order([LR, ALPHA, RHO, SHARPNESS])
    assert [d.key for d in with_parents([ALPHA], space)] == [SHARPNESS.key, RHO.key, ALPHA.key]
    assert with_parents([LR], space) == [LR]
    assert with_parents([], space) == []


# --- their points ---------------------------------------------------------------------------


def naive_points(space: tuple[Dimension, ...]) -> list[dict[str, Any]]:
    """Every combination of all values; what does not exist is struck out, and what is left once.

    From the last dimension to the first nothing is known of the parents, so conditions are looked
    up until nothing changes any more.
    """
    found = []
    for combination in itertools.product(*(d.extremes() for d in space)):
        params = {d.key: v for d, v in zip(space, combination, strict=True)}
        while gone := [
            d.key
            for d in space
            if d.key in params and any(params.get(k) not in values for k, values in d.when)
        ]:
            for key in gone:
                del params[key]
        if params not in found:
            found.append(params)
    return found


def random_space(rng: random.Random) -> tuple[Dimension, ...]:
    """Up to six dimensions, many of which depend on up to two others, in any order."""
    made: list[Dimension] = []
    for i in range(rng.randint(0, 6)):
        values = rng.sample([0, 1, 2, 0.5, "a", "b"], rng.randint(2, 3))
        parents = rng.sample(made, min(len(made), rng.choice([0, 0, 1, 2])))
        when = {p.name: rng.sample(p.values, rng.randint(1, len(p.values) - 1)) for p in parents}
        made.append(dimension(f"d{i}", values, **when))
    rng.shuffle(made)
    return in_order(made)


@pytest.mark.parametrize("seed", range(60))
def test_points_are_all_combinations_of_what_exists_each_once(seed):
    space = random_space(random.Random(seed))
    found, naive = list(points(space)), naive_points(space)
    assert len(found) == len(naive)
    assert all(p in naive for p in found)
    assert count_points(space, 10**6) == len(naive)
    assert count_points(space, len(naive)) == len(naive)
    assert count_points(space, len(naive) - 1) is None


def test_points_of_no_dimension_are_the_one_of_nothing():
    assert list(points(())) == [{}]
    assert count_points((), 1) == 1


def test_points_hold_the_two_ends_of_a_continuous_dimension():
    space = in_order([dimension("a", [1, 2]), LR])
    assert len(list(points(space))) == 4
    assert {p[LR.key] for p in points(space)} == {10.0, 1000.0}
    assert count_points(space, 10**6) is None


def test_large_spaces_are_counted_without_visiting_their_points():
    space = [dimension(f"d{i}", list(range(1000))) for i in range(9)]
    assert count_points(space, 10**27) == 10**27
    assert count_points(space, 10**6) is None
    conditional = in_order([*space, dimension("last", [1, 2], d0=0)])
    assert count_points(conditional, 1000) is None


# --- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1, 1.0, True),
        (1e-5, 0.00001, True),
        (1, True, False),
        (0, False, False),
        (True, True, True),
        (1, "1", False),
        (None, None, True),
        (None, 0, False),
        ("sam", "sam", True),
        (float("nan"), float("nan"), False),
        (10**400, 10**400, True),
        (10**400, 1.0, False),
    ],
)
def test_number_is_the_same_whatever_its_type_but_truth_is_no_number(a, b, same):
    assert is_same(a, b) is same
    assert is_same(b, a) is same


def test_member_is_the_dimensions_own_value():
    d = parse_dimension("experts.rho", {"choice": [1, 0.5]})
    assert [(v, type(v)) for v in (d.member(1.0), d.member(0.5))] == [(1, int), (0.5, float)]
    assert d.member(True) is None
    assert d.member("1") is None and d.member(2) is None and d.member(None) is None


def test_member_of_words_tells_truth_from_one():
    d = parse_dimension("experts.x", {"choice": ["a", True, 1]})
    assert d.member(True) is True and type(d.member(1.0)) is int
    assert d.member(False) is None


def test_member_of_a_continuous_dimension_lies_between_its_ends():
    assert LR.member(10) == 10.0 and isinstance(LR.member(10), float)
    assert LR.member(1000.0) == 1000.0
    for outside in (9.99, 1001, True, "100", None, float("nan"), 10**400):
        assert LR.member(outside) is None


@pytest.mark.parametrize("d", [SHARPNESS, RHO, LR], ids=lambda d: d.key)
def test_what_a_sampler_draws_stands_for_the_value(d):
    for value in d.extremes():
        assert d.decode(d.encode(value)) == value
        assert d.distribution()._contains(d.distribution().to_internal_repr(d.encode(value)))


def test_condition_holds_for_an_equal_number_and_not_for_a_missing_dimension():
    d = dimension("b", [1, 2], a=[1, 3])
    assert d.active({"experts.a": 1.0}) and d.active({"experts.a": 3})
    assert not d.active({"experts.a": 2}) and not d.active({})
    assert not d.active({"experts.a": True})


def test_set_among_the_values_is_refused_as_no_plain_value():
    with pytest.raises(UserError, match=r"^distill\.lr_img: choice=.* must hold plain values"):
        parse_dimension("distill.lr_img", {"choice": [{"a"}, 1]})
