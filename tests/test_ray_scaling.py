"""Clusters that grow: what an autoscaler is asked for, what comes, and that all goes again."""

import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from autoscaling_helpers import Autoscaling, autoscaling_cluster, free_port
from fleet_helpers import WatchedBroker, ask, order_for, watched_broker
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import ClusterStatusFormatter
from ray_helpers import Ran, finished, parse_tiny, running_sweep, tiny, wait_until, write_sweep

from ftd.errors import UserError
from ftd_ray.autoscaler import (
    Autoscaler,
    NodeType,
    find_autoscaler,
    last_failure,
    look,
    read_file,
    read_status,
    status_words,
)
from ftd_ray.cluster import _check_held
from ftd_ray.experts import fleet
from ftd_ray.experts.orders import FleetStatus, NodeStatus
from ftd_ray.experts.room import room_for
from ftd_ray.plan import Need, make_plan
from ftd_ray.waiting import WAIT_SECONDS, NodeWatch

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests

ROOT = Path(__file__).parents[1]

FILE = {
    "max_workers": 6,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}},
        "gpu": {"resources": {"CPU": 8, "GPU": 2, "memory": 32e9}, "max_workers": 4},
        "cpu": {"resources": {"CPU": 16, "memory": 64e9}},
    },
}
"""A cluster's file, as far as it says what may be started."""


# --- what a cluster's file allows -----------------------------------------------------------


def test_file_says_how_many_nodes_of_which_type_may_be_started():
    found = read_file(FILE)
    assert found.kinds() == [
        {"CPU": 8, "GPU": 2, "memory": 32e9},
        {"CPU": 16, "memory": 64e9},
    ]
    assert str(found) == "4 gpu and 6 cpu, 6 nodes in all"


@pytest.mark.parametrize(
    ("size", "room"),
    [
        ((1, 0), 2 * 8 + 4 * 16 + 2 * 8),  # the larger ones first
        ((1, 1), 4 * 2),
        ((1, 0.5), 4 * 4),
        ((8, 1), 4 * 1),
        ((0.5, 0, int(32e9)), 6 * 2),
        ((32, 0), 0),
        ((1, 3), 0),
    ],
)
def test_room_is_that_of_all_nodes_that_may_be_started(size, room):
    assert read_file(FILE).room_for(*size) == room


def test_room_on_a_kind_of_gpu_is_that_of_types_that_say_they_have_it():
    types = {"L4": 3, "T4": 2}
    found = Autoscaler(
        tuple(
            NodeType(kind, most, {"CPU": 8, "GPU": 1, f"accelerator_type:{kind}": 1})
            for kind, most in types.items()
        )
    )
    assert [found.room_for(1, 0.5, 0, kind) for kind in (None, "L4", "T4", "A10G")] == [10, 6, 4, 0]


def test_type_that_leaves_its_resources_to_the_machine_may_hold_anything():
    found = read_file(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    assert str(found) == "6 gpu_spot and 2 gpu_on_demand"
    assert found.kinds() is None
    assert found.room_for(1, 0.25) == Autoscaler().room_for(1, 0.25) == float("inf")
    _check_held(Need("an expert", 1, 1, 0), [{"CPU": 1}], found)


@pytest.mark.parametrize("later", [read_file(FILE), Autoscaler()], ids=["known", "unknown"])
def test_what_a_node_may_hold_later_on_is_not_refused(later):
    _check_held(Need("an expert", 1, 1, 0), [{"CPU": 1}], later)


def test_what_no_node_may_ever_hold_is_refused_with_what_there_may_be():
    refused = r"^a trial takes 32 CPUs, and there are 16 on any node .* \(4 gpu and 6 cpu, 6 nodes"
    with pytest.raises(UserError, match=refused):
        _check_held(Need("a trial", 32, 1, 0), [{"CPU": 4}], read_file(FILE))


@pytest.mark.parametrize(
    ("need", "nodes", "reason"),
    [
        (
            Need("an expert", 2, 0, 0),
            [{"CPU": 0}, {"CPU": 1}, {"CPU": 1}],
            "takes 2 CPUs, and there is 1 on any one node",
        ),
        (
            Need("an expert", 1, 0.5, 0),
            [{"CPU": 4}],
            "takes 0.5 GPU, and there are 0 in the cluster",
        ),
        (
            Need("an expert", 2, 1, 0),
            [{"CPU": 1, "GPU": 1}, {"CPU": 8}],
            r"an expert \(2 CPU and 1 GPU\) has no room on any one node",
        ),
    ],
    ids=["the largest node is too small", "nothing of it", "no node has both"],
)
def test_what_no_node_holds_is_refused_with_what_comes_closest(need, nodes, reason):
    for order in (nodes, nodes[::-1]):
        with pytest.raises(UserError, match=reason):
            _check_held(need, order, None)


def test_expert_and_trial_may_need_different_nodes():
    nodes = [{"CPU": 1, "GPU": 1}, {"CPU": 8}]
    for need in (Need("an expert", 1, 1, 0), Need("a trial", 8, 0, 0)):
        _check_held(need, nodes, None)


# --- whether there is one -------------------------------------------------------------------


@pytest.fixture
def monitor(tmp_path) -> Iterator[Callable[[str], None]]:
    """Starts a process with the options of an autoscaler's."""
    started = []

    def start(*words: str) -> None:
        process = subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=-1)
        started.append(process)

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_autoscaler_is_found_by_the_options_of_its_process(monitor, tmp_path, monkeypatch):
    monkeypatch.delenv("KUBERAY_GEN_RAY_START_CMD", raising=False)
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(FILE, sort_keys=False))
    a, b, c, d = (free_port() for _ in range(4))
    for port, file in ((a, "cluster.yaml"), (b, "gone.yaml")):
        monitor(f"--gcs-address=head:{port}", f"--autoscaling-config={tmp_path / file}")
    monitor(f"--gcs-address=head:{c}")
    wait_until("the processes", lambda: look(f"head:{a}") and look(f"head:{b}"))
    assert look(f"10.0.0.1:{a}") == read_file(FILE)
    assert look(f"10.0.0.1:{b}") == Autoscaler()
    assert look(f"10.0.0.1:{c}") is look(f"10.0.0.1:{d}") is None


def test_what_the_cloud_answered_last_is_found_in_its_log(monitor, tmp_path):
    port = free_port()
    line = "INFO node_provider.py:491 -- Failed to launch {} nodes of type gpu: {}\n"
    logged = line.format(2, "no quota") + "INFO other\n" + line.format(1, "sold out") + "INFO x\n"
    (tmp_path / "monitor.log").write_text(logged)
    options = (f"--gcs-address=head:{port}", "--autoscaling-config=x", f"--logs-dir={tmp_path}")
    assert last_failure(f"head:{port}") == ""
    monitor(*options)
    found = wait_until("the process", lambda: last_failure(f"head:{port}"))
    assert found == "1 nodes of type gpu: sold out"


@pytest.mark.parametrize(
    ("command", "found"),
    [("ray start --head --no-monitor --block", Autoscaler()), ("ray start --head --block", None)],
)
def test_in_kubernetes_it_is_told_by_the_heads_start_command(command, found, monkeypatch):
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", command)
    assert look(f"head:{free_port()}") == found


# --- word of nodes that do not come ---------------------------------------------------------


def test_words_of_ray_status_say_what_is_pending_and_what_failed():
    launches = [
        LaunchRequest("g5", "gpu_worker", 2, LaunchRequest.Status.PENDING, 0),
        LaunchRequest("g5", "gpu_worker", 1, LaunchRequest.Status.FAILED, 0, 0, "no capacity"),
    ]
    status = ClusterStatus(pending_launches=launches[:1], failed_launches=launches[1:])
    said = read_status(ClusterStatusFormatter.format(status, verbose=True))
    assert re.fullmatch(
        r"pending: gpu_worker, \d launching; recent failures: gpu_worker: LaunchFailed .* - "
        "no capacity",
        said,
    )
    nothing = read_status(ClusterStatusFormatter.format(ClusterStatus(), verbose=True))
    assert nothing == "pending: (no pending nodes); recent failures: (no failures)"
    assert read_status("No cluster status.") == "ray status does not say"


class Watched:
    """A NodeWatch in a time of its own, and what it says."""

    def __init__(self, autoscaler: Autoscaler | None, **changes: Any) -> None:
        self.said: list[str] = []
        self.now = 0.0
        self._watch = NodeWatch(
            parse_tiny(**changes),
            autoscaler,
            self.said.append,
            words=lambda: "pending: nothing",
            clock=lambda: self.now,
        )

    def after(self, seconds: float, *, starting: int, running: int) -> list[str]:
        """What was said so far, when so much time has passed and that is known."""
        self.now += seconds
        status = FleetStatus(starting=starting, nodes={"a": NodeStatus(running=running)})
        self._watch.look(status)
        time.sleep(0.2)  # it finds out in a thread
        self._watch.look(FleetStatus(starting=starting, nodes=status.nodes))
        return self.said


def test_user_is_told_once_why_no_node_came_and_again_after_twice_the_time():
    watched = Watched(read_file(FILE), resources__gpus_per_expert=0.25)
    assert watched.after(0, starting=3, running=0) == []
    assert watched.after(WAIT_SECONDS - 1, starting=3, running=0) == []
    assert watched.after(1, starting=3, running=0) == [
        "warning    no node has had room for an expert (1 CPU and 0.25 GPU) for 5 min. The "
        "autoscaler may start 4 gpu and 6 cpu, 6 nodes in all, and says: pending: nothing"
    ]
    assert len(watched.after(WAIT_SECONDS - 1, starting=3, running=0)) == 1
    assert len(watched.after(1, starting=3, running=0)) == 2


@pytest.mark.parametrize(("starting", "running"), [(3, 1), (0, 0)])
def test_nothing_is_said_while_something_runs_or_nothing_waits(starting, running):
    watched = Watched(read_file(FILE))
    watched.after(0, starting=3, running=0)
    watched.after(WAIT_SECONDS / 2, starting=starting, running=running)
    assert watched.after(WAIT_SECONDS - 1, starting=3, running=0) == []
    assert watched.after(WAIT_SECONDS - 1, starting=3, running=0) == []


def test_without_an_autoscaler_the_user_is_told_to_add_a_node():
    watched = Watched(None)
    watched.after(0, starting=1, running=0)
    (said,) = watched.after(WAIT_SECONDS, starting=1, running=0)
    assert said.endswith("The cluster has no autoscaler: make room, or add a node")


# --- configuration --------------------------------------------------------------------------


def test_plan_names_the_most_experts_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan(parse_tiny(resources__max_experts_at_once=3))
    assert "resources  an expert 1 CPU (at most 3 at once), a trial 1 CPU" in plan.text([])
    assert "resources  an expert 1 CPU (at most 3 at once)" in plan.experts_text([])


def test_no_expert_at_all_is_refused():
    with pytest.raises(UserError, match="max_experts_at_once=0 must be at least 1, or null"):
        parse_tiny(resources__max_experts_at_once=0)


# --- a cluster that grows -------------------------------------------------------------------

TYPES = {
    "cpu_worker": {"resources": {"CPU": 1}, "max_workers": 3},
    "gpu_worker": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
}


@pytest.mark.heavy
def test_why_no_node_comes_is_told_by_the_autoscaler_itself(tmp_path):
    provider = "autoscaling_helpers.SoldOut"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        with autoscaling_cluster(tmp_path, TYPES, provider=provider) as cluster:
            ray.init(cluster.address, log_to_driver=False)
            try:
                waits = ray.remote(num_gpus=1)(lambda: 0).remote()
                said = wait_until(
                    "word of the failure",
                    lambda: re.search(".*LaunchFailed.*; last: .*", status_words()),
                )
                del waits
            finally:
                ray.shutdown()
    assert re.search(
        "recent failures: gpu_worker: LaunchFailed.*"
        r"; last: 1 nodes of type gpu_worker: .*no g5\.2xlarge is left$",
        said.string,
    )


@pytest.fixture(scope="module")
def growing(tmp_path_factory) -> Iterator[Autoscaling]:
    """A head without room for anything, and the types of nodes that may be started."""
    folder = tmp_path_factory.mktemp("growing")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        with autoscaling_cluster(folder, TYPES) as cluster:
            ray.init(cluster.address, log_to_driver=False)
            try:
                yield cluster
            finally:
                ray.shutdown()


def workers_alive() -> set[str]:
    """The nodes beside the head."""
    heads = "node:__internal_head__"
    return {n["NodeID"] for n in ray.nodes() if n["Alive"] and heads not in n["Resources"]}


def at_work(cluster: Autoscaling) -> set[str]:
    """Nodes on which somebody has taken a CPU."""
    status = get_cluster_status(cluster.address)
    return {n.node_id for n in status.active_nodes if n.used_resources().get("CPU")}


def watch_to_the_end(
    cluster: Autoscaling, folder: Path, *args: str, module: str
) -> tuple[Ran, set[str], set[str]]:
    """Runs a command there; also the nodes that came, and those that were at work."""
    came, worked = set[str](), set[str]()
    words = ("sweep.yaml", "--address", cluster.address, *args)
    with running_sweep(folder, *words, module=module) as process:

        def over() -> bool:
            came.update(workers_alive())
            worked.update(at_work(cluster))
            return process.poll() is not None

        wait_until("the end", over, seconds=600, every=0.3)
    return finished(folder, process.returncode), came, worked


def assert_all_go(cluster: Autoscaling) -> None:
    """Nothing of ours keeps a node alive, or asks for one."""
    wait_until("the nodes' end", lambda: not workers_alive(), seconds=180, every=0.5)
    assert get_cluster_status(cluster.address).resource_demands.ray_task_actor_demand == []


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_filling_brings_nodes_uses_all_that_come_and_lets_them_go(growing, tmp_path):
    assert workers_alive() == set()
    long = {"count": 9, "epochs": 60, "batch_size": 8, "rho": 0.01}
    changes: dict[str, Any] = {f"experts__{k}": v for k, v in long.items()}
    write_sweep(tmp_path, tiny(**changes, resources__max_experts_at_once=3))
    ran, came, worked = watch_to_the_end(growing, tmp_path, module="ftd_ray.experts")
    assert ran.code == 0, ran.out + ran.err
    assert "The autoscaler may start 3 cpu_worker and 2 gpu_worker. It is asked for" in ran.out
    assert "9 experts built, 0 were there" in ran.out
    assert "at most 3 at a time" in ran.out
    assert len(came) == 3
    assert worked == came
    assert_all_go(growing)


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_search_brings_nodes_for_its_trials_and_its_cache_lets_them_go(growing, tmp_path):
    assert workers_alive() == set()
    many = tiny(
        experts__rho=0.01,
        distill__iterations=400,
        evaluate__every=100,
        search__trials=4,
        search__concurrency=2,
    )
    write_sweep(tmp_path, many)
    ran, came, worked = watch_to_the_end(growing, tmp_path, module="ftd_ray.sweep")
    assert ran.code == 0, ran.out + ran.err
    assert "and for 2 trials at a time" in ran.out
    assert len(came) > 1
    assert worked == came
    assert_all_go(growing)


class Patient:
    """An expert actor that trains nothing, and ends a build when it is told to."""

    def node(self) -> str:
        return fleet.node_name()

    def build(
        self, work: bytes, key: str, index: int, share: float | None, broker: Any
    ) -> float | None:
        folder = Path(pickle.loads(work))
        (folder / f"begun-{index}").write_text(self.node())
        while not (folder / "enough").exists():
            time.sleep(0.1)
        return 1.0


class PatientBroker(WatchedBroker):
    expert_actor = Patient


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_experts_that_share_gpus_bring_as_many_nodes_as_the_file_allows(growing, tmp_path):
    assert find_autoscaler() == Autoscaler(
        (
            NodeType("cpu_worker", 3, {"CPU": 1}),
            NodeType("gpu_worker", 2, {"CPU": 8, "GPU": 1}),
        ),
        8,
    )
    assert [room_for(1, 0), room_for(1, 0.25), room_for(1, 1)] == [19, 8, 2]
    handle = watched_broker(tmp_path / "store", PatientBroker)
    order = order_for(tmp_path / "store", gpus=0.25, count=12)
    order = replace(order, work=pickle.dumps(str(tmp_path)))
    answer = handle.ensure.remote(order)
    begun = wait_until(
        "builds on both nodes",
        lambda: len(found := list(tmp_path.glob("begun-*"))) == 8 and found,
        seconds=300,
    )
    assert len({path.read_text() for path in begun}) == len(workers_alive()) == 2
    (tmp_path / "enough").touch()
    assert ask(answer) == list(range(12))
    assert_all_go(growing)
    ray.kill(handle)


@pytest.mark.heavy
def test_expert_that_no_node_may_ever_hold_is_refused(growing, tmp_path):
    write_sweep(tmp_path)
    ran, came, _ = watch_to_the_end(
        growing, tmp_path, "resources.cpus_per_expert=9", module="ftd_ray.experts"
    )
    assert ran.code == 2, ran.out + ran.err
    assert "an expert takes 9 CPUs, and there" in ran.err
    assert "(3 cpu_worker and 2 gpu_worker)" in ran.err and ran.err.count("\n") == 1
    assert came == set()
