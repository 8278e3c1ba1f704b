"""The sweep file: what is taken, what is refused, and that a refusal names the key and the rule."""

import math
import tempfile
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import yaml
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from ray_helpers import REPOSITORY, TINY, tiny
from sweep_strategies import mutated, partners, sweeps

from ftd.data import describe
from ftd.errors import UserError
from ftd.trajectory import PRECISIONS
from ftd_ray.config import SEARCHED, SECTIONS, SweepConfig, load_config, parse_config
from ftd_ray.experts.build import ExpertRequest, build_expert
from ftd_ray.plan import lacking, make_plan, size_text
from ftd_ray.presets import PRESETS, preset, start_points
from ftd_ray.space import parse_dimension

SWEEPS = sorted((REPOSITORY / "sweeps").glob("*.yaml"))


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(tree)
    return str(caught.value)


def load_text(folder: Path, text: str, *overrides: str) -> SweepConfig:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return load_config(path, overrides)


# --- shipped files --------------------------------------------------------------------------


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.name)
def test_every_shipped_sweep_is_valid(path):
    config = load_config(path)
    assert config.space
    assert config.search.trials >= 1


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.name)
def test_every_shipped_sweep_fits_its_folder_name(path):
    assert load_config(path).name == path.stem


def test_digits_sweep_plans_three_expert_sets(tmp_path):
    path = REPOSITORY / "sweeps" / "digits.yaml"
    plan = make_plan(load_config(path, [f"store.uri={tmp_path}"]))
    assert len(plan.sets) == 3
    assert [s.present for s in plan.sets] == [0, 0, 0]


def test_cache_of_a_node_holds_all_that_trials_read_unless_it_is_told_otherwise(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tree = tiny(
        experts__epochs=8,
        experts__count=3,
        distill__max_start_epoch={"choice": [2, 5]},
        distill__expert_epochs={"choice": [1, 2]},
    )
    plan = make_plan(parse_config(tree))
    parameters = plan.sets[0].parameters
    assert plan.hot_bytes == plan.cache_bytes == 2 * 3 * 7 * parameters * 4  # epochs 0 to 6
    told = make_plan(parse_config(tree | {"store": {"cache_mb": 3}}))
    assert (told.hot_bytes, told.cache_bytes) == (plan.hot_bytes, 3 * 2**20)
    (line,) = (x for x in told.text([]).splitlines() if x.startswith("segments"))
    assert size_text(plan.hot_bytes) in line and size_text(3 * 2**20) in line


# --- the space ------------------------------------------------------------------------------


def test_choice_of_numbers_is_sorted_and_ordered():
    d = parse_dimension("experts.rho", {"choice": [0.05, 0, 0.01]})
    assert d.values == (0, 0.01, 0.05)
    assert d.ordered and d.discrete


def test_choice_of_words_keeps_its_order_and_has_none_for_the_sampler():
    d = parse_dimension("experts.sharpness", {"choice": ["sam", "none", "asam"]})
    assert d.values == ("sam", "none", "asam")
    assert not d.ordered


def test_int_range_includes_both_ends_and_walks_in_steps():
    assert parse_dimension("a.b", {"int": [10, 50], "step": 20}).values == (10, 30, 50)
    assert parse_dimension("a.b", {"int": [1, 3]}).values == (1, 2, 3)


def test_log_levels_are_spaced_by_factors():
    d = parse_dimension("a.b", {"float": [10, 1000], "log": True, "levels": 3})
    assert d.values == (10.0, 100.0, 1000.0)


def test_linear_levels_are_spaced_by_differences():
    assert parse_dimension("a.b", {"float": [0, 1], "levels": 3}).values == (0.0, 0.5, 1.0)


def test_float_without_levels_is_continuous():
    d = parse_dimension("a.b", {"float": [1e-6, 1e-3], "log": True})
    assert not d.discrete and d.ordered
    assert d.bounds == (1e-6, 1e-3)


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ({}, "exactly one of choice, int and float"),
        ({"choices": [1, 2]}, "exactly one of choice, int and float"),
        ({"choice": [1, 2], "int": [1, 2]}, "exactly one of choice, int and float"),
        ({"choice": []}, "at least one value"),
        ({"choice": 3}, "must be a list"),
        ({"choice": [1, 1]}, "twice"),
        ({"choice": [1, 1.0]}, "twice"),
        ({"choice": [[1], [2]]}, "plain values"),
        ({"choice": [1, 2], "step": 1}, "'step' is not an option of choice"),
        ({"choice": list(range(10_001))}, "10001 values"),
        ({"int": [1, 2, 3]}, "[low, high]"),
        ({"int": [1.5, 2]}, "whole numbers"),
        ({"int": [True, 2]}, "whole numbers"),
        ({"int": [3, 1]}, "low to high"),
        ({"int": [1, 3], "step": 0}, "step=0"),
        ({"int": [1, 3], "step": True}, "step=True"),
        ({"int": [1, 3], "log": True}, "'log' is not an option of int"),
        ({"int": [0, 10**9]}, "over 10000 values"),
        ({"float": [0.0, math.inf]}, "finite"),
        ({"float": [0.0, math.nan]}, "finite"),
        ({"float": ["1", "2"]}, "finite numbers"),
        ({"float": [2, 1]}, "low to high"),
        ({"float": [0, 1], "log": True}, "bounds above 0"),
        ({"float": [1, 2], "log": 1}, "log=1"),
        ({"float": [1, 2], "levels": 1}, "levels=1"),
        ({"float": [1, 2], "levels": 2.0}, "levels=2.0"),
        ({"float": [1, 2], "step": 0.1}, "'step' is not an option of float"),
    ],
)
def test_refused_dimension_names_its_key_and_the_rule(written, rule):
    with pytest.raises(UserError) as caught:
        parse_dimension("distill.lr_img", written)
    assert str(caught.value).startswith("distill.lr_img")
    assert rule in str(caught.value)


def test_number_too_large_for_a_float_is_a_user_error():
    message = refusal(tiny(distill__lr_img={"choice": [1, 10**400]}))
    assert "distill.lr_img" in message


def test_dimension_of_one_value_is_refused():
    assert "a dimension of one value" in refusal(tiny(experts__rho={"choice": [0.1]}))


def test_continuous_dimension_of_experts_is_refused():
    message = refusal(tiny(experts__rho={"float": [0.01, 0.1]}))
    assert "experts.rho" in message and "discrete" in message


def test_only_experts_and_distill_can_be_searched():
    assert "evaluate.every cannot be searched" in refusal(tiny(evaluate__every={"choice": [1, 2]}))


def test_every_value_of_a_dimension_is_checked_not_the_first_alone():
    message = refusal(tiny(experts__rho={"choice": ["a", 0.01]}))
    assert message.startswith("experts.rho='a'")
    message = refusal(tiny(distill__ema_decay={"choice": [0.5, 1.5]}))
    assert message.startswith("distill.ema_decay=1.5")


def test_telling_points_hold_every_value_of_every_dimension():
    config = parse_config(tiny())
    points = list(config.telling_points())
    for d in config.space:
        assert {p[d.key] for p in points} == set(d.values)


def test_telling_points_hold_every_combination_of_keys_that_are_ruled_together():
    tree = tiny(
        experts__epochs={"choice": [8, 9]},
        distill__max_start_epoch={"int": [1, 4]},
        distill__expert_epochs={"choice": [1, 2]},
    )
    keys = ("experts.epochs", "distill.max_start_epoch", "distill.expert_epochs")
    points = parse_config(tree).telling_points()
    assert len({tuple(p[k] for k in keys) for p in points}) == 2 * 4 * 2


def test_at_puts_a_point_in_the_place_of_its_dimensions():
    config = parse_config(tiny())
    point = config.at({"experts.rho": 0.01, "distill.lr_img": 100})
    assert (point.experts.rho, point.distill.lr_img) == (0.01, 100)
    assert point.experts.network == "ConvNetD1W8"


def test_expert_points_differ_in_dimensions_of_experts_alone():
    params = [p for p, _ in parse_config(tiny()).expert_points()]
    assert params == [{"experts.rho": 0.0}, {"experts.rho": 0.01}]


# --- strictness -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "wrong", "right"),
    [
        ("", "expert", "experts"),
        ("experts", "rhos", "rho"),
        ("distill", "sin_steps", "syn_steps"),
        ("dataset", "val_fractions", "val_fraction"),
        ("search", "trails", "trials"),
        ("evaluate", "evry", "every"),
        ("resources", "gpu_per_trial", "gpus_per_trial"),
        ("store", "url", "uri"),
        ("tracking", "ury", "uri"),
        ("output", "dirs", "dir"),
    ],
)
def test_typo_in_a_key_is_refused_with_the_nearest_valid_key(section, wrong, right):
    tree = tiny()
    node = tree.setdefault(section, {}) if section else tree
    node[wrong] = node.pop(right, 1)
    message = refusal(tree)
    prefix = f"{section}." if section else ""
    assert f"{prefix}{wrong} is not a known key" in message
    assert f"{prefix}{right}" in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("search.trials", "3"),
        ("search.trials", 3.0),
        ("search.trials", True),
        ("search.trials", None),
        ("search.sampler", "bohb"),
        ("search.pruner", 1),
        ("search.grace", 0),
        ("experts.lr", "0.1"),
        ("experts.lr", False),
        ("experts.lr", math.inf),
        ("experts.lr", math.nan),
        ("experts.rho", -0.01),
        ("experts.count", 1.5),
        ("experts.network", "ConvNet"),
        ("experts.network", 3),
        ("experts.sharpness", "sharp"),
        ("distill.ipc", 0),
        ("distill.ipc", [1]),
        ("distill.ema_decay", 1.0),
        ("distill.lr_lr", -1e-5),
        ("distill.labels", "both"),
        ("distill.init", True),
        ("dataset.name", "digit"),
        ("dataset.download", 1),
        ("dataset.val_fraction", 0),
        ("dataset.resolution", 0),
        ("dataset.split_seed", -1),
        ("dataset.augment", "colour"),
        ("evaluate.every", 0),
        ("evaluate.momentum", 1),
        ("resources.cpus_per_trial", 0),
        ("resources.gpus_per_trial", 1.5),
        ("resources.gpus_per_expert", -1),
        ("resources.gpus_per_trial", "auto"),
        ("store.uri", 5),
        ("store.precision", "float64"),
        ("store.precision", 16),
        ("store.cache_mb", 0),
        ("store.cache_mb", 1.5),
        ("tracking.uri", "./mlruns"),
        ("output.dir", 7),
        ("name", "two words"),
        ("name", 5),
        ("name", "../up"),
        ("seed", -1),
        ("seed", 1.0),
        ("seed", True),
    ],
)
def test_wrong_value_is_refused_on_one_line_that_names_the_key(path, value):
    message = refusal(tiny(**{path.replace(".", "__"): value}))
    assert path in message
    assert "\n" not in message


@pytest.mark.parametrize("value", ["Auto", "all", "0.5", [1], None, True])
def test_share_of_a_gpu_that_is_no_number_and_not_auto_is_refused_by_both(value):
    message = refusal(tiny(resources__gpus_per_expert=value))
    shown = tuple(value) if isinstance(value, list) else value
    assert message == f"resources.gpus_per_expert={shown!r} must be a valid number or 'auto'."


def test_measured_share_of_a_gpu_is_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config(tiny(resources__gpus_per_expert="auto"))
    assert config.resources.expert_gpus is None
    assert config.resources.expert_numerics.device == "cuda"
    assert config.resources.trial_numerics.device == "cpu"
    plan = make_plan(config)
    line = "resources  an expert 1 CPU and a measured share of a GPU, a trial 1 CPU"
    assert line in plan.text([]).splitlines()
    whole = make_plan(parse_config(tiny(resources__gpus_per_expert=1)))
    assert [s.key for s in plan.sets] == [s.key for s in whole.sets]
    here = {"CPU": 2.0, "GPU": 0.0}
    assert lacking(config, here) == ["an expert takes 1 GPU, and there are 0"]
    assert lacking(config, here | {"GPU": 1.0}) == []


def test_memory_is_booked_in_bytes_or_units_and_is_no_part_of_an_expert_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    booked = {"resources__memory_per_expert": "1.5GB", "resources__memory_per_trial": 10**9}
    config = parse_config(tiny(**booked))
    assert (config.resources.expert_memory, config.resources.trial_memory) == (15 * 10**8, 10**9)
    assert parse_config(config.resolved()).resources == config.resources
    plan, plain = make_plan(config), make_plan(parse_config(tiny()))
    assert "resources  an expert 1 CPU and 1.5 GB, a trial 1 CPU and 1.0 GB" in plan.text([])
    assert [s.key for s in plan.sets] == [s.key for s in plain.sets]
    here = {"CPU": 2.0, "memory": 12e8}
    assert lacking(config, here) == ["an expert takes 1.5 GB of memory, and there are 1.2 GB"]
    assert lacking(plain.config, {"CPU": 2.0}) == []


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("much", "'much' is not a size"),
        ("-1GB", "'-1GB' is not a size"),
        (0, "memory_per_trial=0 must be above 0"),
        (1.5, "must be a valid integer or a valid string"),
    ],
)
def test_memory_that_is_no_size_is_refused(value, rule):
    assert rule in refusal(tiny(resources__memory_per_trial=value))


@pytest.mark.parametrize("key", ["dataset.name", "search.trials"])
def test_missing_required_key_is_named(key):
    section, _, name = key.partition(".")
    tree = tiny()
    del tree[section][name]
    assert f"{key} is missing" in refusal(tree)


def test_missing_name_is_refused():
    tree = tiny()
    del tree["name"]
    assert "name=None" in refusal(tree)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"experts__sharpness": "none", "experts__rho": 0.01},
            ("experts.rho", "experts.sharpness"),
        ),
        ({"experts__gsam_alpha": 0.5}, ("experts.gsam_alpha", "experts.sharpness")),
        ({"evaluate__every": 5}, ("evaluate.every", "distill.iterations")),
        ({"search__grace": 2}, ("search.grace", "search.pruner")),
        (
            {"search__sampler": "grid", "distill__lr_img": {"float": [1, 2]}},
            ("search.sampler", "distill.lr_img"),
        ),
        (
            {
                "search__sampler": "qmc",
                "experts__sharpness": {"choice": ["sam", "asam"]},
            },
            ("search.sampler", "experts.sharpness"),
        ),
        (
            {"distill__max_start_epoch": 4},
            ("distill.max_start_epoch", "distill.expert_epochs", "experts.epochs"),
        ),
        (
            {"distill__expert_epochs": {"int": [1, 2]}},
            ("distill.max_start_epoch", "distill.expert_epochs", "experts.epochs"),
        ),
    ],
)
def test_impossible_combination_names_every_key_that_takes_part(changes, names):
    message = refusal(tiny(**changes))
    assert [n for n in names if n not in message] == []


def test_trajectory_of_just_enough_epochs_is_taken():
    parse_config(tiny(experts__epochs=4, distill__max_start_epoch=4))


def test_impossible_point_far_into_a_large_space_is_found():
    # 10 x 10 x 9 points, and only the last ones ask for an epoch too many.
    tree = tiny(
        experts__epochs=9,
        distill__max_start_epoch={"int": [1, 9]},
        distill__expert_epochs={"choice": [1, 2]},
        distill__lr_img={"float": [1, 10], "levels": 10},
        distill__lr_init={"float": [0.01, 0.1], "levels": 10},
    )
    assert "needs 10 epochs; experts have 9" in refusal(tree)


def test_images_per_class_above_what_there_is_are_refused(tmp_path):
    config = parse_config(tiny(distill__ipc=1000, store__uri=str(tmp_path)))
    with pytest.raises(UserError, match=r"distill\.ipc=1000 is above the \d+ training images"):
        make_plan(config)


def test_ipc_is_checked_at_every_point(tmp_path):
    config = parse_config(tiny(distill__ipc={"choice": [1, 1000]}, store__uri=str(tmp_path)))
    with pytest.raises(UserError, match=r"distill\.ipc=1000"):
        make_plan(config)


def test_images_of_a_step_are_compared_with_those_of_all_classes(tmp_path):
    changes = {"distill__ipc": 2, "store__uri": str(tmp_path)}  # of digits' ten classes
    make_plan(parse_config(tiny(distill__batch_syn={"choice": [1, 20]}, **changes)))
    config = parse_config(tiny(distill__batch_syn={"choice": [1, 21]}, **changes))
    with pytest.raises(UserError, match=r"distill\.batch_syn=21 is above the 20 synthetic images"):
        make_plan(config)


def test_network_too_deep_for_the_images_is_refused_by_its_key(tmp_path):
    config = parse_config(tiny(experts__network="ConvNetD5W8", store__uri=str(tmp_path)))
    with pytest.raises(UserError, match=r"ConvNetD5"):
        make_plan(config)


def test_missing_data_says_what_was_looked_for_and_where(tmp_path):
    tree = tiny(dataset={"name": "cifar10", "root": str(tmp_path / "nowhere")})
    with pytest.raises(UserError) as caught:
        make_plan(parse_config(tree))
    assert "nowhere" in str(caught.value)


def test_network_of_absurd_width_is_refused():
    assert "network" in refusal(tiny(experts__network="ConvNetD1W" + "9" * 5000))


def test_rho_zero_and_no_sharpness_are_one_expert_set(tmp_path):
    tree = tiny(
        experts__sharpness={"choice": ["sam", "asam"]},
        experts__rho={"choice": [0.0, 0.01]},
        store__uri=str(tmp_path),
    )
    assert len(make_plan(parse_config(tree)).sets) == 3


def test_set_wanted_with_two_counts_is_planned_once_with_the_larger(tmp_path):
    tree = tiny(experts__rho=0.01, experts__count={"int": [2, 5]}, store__uri=str(tmp_path))
    (one,) = make_plan(parse_config(tree)).sets
    assert one.experts.count == 5


# --- the search -----------------------------------------------------------------------------

SHARPNESSES = {"choice": ["sam", "gsam"]}
CONDITIONAL = {
    "experts__sharpness": SHARPNESSES,
    "experts__gsam_alpha": {"choice": [0.1, 0.4], "when": {"sharpness": "gsam"}},
}
CONTINUOUS = {"float": [1.0, 2.0]}
TWO = ["accuracy", "cpu_seconds"]


def search(**keys: Any) -> dict[str, Any]:
    """Changes of ``tiny`` that set keys of its section ``search``."""
    return {f"search__{k}": v for k, v in keys.items()}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (search(trials=0), ("search.trials=0", "at least 1")),
        (search(concurrency=0), ("search.concurrency=0", "at least 1")),
        (search(sampler="tpe", startup_trials=0), ("search.startup_trials=0", "at least 1")),
        (search(population=1), ("search.population=1", "at least 2")),
        (search(pruner="asha", reduction_factor=1), ("search.reduction_factor=1", "at least 2")),
        (search(repeats=0), ("search.repeats=0", "at least 1")),
        (search(finalists=0), ("search.finalists=0", "at least 1")),
        (search(finalists=4), ("search.finalists=4", "search.trials=3", "Lower it")),
        (search(max_hours=0), ("search.max_hours=0", "above 0", "null")),
        (search(max_hours=-0.5), ("search.max_hours=-0.5", "above 0", "null")),
        (search(max_hours=math.inf), ("search.max_hours=inf", "finite")),
        (search(max_hours=math.nan), ("search.max_hours=nan", "finite")),
        (
            search(max_gpu_hours=1.5),
            ("search.max_gpu_hours=1.5 has no effect", "search.max_hours"),
        ),
        (
            search(sampler="random", startup_trials=5),
            ("search.startup_trials=5", "search.sampler=random", "tpe or gp"),
        ),
        (
            search(sampler="tpe", population=5),
            ("search.population=5", "search.sampler=tpe", "nsga2"),
        ),
        (
            search(sampler="qmc", warm_start="runs/a"),
            ("search.warm_start=runs/a", "search.sampler=qmc", "tpe or gp"),
        ),
        (
            search(pruner="median", reduction_factor=3),
            ("search.reduction_factor=3", "search.pruner=median", "asha or hyperband"),
        ),
        (
            search(pruner="wilcoxon", grace=2, repeats=5),
            ("search.grace=2", "search.pruner=wilcoxon", "asha or hyperband or median"),
        ),
        (
            search(pruner="asha", grace=4),
            ("search.grace=4", "distill.iterations=4", "search.pruner=none"),
        ),
        (
            search(sampler="grid", start_from=[{"experts.rho": 0.0}]),
            ("search.start_from", "search.sampler=grid", "Leave it out"),
        ),
        (
            search(trials=1, start_from=[{"experts.rho": 0.0}, {"experts.rho": 0.01}]),
            ("search.start_from names 2 points", "search.trials=1", "Raise it"),
        ),
        (search(objectives=[]), ("search.objectives=[]", "must hold accuracy")),
        (
            search(objectives=["cpu_seconds"]),
            ("search.objectives=['cpu_seconds']", "must hold accuracy"),
        ),
        (
            search(objectives=["accuracy", "accuracy"]),
            ("search.objectives=['accuracy', 'accuracy']", "each objective once"),
        ),
        (search(objectives=["loss"]), ("search.objectives[0]='loss'", "accuracy")),
        (search(objectives="accuracy"), ("search.objectives='accuracy'",)),
        (
            search(objectives=TWO, pruner="asha"),
            ("search.pruner=asha", "accuracy, cpu_seconds", "search.pruner=none"),
        ),
        (
            search(objectives=TWO, sampler="cmaes"),
            ("search.sampler=cmaes", "accuracy, cpu_seconds", "nsga2, tpe or gp"),
        ),
        (search(sampler="nsga2"), ("search.sampler=nsga2", "several objectives", "Take tpe")),
        (
            search(sampler="nsga2", objectives=TWO),
            ("search.sampler=nsga2", "20 trials at random", "search.trials=3", "population"),
        ),
        (
            search(sampler="nsga2", objectives=TWO, population=3),
            ("search.sampler=nsga2", "3 trials at random", "search.trials=3"),
        ),
        (
            search(objectives=["accuracy", "ipc"]),
            ("search.objectives", "distill.ipc=1", "Make it a dimension"),
        ),
        (
            search(objectives=["accuracy", "gpu_seconds"]),
            ("gpu_seconds", "resources.gpus_per_trial=0", "cpu_seconds"),
        ),
        (
            search(pruner="wilcoxon"),
            ("search.pruner=wilcoxon", "search.repeats=1", "evaluate.search_networks=1", "Raise"),
        ),
        (search(pruner="wilcoxon", repeats=4), ("compares 3 fresh networks", "fewer than 4")),
        (
            search(pruner="wilcoxon", repeats=5, sampler="tpe", warm_start="/a"),
            ("search.pruner=wilcoxon", "search.warm_start=/a", "another pruner"),
        ),
        *[
            (
                search(sampler=sampler, objectives=objectives, trials=30) | CONDITIONAL,
                (f"search.sampler={sampler}", key, reason, "tpe or random"),
            )
            for sampler, objectives, key, reason in (
                ("grid", ["accuracy"], "experts.gsam_alpha", "under a condition"),
                ("qmc", ["accuracy"], "experts.sharpness", "no order"),
                ("cmaes", ["accuracy"], "experts.sharpness", "no order"),
                ("gp", ["accuracy"], "experts.gsam_alpha", "under a condition"),
                ("nsga2", TWO, "experts.gsam_alpha", "under a condition"),
            )
        ],
        *[
            (
                search(sampler=sampler)
                | {
                    "distill__lr_label": {"choice": [1, 2], "when": {"experts.epochs": 4}},
                    "experts__epochs": {"choice": [3, 4]},
                    "distill__labels": "soft",
                },
                (f"search.sampler={sampler}", "distill.lr_label", "Drop its when"),
            )
            for sampler in ("qmc", "cmaes")
        ],
        (
            search(sampler="grid") | {"distill__lr_img": CONTINUOUS},
            ("search.sampler=grid", "distill.lr_img", "Give it levels: n"),
        ),
        (
            search(sampler="cmaes") | {"experts__rho": 0.01},
            ("search.sampler=cmaes", "two dimensions", "distill.lr_img", "tpe or gp"),
        ),
        (
            search(duplicates="skip", trials=5),
            ("search.trials=5", "4 points", "search.duplicates=skip", "repeat"),
        ),
        (
            search(duplicates="skip", trials=7) | CONDITIONAL | {"experts__rho": 0.01},
            ("search.trials=7", "6 points", "search.duplicates=skip"),
        ),
        (
            search(duplicates="skip") | {"distill__lr_img": CONTINUOUS},
            ("search.duplicates=skip", "distill.lr_img is continuous", "levels: n"),
        ),
        (
            search(start_from=["ftd-cifar10-ipc100"]),
            ("search.start_from", "'ftd-cifar10-ipc100'", "Did you mean ftd-cifar10-ipc10?"),
        ),
        (
            search(start_from=["ours"]),
            ("search.start_from", "no preset 'ours'", "ftd-cifar10-ipc1, "),
        ),
        (
            search(start_from=[{"experts.rho": 0.02}]),
            ("search.start_from[0]", "experts.rho=0.02", "(0 | 0.01)", "Add it"),
        ),
        (
            search(start_from=[{"experts.rho": 0.01}, {"distill.lr_img": True}]),
            ("search.start_from[1]", "distill.lr_img=True", "(10 | 100)"),
        ),
        (
            search(start_from=[{"distill.lr_image": 10}]),
            ("search.start_from[0]", "distill.lr_image is no dimension", "distill.lr_img?"),
        ),
        (
            search(start_from=[{"distill.ipc": 1}]),
            ("search.start_from[0]", "distill.ipc is no dimension"),
        ),
        (
            search(start_from=[{"experts.rho": 0.01}, {"experts.rho": 0.01}]),
            ("search.start_from[1]", "{experts.rho: 0.01}", "Name it once"),
        ),
        (
            search(start_from=["ftd-cifar10-ipc1", {"experts.rho": 0.01, "distill.lr_img": 100}]),
            ("search.start_from[1]", "same point as ftd-cifar10-ipc1"),
        ),
        (
            search(start_from=[{"experts.sharpness": "sam", "experts.gsam_alpha": 0.1}])
            | CONDITIONAL,
            ("search.start_from[0]", "experts.gsam_alpha does not exist at that point"),
        ),
        (
            search(start_from=[{"experts.gsam_alpha": 0.1}]) | CONDITIONAL,
            ("search.start_from[0]", "experts.gsam_alpha does not exist", "depends on"),
        ),
        (search(start_from=[3]), ("search.start_from[0]=3",)),
        (search(start_from="ftd-cifar10-ipc10"), ("search.start_from='ftd-cifar10-ipc10'",)),
        (search(warm_start=5), ("search.warm_start=5",)),
        (search(max_hours="2"), ("search.max_hours='2'",)),
        (search(duplicates="allow"), ("search.duplicates='allow'", "repeat", "skip")),
        (
            {
                "distill__lr_label": {"choice": [1, 2], "when": {"labels": "soft"}},
                "distill__labels": "soft",
            },
            ("distill.lr_label", "distill.labels", "not searched"),
        ),
        (
            {
                "experts__rho": {"choice": [0.0, 0.1], "when": {"distill.ipc": 2}},
                "distill__ipc": {"int": [1, 2]},
            },
            ("experts.rho: when may name dimensions of experts only",),
        ),
    ],
    ids=str,
)
def test_search_that_cannot_be_meant_is_refused_on_one_line_with_key_value_and_remedy(
    changes, parts
):
    message = refusal(tiny(**changes))
    assert [p for p in parts if p not in message] == [], message
    assert "\n" not in message and message.endswith((".", "?"))


@pytest.mark.parametrize(
    "changes",
    [
        search(finalists=3),
        search(pruner="wilcoxon", repeats=5),
        search(pruner="wilcoxon", repeats=3) | {"evaluate__search_networks": 2},
        search(pruner="asha", grace=3),
        search(pruner="asha", grace=7, repeats=2),
        search(sampler="nsga2", objectives=TWO, population=2),
        search(sampler="gp", objectives=TWO),
        search(objectives=["accuracy", "ipc"]) | {"distill__ipc": {"int": [1, 2]}},
        search(objectives=["accuracy", "gpu_seconds"]) | {"resources__gpus_per_trial": 0.5},
        search(max_gpu_hours=1) | {"resources__gpus_per_expert": "auto"},
        search(max_hours=0.01),
        search(duplicates="skip", trials=4),
        search(duplicates="skip", trials=6) | CONDITIONAL | {"experts__rho": 0.01},
        search(sampler="cmaes"),
        search(sampler="gp") | {"experts__sharpness": SHARPNESSES},
        search(sampler="tpe") | CONDITIONAL,
        search(start_from=["ftd-cifar10-ipc1", {"experts.rho": 0.0}]),
        search(start_from=[{"experts.sharpness": "gsam", "experts.gsam_alpha": 0.1}]) | CONDITIONAL,
    ],
    ids=str,
)
def test_search_at_the_edge_of_a_rule_is_taken_and_round_trips(changes):
    config = parse_config(tiny(**changes))
    assert parse_config(config.resolved()) == replace(config, written=ANY)


@pytest.mark.parametrize(
    "changes",
    [
        {"experts__a\nb": 1},
        {"a\u2028b": 1},
        search(start_from=[{"experts.rho": "a\nb"}]),
        search(start_from=[{"a\nb": 1}]),
        search(warm_start="a\nb"),
        {"dataset__root": "a\nb"},
        {"distill__lr_label": {"choice": [1, 2], "when": {"a\rb": 1}}, "distill__labels": "soft"},
        {"experts__sharpness": {"choice": ["sam", "a\nb"]}},
    ],
    ids=ascii,
)
def test_refusal_is_one_line_whatever_was_written(changes):
    message = refusal(tiny(**changes))
    assert len(message.splitlines()) == 1
    assert any(shown in message for shown in (r"a\nb", r"a\rb", r"a\u2028b"))


def test_several_objectives_mean_no_pruner_where_none_is_named():
    tree = tiny(search__objectives=TWO)
    del tree["search"]["pruner"]
    assert parse_config(tree).search.pruner == "none"
    assert parse_config(parse_config(tree).resolved()).search.pruner == "none"


def test_every_key_that_may_be_searched_has_a_default_to_take_where_its_dimension_is_not():
    assert all(f.default is not MISSING for s in SEARCHED for f in fields(SECTIONS[s]))


def test_conditional_dimension_has_its_default_where_it_does_not_exist():
    config = parse_config(tiny(**CONDITIONAL))
    assert config.at({"experts.sharpness": "sam", "experts.rho": 0.0}).experts.gsam_alpha == 0.0
    assert all(
        ("experts.gsam_alpha" in p) is (p["experts.sharpness"] == "gsam")
        for p, _ in config.expert_points()
    )
    assert len(config.expert_points()) == 2 * (1 + 2)


def test_rule_that_breaks_only_under_a_condition_is_found():
    changes = {
        "distill__labels": {"choice": ["hard", "soft"]},
        "distill__lr_label": {"choice": [1, 2], "when": {"labels": "hard"}},
    }
    assert "distill.lr_label=1" in refusal(tiny(**changes))
    changes["distill__lr_label"]["when"] = {"labels": "soft"}
    parse_config(tiny(**changes))


def test_iterations_under_a_condition_count_with_their_default_too():
    iterations = {"choice": [6, 8], "when": {"labels": "soft"}}
    changes = {"distill__labels": {"choice": ["hard", "soft"]}, "distill__iterations": iterations}
    parse_config(tiny(**changes, evaluate__every=6))
    assert "evaluate.every=7" in refusal(tiny(**changes, evaluate__every=7))


# --- presets --------------------------------------------------------------------------------

TABLE_7 = """
cifar10-ipc1         50 2 2  all  100  1e-7 .01  .3 .9999
cifar10-ipc10        30 2 20 all  100  1e-5 .001 .3 .9995
cifar10-ipc50        30 2 40 all  1000 1e-5 .01  1  .999
cifar100-ipc1        40 3 20 all  1000 1e-5 .01  1  .9995
cifar100-ipc10       20 2 40 all  1000 1e-5 .01  1  .9995
cifar100-ipc50       80 2 40 1000 1000 1e-5 .01  1  .999
tiny_imagenet-ipc1   30 2 10 all  1e4  1e-4 .01  1  .999
tiny_imagenet-ipc10  20 2 40 500  1e4  1e-4 .01  1  .999
imagenet-ipc1        20 2 10 all  1e4  1e-4 .01  1  .999
imagenet-ipc10       20 2 10 64   1e4  1e-4 .001 1  .999
"""
"""N, M, T+, |b|, lr_img, lr_lr, eta, alpha, beta. The author's 64 images of a step on ImageNet's
subsets are more than the 10 of one image per class, so all of them there."""


@pytest.mark.parametrize("line", TABLE_7.split("\n")[1:-1], ids=lambda line: line.split()[0])
def test_preset_is_the_published_row(line):
    name, n, m, t, batch, *rates = line.split()
    lr_img, lr_lr, eta, alpha, beta = map(float, rates)
    assert preset(f"ftd-{name}") == {
        "experts.sharpness": "sam",
        "experts.rho": 0.01,
        "experts.sharpness_weight": alpha,
        "distill.optimiser": "sgd",
        "distill.ipc": int(name.rpartition("ipc")[2]),
        "distill.syn_steps": int(n),
        "distill.expert_epochs": int(m),
        "distill.max_start_epoch": int(t),
        "distill.batch_syn": None if batch == "all" else int(batch),
        "distill.lr_img": lr_img,
        "distill.lr_lr": lr_lr,
        "distill.lr_init": eta,
        "distill.ema_decay": beta,
    }


def test_there_is_no_preset_beside_the_published_rows():
    assert sorted(PRESETS) == sorted(f"ftd-{line.split()[0]}" for line in TABLE_7.split("\n")[1:-1])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_sweep_of_its_data(name):
    tree = tiny(experts__epochs=50)
    for key, value in preset(name).items():
        section, _, inner = key.partition(".")
        tree[section][inner] = value
    tree["experts"]["rho"] = {"choice": [0.0, 0.01]}
    tree["search"]["start_from"] = [name]
    (point,) = start_points(parse_config(tree))
    assert (point.label, point.params, point.others) == (name, {"experts.rho": 0.01}, {})


def test_preset_says_which_keys_the_sweep_fixes_otherwise():
    (point,) = start_points(parse_config(tiny(search__start_from=["ftd-cifar10-ipc1"])))
    assert point.params == {"experts.rho": 0.01, "distill.lr_img": 100}
    assert point.others["distill.lr_lr"] == (1e-5, 1e-7)
    assert point.others["experts.sharpness_weight"] == (1.0, 0.3)
    assert not {"experts.rho", "distill.lr_img", "distill.ipc"} & set(point.others)


def test_preset_of_a_searched_sharpness_starts_at_the_one_that_it_was_published_for():
    changes = {"experts__sharpness": {"choice": ["none", "sam"]}}
    changes["experts__rho"] = {"choice": [0.01, 0.1], "when": {"sharpness": "sam"}}
    config = parse_config(tiny(**changes, search__start_from=["ftd-cifar10-ipc1"]))
    (point,) = start_points(config)
    assert point.params["experts.sharpness"] == "sam" and point.params["experts.rho"] == 0.01


# --- YAML and overrides ---------------------------------------------------------------------

TEXT = yaml.safe_dump(TINY, sort_keys=False)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", "1.0e-5", "+1e-5", ".1e-4", "0.00001"])
def test_exponents_are_numbers_with_and_without_a_point(tmp_path, text):
    config = load_text(tmp_path, TEXT, f"distill.lr_lr={text}")
    assert config.distill.lr_lr == 1e-5


@pytest.mark.parametrize("text", ["'1e-5'", "1e", "e5", "1e-5x"])
def test_what_only_looks_like_a_number_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"distill\.lr_lr"):
        load_text(tmp_path, TEXT, f"distill.lr_lr={text}")


def test_override_replaces_a_dimension_by_a_literal(tmp_path):
    config = load_text(tmp_path, TEXT, "experts.rho=0.02")
    assert [d.key for d in config.space] == ["distill.lr_img"]
    assert config.experts.rho == 0.02


def test_override_replaces_a_literal_by_a_dimension(tmp_path):
    config = load_text(tmp_path, TEXT, "distill.syn_steps={int: [1, 3]}")
    assert "distill.syn_steps" in [d.key for d in config.space]


def test_override_replaces_a_dimension_by_another_whole(tmp_path):
    config = load_text(tmp_path, TEXT, "experts.rho={float: [0.01, 0.04], levels: 2}")
    assert next(d for d in config.space if d.key == "experts.rho").values == (0.01, 0.04)


def test_override_reaches_into_a_dimension(tmp_path):
    config = load_text(tmp_path, TEXT, "experts.rho.choice=[0.1, 0.2]")
    assert next(d for d in config.space if d.key == "experts.rho").values == (0.1, 0.2)


def test_override_adds_a_section(tmp_path):
    assert load_text(tmp_path, TEXT, "output.dir=/elsewhere").output_dir == "/elsewhere"


def test_later_override_wins(tmp_path):
    assert load_text(tmp_path, TEXT, "seed=1", "seed=2").seed == 2


def test_override_may_hold_an_equals_sign_in_its_value(tmp_path):
    config = load_text(tmp_path, TEXT, "store.uri=s3://bucket/a?b=c")
    assert config.store.uri == "s3://bucket/a?b=c"


@pytest.mark.parametrize(
    "override",
    ["seed", "=3", "name.sub=3", "experts.rho.choice.deep=1", "experts.rho={", "experts..rho=1"],
)
def test_what_is_no_override_is_refused_by_name(tmp_path, override):
    with pytest.raises(UserError) as caught:
        load_text(tmp_path, TEXT, override)
    assert "\n" not in str(caught.value)


def test_override_with_a_typo_is_refused_with_file_and_key(tmp_path):
    with pytest.raises(UserError) as caught:
        load_text(tmp_path, TEXT, "experts.rh=0.1")
    assert "experts.rh is not a known key. Did you mean experts.rho?" in str(caught.value)
    assert "sweep.yaml" in str(caught.value)


def test_duplicate_key_is_refused_by_name_and_line(tmp_path):
    with pytest.raises(UserError, match=r"the key seed stands twice, line"):
        load_text(tmp_path, TEXT + "seed: 3\n")
    with pytest.raises(UserError, match=r"the key choice stands twice"):
        load_text(tmp_path, TEXT, "experts.rho={choice: [1, 2], choice: [1]}")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", "a: [", "a: b: c", "\tx: 1", "? [a, b]\n: 1", "1: 2", "a: !!python/none",
        "a: &x [*x]", "&a {b: *a}", "<<: {name: x}", "? !!set {a, b}\n: 1", "\x00",
    ],
)  # fmt: skip
def test_what_is_no_sweep_is_a_user_error(tmp_path, text):
    with pytest.raises(UserError):
        load_text(tmp_path, text)


def test_file_that_is_no_text_is_a_user_error(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match=r"x\.yaml"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / name)


# --- what comes of it -----------------------------------------------------------------------


def test_local_places_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config(tiny())
    assert config.output_dir == str(tmp_path / "runs" / "tiny")
    assert config.store.uri == str(tmp_path / "store")
    assert config.tracking.uri == f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_file_uris_are_paths(tmp_path):
    config = parse_config(tiny(store={"uri": f"file://{tmp_path}/s"}))
    assert config.store.uri == f"{tmp_path}/s"


def test_object_store_uris_stay_as_they_are():
    config = parse_config(tiny(store={"uri": "s3://b/x"}, output={"dir": "gs://b/y"}))
    assert (config.store.uri, config.output_dir) == ("s3://b/x", "gs://b/y")


ROUND_TRIPS = [
    {},
    {"experts__sharpness": {"choice": ["none", "sam"]}, "experts__rho": 0.0},
    {"experts__sharpness": "none", "experts__rho": 0.0},
    {"distill__lr_img": {"float": [1e-5, 1e3], "log": True}},
    {"distill__syn_steps": {"int": [1, 9], "step": 4}},
    {"search__grace": 2, "search__pruner": "asha"},
    {"distill__batch_syn": None},
    {"distill__ema_decay": None, "distill__ema_share": 0.1},
    {
        "distill__optimiser": {"choice": ["sgd", "rmsprop"]},
        "distill__lr_lr": None,
        "distill__lr_img": {"choice": [0.02, 0.1], "when": {"optimiser": "rmsprop"}},
    },
    {
        "distill__ema_decay": None,
        "distill__ema_share": {"choice": [0.1, 0.2], "when": {"lr_img": 10}},
    },
    {"store": {"uri": "s3://b/x", "precision": "bfloat16", "cache_mb": 1}},
    {"resources__gpus_per_expert": "auto"},
]


@pytest.mark.parametrize("changes", ROUND_TRIPS)
def test_resolved_configuration_round_trips(changes):
    config = parse_config(tiny(**changes))
    resolved = config.resolved()
    again = parse_config(yaml.safe_load(yaml.safe_dump(resolved)))
    assert again.resolved() == resolved
    assert again.space == config.space
    for params in config.telling_points():
        assert again.at(params) == config.at(params)


def test_resolved_configuration_of_a_searched_sharpness_without_rho_round_trips():
    tree = tiny(experts__sharpness={"choice": ["none", "sam"]})
    del tree["experts"]["rho"]
    config = parse_config(tree)
    again = parse_config(config.resolved())
    assert [c for _, c in again.expert_points()] == [c for _, c in config.expert_points()]


def test_a_dimension_chooses_between_optimisers_each_with_rates_of_its_own():
    config = parse_config(
        tiny(
            distill__optimiser={"choice": ["sgd", "rmsprop"]},
            distill__lr_img={"choice": [0.02, 0.1], "when": {"optimiser": "rmsprop"}},
            distill__lr_lr=None,
            distill__lr_init=None,
        )
    )
    paper = config.at({"distill.optimiser": "sgd"}).distill
    ours = config.at({"distill.optimiser": "rmsprop", "distill.lr_img": 0.1}).distill
    assert (paper.lr_img, paper.lr_lr, paper.lr_init) == (100.0, 1e-7, 0.01)
    assert (ours.lr_img, ours.lr_lr, ours.lr_init) == (0.1, 0.05, None)


def test_rates_of_sgd_are_refused_where_a_point_takes_rmsprop():
    message = refusal(tiny(distill__optimiser={"choice": ["sgd", "rmsprop"]}))
    assert message.startswith("distill.lr_img=10 with distill.optimiser=rmsprop")


def test_fine_rates_together_are_no_space_that_is_too_large():
    fine = {"float": [1e-3, 0.9], "log": True, "levels": 60}
    config = parse_config(tiny(distill__lr_img=fine, distill__lr_lr=fine, distill__ema_decay=fine))
    assert len(config.space) == 4


def test_a_sweep_without_units_says_how_it_differs_from_a_preset():
    tree = tiny(
        distill__optimiser="rmsprop",
        distill__ema_decay=None,
        distill__ema_share=0.1,
        search__start_from=["ftd-cifar10-ipc1"],
    )
    for key in ("lr_img", "lr_lr"):
        del tree["distill"][key]
    (point,) = start_points(parse_config(tree))
    assert point.others["distill.optimiser"] == ("rmsprop", "sgd")
    assert point.others["distill.lr_img"] == (0.05, 100.0)
    assert point.others["distill.ema_decay"] == (None, 0.9999)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.name)
def test_resolved_shipped_sweep_round_trips(path):
    resolved = load_config(path).resolved()
    assert parse_config(yaml.safe_load(yaml.safe_dump(resolved))).resolved() == resolved


def test_resolved_configuration_states_every_key_with_its_default():
    resolved = parse_config(tiny()).resolved()
    assert set(resolved) == {"name", "seed", *SECTIONS}
    assert resolved["distill"]["momentum"] == 0.5
    assert resolved["experts"]["rho"] == {"choice": [0.0, 0.01]}


# --- what experts take on disk --------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_planned_bytes_are_those_that_experts_take_on_disk(tmp_path, precision, momentum):
    # Wide enough for names and checksums to count little.
    config = parse_config(
        tiny(
            experts__network="ConvNetD1W128",
            experts__rho=0.0,
            experts__epochs=7,
            experts__momentum=momentum,
            store={"uri": str(tmp_path), "precision": precision},
        )
    )
    plan = make_plan(config)
    request = ExpertRequest(
        store_uri=config.store.uri,
        identity=config.identity(config.experts, describe(config.dataset)),
        dataset=config.dataset,
        experts=config.experts,
        numerics=config.resources.expert_numerics,
    )
    for index in range(config.experts.count):
        build_expert(request, index, lambda snapshot: None)
    files = [p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()]
    assert plan.bytes_missing == pytest.approx(sum(files), rel=0.05)
    assert make_plan(config).bytes_missing == 0
    half = "" if precision == "float32" else f" in {precision}"
    assert f"disk       {size_text(plan.bytes_missing)} for the experts to build{half}," in (
        plan.text([])
    )


def test_precision_is_part_of_what_an_expert_set_is(tmp_path):
    configs = [parse_config(tiny(store={"uri": str(tmp_path), "precision": p})) for p in PRECISIONS]
    keys = [{s.key for s in make_plan(c).sets} for c in configs]
    assert len(set.union(*keys)) == 3 * 2
    unsaid = make_plan(parse_config(tiny(store__uri=str(tmp_path))))
    assert {s.key for s in unsaid.sets} == keys[PRECISIONS.index("float32")]


# --- anything else --------------------------------------------------------------------------

FULL = parse_config(TINY).resolved()
KEYS = [(s, k) for s in SECTIONS for k in FULL[s]]

ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-3, max_value=60),
    st.sampled_from([10**30, 10**400, -(10**400), 2**63, 1e300]),
    st.floats(),
    st.floats(min_value=0, max_value=1),
    st.text(max_size=8),
    st.sampled_from(["sam", "none", "tpe", "grid", "ConvNetD2W8", "digits", "soft", "asha"]),
    st.dates(),
    st.binary(max_size=3),
)
VALUES = st.one_of(
    ATOMS,
    st.lists(ATOMS, max_size=3),
    st.dictionaries(
        st.sampled_from(["choice", "int", "float", "step", "log", "levels", "x"]),
        st.one_of(ATOMS, st.lists(ATOMS, max_size=4)),
        max_size=3,
    ),
)


UNSHRUNK = (Phase.explicit, Phase.generate)
"""A whole sweep takes minutes to shrink, and a failure says what was wrong anyway."""


def assert_valid_or_named(tree: dict[str, Any], keys: list[str]) -> None:
    """A tree is taken and round-trips, or is refused on one line that names one of ``keys``."""
    try:
        resolved, message = parse_config(tree).resolved(), None
    except UserError as error:
        resolved, message = None, str(error)
    if message is None:
        assert resolved is not None
        assert parse_config(resolved).resolved() == resolved
    else:
        assert any(str(key) in message for key in keys), message
        assert "\n" not in message


@settings(max_examples=400, deadline=None, derandomize=True, phases=UNSHRUNK)
@given(sweeps())
def test_generated_sweep_is_valid_and_its_resolved_form_is_the_same_sweep(tree):
    with tempfile.TemporaryDirectory() as folder:
        config = load_text(Path(folder), yaml.safe_dump(tree, allow_unicode=True))
        resolved = config.resolved()
        again = load_text(Path(folder), yaml.safe_dump(resolved))
    assert again == replace(config, written=again.written)
    assert again.resolved() == resolved
    for params in config.telling_points():
        assert again.at(params) == config.at(params)


@settings(max_examples=700, deadline=None, derandomize=True, phases=UNSHRUNK)
@given(mutated(5))
def test_one_mutation_of_a_valid_sweep_is_valid_or_refused_by_its_key(changes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.yaml"
        for tree, touched in changes:
            path.write_text(yaml.safe_dump(tree, allow_unicode=True))
            try:
                config = load_config(path)
            except UserError as error:
                message = str(error).removeprefix(f"{path}")
                assert len(message.splitlines()) == 1, message
                named = [str(UserError(k)) for k in partners(touched)]  # with its escapes
                assert any(k in message for k in named), (message, touched)
            else:
                again = parse_config(config.resolved())
                assert again == replace(config, written=again.written)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(key=st.sampled_from(KEYS), value=VALUES)
@example(key=("experts", "rho"), value={"choice": [0, 10**400]})
@example(key=("distill", "lr_img"), value={"float": [1, 10**400]})
@example(key=("distill", "lr_img"), value=10**400)
@example(key=("resources", "cpus_per_trial"), value=1e300)
@example(key=("resources", "gpus_per_trial"), value=1e300)
@example(key=("store", "uri"), value="s3://[")
@example(key=("store", "uri"), value="file://\x00")
@example(key=("output", "dir"), value="")
@example(key=("tracking", "uri"), value="sqlite:///")
def test_one_changed_value_is_valid_or_a_user_error_that_names_its_key(key, value):
    section, name = key
    tree = {s: dict(v) if isinstance(v, dict) else v for s, v in FULL.items()}
    tree[section][name] = value
    assert_valid_or_named(tree, [name])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    section=st.sampled_from([*SECTIONS, "name", "seed"]),
    value=st.one_of(VALUES, st.dictionaries(st.text(max_size=6), ATOMS, max_size=2)),
)
def test_one_changed_section_is_valid_or_a_user_error_that_names_it(section, value):
    keys = [section, *(value if isinstance(value, dict) else ())]
    assert_valid_or_named({**FULL, section: value}, keys)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60))
@example("a: 2020-13-45")
@example("a: !!int x")
@example("a: !!timestamp x")
@example("a: !!binary x")
@example("? {}\n: 1")
def test_any_text_after_a_key_is_valid_or_a_user_error(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.yaml"
        path.write_text(TEXT)
        message = None
        try:
            load_config(path, [f"distill.lr_img={text}"])
        except UserError as error:
            message = str(error)
        assert message is None or "distill." in message
