"""A cluster that really runs: ``ray up`` of clusters/on-prem.yaml on three hosts, sweeps on all of
them, hosts that lose power in the middle, and ``ray down``. The tests are one story, in this order.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from lab import Host, lacking, namespace
from lab_cluster import SECONDS, Lab
from ray_helpers import wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.unproven, pytest.mark.timeout(4 * SECONDS)]

TRIALS = 6
EXPERTS = 3
EPOCHS = 4
SETS = 2

SMALL = (
    f"experts.count={EXPERTS}",
    f"experts.epochs={EPOCHS}",
    "experts.network=ConvNetD1W16",
    "experts.rho={choice: [0.0, 0.01]}",
    "distill.syn_steps={choice: [5, 10]}",
    "distill.expert_epochs=1",
    "distill.max_start_epoch=2",
    "distill.iterations=60",
    "evaluate.every=10",
    "evaluate.search_networks=1",
    "evaluate.search_epochs=50",
    "evaluate.networks=2",
    "evaluate.epochs=50",
    f"search.trials={TRIALS}",
    "search.concurrency=3",
    "search.sampler=random",
    "search.pruner=none",
)
"""The digits' sweep, made to take about a minute; every host has work in it."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if reason := lacking():
        pytest.skip(reason)
    pytest.importorskip("aiohttp_cors", reason="`ray job submit` takes ray[default]: extra `lab`")
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def lab(hosts: Lab) -> Lab:
    """The lab with all of its hosts in the cluster."""
    hosts.assemble()
    return hosts


def assert_whole(lab: Lab, sweep: str) -> None:
    """Exactly the trials asked for, none failed; every expert once; no run goes on."""
    found = lab.results(sweep)
    trials, summary = found["trials"], found["summary"]
    assert [(t["number"], t["state"]) for t in trials] == [(i, "complete") for i in range(TRIALS)]
    assert (summary["state"], summary["interrupted"], found["interrupted"]) == ("done", 0, 0)
    assert summary["trials"] == {"complete": TRIALS, "pruned": 0, "failed": 0}
    assert_runs(found["runs"])
    sets = found["store"]["sets"]
    everything = {str(i): EPOCHS for i in range(EXPERTS)}
    assert [(s["experts"], s["problems"]) for s in sets] == [(everything, [])] * SETS
    assert found["store"]["quarantined"] == [] and not any(s["quarantined"] for s in sets)
    published = set(lab.published(sweep))  # a put that was answered late is tried again
    states = Counter(re.sub(r"(manifest-\d+).*", r"\1", r.path) for r in published)
    assert set(states.values()) == {1}  # no epochs of an expert were trained twice


def assert_runs(runs: list[dict[str, Any]]) -> None:
    """One run of the sweep, one of each trial and one of each expert set, all of them over."""
    assert {r["status"] for r in runs} == {"FINISHED"}
    kinds = Counter(r["tags"]["ftd.kind"] for r in runs)
    assert (kinds["sweep"], kinds["trial"]) == (1, TRIALS)
    numbers = sorted(int(r["tags"]["ftd.trial"]) for r in runs if r["tags"]["ftd.kind"] == "trial")
    assert numbers == list(range(TRIALS))


def test_sweep_submitted_as_a_job_uses_every_host(lab):
    said = lab.submit("whole", "whole", *SMALL)
    assert "succeeded" in said
    assert_whole(lab, "whole")
    everyone = {h.address for h in lab.room.hosts}
    assert {r.host for r in lab.published("whole")} == everyone
    assert lab.places("TrialWorker") == everyone


def test_sweep_goes_on_when_a_worker_loses_power(lab):
    lost = lab.workers[1]
    lab.submit("worker-lost", "worker-lost", *SMALL, wait=False)
    wait_until("trials on it", lambda: at_work(lost), seconds=SECONDS, every=0.5)
    lab.room.power_off(lost)
    lab.wait_for("worker-lost")
    assert_whole(lab, "worker-lost")


def test_sweep_whose_head_loses_power_is_resumed_after_another_ray_up(lab):
    lab.submit("head-lost", "head-lost", *SMALL, wait=False)
    wait_until("reports", lambda: "  step " in lab.log("head-lost"), seconds=SECONDS, every=1)
    lab.room.power_off(lab.head)
    lab.assemble()
    said = lab.submit("head-again", "head-lost", *SMALL, "--resume")
    assert "succeeded" in said
    assert_whole(lab, "head-lost")


def test_ray_down_leaves_mlflow_on_the_head_and_nothing_else(lab):
    lab.down()

    def left() -> list[str]:
        running = [(h, title(p)) for h in lab.room.hosts for p in h.processes()]
        return [t for h, t in running if t and not (h is lab.head and "mlflow" in t)]

    wait_until("the end of Ray", lambda: not left(), seconds=SECONDS, every=1)
    spaces = {namespace(h.pid) for h in lab.room.hosts}
    lab.close()
    assert not spaces & {namespace(p) for p in psutil.pids()}


def at_work(host: Host) -> bool:
    """Whether a host has a trial's worker in the middle of a trial."""
    return any(title(p).startswith("ray::TrialWorker.") for p in host.processes())


def title(process: psutil.Process) -> str:
    """Its command line; empty when it has just ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
