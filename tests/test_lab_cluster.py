"""A cluster that really runs: ``ray up`` of clusters/on-prem.yaml on three hosts, sweeps on all of
them, hosts that fail or lose power in the middle, and ``ray down``. One lab serves all, in turn.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from grpc_helpers import UNAUTHENTICATED
from lab import HOME, Host, lacking, namespace
from lab_cluster import CHECKOUT, CLIENT_PORT, DASHBOARD, PYTHON, RAY_PORT, SECONDS, TRACKING, Lab
from ray_helpers import wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(2 * SECONDS)]

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
"""The digits' sweep, made to take less than a minute; every host has work in it."""

JOIN = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='CRITICAL')"
KNOCK = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=9)"
CALL = """
import sys
folder, port, method, *token = sys.argv[1:]
sys.path.append(folder)
from grpc_helpers import grpc_status
print(grpc_status(int(port), method, **{"authorization": f"Bearer {t}" for t in token}))
"""

CALLS = {
    RAY_PORT: "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    CLIENT_PORT: "/ray.rpc.RayletDriver/ClusterInfo",
}
"""A call that a server on each of the head's open ports takes from those who have the token."""

REFUSED = "AuthenticationError|UNAUTHENTICATED"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if reason := lacking():
        pytest.skip(reason)
    if not PYTHON.exists():
        pytest.skip(f"the lab's Python is not at {PYTHON}: `make test-heavy` puts it there")
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def lab(hosts: Lab) -> Lab:
    """The lab with all of its hosts in the cluster."""
    hosts.assemble()
    return hosts


@pytest.fixture(scope="module")
def undisturbed(hosts: Lab) -> dict[str, Any]:
    """What a sweep of which nothing is lost leaves."""
    hosts.assemble()
    assert "succeeded" in hosts.submit("undisturbed", "undisturbed", *SMALL)
    return hosts.results("undisturbed")


def assert_whole(lab: Lab, sweep: str, found: dict[str, Any]) -> None:
    """Exactly the trials asked for, none failed; every expert once; no run goes on."""
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


def outcomes(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What every trial of a sweep came to, by its number."""
    return [(t["params"], t["value"]) for t in found["trials"]]


def test_sweep_submitted_as_a_job_uses_every_host(lab, undisturbed):
    assert_whole(lab, "undisturbed", undisturbed)
    everyone = {h.address for h in lab.hosts}
    assert {r.host for r in lab.published("undisturbed")} == everyone
    assert lab.places("TrialWorker") == everyone


def test_strangers_are_refused_by_the_cluster_and_its_jobs(lab):
    strangers = (
        ("RAY_AUTH_MODE=disabled",),
        ("RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN={'0' * 64}"),
    )
    there = f"{lab.head.address}:{RAY_PORT}"
    submit = ("ray", "job", "submit", f"--address={DASHBOARD}", "--", "touch", "/tmp/submitted")
    for said in strangers:
        ran = lab.stranger.run("env", *said, "python", "-c", JOIN, there)
        assert ran.returncode and re.search(REFUSED, ran.stdout + ran.stderr), said
        ran = lab.head.run("env", "HOME=/tmp/nobody", *said, *submit)
        assert ran.returncode and re.search(REFUSED, ran.stdout + ran.stderr), said
    assert lab.head.run("test", "-e", "/tmp/submitted").returncode == 1
    for address in (DASHBOARD, TRACKING):  # only for those who are on the head
        port = address.rpartition(":")[2]
        ran = lab.stranger.run("python", "-c", KNOCK, lab.head.address, port)
        assert "ConnectionRefusedError" in ran.stderr, port
    token = lab.head.check("cat", ".ray/auth_token").strip()
    for port, method in CALLS.items():
        call = ("python", "-c", CALL, str(CHECKOUT / "tests"), str(port), method)
        assert lab.head.check(*call).strip() == UNAUTHENTICATED
        assert lab.head.check(*call, "0" * 64).strip() == UNAUTHENTICATED
        assert lab.head.check(*call, token).strip() != UNAUTHENTICATED


def test_sweep_goes_on_when_a_worker_loses_power(lab, undisturbed):
    lost = lab.workers[1]
    lab.submit("worker-lost", "worker-lost", *SMALL, wait=False)
    wait_until("trials on it", lambda: at_work(lost), seconds=SECONDS, every=0.5)
    lab.room.power_off(lost)
    lab.wait_for("worker-lost")
    found = lab.results("worker-lost")
    assert_whole(lab, "worker-lost", found)
    assert outcomes(found) == outcomes(undisturbed)


def test_worker_that_fails_every_task_costs_no_trial(lab, undisturbed):
    sick, cache = lab.workers[0], str(HOME / ".cache")
    sick.check("mkdir", "-p", cache)
    sick.check("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", cache)  # as a disk that has failed
    lab.submit("sick", "sick", *SMALL)
    sick.check("umount", cache)
    found = lab.results("sick")
    assert_whole(lab, "sick", found)
    assert outcomes(found) == outcomes(undisturbed)
    assert sick.address not in {r.host for r in lab.published("sick")}
    named = found["summary"]["left_out"]  # it has one place, and may not get three tasks in time
    assert all(sick.address in why and "Read-only" in why for why in named)


def test_sweep_whose_head_loses_power_is_resumed_after_another_ray_up(lab, undisturbed):
    lab.submit("head-lost", "head-lost", *SMALL, wait=False)
    wait_until("reports", lambda: "  step " in lab.log("head-lost"), seconds=SECONDS, every=1)
    lab.room.power_off(lab.head)
    lab.assemble()
    said = lab.submit("head-again", "head-lost", *SMALL, "--resume")
    assert "succeeded" in said
    found = lab.results("head-lost")
    assert_whole(lab, "head-lost", found)
    assert outcomes(found) == outcomes(undisturbed)


def test_ray_down_leaves_nothing_running(lab):
    lab.down()

    def left() -> list[str]:
        running = [title(p) for h in lab.hosts for p in h.processes()]
        return [t for t in running if t]

    wait_until("the end of all", lambda: not left(), seconds=SECONDS, every=1)
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
