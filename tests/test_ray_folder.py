"""What a resumed sweep may have otherwise than the saved one, and when a sweep is over."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_helpers import parse_tiny, tiny

from ftd.errors import UserError
from ftd_ray.config import SECTIONS, parse_config
from ftd_ray.folder import CHANGEABLE, check_same, finished_summary, saved_sweep


def saved(**changes: Any) -> dict[str, Any]:
    """What a sweep's folder says of it."""
    return yaml.safe_load(yaml.safe_dump(parse_tiny(**changes).resolved(), sort_keys=False))


CONDITIONAL = {
    "experts__sharpness": {"choice": ["sam", "gsam"]},
    "experts__gsam_alpha": {"choice": [0.1, 0.4], "when": {"sharpness": "gsam"}},
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        CONDITIONAL,
        {"search__objectives": ["accuracy", "cpu_seconds"]},
        {"search__start_from": [{"experts.rho": 0.01}]},
        {"experts__sharpness": {"choice": ["none", "sam"]}, "experts__rho": 0},
        {"resources__gpus_per_expert": "auto"},
    ],
    ids=str,
)
def test_sweep_is_the_same_as_itself(changes):
    assert check_same(saved(**changes), parse_tiny(**changes)) == []


def test_numbers_may_be_written_otherwise():
    now = parse_tiny(distill__lr_img={"choice": [100.0, 10.0]}, distill__lr_init=0.020)
    assert check_same(saved(distill__lr_img={"choice": [100, 10]}), now) == []


ALLOWED = {
    "search.trials": 9,
    "search.concurrency": 2,
    "search.max_hours": 1.5,
    "search.finalists": 2,
    "resources.cpus_per_trial": 1.5,
    "tracking.uri": "http://here",
    "tracking.experiment": "another",
    "output.dir": "/elsewhere",
    "store.uri": "/other/store",
    "store.cache_mb": 3,
}


def test_all_that_may_change_is_returned_as_before_and_now():
    changes = {k.replace(".", "__"): v for k, v in ALLOWED.items()}
    before = parse_config(saved()).resolved()
    lines = check_same(saved(), parse_tiny(**changes))
    assert lines == sorted(
        f"{key}: {before[key.partition('.')[0]][key.partition('.')[2]]} -> {value}"
        for key, value in ALLOWED.items()
    )


def test_what_is_read_of_images_may_change():
    images = {"name": "parquet", "root": "/a", "resolution": 8}
    now = images | {"columns": {"image": "img"}, "on_unreadable": "skip"}
    assert check_same(saved(dataset=images), parse_tiny(dataset=now)) == [
        "dataset.columns: None -> {'image': 'img'}",
        "dataset.on_unreadable: fail -> skip",
    ]


def test_a_budget_of_gpus_and_where_images_lie_may_change():
    base = {"dataset": {"name": "cifar10", "root": "/a"}, "resources__gpus_per_trial": 1}
    now = parse_tiny(
        dataset={"name": "cifar10", "root": "/b", "download": True, "val_fraction": 0.1},
        resources__gpus_per_trial=0.5,
        search__max_gpu_hours=2,
    )
    assert check_same(saved(**base), now) == [
        "dataset.download: False -> True",
        "dataset.root: /a -> /b",
        "resources.gpus_per_trial: 1.0 -> 0.5",
        "search.max_gpu_hours: None -> 2.0",
    ]


REFUSED = {
    "seed": 1,
    "name": "other",
    "dataset.split_seed": 1,
    "dataset.zca": True,
    "experts.rho": {"choice": [0.0, 0.02]},
    "experts.count": 3,
    "distill.lr_img": 10,
    "distill.syn_steps": {"choice": [1, 2]},
    "evaluate.every": 1,
    "evaluate.networks": 3,
    "search.sampler": "tpe",
    "search.pruner": "median",
    "search.objectives": ["accuracy", "cpu_seconds"],
    "search.repeats": 2,
    "search.duplicates": "skip",
    "search.start_from": [{"experts.rho": 0.0}],
    "store.precision": "float16",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_a_sweep_is_may_not_change(key):
    now = parse_tiny(**{key.replace(".", "__"): REFUSED[key]})
    with pytest.raises(UserError) as caught:
        check_same(saved(), now)
    message = str(caught.value)
    assert message.count(f"{key}=") == 2 and len(message.splitlines()) == 1
    assert "or give another output.dir" in message


def test_everything_that_may_not_change_is_named_at_once_and_nothing_else():
    together = {k: v for k, v in REFUSED.items() if k not in ("name", "search.objectives")}
    changes = {k.replace(".", "__"): v for k, v in together.items()}
    changes |= {"output__dir": parse_tiny().output_dir, "search__trials": 2}
    now = parse_tiny(**changes)
    with pytest.raises(UserError) as caught:
        check_same(saved(), now)
    message = str(caught.value)
    assert [k for k in together if message.count(f"{k}=") < 2] == []
    assert "search.trials" not in message


def test_changed_condition_is_another_space():
    other = {**CONDITIONAL, "experts__gsam_alpha": {"choice": [0.1, 0.4], "when": {}}}
    other["experts__sharpness"] = {"choice": ["gsam", "gsam_adaptive"]}
    before, now = saved(**CONDITIONAL), parse_tiny(**other)
    with pytest.raises(UserError, match=r"experts\.gsam_alpha=.*'when'.*experts\.sharpness="):
        check_same(before, now)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"resources__cpus_per_expert": 2}, ("expert on cpu with 1 threads", "cpu with 2")),
        ({"resources__cpus_per_trial": 2}, ("trial on cpu with 1 threads", "cpu with 2")),
        (
            {"resources__trial_backend": "eager"},
            ("trial on cpu with 1 threads (native)", "cpu with 1 (eager)"),
        ),
        ({"resources__gpus_per_trial": 1}, ("trial on cpu", "cuda")),
        ({"resources__gpus_per_expert": "auto"}, ("expert on cpu", "cuda")),
    ],
    ids=str,
)
def test_resources_that_would_change_bits_are_refused(changes, parts):
    now = parse_tiny(**changes)
    with pytest.raises(UserError) as caught:
        check_same(saved(), now)
    assert all(p in str(caught.value) for p in parts)


def test_sweep_of_before_a_key_was_there_had_its_default():
    old = saved()
    for key in ("repeats", "duplicates", "start_from", "warm_start", "finalists", "objectives"):
        del old["search"][key]
    assert check_same(old, parse_tiny()) == []
    with pytest.raises(UserError, match=r"search\.repeats=1.*search\.repeats=2"):
        check_same(old, parse_tiny(search__repeats=2))


def test_shares_that_stood_in_older_sweeps_are_the_defaults_of_now():
    old = saved()
    del old["dataset"]["val_fraction"], old["dataset"]["columns"], old["dataset"]["on_unreadable"]
    digits = {"name": "digits"}
    assert (
        check_same(old | {"dataset": digits | {"val_fraction": 0.1}}, parse_tiny(dataset=digits))
        == []
    )
    with pytest.raises(UserError, match=r"dataset\.val_fraction=0\.15, and now .*=0\.1\."):
        check_same(saved(), parse_tiny(dataset=digits))


def test_sweep_of_before_there_were_backends_was_eager():
    old = saved()
    for kind in ("expert", "trial"):
        del old["resources"][f"{kind}_backend"]
    with pytest.raises(UserError, match=r"\(eager\).*\(native\).*expert_backend"):
        check_same(old, parse_tiny())
    eager = {f"resources__{kind}_backend": "eager" for kind in ("expert", "trial")}
    assert check_same(old, parse_tiny(**eager)) == []


def test_sweep_that_is_no_longer_valid_is_still_compared():
    old = saved()
    old["distill"]["gone"] = 3
    with pytest.raises(UserError, match=r"distill\.gone=3, and now it is distill\.gone=None"):
        check_same(old, parse_tiny())


def test_what_may_change_is_a_section_or_a_key():
    known = set(SECTIONS) | {
        f"{s}.{k}" for s, cls in SECTIONS.items() for k in cls.__dataclass_fields__
    }
    assert set(CHANGEABLE) <= known


# --- the saved sweep ------------------------------------------------------------------------


def test_empty_folder_holds_no_sweep(tmp_path):
    assert saved_sweep(str(tmp_path)) is None


@pytest.mark.parametrize("text", ["a: [", "3", "", "[1]"])
def test_damaged_sweep_file_is_named(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.yaml is damaged"):
        saved_sweep(str(tmp_path))


# --- when it is over ------------------------------------------------------------------------


@pytest.fixture
def ended(tmp_path):
    """A sweep of three trials in a folder with the summary of its last session."""

    def make(trials: int = 3, **search: Any) -> Any:
        changes = {f"search__{k}": v for k, v in {"trials": trials, **search}.items()}
        if search.get("max_gpu_hours"):
            changes["resources__gpus_per_trial"] = 1
        return parse_config(tiny(**changes, output={"dir": str(tmp_path)}))

    def summary(state: str = "done", complete: int = 3, **more: Any) -> None:
        score = {"mean": 0.5, "std": 0.1, "n": 2}
        best = {
            "trial": 0,
            "params": {"experts.rho": 0.01, "distill.lr_img": 10},
            "val_accuracy": 0.5,
            "val_accuracy_full": score,
            "test_accuracy": score,
            "artifact": "a",
        }
        content = {
            "state": state,
            "trials": {"complete": complete, "pruned": 0, "failed": 0},
            "seconds": 1.0,
            "experts": {"built": 0, "reused": 2},
            "best": best if complete else None,
            "baseline": {"random_real": score, "whole_data": score | {"epochs": 3}},
            "mlflow": {"tracking_uri": "sqlite:///x", "trials_path": "/#/"},
            "budget": {"hours": 0.0, "gpu_hours": 0.0},
            "stopped_by": "trials",
        }
        (tmp_path / "summary.json").write_text(json.dumps(content | more))

    return make, summary


def test_sweep_whose_trials_are_all_over_is_over(ended):
    config, summary = ended
    summary()
    found = finished_summary(config())
    assert found is not None and found["trials"]["complete"] == 3
    assert finished_summary(config(trials=2)) == found


def test_sweep_asked_for_more_trials_is_not_over(ended):
    config, summary = ended
    summary()
    assert finished_summary(config(trials=4)) is None


def test_sweep_asked_for_more_finalists_is_not_over(ended):
    config, summary = ended
    summary(protocol={"finalists": 2})
    assert finished_summary(config(finalists=2)) is not None
    assert finished_summary(config(finalists=3)) is None


def test_pruned_and_failed_trials_count(ended):
    config, summary = ended
    summary(trials={"complete": 1, "pruned": 1, "failed": 1})
    assert finished_summary(config()) is not None


@pytest.mark.parametrize("unit", ["hours", "gpu_hours"])
def test_sweep_whose_budget_is_spent_is_over_until_the_budget_is_raised(ended, unit):
    config, summary = ended
    summary(complete=1, budget={"hours": 0.1, "gpu_hours": 0.1, unit: 1.0}, stopped_by=unit)
    limit = f"max_{unit}"
    assert finished_summary(config(**{limit: 1})) is not None
    assert finished_summary(config(**{limit: 0.5})) is not None
    assert finished_summary(config(**{limit: 1.01})) is None
    assert finished_summary(config()) is None  # without a limit
    other = {"hours": "max_gpu_hours", "gpu_hours": "max_hours"}[unit]
    assert finished_summary(config(**{limit: 2, other: 2})) is None
    assert finished_summary(config(**{limit: 2, other: 0.1})) is not None


def test_summary_of_before_there_were_budgets_says_that_nothing_was_used(ended):
    config, summary = ended
    summary(complete=1, budget={})
    assert finished_summary(config(max_hours=1)) is None


def test_failed_sweep_is_over_when_none_of_its_trials_is_of_use(ended):
    config, summary = ended
    summary(state="failed", trials={"complete": 0, "pruned": 1, "failed": 2}, best=None)
    assert finished_summary(config()) is not None
    summary(state="failed")  # the end of the search failed, and may be tried again
    assert finished_summary(config()) is None


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"3", b"{}", b'{"trials": 3, "state": "done"}', b"\xff"]
)
def test_summary_that_cannot_be_read_is_none(ended, content):
    config, _ = ended
    if content is not None:
        (Path(config().output_dir) / "summary.json").write_bytes(content)
    assert finished_summary(config()) is None
