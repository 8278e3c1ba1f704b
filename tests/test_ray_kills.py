"""What survives when a driver is killed at any moment, or its head node is lost."""

import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fleet_helpers import files_of
from ray.cluster_utils import Cluster
from ray_helpers import (
    SWEEP_TIMEOUT,
    environment,
    mlflow_runs,
    run_sweep,
    running_sweep,
    summary_of,
    tiny,
    wait_until,
    write_sweep,
)

from ftd_ray.search import Ended, read_study

KILLS = 10
LATE = (2, 5, 8)
"""Of the kills, those that come when trials are at work for sure."""
TRIALS = 6
STATES = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}


def sweep(concurrency: int) -> dict[str, Any]:
    """Trials of a few seconds, of which TPE chooses the later half and ASHA prunes some."""
    return tiny(
        experts__lr=0.1,
        distill__iterations=40,
        distill__syn_steps={"choice": [2, 3, 4]},
        evaluate={
            "every": 10, "search_networks": 1, "search_epochs": 40, "networks": 2, "epochs": 40,
        },
        search={
            "trials": TRIALS, "concurrency": concurrency, "sampler": "tpe", "startup_trials": 3,
            "pruner": "asha", "reduction_factor": 2,
        },
    )  # fmt: skip


def ended(folder: Path) -> list[Ended]:
    found = read_study(str(folder / "runs" / "tiny"))
    assert found is not None
    return found[0]


def assert_whole(folder: Path) -> None:
    """Exactly the trials asked for, each once, and the same in the study, summary and MLflow."""
    trials, summary = ended(folder), summary_of(folder)
    assert [t.number for t in trials] == list(range(TRIALS))
    assert summary["state"] == "done" and summary["interrupted"] == 0
    assert summary["trials"] == {
        s: sum(t.state == s for t in trials) for s in ("complete", "pruned", "failed")
    }
    runs = mlflow_runs(folder)
    assert [r.info.run_name for r in runs if r.info.status == "RUNNING"] == []
    children = [r for r in runs if r.data.tags["ftd.kind"] == "trial"]
    told = {int(r.data.tags["ftd.trial"]): r for r in children}
    assert len(children) == TRIALS and sorted(told) == list(range(TRIALS))
    for t in trials:
        run = told[t.number]
        assert (run.info.status, run.data.tags["ftd.state"]) == (STATES[t.state], t.state)
        if t.value is not None:
            assert run.data.metrics["val_accuracy"] == pytest.approx(t.value)
    assert Counter(r.data.tags["ftd.kind"] for r in runs)["sweep"] == 1
    assert list((folder / "runs" / "tiny" / "trials").glob("*/checkpoint")) == []


def reports(folder: Path) -> bool:
    """Whether the driver of now has told of a trial at work."""
    return "  step  " in (folder / "stdout.txt").read_text()


@pytest.mark.heavy
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("concurrency", [1, 2])
def test_driver_killed_ten_times_at_random_moments_loses_and_doubles_nothing(tmp_path, concurrency):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, folder):
        write_sweep(place, sweep(concurrency))
    undisturbed = run_sweep(whole, "sweep.yaml", timeout=600)
    assert undisturbed.code == 0, undisturbed.out + undisturbed.err
    assert_whole(whole)
    moments = random.Random(concurrency)
    for kill in range(KILLS):
        with running_sweep(folder, "sweep.yaml", "--resume") as process:
            if kill in LATE:
                wait_until(
                    "a report",
                    lambda p=process: reports(folder) or p.poll() is not None,
                    seconds=SWEEP_TIMEOUT,
                )
                time.sleep(moments.uniform(0, 3))
            else:
                time.sleep(moments.uniform(2, 9))
            process.kill()
    resumed = run_sweep(folder, "sweep.yaml", "--resume", timeout=600)
    assert resumed.code == 0, resumed.out + resumed.err
    assert_whole(folder)
    if concurrency == 1:
        ours, theirs = (ended(f) for f in (folder, whole))
        assert [(t.state, t.params, t.reports) for t in ours] == [
            (t.state, t.params, t.reports) for t in theirs
        ]
        best = Path("runs", "tiny", "best", "synthetic.npz")
        assert (folder / best).read_bytes() == (whole / best).read_bytes()
    else:  # what is pruned depends on who came first; a trial that both completed is the same
        by_point = {(t.number, str(t.params)): t for t in ended(whole) if t.state == "complete"}
        for t in ended(folder):
            twin = by_point.get((t.number, str(t.params)))
            if t.state == "complete" and twin is not None and twin.repeat == t.repeat:
                assert t.reports == twin.reports


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_sweep_whose_head_node_is_lost_goes_on_elsewhere(tmp_path):
    write_sweep(tmp_path, sweep(2))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        arguments = ("sweep.yaml", "--address", cluster.address)
        with running_sweep(tmp_path, *arguments, env=environment()) as process:
            output = tmp_path / "stdout.txt"
            wait_until("a report", lambda: "step    20" in output.read_text(), seconds=180)
            cluster.remove_node(cluster.head_node, allow_graceful=False)
            process.send_signal(signal.SIGKILL)  # it ran there
    finally:
        cluster.shutdown()
    store = files_of(tmp_path / "store")
    resumed = run_sweep(tmp_path, "sweep.yaml", "--resume")
    assert resumed.code == 0, resumed.out + resumed.err
    assert_whole(tmp_path)
    after = files_of(tmp_path / "store")
    assert all(after[name] == content for name, content in store.items())
