"""The fleet: 50 experts on a cluster of four nodes against the same work without Ray.

The nodes are processes on this machine, so the work is spread over its cores, not over machines;
what shows is what Ray, the broker and the start of the actors cost.
"""

import multiprocessing
import os
import pickle
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from benchmarks.report import spread
from ftd.data import DatasetConfig, describe
from ftd.expert import ExpertConfig, Numerics, identity, set_key
from ftd_ray.experts.broker import Broker
from ftd_ray.experts.build import ExpertRequest, build_expert
from ftd_ray.experts.fleet import ExpertActor
from ftd_ray.experts.orders import ExpertOrder

NODES = 4
COUNT = 50
EXPERTS = ExpertConfig(network="ConvNetD2W64", epochs=16, count=COUNT, batch_size=256, lr=0.02)
DATA = DatasetConfig(name="digits", val_fraction=0.15)
ROUNDS = 2
HOLLOW = 400
"""Experts without work, for the broker's own cost."""


def run() -> dict[str, Any]:
    """Wall time of the fleet against work ÷ cores, and the broker's cost of an expert and epoch."""
    cores = len(os.sched_getaffinity(0))
    folder = Path(tempfile.mkdtemp(prefix="ftd-bench-"))
    rounds = []
    try:
        for i in range(ROUNDS):
            plain = without_ray(request(folder / f"plain{i}"), cores)
            with four_nodes():
                fleet = with_the_fleet(request(folder / f"fleet{i}"))
            rounds.append({"plain": plain, "fleet": fleet})
            print(rounds[-1], flush=True)
        with four_nodes():
            overhead = hollow(request(folder / "hollow"))
        print(overhead, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"cores": cores, "rounds": rounds, "overhead": overhead}


def request(store: Path) -> ExpertRequest:
    numerics = Numerics.on("cpu", 1)
    data = describe(DATA)
    return ExpertRequest(
        store_uri=str(store),
        identity=identity(EXPERTS, data, DATA.strategy, numerics),
        dataset=DATA,
        experts=EXPERTS,
        numerics=numerics,
    )


# --- without Ray ----------------------------------------------------------------------------


def without_ray(work: ExpertRequest, cores: int) -> float:
    """Seconds of all experts in one process for each core, which share the list evenly."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(cores), context.Queue()
    shares = [range(i, COUNT, cores) for i in range(cores)]
    processes = [context.Process(target=_share, args=(work, s, barrier, queue)) for s in shares]
    for process in processes:
        process.start()
    seconds = [queue.get(timeout=3600) for _ in processes]
    for process in processes:
        process.join()
    return sum(seconds) / cores


def _share(work: ExpertRequest, share: Sequence[int], barrier: Any, queue: Any) -> None:
    build_expert(work, COUNT + share[0], lambda snapshot: None)  # a warm-up; it is not counted
    barrier.wait()
    began = time.perf_counter()
    for index in share:
        build_expert(work, index, lambda snapshot: None)
    queue.put(time.perf_counter() - began)


# --- with the fleet -------------------------------------------------------------------------


@contextmanager
def four_nodes() -> Iterator[None]:
    """A Ray cluster of four nodes of a CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(NODES - 1):
            cluster.add_node(num_cpus=1)
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        settle()
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def settle(seconds: float = 60) -> None:
    """Waits until the agents of new nodes have started up: the machine is theirs until then."""
    end = time.monotonic() + seconds
    while psutil.cpu_percent(interval=2) > 15 and time.monotonic() < end:
        pass


def order(work: ExpertRequest, count: int) -> ExpertOrder:
    return ExpertOrder(
        asker="bench",
        key=set_key(work.identity),
        identity=work.identity,
        count=count,
        epochs=work.experts.epochs,
        work=pickle.dumps(work),
        cpus=1,
        gpus=0.0,
    )


def _broker(cls: type, work: ExpertRequest) -> Any:
    actor = ray.remote(cls).options(num_cpus=0, max_concurrency=10_000)
    broker = actor.remote(work.store_uri, 1, "bench")
    ray.get(broker.status.remote("bench"))
    return broker


def with_the_fleet(work: ExpertRequest) -> float:
    """Seconds from the order to the last expert; the actors start within them."""
    broker = _broker(Broker, work)
    began = time.perf_counter()
    ray.get(broker.ensure.remote(order(work, COUNT)))
    return time.perf_counter() - began


class HollowActor(ExpertActor):
    """Says that it trained epochs, and has done nothing."""

    def build(
        self, work: bytes, key: str, index: int, share: float | None, broker: Any
    ) -> float | None:
        for epoch in range(1, pickle.loads(work)["epochs"] + 1):
            broker.epoch_done.remote(key, index, epoch, 0.5)
        return 0.0


class HollowBroker(Broker):
    """The broker over hollow actors."""

    expert_actor = HollowActor

    def pid(self) -> int:
        return os.getpid()


def hollow(work: ExpertRequest) -> dict[str, float]:
    """Seconds of the broker's own processor time for an expert and for an epoch."""
    found = {}
    for epochs in (0, 50):
        broker = _broker(HollowBroker, work)
        process = psutil.Process(ray.get(broker.pid.remote()))
        what = order(work, HOLLOW)
        object.__setattr__(what, "work", pickle.dumps({"epochs": epochs}))
        before, began = sum(process.cpu_times()[:2]), time.perf_counter()
        ray.get(broker.ensure.remote(what))
        ray.get(broker.status.remote("bench"))  # behind the last word of an epoch
        found[epochs] = (sum(process.cpu_times()[:2]) - before, time.perf_counter() - began)
        ray.kill(broker)
    return {
        "cpu_expert": found[0][0] / HOLLOW,
        "cpu_epoch": max(0.0, found[50][0] - found[0][0]) / HOLLOW / 50,
        "wall_expert": found[0][1] / HOLLOW,
        "wall_epoch": max(0.0, found[50][1] - found[0][1]) / HOLLOW / 50,
    }


def render(results: dict[str, Any]) -> list[str]:
    rounds, o = results["rounds"], results["overhead"]
    plain, fleet = ([r[k] for r in rounds] for k in ("plain", "fleet"))
    ratios = [r["fleet"] / r["plain"] for r in rounds]
    return [
        f"{COUNT} experts ({EXPERTS.network} on digits, {EXPERTS.epochs} epochs of SAM, one "
        f"thread each) on a cluster of {NODES} nodes of one CPU",
        f"each, all on this machine's {results['cores']} cores. Work ÷ cores is the time of the "
        "same builds in one process a core",
        "without Ray, imports not counted; the fleet's time runs from the order to the last "
        "expert, the",
        "start of its actors included.",
        "",
        "| work ÷ cores | fleet | ratio |",
        "|---|---|---|",
        f"| {spread(plain, '{:.1f} s')} | {spread(fleet, '{:.1f} s')} "
        f"| {spread(ratios, 'x {:.2f}')} |",
        "",
        f"The broker itself, with actors that do nothing ({HOLLOW} experts on {NODES} actors): "
        f"{1000 * o['wall_expert']:.1f} ms an expert",
        f"({1000 * o['cpu_expert']:.1f} ms of its processor time), "
        f"{1e6 * o['wall_epoch']:.0f} µs an epoch ({1e6 * o['cpu_epoch']:.0f} µs). Median of "
        f"{statistics.median(fleet) / COUNT:.1f} s an expert above.",
    ]
