"""Sweeps under chaos (``chaos.py``) leave what they leave in peace; and the schedule of kills."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from chaos import (
    KILLS,
    KINDS,
    PAUSE,
    STAND_INS,
    differences,
    disturb,
    schedule,
    search_of,
    story,
    undisturbed,
)

SEEDS = (0, 1, 2)


def test_seed_gives_its_schedule_and_no_other_gives_the_same():
    first, again, other = (list(islice(schedule(seed), 50)) for seed in (7, 7, 8))
    assert first == again != other
    assert list(islice(schedule(7), KILLS)) == first[:KILLS]


def test_every_kind_has_its_turn_and_only_what_is_at_work_stands_in():
    kills = list(islice(schedule(3), 1000))
    assert {kill.kinds[0] for kill in kills} == set(KINDS)
    assert all({*kill.kinds} == {kill.kinds[0], *STAND_INS} for kill in kills)
    assert all(PAUSE[0] <= kill.pause <= PAUSE[1] and 0 <= kill.which < 1 for kill in kills)
    first = [kill.kinds[0] for kill in kills]
    assert first.count("worker") > first.count("broker") > first.count("head")


def test_seeds_of_the_heavy_test_begin_with_kinds_of_all_sorts():
    met = {kill.kinds[0] for seed in SEEDS for kill in islice(schedule(seed), KILLS)}
    assert met >= {"driver", "raylet", "broker", "expert", "worker", "trainable", "pool"}


def test_what_differs_is_named_from_both_sides():
    peace = {"trials": 8, "trial 3": ["complete", 0.5], "store: a/part": "1f"}
    assert differences(dict(peace), peace) == []
    ours = {"trials": 8, "trial 3": ["failed", None], "store: a/other": "1f"}
    assert differences(ours, peace) == [
        "store: a/other: '1f', undisturbed 'not there'",
        "store: a/part: 'missing', undisturbed '1f'",
        "trial 3: ['failed', None], undisturbed ['complete', 0.5]",
    ]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a sweep leaves in peace; each runs once."""
    known: dict[str, dict[str, Any]] = {}

    def of(search: str) -> dict[str, Any]:
        if search not in known:
            known[search] = undisturbed(tmp_path_factory.mktemp(search), search)
        return known[search]

    return of


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_sweep_whose_processes_are_killed_leaves_what_it_leaves_in_peace(expected, tmp_path, seed):
    wrong = disturb(tmp_path, seed, KILLS, expected(search_of(seed)))
    assert not wrong, story(tmp_path, seed, KILLS, wrong)
