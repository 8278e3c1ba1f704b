"""Real sweeps with budgets, several objectives, finalists, repeats and an earlier study."""

from typing import Any

import pytest
from ray_helpers import mlflow_runs, run_sweep, summary_of, tiny, write_sweep

from ftd_ray.search import read_study

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]


def one_set(**changes: Any) -> dict[str, Any]:
    """The tiny sweep on one expert set."""
    return tiny(experts__rho=0.01, **changes)


def test_spent_budget_ends_a_sweep_with_what_is_done_and_a_larger_one_goes_on(tmp_path):
    many = {"search__trials": 4000, "search__concurrency": 2, "search__max_hours": 0.015}
    write_sweep(tmp_path, one_set(**many))
    ended = run_sweep(tmp_path, "sweep.yaml")
    assert ended.code == 0, ended.out + ended.err
    summary = summary_of(tmp_path)
    done = sum(summary["trials"].values())
    assert (summary["state"], summary["stopped_by"]) == ("done", "wall time")
    assert 0 < done < 4000 and summary["interrupted"] <= 2
    assert "the budget of wall time is spent" in ended.out
    statuses = {r.info.status for r in mlflow_runs(tmp_path)}
    assert "RUNNING" not in statuses

    again = run_sweep(tmp_path, "sweep.yaml", "--resume")
    assert again.code == 0 and "resumed " not in again.out  # nothing was started
    assert summary_of(tmp_path) == summary

    arguments = ("search.max_hours=1", f"search.trials={done + 3}")
    larger = run_sweep(tmp_path, "sweep.yaml", "--resume", *arguments)
    assert larger.code == 0, larger.out + larger.err
    assert "changed    search.max_hours: 0.015 -> 1" in larger.out
    summary = summary_of(tmp_path)
    assert (summary["stopped_by"], summary["interrupted"]) == ("trials", 0)
    assert sum(summary["trials"].values()) == done + 3
    trials, _ = read_study(str(tmp_path / "runs" / "tiny")) or ([], None)
    assert [t.number for t in trials] == list(range(done + 3))


def test_two_objectives_end_in_a_front_and_its_most_accurate_finalist_wins(tmp_path):
    tree = one_set(
        distill__ipc={"choice": [1, 2]},
        search__trials=5,
        search__concurrency=2,
        search__sampler="tpe",
        search__objectives=["accuracy", "ipc", "cpu_seconds"],
        search__finalists=2,
    )
    del tree["search"]["pruner"]
    write_sweep(tmp_path, tree)
    ran = run_sweep(tmp_path, "sweep.yaml")
    assert ran.code == 0, ran.out + ran.err
    summary = summary_of(tmp_path)
    trials, _ = read_study(str(tmp_path / "runs" / "tiny")) or ([], None)
    values = {t.number: t.values for t in trials}
    front = {f["trial"] for f in summary["front"]}
    assert front <= set(values) and all(
        f["values"] == pytest.approx(values[f["trial"]]) for f in summary["front"]
    )
    finalists = summary["finalists"]
    assert {f["trial"] for f in finalists} <= front and 1 <= len(finalists) <= 2
    if len(finalists) == 2:
        full = {f["trial"]: f["val_accuracy_full"]["mean"] for f in finalists}
        assert full[summary["best"]["trial"]] == max(full.values())
    assert (tmp_path / "runs" / "tiny" / "front.png").exists()
    children = [r for r in mlflow_runs(tmp_path) if r.data.tags["ftd.kind"] == "trial"]
    assert all({"ipc", "cpu_seconds", "val_accuracy"} <= set(r.data.metrics) for r in children)


def test_sweep_learns_from_an_earlier_one_and_counts_its_own_trials(tmp_path):
    write_sweep(tmp_path, one_set(search__trials=4))
    assert run_sweep(tmp_path, "sweep.yaml").code == 0
    later = ("output.dir=runs/later", "search.warm_start=runs/tiny", "search.sampler=tpe")
    ran = run_sweep(tmp_path, "sweep.yaml", *later)
    assert ran.code == 0, ran.out + ran.err
    assert "learns   from 4 complete trials" in ran.out
    assert sum(summary_of(tmp_path, "later")["trials"].values()) == 4
    trials, _ = read_study(str(tmp_path / "runs" / "later")) or ([], None)
    assert [t.number for t in trials] == [0, 1, 2, 3]


def test_repeats_distil_each_trial_several_times_and_compare_their_means(tmp_path):
    tree = one_set(
        search__trials=3,
        search__repeats=3,
        search__pruner="wilcoxon",
        evaluate__search_networks=2,
    )
    write_sweep(tmp_path, tree)
    ran = run_sweep(tmp_path, "sweep.yaml")
    assert ran.code == 0, ran.out + ran.err
    trials, _ = read_study(str(tmp_path / "runs" / "tiny")) or ([], None)
    whole = [t for t in trials if t.state == "complete"]
    assert whole and all(sorted(t.reports) == [2, 4, 6, 8, 10, 12] for t in whole)
