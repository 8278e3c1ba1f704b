"""The fleet on real clusters of several nodes: what joins, what dies, who is served first."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from fleet_helpers import (
    BOUND,
    WatchedBroker,
    ask,
    assert_all_there,
    build,
    expert_processes,
    files_of,
    fleet_status,
    order_for,
    processes,
    request_for,
    running_epochs,
    set_of,
    status,
    watched_broker,
)
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.cluster_utils import Cluster
from ray_helpers import (
    QUICK_TO_NOTICE,
    Ran,
    files_below,
    finished,
    mlflow_runs,
    parse_tiny,
    run_sweep,
    running_sweep,
    summary_of,
    tiny,
    wait_until,
    write_sweep,
)

from ftd.data import describe
from ftd.errors import Diverged, UserError
from ftd.trajectory import PART_EPOCHS
from ftd_ray.experts import fleet
from ftd_ray.experts.__main__ import main
from ftd_ray.experts.client import BrokerClient
from ftd_ray.experts.fleet import ExpertActor
from ftd_ray.experts.orders import FleetStatus, SetStatus, Urgency
from ftd_ray.experts.room import room_for
from ftd_ray.nodes import nodes_able
from ftd_ray.storage import PlaceError
from ftd_ray.store import TrajectoryStore

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests

LONG = {"epochs": 8, "batch_size": 8}
"""Experts that take a second or so."""


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """A cluster whose head has no room for experts; tests add nodes to it and remove them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for key, value in QUICK_TO_NOTICE.items():
            patch.setenv(key, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        try:
            ray.init(cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def nodes(head) -> Iterator[Callable[..., Any]]:
    """Adds a node to the cluster; all go when the test is over."""
    added = []

    def add(**resources: float) -> Any:
        added.append(head.add_node(wait=False, **({"num_cpus": 1} | resources)))
        head.wait_for_nodes(BOUND)
        return added[-1]

    yield add
    for node in added:
        if node in head.worker_nodes:
            head.remove_node(node)
    wait_until("the nodes' end", lambda: sum(n["Alive"] for n in ray.nodes()) == 1, seconds=60)


@pytest.fixture
def broker_for(head) -> Iterator[Callable[..., Any]]:
    """A broker to look into, which goes when the test is over."""
    started = []

    def start(store: Path, cls: type = WatchedBroker) -> Any:
        started.append(watched_broker(store, cls))
        return started[-1]

    yield start
    for handle in started:
        ray.kill(handle)


def undisturbed(folder: Path, **experts: Any) -> dict[str, bytes]:
    """The files that a store has when nothing happens while it is filled."""
    request = request_for(folder, **experts)
    for index in range(request.experts.count):
        build(request, index)
    return files_of(folder)


def demand(cluster: Cluster) -> list[dict[str, float]]:
    """What an autoscaler is told that tasks and actors wait for."""
    found = get_cluster_status(cluster.address).resource_demands.ray_task_actor_demand
    return [dict(b.bundle) for d in found for b in d.bundles_by_count for _ in range(b.count)]


# --- nodes ----------------------------------------------------------------------------------


@pytest.mark.heavy
def test_node_that_joins_is_used_at_once_and_one_that_is_removed_is_done_without(
    head, nodes, broker_for, tmp_path
):
    nodes()
    handle, order = broker_for(tmp_path / "a"), order_for(tmp_path / "a", count=6, **LONG)
    answer = handle.ensure.remote(order)
    wait_until("a build on the only node", lambda: running_epochs(handle, order))
    (first,) = fleet_status(handle).nodes
    second = nodes()

    def spread() -> bool:
        known = fleet_status(handle).nodes
        return len(known) == 2 and all(n.running == 1 for n in known.values())

    wait_until("a build on each of two nodes", spread)
    address = ray.util.get_node_ip_address()
    names = set(fleet_status(handle).nodes)
    assert first in names
    assert names == {
        f"{address}-{n['NodeID'][:6]}" for n in ray.nodes() if n["Resources"].get("CPU")
    }
    head.remove_node(second, allow_graceful=False)
    assert ask(answer) == list(range(6))
    assert_all_there(handle, order)
    assert fleet_status(handle).nodes[first].epochs_per_second > 0
    assert files_of(tmp_path / "a") == undisturbed(tmp_path / "b", count=6, **LONG)


def test_actor_without_a_place_is_demand_that_ends_with_the_queue(
    head, nodes, broker_for, tmp_path
):
    nodes()
    blocker = ray.remote(ExpertActor).options(num_cpus=1).remote()
    ask(blocker.node.remote())
    handle, order = broker_for(tmp_path), order_for(tmp_path, count=4)
    answer = handle.ensure.remote(order)
    wait_until("demand", lambda: demand(head) == [{"CPU": 1}], every=0.3)
    assert fleet_status(handle).starting == 1
    assert status(handle, order).running == {}
    ask(handle.withdraw.remote(order.asker))
    with pytest.raises(UserError, match="not wanted any more"):
        ask(answer)
    wait_until("no demand", lambda: demand(head) == [], every=0.3)
    assert ask(handle.actors.remote()) == 0
    ray.kill(blocker)


@pytest.mark.heavy
def test_node_killed_in_mid_epoch_costs_no_bit(head, nodes, broker_for, tmp_path):
    nodes(), nodes()
    long = {"count": 3, "epochs": 3 * PART_EPOCHS, "batch_size": 8}
    handle, order = broker_for(tmp_path / "a"), order_for(tmp_path / "a", **long)
    answer = handle.ensure.remote(order)
    wait_until(
        "two experts beyond their first part",
        lambda: sum(e > PART_EPOCHS for e in running_epochs(handle, order)) == 2,
    )
    victim = next(iter(head.worker_nodes))
    raylet = victim.all_processes["raylet"][0].process
    os.kill(raylet.pid, signal.SIGKILL)
    assert ask(answer) == [0, 1, 2]
    assert_all_there(handle, order)
    assert files_of(tmp_path / "a") == undisturbed(tmp_path / "b", **long)


@pytest.mark.heavy
def test_broker_killed_in_mid_epoch_costs_no_bit_and_its_actors_go_with_it(
    head, nodes, broker_for, tmp_path
):
    nodes(num_cpus=2)
    long = {"epochs": 5 * PART_EPOCHS, "batch_size": 8}
    handle, order = broker_for(tmp_path / "a"), order_for(tmp_path / "a", **long)
    answer = handle.ensure.remote(order)
    wait_until(
        "two experts beyond their first part",
        lambda: sum(e > PART_EPOCHS for e in running_epochs(handle, order)) == 2,
    )
    before = expert_processes()
    (process,) = processes("ray::WatchedBroker")
    process.send_signal(signal.SIGKILL)
    assert ask(answer) == [0, 1]
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in before)
    assert files_of(tmp_path / "a") == undisturbed(tmp_path / "b", **long)


# --- who is served first --------------------------------------------------------------------


@pytest.mark.heavy
def test_urgent_order_comes_before_the_rest_of_a_fill_whatever_it_needs(
    head, nodes, broker_for, tmp_path
):
    nodes()
    handle = broker_for(tmp_path)
    fills = [
        order_for(tmp_path, asker="fill", urgency=Urgency.FILL, count=c, rho=r, **LONG)
        for c, r in ((5, 0.01), (3, 0.02))
    ]
    filled = [handle.ensure.remote(fills[0])]
    wait_until("the fill's first build", lambda: running_epochs(handle, fills[0]))
    filled.append(handle.ensure.remote(fills[1]))
    wait_until("both fills in the queue", lambda: len(ask(handle.waiting.remote())) == 7)
    longer = {"epochs": LONG["epochs"] + 1, "batch_size": LONG["batch_size"]}
    fills.append(
        order_for(tmp_path, asker="more", urgency=Urgency.FILL, count=1, rho=0.02, **longer)
    )
    filled.append(handle.ensure.remote(fills[2]))
    wait_until("a third fill", lambda: fleet_status(handle, "more").sets)
    further = {"epochs": LONG["epochs"] + 2, "batch_size": LONG["batch_size"]}
    urgent = [
        order_for(tmp_path, asker="trial", count=2, rho=0.02, **further),
        order_for(tmp_path, asker="trial", count=1, rho=0.03),
    ]
    served = [handle.ensure.remote(o) for o in urgent]
    assert [ask(answer) for answer in served + filled] == [
        [0, 1],
        [0],
        [0, 1, 2, 3, 4],
        [0, 1, 2],
        [0],
    ]
    trained = ask(handle.trained.remote())
    assert max(Counter(trained).values()) == 1
    order = list(dict.fromkeys((key, index) for key, index, _ in trained))
    a, b, c = fills[0].key, fills[1].key, urgent[1].key
    assert order[0] == (a, 0)
    assert set(order[1:4]) == {(b, 0), (b, 1), (c, 0)}
    assert order[4:] == [(a, 1), (a, 2), (a, 3), (a, 4), (b, 2)]
    last = max(i for i, (key, index, _) in enumerate(trained) if (key, index) in order[1:4])
    assert last < trained.index((a, 1, 1))


def expected(folder: Path, **experts: Any) -> Any:
    return order_for(folder, urgency=Urgency.AHEAD, **experts)


@pytest.mark.parametrize("told", ["before", "after"])
def test_what_is_expected_is_built_by_an_actor_that_stands_and_starts_none(
    head, nodes, broker_for, tmp_path, told
):
    nodes(num_cpus=2)
    handle, first = broker_for(tmp_path), order_for(tmp_path, **LONG)
    orders = [expected(tmp_path, rho=0.02), expected(tmp_path, rho=0.03, count=1)]
    if told == "before":
        ask(handle.expect.remote(orders))
        assert ask(handle.actors.remote()) == 0
    answer = handle.ensure.remote(first)
    if told == "after":
        wait_until("a build", lambda: running_epochs(handle, first))
        ask(handle.expect.remote(orders))
    assert ask(answer) == [0, 1]
    trained = wait_for_epochs(handle, 2 * LONG["epochs"] + 3 * 3)
    assert max(Counter(trained).values()) == 1
    wait_until("the actors' end", lambda: ask(handle.actors.remote()) == 0)
    sets = fleet_status(handle).sets
    assert {k: (s.needed, set(s.built), s.present) for k, s in sets.items()} == {
        o.key: (o.count, set(range(o.count)), set(range(o.count))) for o in [first, *orders]
    }


class BusyBroker(WatchedBroker):
    """Its actors have no time to build ahead."""

    def __init__(self, *args: Any) -> None:
        fleet.AHEAD_SECONDS = 0
        super().__init__(*args)


def test_what_is_expected_and_takes_long_is_built_when_it_is_asked_for(
    head, nodes, broker_for, tmp_path
):
    nodes()
    handle, first = broker_for(tmp_path, BusyBroker), order_for(tmp_path)
    more = expected(tmp_path, rho=0.02, count=3, epochs=9)
    ask(handle.expect.remote([more]))
    assert ask(handle.ensure.remote(first)) == [0, 1]
    wait_until("the actors' end", lambda: ask(handle.actors.remote()) == 0)
    assert ask(handle.waiting.remote()) == [(more.key, i) for i in range(3)]
    assert fleet_status(handle).sets.keys() == {first.key}
    asked = order_for(tmp_path, rho=0.02, count=1)
    assert (asked.key, asked.epochs) == (more.key, 3)
    assert ask(handle.ensure.remote(asked)) == [0]
    known = status(handle, asked)
    assert (known.needed, known.epochs, known.present, set(known.built)) == (1, 3, {0}, {0})
    assert known.ours == set()
    ask(handle.withdraw.remote(asked.asker))
    assert ask(handle.waiting.remote()) == []


def test_who_asks_pays_for_what_another_only_expects(head, nodes, broker_for, tmp_path):
    nodes()
    handle, first = broker_for(tmp_path, BusyBroker), order_for(tmp_path, count=1)
    later = expected(tmp_path, rho=0.02, count=1)
    ask(handle.expect.remote([later]))
    assert ask(handle.ensure.remote(first)) == [0]
    assert ask(handle.waiting.remote()) == [(later.key, 0)]
    theirs = order_for(tmp_path, asker="they", rho=0.02, count=1)
    assert ask(handle.ensure.remote(theirs)) == [0]
    assert set(status(handle, theirs).built) == {0}
    assert fleet_status(handle).sets.keys() == {first.key, later.key}
    assert status(handle, later).built == {}


def test_what_is_expected_and_diverges_fails_whoever_asks_for_it_only(
    head, nodes, broker_for, tmp_path
):
    nodes()
    handle, first = broker_for(tmp_path), order_for(tmp_path)
    wild = order_for(tmp_path, lr=1e30)
    ask(handle.expect.remote([replace(wild, urgency=Urgency.AHEAD)]))
    assert ask(handle.ensure.remote(first)) == [0, 1]
    wait_until("the actors' end", lambda: ask(handle.actors.remote()) == 0)
    assert ask(handle.waiting.remote()) == []
    with pytest.raises(UserError, match="diverged"):
        ask(handle.ensure.remote(wild))


@pytest.mark.heavy
def test_topping_up_trains_the_difference_to_the_bits_of_asking_for_all_at_once(
    head, nodes, broker_for, tmp_path
):
    nodes(num_cpus=2)
    handle = broker_for(tmp_path / "a")
    few, many = ({"count": c, "epochs": e, "batch_size": 1200} for c, e in ((6, 10), (9, 15)))
    ask(handle.ensure.remote(order_for(tmp_path / "a", **few)))
    more = order_for(tmp_path / "a", **many)
    ask(handle.ensure.remote(more))
    trained = wait_for_epochs(handle, 9 * 15)
    assert Counter(trained) == Counter((more.key, i, e) for i in range(9) for e in range(1, 16))
    assert files_of(tmp_path / "a") == undisturbed(tmp_path / "b", **many)


def wait_for_epochs(handle: Any, count: int) -> list[tuple[str, int, int]]:
    """What was trained, when word of ``count`` epochs has come."""

    def all_of_it() -> Any:
        trained = ask(handle.trained.remote())
        return trained if len(trained) >= count else None

    return wait_until(f"word of {count} epochs", all_of_it)


# --- who wants no more ----------------------------------------------------------------------


@pytest.mark.heavy
def test_what_only_a_withdrawn_asker_wants_ends_and_what_another_wants_goes_on(
    head, nodes, broker_for, tmp_path
):
    nodes(num_cpus=2)
    handle = broker_for(tmp_path / "a")
    long = {"epochs": 40, "batch_size": 8}
    ours = order_for(tmp_path / "a", asker="we", count=4, **long)
    theirs = order_for(tmp_path / "a", asker="they", count=1, **long)
    answers = [handle.ensure.remote(o) for o in (ours, theirs)]

    def both_have_a_part() -> bool:
        return [e > PART_EPOCHS for e in running_epochs(handle, ours)] == [True, True]

    wait_until("two experts beyond their first part", both_have_a_part)
    assert ask(handle.waiting.remote()) == [(ours.key, 2), (ours.key, 3)]
    ask(handle.withdraw.remote("we"))
    with pytest.raises(UserError, match="not wanted any more"):
        ask(answers[0])
    assert ask(handle.waiting.remote()) == []
    assert ask(handle.actors.remote()) == 1
    wait_until("the end of one process", lambda: len(expert_processes()) == 1, seconds=20)
    assert status(handle, theirs).running.keys() == {0}
    left = set_of(ours, tmp_path / "a").manifest(1)
    assert left is not None and left.epochs >= PART_EPOCHS
    again = replace(order_for(tmp_path / "a", asker="we again", count=2, **long))
    assert ask(handle.ensure.remote(again)) == [0, 1]
    assert ask(answers[1]) == [0]
    assert status(handle, theirs).built.keys() | status(handle, again).built.keys() == {0, 1}
    assert files_of(tmp_path / "a") == undisturbed(tmp_path / "b", count=2, **long)


def test_withdrawal_and_the_same_order_in_one_breath_serves_the_order(
    head, nodes, broker_for, tmp_path
):
    nodes()
    handle = broker_for(tmp_path)
    short = order_for(tmp_path, asker="we", count=2, epochs=2)
    longer = order_for(tmp_path, asker="they", count=2, epochs=4)
    first = []
    for order in (short, longer):
        first.append(handle.ensure.remote(order))
        wait_until("the order", lambda a=order.asker: fleet_status(handle, a).sets)
    for asker in ("we", "they"):
        handle.withdraw.remote(asker)
    again = handle.ensure.remote(replace(longer, asker="others"))
    for answer in first:
        with pytest.raises(UserError, match="not wanted any more"):
            ask(answer)
    assert ask(again) == [0, 1]
    handle.withdraw.remote("others")
    wait_until("an end of all actors", lambda: ask(handle.actors.remote()) == 0)


class ImpatientBroker(WatchedBroker):
    def __init__(self, *args: Any) -> None:
        import ftd_ray.experts.broker as module

        module.SILENT_SECONDS = 2
        super().__init__(*args)


def test_order_of_a_silent_asker_rests_until_it_is_heard_again(head, broker_for, tmp_path):
    handle, order = broker_for(tmp_path, ImpatientBroker), order_for(tmp_path)
    answer = handle.ensure.remote(order)  # there is no node for it
    wait_until("the build in the queue", lambda: len(ask(handle.waiting.remote())) == 2)
    wait_until("an empty queue", lambda: ask(handle.waiting.remote()) == [], seconds=60)
    wait_until("no demand", lambda: demand(head) == [], every=0.3)
    assert not ray.wait([answer], timeout=0)[0]
    wait_until(
        "the build in the queue",
        lambda: fleet_status(handle) and len(ask(handle.waiting.remote())) == 2,
    )
    ask(handle.withdraw.remote(order.asker))
    with pytest.raises(UserError, match="not wanted any more"):
        ask(answer)


# --- stand-ins for experts ------------------------------------------------------------------


class StandIn:
    """An expert actor that trains nothing. Its work is pickled {"folder": ..., ...}."""

    def node(self) -> str:
        return fleet.node_name()

    def gpu_need(self, work: bytes) -> tuple[int, int]:
        todo = pickle.loads(work)
        if todo.get("dies") and self.first(todo, "measured"):
            os._exit(1)
        mine = ray.get_runtime_context().get_assigned_resources()
        (Path(todo["folder"]) / f"measured-{time.time_ns()}").write_text(repr(mine))
        kinds = [k for k in mine if k.startswith("accelerator_type:")]
        return todo["need"], todo.get("totals", {}).get(*kinds, 100) if kinds else 100

    def build(
        self, work: bytes, key: str, index: int, share: float | None, broker: Any
    ) -> float | None:
        from ftd_ray.experts.orders import GpuFull

        todo = pickle.loads(work)
        Path(todo["folder"], f"begun-{index}-{time.time_ns()}").touch()
        if (share or 1) < todo.get("fits", 0):
            time.sleep(0.5)  # so that neighbours find out at the same time
            raise GpuFull("an expert needs more GPU memory than it was given.")
        if "diverges" in todo:  # it is the first to come to its end
            end = Path(todo["folder"], "diverged")
            if index == todo["diverges"]:
                end.touch()
                raise Diverged(f"expert {index} diverged.")
            while not end.exists():
                time.sleep(0.05)
            time.sleep(0.5)
        for part in range(1, todo.get("parts", 0) + 1):
            if self.first(todo, f"{index}-{part}"):
                ray.get(broker.epoch_done.remote(key, index, part * PART_EPOCHS, 0.5))
                os._exit(1)
        while len(list(Path(todo["folder"]).glob("begun-*"))) < todo.get("meet", 0):
            time.sleep(0.05)
        began = time.time()
        time.sleep(0.3)
        gpus = f"{self.node()} {ray.get_gpu_ids()}"
        text = repr((gpus, share, began, time.time()))
        written = Path(todo["folder"], f"written-{index}")
        written.write_text(text)
        written.rename(written.with_name(f"built-{index}"))
        return 1.0

    def first(self, todo: dict[str, Any], name: str) -> bool:
        path = Path(todo["folder"], name)
        there = path.exists()
        path.touch()
        return not there


class StandInBroker(WatchedBroker):
    expert_actor = StandIn


class HastyBroker(StandInBroker):
    patience = 0


def stand_in_order(folder: Path, *, count: int, gpus: float | None, **todo: Any) -> Any:
    order = order_for(folder / "store", cpus=0.1, gpus=gpus, count=count)
    return replace(order, work=pickle.dumps({"folder": str(folder)} | todo))


def built(folder: Path) -> list[tuple[str, float, float, float]]:
    """(node and GPU, share, begin, end) of every build."""
    return [eval(p.read_text()) for p in folder.glob("built-*")]


def most_at_once(builds: list[tuple[str, float, float, float]], gpu: str) -> int:
    ours = [b for b in builds if b[0] == gpu]
    return max(sum(o[2] <= b[2] < o[3] for o in ours) for b in ours)


def test_room_is_that_of_the_nodes_that_stand(head, nodes):
    assert room_for(1, 0) == 1  # so that there is demand
    nodes(num_cpus=2, num_gpus=1)
    nodes(num_cpus=1, num_gpus=2)
    assert [room_for(*size) for size in ((1, 0), (0.5, 0), (2, 0), (64, 0))] == [3, 6, 1, 1]
    assert [room_for(*size) for size in ((1, 1), (0.5, 0.5), (0.25, 0.3))] == [2, 4, 7]
    named = nodes(num_cpus=2, num_gpus=1, resources={"accelerator_type:L4": 1})
    assert [room_for(0.5, 0.5, 0, kind) for kind in (None, "L4", "T4")] == [6, 2, 1]
    assert nodes_able(1, 0.5, 0, "L4") == {named.node_id} < nodes_able(1, 0.5, 0)
    assert nodes_able(1, 0.5, 0, "T4") == set()


@pytest.mark.heavy
def test_no_gpu_is_given_more_experts_than_its_memory_holds(head, nodes, broker_for, tmp_path):
    for _ in range(2):
        nodes(num_cpus=2, num_gpus=1)
    handle = broker_for(tmp_path / "store", StandInBroker)
    order = stand_in_order(tmp_path, count=16, gpus=None, need=30, dies=True)
    assert ask(handle.ensure.remote(order)) == list(range(16))
    builds = built(tmp_path)
    assert {share for _, share, _, _ in builds} == {1 / 3}
    gpus = {gpu for gpu, *_ in builds}
    assert 1 <= len(gpus) <= 2
    assert max(most_at_once(builds, gpu) for gpu in gpus) in {2, 3}


def test_node_takes_no_more_experts_than_its_memory_is_booked_for(
    head, nodes, broker_for, tmp_path
):
    nodes(num_cpus=2, memory=1e9)
    assert [room_for(0.1, 0, int(b)) for b in (4e8, 1e9, 0)] == [2, 1, 20]
    handle = broker_for(tmp_path / "store", StandInBroker)
    order = replace(stand_in_order(tmp_path, count=6, gpus=0), memory=int(4e8))
    assert ask(handle.ensure.remote(order)) == list(range(6))
    builds = built(tmp_path)
    assert most_at_once(builds, builds[0][0]) in {1, 2}


def test_no_more_experts_are_trained_at_a_time_than_their_orders_allow(
    head, nodes, broker_for, tmp_path
):
    nodes(num_cpus=4)
    handle = broker_for(tmp_path / "store", StandInBroker)
    order = replace(stand_in_order(tmp_path, count=6, gpus=0), at_once=2)
    assert ask(handle.ensure.remote(order)) == list(range(6))
    builds = built(tmp_path)
    assert most_at_once(builds, builds[0][0]) in {1, 2}


def test_experts_that_do_not_fit_their_share_get_one_neighbour_less(
    head, nodes, broker_for, tmp_path
):
    nodes(num_cpus=2, num_gpus=1)
    handle = broker_for(tmp_path / "store", StandInBroker)
    order = stand_in_order(tmp_path, count=6, gpus=None, need=20, fits=1 / 3)
    assert ask(handle.ensure.remote(order)) == list(range(6))
    assert {share for _, share, _, _ in built(tmp_path)} == {1 / 3}


@pytest.mark.heavy
def test_share_that_was_said_and_that_no_expert_fits_on_is_no_experts_own(
    head, nodes, broker_for, tmp_path
):
    nodes(num_cpus=2, num_gpus=1)
    handle = broker_for(tmp_path / "store", StandInBroker)
    small = stand_in_order(tmp_path, count=2, gpus=0.25, fits=1 / 3)
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ask(handle.ensure.remote(small))
    assert isinstance(raised.value.cause, PlaceError)
    assert "more GPU memory than it was given" in str(raised.value.cause)


@pytest.mark.heavy
def test_each_kind_of_gpu_has_the_share_that_was_measured_on_it(head, nodes, broker_for, tmp_path):
    totals = {"accelerator_type:T4": 40, "accelerator_type:A10G": 100, "accelerator_type:K80": 20}
    for kind in totals:
        nodes(num_cpus=2, num_gpus=1, resources={kind: 1})
    nodes(num_cpus=2, num_gpus=1)  # of no name: nothing that was measured may be applied to it
    addresses = {}
    for n in ray.nodes():
        kinds = [k for k in n["Resources"] if k in totals]
        if n["Alive"] and n["Resources"].get("GPU"):
            addresses[n["NodeID"]] = kinds[0] if kinds else None
    handle = broker_for(tmp_path / "store", StandInBroker)
    order = stand_in_order(tmp_path, count=12, gpus=None, need=30, totals=totals, meet=4)
    assert ask(handle.ensure.remote(order)) == list(range(12))
    where = [(gpu.split()[0].split("-")[-1], share) for gpu, share, *_ in built(tmp_path)]
    found = {
        (kind, share) for i, share in where for n, kind in addresses.items() if n.startswith(i)
    }
    assert found == {("accelerator_type:T4", 1), ("accelerator_type:A10G", 1 / 3)}
    assert len(list(tmp_path.glob("measured-*"))) == 3  # the smallest kind holds none


@pytest.mark.heavy
def test_gpu_of_another_kind_that_joins_is_used_with_a_share_of_its_own(
    head, nodes, broker_for, tmp_path
):
    totals = {"accelerator_type:L4": 100, "accelerator_type:T4": 40}
    nodes(num_cpus=2, num_gpus=1, resources={"accelerator_type:L4": 1})
    handle = broker_for(tmp_path / "store", HastyBroker)
    todo = {"gpus": None, "need": 30, "totals": totals}
    assert ask(handle.ensure.remote(stand_in_order(tmp_path, count=1, **todo))) == [0]
    blocker = ray.remote(ExpertActor).options(num_gpus=1).remote()
    ask(blocker.node.remote())
    answer = handle.ensure.remote(stand_in_order(tmp_path, count=4, **todo))
    wait_until("actors that wait", lambda: demand(head), every=0.3)
    nodes(num_cpus=2, num_gpus=1, resources={"accelerator_type:T4": 1})
    assert ask(answer) == [0, 1, 2, 3]
    ray.kill(blocker)
    assert {share for _, share, *_ in built(tmp_path)} == {1}


@pytest.mark.heavy
def test_experts_whose_kind_of_gpu_goes_are_built_on_another(head, nodes, broker_for, tmp_path):
    totals = {"accelerator_type:L4": 100, "accelerator_type:T4": 40}
    named = [nodes(num_cpus=2, num_gpus=1, resources={kind: 1}) for kind in totals]
    handle = broker_for(tmp_path / "store", StandInBroker)
    todo = {"gpus": None, "need": 30, "totals": totals}
    assert ask(handle.ensure.remote(stand_in_order(tmp_path, count=1, **todo))) == [0]
    blockers = [
        ray.remote(ExpertActor).options(num_gpus=1, accelerator_type=kind).remote()
        for kind in ("L4", "T4")
    ]
    for blocker in blockers:
        ask(blocker.node.remote())
    answer = handle.ensure.remote(stand_in_order(tmp_path, count=8, **todo))
    wait_until("actors that wait for each", lambda: len(demand(head)) == 3 + 1, every=0.3)
    head.remove_node(named[1])
    ray.kill(blockers[0])
    assert ask(answer) == list(range(8))
    assert {share for _, share, *_ in built(tmp_path)} <= {1 / 3, 1}


def test_first_gpu_that_comes_says_which_kinds_are_measured(head, nodes, broker_for, tmp_path):
    handle = broker_for(tmp_path / "store", StandInBroker)
    order = stand_in_order(tmp_path, count=2, gpus=None, need=30)
    answer = handle.ensure.remote(order)
    wait_until("demand", lambda: {"CPU": 0.1, "GPU": 1.0} in demand(head), every=0.3)
    assert (len(demand(head)), fleet_status(handle).starting) == (1, 1)  # for both experts
    nodes(num_cpus=2, num_gpus=1, resources={"accelerator_type:L4": 1})
    assert ask(answer) == [0, 1]
    assert len(list(tmp_path.glob("measured-*"))) == 1
    assert {share for _, share, *_ in built(tmp_path)} == {1 / 3}


def test_share_that_was_given_is_kept_to_as_well(head, nodes, broker_for, tmp_path):
    nodes(num_cpus=2, num_gpus=1)
    handle = broker_for(tmp_path / "store", StandInBroker)
    assert ask(handle.ensure.remote(stand_in_order(tmp_path, count=2, gpus=0.5))) == [0, 1]
    assert {share for _, share, *_ in built(tmp_path)} == {0.5}


@pytest.mark.parametrize(
    ("todo", "reason"),
    [
        ({"need": 40, "fits": 2}, "does not fit on a GPU"),
        ({"need": 93}, "Lower experts.batch_size"),
    ],
    ids=["by trying", "by measuring"],
)
def test_expert_that_fits_no_gpu_is_an_error(head, nodes, broker_for, tmp_path, todo, reason):
    nodes(num_cpus=2, num_gpus=1)
    handle = broker_for(tmp_path / "store", StandInBroker)
    with pytest.raises(UserError, match=reason):
        ask(handle.ensure.remote(stand_in_order(tmp_path, count=3, gpus=None, **todo)))


def test_expert_that_gets_further_each_time_is_not_given_up(head, nodes, broker_for, tmp_path):
    nodes()
    handle = broker_for(tmp_path / "store", StandInBroker)
    order = stand_in_order(tmp_path, count=1, gpus=0, parts=6)
    assert ask(handle.ensure.remote(order)) == [0]
    assert [epoch for _, _, epoch in ask(handle.trained.remote())] == [5, 10, 15, 20, 25, 30]


def test_expert_that_diverges_fails_the_orders_that_need_it_and_no_others(
    head, nodes, broker_for, tmp_path
):
    nodes()
    handle = broker_for(tmp_path / "store", StandInBroker)
    order = stand_in_order(tmp_path, count=6, gpus=0, diverges=2)
    answers = [handle.ensure.remote(o) for o in (order, replace(order, count=2))]
    with pytest.raises(UserError, match="diverged"):
        ask(answers[0])
    assert ask(answers[1]) == [0, 1]
    assert [len(list(tmp_path.glob(f"begun-{index}-*"))) for index in (0, 1)] == [1, 1]
    assert ask(handle.waiting.remote()) == []
    with pytest.raises(UserError, match="diverged"):
        ask(handle.ensure.remote(replace(order, asker="they", epochs=order.epochs + 1)))


def test_more_epochs_of_a_set_that_is_there_are_told_as_missing(head, broker_for, tmp_path):
    undisturbed(tmp_path)
    handle, more = broker_for(tmp_path), order_for(tmp_path, epochs=7)
    assert ask(handle.ensure.remote(order_for(tmp_path))) == [0, 1]
    assert status(handle, more).present == {0, 1}
    handle.ensure.remote(more)  # there is no node for it
    wait_until("the builds in the queue", lambda: len(ask(handle.waiting.remote())) == 2)
    known = status(handle, more)
    assert (known.present, known.epochs, known.ours) == (set(), 7, {0, 1})
    assert ask(handle.ensure.remote(order_for(tmp_path))) == [0, 1]
    assert status(handle, more).present == set()


class PoliteBroker(StandInBroker):
    def __init__(self, *args: Any) -> None:
        fleet.LEASE_SECONDS = 0.1
        super().__init__(*args)


def test_fill_makes_way_for_what_waits_for_a_place(head, nodes, broker_for, tmp_path):
    nodes()
    handle = broker_for(tmp_path / "store", PoliteBroker)
    order = replace(stand_in_order(tmp_path, count=100, gpus=0), cpus=1, urgency=Urgency.FILL)
    handle.ensure.remote(order)
    wait_until("the first builds", lambda: built(tmp_path))
    ask(ray.remote(lambda: None).options(num_cpus=1).remote())
    assert len(ask(handle.waiting.remote())) > 50
    ask(handle.withdraw.remote(order.asker))


class UnluckyBroker(StandInBroker):
    """The cluster does not say how large it is, and its first actors cannot be started."""

    failures = 2

    def __init__(self, *args: Any) -> None:
        def lost(*_: Any) -> int:
            raise OSError("no answer")

        def failing(*args: Any) -> Any:
            self.failures -= 1
            if self.failures >= 0:
                raise ValueError("no such size")
            return start(*args)

        start, fleet.start_actor, fleet.room_for = fleet.start_actor, failing, lost
        super().__init__(*args)


class HopelessBroker(UnluckyBroker):
    failures = 1000


def test_faults_in_starting_actors_delay_an_order(head, nodes, broker_for, tmp_path):
    nodes()
    handle = broker_for(tmp_path / "store", UnluckyBroker)
    assert ask(handle.ensure.remote(stand_in_order(tmp_path, count=2, gpus=0))) == [0, 1]


def test_actors_that_can_never_be_started_are_an_error(head, broker_for, tmp_path):
    handle = broker_for(tmp_path / "store", HopelessBroker)
    with pytest.raises(UserError, match=r"could not be started 4 times \(no such size\)"):
        ask(handle.ensure.remote(stand_in_order(tmp_path, count=3, gpus=0)))


# --- accounts -------------------------------------------------------------------------------


def told(broker: str, **changes: Any) -> FleetStatus:
    empty: dict[str, Any] = {"present": (), "built": {}, "running": {}, "ours": ()}
    now = SetStatus(needed=4, epochs=3, epochs_left=9, curves={}, broker=broker, **empty)
    return FleetStatus(sets={"key": replace(now, **changes)})


def test_expert_that_ended_with_its_broker_is_of_the_account_that_it_was_built_on():
    config = parse_tiny()
    client = BrokerClient(config, describe(config.dataset))
    client._take(told("a", present={0}, built={0: 2.0}, ours={1, 2}))
    client._take(FleetStatus())  # a new one, which has heard of nothing yet
    client._take(told("b", present={0, 1, 3}, ours={2}))
    assert client.status.sets["key"].built == {0: 2.0, 1: 0.0}
    client._take(told("b", present={0, 1, 2, 3}, built={2: 5.0}))
    assert client.status.sets["key"].built == {0: 2.0, 1: 0.0, 2: 5.0}


def test_actor_that_found_its_expert_built_says_so(tmp_path):
    class Deaf:
        epoch_done = type("Method", (), {"remote": lambda *_: None})()

    order = order_for(tmp_path)
    assert ExpertActor().build(order.work, order.key, 0, None, Deaf) > 0
    assert ExpertActor().build(order.work, order.key, 0, None, Deaf) is None


# --- drivers --------------------------------------------------------------------------------

SWEEP = tiny(
    experts__rho=0.01,
    experts__count=3,
    experts__epochs=4 * PART_EPOCHS,
    experts__batch_size=8,
    distill__iterations=12,
    evaluate__every=6,
    search__trials=1,
)


def sweep_file(folder: Path, **changes: Any) -> Path:
    """A sweep of one trial on three experts, which take a few seconds to train."""
    write_sweep(folder, SWEEP | changes)
    return folder


def best_of(folder: Path) -> dict[str, Any]:
    """The synthetic set that a sweep ended with."""
    with np.load(folder / "runs" / "tiny" / "best" / "synthetic.npz") as found:
        return {name: found[name].tobytes() for name in ("images", "labels")}


@pytest.fixture(scope="module")
def pair(head, tmp_path_factory) -> list[Path]:
    """Two sweeps that began at the same moment on one cluster and asked for the same experts."""
    node = head.add_node(wait=False, num_cpus=2)
    head.wait_for_nodes(BOUND)
    folder = tmp_path_factory.mktemp("pair")
    folders = [sweep_file(folder / n, store={"uri": str(folder / "store")}) for n in "ab"]
    args = ("sweep.yaml", "--address", head.address)
    with running_sweep(folders[0], *args) as a, running_sweep(folders[1], *args) as b:
        codes = [p.wait(timeout=240) for p in (a, b)]
    for code, where in zip(codes, folders, strict=True):
        ran = finished(where, code)
        assert code == 0, ran.out + ran.err
    head.remove_node(node)
    return folders


@pytest.mark.heavy
def test_sweeps_that_ask_at_the_same_moment_cause_one_build(pair):
    accounts = [summary_of(folder)["experts"] for folder in pair]
    assert sum(a["built"] for a in accounts) == 3
    assert all(a["built"] + a["reused"] == 3 for a in accounts)
    store = pair[0].parent / "store"
    assert len(list(store.glob("*/expert-*/manifest-*"))) == 3 * 4
    assert len(list(store.glob("*/expert-*/part-*"))) == 3 * 4
    assert best_of(pair[0]) == best_of(pair[1])


def wait_for_an_expert(folder: Path) -> None:
    """Waits until a driver has said that one or two of the three experts are there."""
    output = folder / "stdout.txt"
    wait_until(
        "the first expert",
        lambda: re.search(r"experts    [12]/3", output.read_text()),
        every=0.1,
    )


def assert_undisturbed(folder: Path, ran: Ran, pair: list[Path]) -> None:
    assert ran.code == 0, ran.out + ran.err
    assert best_of(folder) == best_of(pair[0])
    theirs = files_of(pair[0].parent / "store")
    ours = files_of(folder / "store")
    assert {n: b for n, b in ours.items() if "/quarantine/" not in n} == theirs


@pytest.mark.heavy
def test_broker_that_is_killed_is_not_noticed_by_a_sweep(head, nodes, pair, tmp_path):
    nodes(num_cpus=2)
    sweep_file(tmp_path)
    before = set(processes("ray::Broker"))
    with running_sweep(tmp_path, "sweep.yaml", "--address", head.address) as process:
        wait_for_an_expert(tmp_path)
        (victim,) = set(processes("ray::Broker")) - before
        victim.send_signal(signal.SIGKILL)
        code = process.wait(timeout=240)
    assert_undisturbed(tmp_path, finished(tmp_path, code), pair)
    account = summary_of(tmp_path)["experts"]
    assert (account["built"], account["reused"]) == (3, 0)


@pytest.mark.heavy
def test_sweep_killed_while_experts_train_is_resumed_on_the_same_cluster(
    head, nodes, pair, tmp_path
):
    nodes(num_cpus=2)
    sweep_file(tmp_path)
    args = ("sweep.yaml", "--address", head.address)
    with running_sweep(tmp_path, *args) as process:
        wait_for_an_expert(tmp_path)
        process.kill()
        process.wait(timeout=60)
    assert_undisturbed(tmp_path, run_sweep(tmp_path, *args, "--resume"), pair)


# --- damage ---------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Changes a byte in every row group."""
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 12, len(data), len(data) // 6):
        data[place] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def expert_folder(store: Path, index: int) -> Path:
    (found,) = store.glob(f"*/expert-{index:04d}")
    return found


def quarantined(store: Path) -> list[str]:
    """Folders in the quarantines of a store, without their time."""
    return sorted(p.name[: len("expert-0000")] for p in store.glob("*/quarantine/*"))


@pytest.mark.heavy
def test_experts_that_a_trial_finds_damaged_are_built_again_and_no_others(
    head, nodes, pair, tmp_path
):
    nodes(num_cpus=2)
    sweep_file(tmp_path)
    store = tmp_path / "store"
    shutil.copytree(pair[0].parent / "store", store)
    places = {}
    for index, harm in ((0, flip), (2, truncate)):
        (places[index],) = expert_folder(store, index).glob("part-0000-*")
        harm(places[index])
    untouched = {p: p.stat().st_mtime_ns for p in expert_folder(store, 1).iterdir()}
    ran = run_sweep(tmp_path, "sweep.yaml", "--address", head.address)
    assert_undisturbed(tmp_path, ran, pair)
    assert quarantined(store) == ["expert-0000", "expert-0002"]
    assert {p: p.stat().st_mtime_ns for p in expert_folder(store, 1).iterdir()} == untouched
    warnings = [line for line in ran.out.splitlines() if line.startswith("warning    ")]
    assert len(warnings) == 2
    for index, line in zip((0, 2), warnings, strict=True):
        assert f"expert {index} of set" in line and str(places[index]) in line
        assert f"{store}/{places[index].parent.parent.name}/quarantine/expert-{index:04d}-" in line
    account = summary_of(tmp_path)["experts"]
    assert (account["built"], account["reused"]) == (2, 1)


def test_expert_whose_last_part_is_damaged_is_topped_up_from_nothing(
    head, nodes, broker_for, tmp_path
):
    nodes()
    undisturbed(tmp_path / "a", epochs=8)
    last = max(expert_folder(tmp_path / "a", 1).glob("part-*"))
    truncate(last)
    handle, order = broker_for(tmp_path / "a"), order_for(tmp_path / "a", epochs=10)
    assert ask(handle.ensure.remote(order)) == [0, 1]
    trained = wait_for_epochs(handle, 2 + 10)
    assert sorted(trained) == [
        *((order.key, 0, e) for e in (9, 10)),
        *((order.key, 1, e) for e in range(1, 11)),
    ]
    assert quarantined(tmp_path / "a") == ["expert-0001"]
    (note,) = fleet_status(handle).notes
    assert str(last) in note
    assert set(status(handle, order).built) == {0, 1}


# --- filling the store ahead of a sweep -----------------------------------------------------


def fill(folder: Path, *args: str) -> Ran:
    return run_sweep(folder, "sweep.yaml", *args, module="ftd_ray.experts")


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[Path, Ran]:
    """A store that was filled by the command, and what it said."""
    folder = tmp_path_factory.mktemp("filled")
    write_sweep(folder, tiny(search__trials=1))
    return folder, fill(folder)


@pytest.mark.heavy
def test_filling_says_its_plan_and_its_progress_and_builds_every_expert(filled):
    folder, ran = filled
    assert (ran.code, ran.err) == (0, "")
    assert "2 distinct sets, 4 experts: 0 in the store, 4 to build" in ran.out
    assert "experts    4/4" in ran.out
    assert re.search(r"done in \d+ (s|min): 4 experts built, 0 were there", ran.out)
    store = TrajectoryStore(str(folder / "store"))
    keys = [p.name for p in (folder / "store").iterdir()]
    assert [store.at(key).complete(3) for key in keys] == [[0, 1], [0, 1]]


@pytest.mark.heavy
def test_filling_is_a_run_of_mlflow_with_a_child_for_each_set(filled):
    runs = mlflow_runs(filled[0])
    (parent,) = (r for r in runs if r.data.tags["ftd.kind"] == "fill")
    children = [r for r in runs if r.data.tags["ftd.kind"] == "experts"]
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert {r.data.tags["ftd.expert_set"] for r in children} == {
        p.name for p in (filled[0] / "store").iterdir()
    }
    for run in children:
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.metrics["experts_done"] == run.data.metrics["experts_built"] == 2
        assert 0 < run.data.metrics["expert_val_accuracy"] < 1


@pytest.mark.heavy
def test_filling_a_full_store_does_without_ray(filled):
    code = "import sys; sys.modules['ray'] = None; from ftd_ray.experts.__main__ import main; "
    again = subprocess.run(
        [sys.executable, "-c", f"{code} sys.exit(main(['sweep.yaml']))"],
        cwd=filled[0],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (again.returncode, again.stderr) == (0, "")
    assert "4 experts: 4 in the store, 0 to build" in again.stdout
    assert again.stdout.endswith("every expert is in the store\n")


@pytest.mark.heavy
def test_sweep_on_a_filled_store_builds_nothing(filled):
    folder, _ = filled
    before = files_of(folder / "store")
    ran = run_sweep(folder, "sweep.yaml")
    assert ran.code == 0, ran.out + ran.err
    account = summary_of(folder)["experts"]
    assert (account["built"], account["reused"], account["seconds"]) == (0, 2, 0)
    assert files_of(folder / "store") == before


def test_dry_run_of_filling_says_the_plan_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    write_sweep(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["sweep.yaml", "--dry-run"]) == 0
    assert "4 experts: 0 in the store, 4 to build" in capsys.readouterr().out
    assert set(files_below(tmp_path)) == {"sweep.yaml"}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ("gpus_per_expert=0.5", "takes 0.5 GPU, and there are 0 in the cluster"),
        ("cpus_per_expert=2", "takes 2 CPUs, and there is 1 on any one node"),
    ],
)
def test_expert_that_no_node_holds_is_refused_where_nobody_adds_nodes(
    head, nodes, tmp_path, size, reason
):
    nodes(), nodes()
    sweep_file(tmp_path)
    ran = fill(tmp_path, f"resources.{size}", "--address", head.address)
    assert ran.code == 2, ran.out + ran.err
    assert reason in ran.err and ran.err.count("\n") == 1


def test_wrong_configuration_of_filling_is_one_line_and_exit_2(tmp_path, capsys, monkeypatch):
    write_sweep(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["sweep.yaml", "experts.rhoo=1"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("experts: ") and said.err.count("\n") == 1
    assert "experts.rhoo" in said.err


@pytest.mark.heavy
def test_set_that_diverges_is_told_with_exit_1_and_the_others_are_complete(tmp_path):
    write_sweep(tmp_path, tiny(experts__rho=0.01, experts__lr={"choice": [1e30, 0.05]}))
    ran = fill(tmp_path)
    assert ran.code == 1, ran.out + ran.err
    (failed,) = (line for line in ran.out.splitlines() if line.startswith("failed     "))
    assert "diverged" in failed and "experts.lr" in failed
    store = TrajectoryStore(str(tmp_path / "store"))
    complete = {p.name: store.at(p.name).complete(3) for p in (tmp_path / "store").iterdir()}
    assert complete.pop(failed.split()[1].rstrip(":")) == []
    assert list(complete.values()) == [[0, 1]]
    assert "RUNNING" not in {r.info.status for r in mlflow_runs(tmp_path)}


@pytest.mark.heavy
def test_filling_that_is_interrupted_again_and_again_goes_on_each_time(tmp_path):
    four = {"epochs": 4 * PART_EPOCHS, "batch_size": 8, "count": 4}
    write_sweep(tmp_path, tiny(**{f"experts__{k}": v for k, v in four.items()}, experts__rho=0.01))
    output = tmp_path / "stdout.txt"
    for signum, after in (
        (signal.SIGTERM, "in training"),
        (signal.SIGINT, "experts    [12]/4"),
        (signal.SIGKILL, "experts    [23]/4"),
    ):
        with running_sweep(tmp_path, "sweep.yaml", module="ftd_ray.experts") as process:
            wait_until(f"{after} in the output", lambda t=after: re.search(t, output.read_text()))
            process.send_signal(signum)
            code = process.wait(timeout=60)
        if signum == signal.SIGKILL:
            assert code == -signum
        else:
            assert code == 128 + signum
            assert "the same command goes on" in output.read_text()
    ran = fill(tmp_path)
    assert ran.code == 0, ran.out + ran.err
    assert files_of(tmp_path / "store") == undisturbed(tmp_path / "other", **four)
    runs = [r for r in mlflow_runs(tmp_path) if r.data.tags["ftd.kind"] == "fill"]
    assert Counter(r.info.status for r in runs) == {"KILLED": 2, "RUNNING": 1, "FINISHED": 1}


@pytest.mark.heavy
def test_set_whose_manifest_is_damaged_is_mended_by_filling(pair, tmp_path):
    sweep_file(tmp_path)
    store = tmp_path / "store"
    shutil.copytree(pair[0].parent / "store", store)
    manifest = max(expert_folder(store, 1).glob("manifest-*"))
    manifest.write_bytes(manifest.read_bytes()[:-9])
    ran = fill(tmp_path)
    assert ran.code == 0, ran.out + ran.err
    assert "3 experts: 2 in the store, 1 to build" in ran.out
    assert re.search(f"warning    expert 1 .*{manifest}.*/quarantine/expert-0001-", ran.out)
    assert "1 experts built, 2 were there" in ran.out
    ours = files_of(store)
    theirs = files_of(pair[0].parent / "store")
    assert {n: b for n, b in ours.items() if "/quarantine/" not in n} == theirs


@pytest.mark.heavy
def test_two_clusters_fill_one_store_at_the_same_time(pair, tmp_path):
    store = tmp_path / "store"
    folders = [sweep_file(tmp_path / n, store={"uri": str(store)}) for n in "ab"]
    fills = [running_sweep(f, "sweep.yaml", module="ftd_ray.experts") for f in folders]
    written: dict[str, tuple[int, int]] = {}
    with fills[0] as a, fills[1] as b:

        def both_over() -> bool:
            for path in store.glob("*/expert-*/manifest-*.json"):
                there = path.stat()
                known = written.setdefault(str(path), (there.st_ino, there.st_mtime_ns))
                assert known == (there.st_ino, there.st_mtime_ns), f"{path} was written again"
            return a.poll() is not None and b.poll() is not None

        wait_until("the end of both", both_over, every=0.02)
    for folder, process in zip(folders, (a, b), strict=True):
        ran = finished(folder, process.returncode)
        assert ran.code == 0, ran.out + ran.err
    (key,) = (p.name for p in store.iterdir())
    experts = TrajectoryStore(str(store)).at(key)
    for index in experts.complete(4 * PART_EPOCHS):
        experts.verify(index)
    assert files_of(store) == files_of(pair[0].parent / "store")
