"""Learning from an earlier sweep: which of its trials count, and what makes none of them count."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_helpers import files_below, parse_tiny

from ftd.data import describe
from ftd.errors import UserError
from ftd_ray.config import SweepConfig
from ftd_ray.earlier import Earlier, read_earlier
from ftd_ray.journal import STUDY_FILE
from ftd_ray.plan import make_plan
from ftd_ray.search import SweepStudy, has_begun, read_study


def open_study(config: SweepConfig, **more: Any) -> SweepStudy:
    """The study of a sweep, in its folder."""
    return SweepStudy(
        config.output_dir,
        name=config.name,
        space=config.space,
        search=config.search,
        seed=config.seed,
        every=config.evaluate.every,
        steps=config.distill.iterations,
        **more,
    )


@pytest.fixture
def earlier_sweep(tmp_path):
    """A sweep with so many complete trials, then one that failed and one under way."""

    def make(*, complete: int = 4, fingerprint: str | None = None, **changes: Any) -> Path:
        folder = tmp_path / "earlier"
        folder.mkdir()
        changes = {"search__trials": complete + 2, "output": {"dir": str(folder)}} | changes
        config = parse_tiny(**changes)
        (folder / "sweep.yaml").write_text(yaml.safe_dump(config.resolved()))
        study = open_study(config)
        study.remember("data", fingerprint or describe(config.dataset).fingerprint)
        for i in range(complete + 1):
            suggestion = study.next()
            assert suggestion is not None
            study.report(suggestion.number, 2, 0.1)
            if i == complete:
                study.fail(suggestion.number, "lost")
                continue
            study.report(suggestion.number, 4, (20 + i) / 100, seconds=3.0)
            study.complete(suggestion.number)
        study.next()
        study.close()
        return folder

    return make


def learn(uri: Any, **changes: Any) -> Earlier:
    """What a sweep learns from the one at ``uri``."""
    changes = {"search__sampler": "tpe", "search__warm_start": str(uri)} | changes
    config = parse_tiny(**changes)
    return read_earlier(config, describe(config.dataset))


def refusal(uri: Any, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        learn(uri, **changes)
    message = str(caught.value)
    assert f"{uri}" in message and len(message.splitlines()) == 1
    return message


GRID = {"search__sampler": "grid"}


def test_complete_trials_of_the_same_space_are_learned_with_their_points_and_values(earlier_sweep):
    uri = earlier_sweep(**GRID)
    earlier = learn(uri)
    assert (earlier.uri, earlier.complete) == (str(uri), 4)
    assert [t.number for t in earlier.trials] == [0, 1, 2, 3]
    assert [t.value for t in earlier.trials] == [0.2, 0.21, 0.22, 0.23]
    config = parse_tiny()
    for trial in earlier.trials:
        assert list(trial.params) == [d.key for d in config.space]
        config.at(trial.params)


def test_search_that_learned_has_them_before_its_own_trials(earlier_sweep, tmp_path):
    uri = earlier_sweep(**GRID)
    out = {"output": {"dir": str(tmp_path / "new")}}
    Path(out["output"]["dir"]).mkdir()
    config = parse_tiny(search__sampler="tpe", search__warm_start=str(uri), **out)
    assert not has_begun(config.output_dir)
    earlier = read_earlier(config, describe(config.dataset)).trials
    study = open_study(config, earlier=earlier)
    assert has_begun(config.output_dir)
    assert [t.value for t in study.study.get_trials()] == [0.2, 0.21, 0.22, 0.23]
    first = study.next()
    assert first is not None and first.number == 0
    study.report(0, 4, 0.5)
    study.complete(0)
    study.close()
    found = read_study(config.output_dir)
    assert found is not None and [(t.number, t.value) for t in found[0]] == [(0, 0.5)]


def test_reading_leaves_the_earlier_folder_as_it_was(earlier_sweep):
    uri = earlier_sweep(**GRID)
    with open(uri / STUDY_FILE, "ab") as f:
        f.write(b'{"op_code": 4, "wor')  # it may be under way
    before = files_below(uri)
    assert len(learn(uri).trials) == 4
    assert files_below(uri) == before


@pytest.mark.parametrize(
    ("before", "now", "fitting"),
    [
        ({}, {"experts__rho": {"choice": [0.01, 0.05]}}, 2),
        ({}, {"experts__rho": 0.01}, 2),
        ({}, {"distill__lr_img": {"float": [50, 200]}}, 2),
        ({}, {"distill__lr_img": {"float": [1, 200], "log": True}}, 4),
        ({}, {"distill__syn_steps": {"int": [1, 3]}}, 4),
        ({"distill__syn_steps": 1}, {"distill__syn_steps": {"int": [1, 3]}}, 4),
        ({}, {"evaluate__every": 1}, 4),
        ({}, {"evaluate__networks": 7, "evaluate__epochs": 8}, 4),
        ({}, {"search__pruner": "median", "search__trials": 50, "seed": 9}, 4),
        (
            {},
            {
                "experts__sharpness": {"choice": ["sam", "gsam"]},
                "experts__gsam_alpha": {"choice": [0.1, 0.2], "when": {"sharpness": "gsam"}},
            },
            4,
        ),
    ],
    ids=str,
)
def test_trials_are_learned_as_far_as_they_are_points_of_this_space(
    earlier_sweep, before, now, fitting
):
    earlier = learn(earlier_sweep(**GRID, **before), **now)
    assert (len(earlier.trials), earlier.complete) == (fitting, 4)
    config = parse_tiny(**now)
    assert all(set(t.params) <= {d.key for d in config.space} for t in earlier.trials)


def test_whole_number_is_learned_as_the_spaces_own_value(earlier_sweep):
    earlier = learn(earlier_sweep(**GRID), distill__lr_img={"choice": [10.0, 100.0]})
    assert all(type(t.params["distill.lr_img"]) is float for t in earlier.trials)


@pytest.mark.parametrize(
    ("before", "now", "parts"),
    [
        ({"complete": 0}, {}, ("no trial of this space", "it has no complete trial")),
        ({}, {"distill__syn_steps": 3}, ("no trial of this space", "distill.syn_steps=2")),
        ({}, {"experts__lr": 0.1}, ("experts.lr=0.05", "Leave it out")),
        ({}, {"experts__rho": {"choice": [0.2, 0.3]}}, ("trial 3 has experts.rho=",)),
        ({}, {"distill__lr_img": {"float": [11, 99]}}, ("distill.lr_img=",)),
        ({}, {"experts__epochs": {"int": [4, 5]}}, ("experts.epochs=3",)),
        ({}, {"distill__labels": "soft"}, ("distill.labels=hard",)),
        ({"fingerprint": "0" * 64}, {}, ("other images", "fingerprint 00000000;")),
        ({}, {"dataset__split_seed": 1}, ("other images",)),
        ({}, {"dataset__augment": "none"}, ("dataset.augment", "cannot be compared")),
        ({}, {"evaluate__search_epochs": 4}, ("evaluate.search_epochs=3", "here it is 4")),
        ({}, {"evaluate__search_networks": 2}, ("evaluate.search_networks=1", "here it is 2")),
        ({}, {"evaluate__batch_size": 2}, ("evaluate.batch_size=256",)),
        (
            {},
            {"search__objectives": ["accuracy", "cpu_seconds"]},
            ("did not measure cpu_seconds", "Leave it out"),
        ),
    ],
    ids=str,
)
def test_sweep_that_says_nothing_about_this_one_is_refused_with_what_is_otherwise(
    earlier_sweep, before, now, parts
):
    message = refusal(earlier_sweep(**GRID, **before), **now)
    assert [p for p in ("search.warm_start=", *parts) if p not in message] == [], message


def test_more_objectives_there_than_here_do_no_harm(earlier_sweep):
    uri = earlier_sweep(search__sampler="random", search__objectives=["accuracy", "cpu_seconds"])
    assert all(t.values["accuracy"] == t.value for t in learn(uri).trials)
    both = learn(uri, search__objectives=["cpu_seconds", "accuracy"])
    assert [t.values["cpu_seconds"] for t in both.trials] == [3.0] * 4


@pytest.mark.parametrize("missing", ["everything", "sweep.yaml", STUDY_FILE])
def test_folder_without_a_sweep_is_refused(earlier_sweep, tmp_path, missing):
    uri = tmp_path / "nowhere"
    if missing != "everything":
        uri = earlier_sweep(**GRID)
        (uri / missing).unlink()
    assert "holds no sweep. Give the output.dir of one." in refusal(uri)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (STUDY_FILE, b"nonsense\n"),
        (STUDY_FILE, b"{}\n"),
        (STUDY_FILE, b""),
        (STUDY_FILE, b"\xff\xfe\n"),
        ("sweep.yaml", b"a: ["),
        ("sweep.yaml", b"3"),
    ],
)
def test_damaged_sweep_is_refused_by_its_file(earlier_sweep, name, content):
    uri = earlier_sweep(**GRID)
    (uri / name).write_bytes(content)
    assert f"{name} is damaged" in refusal(uri)


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({}, "  learns   from 4 complete trials of {uri}"),
        (
            {"experts__rho": 0.01},
            "  learns   from 2 of 4 complete trials of {uri}; the others are no points of this "
            "space",
        ),
    ],
    ids=["all", "some"],
)
def test_plan_says_how_many_trials_are_learned_from(earlier_sweep, tmp_path, now, line):
    uri = earlier_sweep(**GRID)
    changes = {"search__sampler": "tpe", "search__warm_start": str(uri), **now}
    config = parse_tiny(**changes, store={"uri": str(tmp_path / "store")})
    plan = replace(make_plan(config), earlier=learn(uri, **now))
    lines: Sequence[str] = plan.text([]).splitlines()
    assert line.format(uri=uri) in lines
    (search,) = (text for text in lines if text.startswith("search "))
    assert "at random" not in search
    cold = make_plan(parse_tiny(search__sampler="tpe", store={"uri": str(tmp_path / "store")}))
    assert "tpe (the first 10 at random)" in cold.text([])
