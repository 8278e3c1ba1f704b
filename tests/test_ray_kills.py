"""What survives when a driver is killed at any moment. Chaos (`chaos.py`) kills everything else."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from ray_helpers import (
    SWEEP_TIMEOUT,
    mlflow_runs,
    run_sweep,
    running_sweep,
    summary_of,
    tiny,
    wait_until,
    write_sweep,
)

from ftd_ray.search import Ended, read_study

KILLS = 6
LATE = (2, 4)
"""Of the kills, those that come when trials are at work for sure."""
TRIALS = 6
STATES = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}


SWEEP = tiny(
    experts__lr=0.1,
    distill__iterations=40,
    distill__syn_steps={"choice": [2, 3, 4]},
    evaluate={
        "every": 10, "search_networks": 1, "search_epochs": 40, "networks": 2, "epochs": 40,
    },
    search={
        "trials": TRIALS, "concurrency": 1, "sampler": "tpe", "startup_trials": 3,
        "pruner": "asha", "reduction_factor": 2,
    },
)  # fmt: skip
"""Trials of a few seconds, of which TPE chooses the later half and ASHA prunes some."""


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
def test_driver_killed_again_and_again_loses_and_doubles_nothing(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, folder):
        write_sweep(place, SWEEP)
    undisturbed = run_sweep(whole, "sweep.yaml", timeout=600)
    assert undisturbed.code == 0, undisturbed.out + undisturbed.err
    assert_whole(whole)
    moments = random.Random(1)
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
    ours, theirs = (ended(f) for f in (folder, whole))
    assert [(t.state, t.params, t.reports) for t in ours] == [
        (t.state, t.params, t.reports) for t in theirs
    ]
    best = Path("runs", "tiny", "best", "synthetic.npz")
    assert (folder / best).read_bytes() == (whole / best).read_bytes()
