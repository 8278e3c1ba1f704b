"""A node's workers share what they read of the store: once read, mapped without a copy, bounded."""

import hashlib
import os
import pickle
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_helpers import parse_tiny, wait_until
from s3_helpers import FaultProxy, S3Server, s3_environment

from ftd.data import describe
from ftd.errors import UserError
from ftd.expert import Snapshot
from ftd.trajectory import PART_EPOCHS, PRECISIONS, DamagedError, ExpertSet
from ftd_ray import cache as cache_module
from ftd_ray.cache import OBJECT_STORE_SHARE, CachedExperts, SegmentCache, node_cache
from ftd_ray.experts.build import ExpertRequest, build_expert
from ftd_ray.store import TrajectoryStore
from ftd_ray.trial import TrialSpec, run_trial
from ftd_ray.workers import TrialWorker

BOUND = 120
"""Seconds after which an answer of Ray is taken for lost."""
OBJECT_STORE = 110 * 2**20
MB = 2**20
STEP_SECONDS = 0.1
SIZE = MB // 4
"""Parameters of an expert here: a snapshot of 1 MB."""


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultProxy]:
    with S3Server() as server, FaultProxy(server.address) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def cluster(s3) -> Iterator[Any]:
    """Two nodes; this process is on the first, whose object store is small."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        for key, value in s3_environment(s3.address).items():
            patch.setenv(key, value)
        head = {"num_cpus": 2, "object_store_memory": OBJECT_STORE}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(num_cpus=1, object_store_memory=10 * OBJECT_STORE)
            cluster.wait_for_nodes()
            ray.init(cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def caches(cluster) -> Iterator[None]:
    """No cache of this test reaches the next."""
    yield
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith("ftd-cache-"):
            ray.kill(ray.get_actor(**actor))


class Store:
    """A store with one set of experts of random weights, and readers of it through the cache."""

    def __init__(
        self,
        uri: str,
        count: int,
        epochs: int,
        size: int = SIZE,
        precision: str = "float32",
        name: str = "toy",
    ):
        self.uri = uri
        whole = precision == "float32"
        identity = {"name": name, **({} if whole else {"snapshots": precision})}
        self.set = TrajectoryStore(uri).expert_set(identity)
        self.set.create()
        self.key = self.set.key
        for expert in range(count):
            self.train(expert, epochs, size)

    def train(self, expert: int, epochs: int, size: int = SIZE, seed: int = 0) -> None:
        """Publishes an expert in parts, on from what is published."""
        manifest = self.set.manifest(expert)
        rng = np.random.default_rng([seed, expert, epochs])
        start = 0 if manifest is None else manifest.epochs + 1
        waiting = []
        for epoch in range(start, epochs + 1):
            weights = torch.from_numpy(rng.standard_normal(size, np.float32))
            waiting.append(Snapshot(epoch, weights, None, 0.0, 0.0))
            if epoch == epochs or (epoch and epoch % PART_EPOCHS == 0):
                self.set.append(expert, waiting)
                waiting = []

    def reader(self, limit: int = 32 * MB) -> CachedExperts:
        return CachedExperts(self.uri, self.key, 1, limit)

    def direct(self) -> ExpertSet:
        """The set read by somebody who knows nothing yet."""
        return TrajectoryStore(self.uri).at(self.key)

    def digest(self, worker: Any, *segment: int) -> Any:
        """A segment's digest as a worker has it, which is under way."""
        return worker.digest.remote(self.uri, self.key, *segment)

    def figures(self) -> dict[str, int]:
        return ray.get(node_cache(self.uri).figures.remote(), timeout=BOUND)

    def damage(self, expert: int, epoch: int) -> None:
        """Overwrites the middle of an epoch's parameters in the file itself."""
        part = self.set.part(expert, epoch)
        path = Path(self.set.folder(expert)) / part.file
        needle = np.ascontiguousarray(self.direct().params(expert, epoch)).tobytes()[:64]
        at = path.read_bytes().index(needle)
        with open(path, "r+b") as f:
            f.seek(at + 1000)
            f.write(b"\0" * 64)


@pytest.fixture
def store(tmp_path, caches) -> Callable[..., Store]:
    return lambda count=1, epochs=PART_EPOCHS, **given: Store(
        str(tmp_path / "store"), count, epochs, **given
    )


def assert_equal(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@ray.remote(num_cpus=0)
class Worker:
    """A worker that reads segments."""

    def __init__(self) -> None:
        self.readers: dict[tuple[str, str, int], CachedExperts] = {}

    def digest(self, uri: str, key: str, *segment: int, limit: int = 32 * MB) -> str:
        return digest(self._reader(uri, key, limit).segment(*segment))

    def read_at_random(
        self, uri: str, key: str, limit: int, seconds: float, experts: int, epochs: int
    ) -> int:
        """Reads as a distillation of quick steps does, and holds two segments at a time."""
        rng, held, count, end = random.Random(0), [], 0, time.monotonic() + seconds
        while time.monotonic() < end:
            t = rng.randrange(epochs - 2)
            segment = self._reader(uri, key, limit).segment(rng.randrange(experts), t, t + 2)
            held = [*held[-1:], segment]
            count += 1
            time.sleep(STEP_SECONDS)
        return count

    def pid(self) -> int:
        return os.getpid()

    def _reader(self, *place: Any) -> CachedExperts:
        uri, key, limit = place
        return self.readers.setdefault(place, CachedExperts(uri, key, 1, limit))


@pytest.fixture(scope="module")
def workers(cluster) -> list[Any]:
    """Two on this node, for all tests, which do not end them."""
    here = ray.get_runtime_context().get_node_id()
    both = [on(here, Worker).remote() for _ in range(2)]
    ray.get([w.pid.remote() for w in both], timeout=BOUND)
    return both


def on(node: str, actor: Any) -> Any:
    return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def digest(segment: tuple[np.ndarray, ...]) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in segment)).hexdigest()


def cache_processes() -> list[psutil.Process]:
    """Caches of this test's own Ray."""

    def is_cache(process: psutil.Process) -> bool:
        try:
            return "SegmentCache" in " ".join(process.cmdline())
        except psutil.Error:
            return False

    return [p for p in psutil.Process().children(recursive=True) if is_cache(p)]


# --- what is read ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_segments_are_those_of_the_store_and_cannot_be_written(store, precision):
    there = store(3, 12, precision=precision)
    reader, direct = there.reader(), there.direct()
    for expert, start, end in [(0, 0, 2), (1, 4, 6), (2, 10, 12), (2, 5, 5), (0, 0, 2)]:
        segment = reader.segment(expert, start, end)
        assert_equal(segment, direct.segment(expert, start, end))
        for array in segment:
            assert array.dtype == np.float32 and not array.flags.writeable


def test_segments_are_views_of_the_object_store_not_copies(store):
    there = store(size=2 * MB)  # 8 MB
    reader = there.reader()
    segment = reader.segment(0, 0, 1)
    before = psutil.Process().memory_full_info().uss
    held = [reader.segment(0, 0, 1) for _ in range(50)]
    assert psutil.Process().memory_full_info().uss - before < 50 * MB  # copies: 400
    addresses = {a.__array_interface__["data"][0] for s in held for a in s}
    assert addresses == {a.__array_interface__["data"][0] for a in segment}
    for array in segment:
        assert not array.flags.owndata
        assert "plasma" in mapping_of(array) or "/dev/shm" in mapping_of(array)


def mapping_of(array: np.ndarray) -> str:
    """What file of this process's memory an array lies in."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(x, 16) for x in line.split()[0].split("-"))
        if first <= address < last:
            return line
    raise AssertionError("the array lies nowhere")


def test_many_who_ask_for_the_same_snapshots_cause_one_read_of_each(store, workers):
    there = store(size=4 * MB)
    asked = [there.digest(w, 0, 1, 3) for w in workers for _ in range(5)]
    expected = digest(there.direct().segment(0, 1, 3))
    assert ray.get(asked, timeout=BOUND) == [expected] * 10
    assert there.figures()["misses"] == 2 and there.figures()["hits"] == 18
    with ThreadPoolExecutor(8) as pool:  # at the same time, and not read before
        segments = list(pool.map(lambda _: digest(there.reader().segment(0, 2, 4)), range(8)))
    assert segments == [digest(there.direct().segment(0, 2, 4))] * 8
    assert there.figures()["misses"] == 4


# --- how much is kept -----------------------------------------------------------------------


def test_bytes_never_exceed_the_limit_and_the_least_recently_used_go_first(store):
    there = store(3)
    reader = there.reader(4 * MB)
    for expert in range(3):
        for epoch in range(PART_EPOCHS):
            reader.segment(expert, epoch, epoch + 1)
            assert there.figures()["bytes"] <= there.figures()["limit"] == 4 * MB
    assert there.figures()["bytes"] == 4 * MB

    def is_kept(epoch: int) -> bool:
        before = there.figures()["misses"]
        reader.segment(0, epoch, epoch)
        return there.figures()["misses"] == before

    for epoch in (0, 1, 2, 3):
        reader.segment(0, epoch, epoch)
    assert is_kept(0)  # 1 is the oldest now
    assert not is_kept(4)
    assert is_kept(0) and is_kept(3) and is_kept(2)
    assert not is_kept(1)


def test_array_that_a_worker_holds_outlives_its_eviction(store):
    there = store(6, 20)  # 126 MB, above the whole object store
    reader = there.reader(2 * MB)
    held = reader.segment(0, 0, 1)
    for expert in range(1, 6):
        for epoch in range(20):
            reader.segment(expert, epoch, epoch + 1)
    assert_equal(held, there.direct().segment(0, 0, 1))
    before = there.figures()["misses"]
    reader.segment(0, 0, 1)
    assert there.figures()["misses"] == before + 2


def test_cache_takes_half_of_the_object_store_at_most_and_of_several_limits_the_largest(store):
    there = store()
    there.reader(2 * MB).segment(0, 0, 1)
    there.reader(MB).segment(0, 0, 1)
    assert there.figures()["limit"] == 2 * MB
    there.reader(10**15).segment(0, 0, 1)
    assert there.figures()["limit"] <= OBJECT_STORE * OBJECT_STORE_SHARE


def test_snapshot_larger_than_the_limit_is_passed_on_and_not_kept(store):
    there = store()
    reader = there.reader(MB - 1)
    for _ in range(2):
        assert_equal(reader.segment(0, 2, 4), there.direct().segment(0, 2, 4))
    assert there.figures() == {"hits": 0, "misses": 4, "bytes": 0, "limit": MB - 1}


# --- who dies -------------------------------------------------------------------------------


def test_cache_outlives_the_worker_that_filled_it(store, workers):
    there = store()
    first = on(ray.get_runtime_context().get_node_id(), Worker).remote()
    expected = ray.get(there.digest(first, 0, 0, 1), timeout=BOUND)
    os.kill(ray.get(first.pid.remote(), timeout=BOUND), signal.SIGKILL)
    with pytest.raises(RayError):
        ray.get(first.pid.remote(), timeout=BOUND)
    assert ray.get(there.digest(workers[0], 0, 0, 1), timeout=BOUND) == expected
    assert there.figures()["misses"] == 2 and there.figures()["hits"] == 2


def test_killed_cache_is_replaced_and_what_its_readers_hold_stays(store):
    there = store()
    reader = there.reader()
    held = reader.segment(0, 0, 1)
    (process,) = cache_processes()
    process.kill()
    process.wait(timeout=20)
    assert_equal(reader.segment(0, 0, 1), there.direct().segment(0, 0, 1))
    assert_equal(held, there.direct().segment(0, 0, 1))
    reader.segment(0, 0, 1)
    figures = there.figures()  # of the new one, which keeps as the old one did
    assert figures == {"hits": 2, "misses": 2, "bytes": 2 * MB, "limit": 32 * MB}


@pytest.mark.heavy
def test_cache_that_is_killed_again_and_again_changes_no_bit(store, workers):
    there = store(2)
    ray.get(there.digest(workers[0], 0, 0, 1), timeout=BOUND)
    segments = [(e, t, t + 1) for t in range(PART_EPOCHS) for e in (0, 1)] * 20
    asked = [there.digest(workers[0], *s) for s in segments]
    for _ in range(3):
        (process,) = wait_until("a cache", cache_processes, seconds=60)
        process.kill()
        process.wait(timeout=20)
        time.sleep(1.0)
    direct = there.direct()
    assert ray.get(asked, timeout=BOUND) == [digest(direct.segment(*s)) for s in segments]


def test_worker_reads_the_store_itself_where_no_cache_lives(store, monkeypatch):
    there, asked = store(), []

    def dead(uri: str) -> Any:
        asked.append(uri)
        raise ray.exceptions.ActorDiedError()

    monkeypatch.setattr(cache_module, "node_cache", dead)
    assert_equal(there.reader().segment(0, 1, 3), there.direct().segment(0, 1, 3))
    assert len(asked) == cache_module.ATTEMPTS


# --- what changes in the store --------------------------------------------------------------


def test_epochs_that_come_later_are_seen(store):
    there = store(2, 5)
    reader = there.reader()
    reader.segment(0, 4, 5)
    with pytest.raises(UserError, match="has 5 of the 8 epochs needed"):
        reader.segment(0, 5, 8)
    there.train(0, 12)
    assert_equal(reader.segment(0, 5, 8), there.direct().segment(0, 5, 8))
    assert_equal(reader.segment(0, 11, 12), there.direct().segment(0, 11, 12))


def test_damaged_part_is_an_error_and_what_is_trained_anew_is_served_by_the_same_cache(
    store, workers
):
    count = 2 * cache_module.READERS  # every reader thread has two
    there = store(count)
    reader = there.reader()
    for expert in range(count):
        old = [a.copy() for a in reader.segment(expert, 0, 1)]
        there.damage(expert, 3)
        for _ in range(2):
            with pytest.raises(DamagedError, match=r"part-0000-0005-\w+.parquet is damaged"):
                reader.segment(expert, 3, 4)
        with pytest.raises(DamagedError):
            ray.get(there.digest(workers[0], expert, 3, 4), timeout=BOUND)
        there.set.quarantine(expert)
        there.train(expert, PART_EPOCHS, seed=1)
        for epochs in ((0, 1), (3, 4)):
            new = there.direct().segment(expert, *epochs)
            assert_equal(reader.segment(expert, *epochs), new)
            answer = there.digest(workers[1], expert, *epochs)
            assert ray.get(answer, timeout=BOUND) == digest(new)
        assert not np.array_equal(old[0], reader.segment(expert, 0, 1)[0])


def test_both_ends_of_a_segment_are_of_one_trajectory(store):
    # Another node quarantined the expert, and other hardware trained it to other bits.
    there = store(1, 10)
    reader = there.reader()
    old = [a.copy() for a in reader.segment(0, 4, 5)]
    there.set.quarantine(0)
    there.train(0, 10, seed=1)
    assert_equal(reader.segment(0, 5, 6), there.direct().segment(0, 5, 6))
    assert_equal(reader.segment(0, 4, 5), there.direct().segment(0, 4, 5))
    assert not np.array_equal(old[1], reader.segment(0, 4, 5)[1])


def test_both_ends_are_of_one_trajectory_when_the_set_was_closed_in_between(store):
    there = store(1)
    reader = there.reader(2 * MB + 10_000)
    for start in (3, 4):
        reader.segment(0, start, start + 1)  # 4 and 5 are kept
    for i in range(cache_module.SETS_OPEN):
        other = Store(there.uri, 1, 1, size=10, name=f"small {i}")
        other.reader().segment(0, 0, 1)
    assert there.figures()["bytes"] >= 2 * MB
    there.set.quarantine(0)
    there.train(0, PART_EPOCHS, seed=1)
    assert_equal(reader.segment(0, 3, 5), there.direct().segment(0, 3, 5))


def test_expert_that_is_not_there_is_the_stores_own_error(store):
    with pytest.raises(UserError, match=r"expert 7 of .* has none of the 1 epochs needed"):
        store().reader().segment(7, 0, 1)


# --- where ----------------------------------------------------------------------------------


def test_object_store_is_read_in_one_pass(caches, s3, workers):
    there = Store("s3://buffers/cache", 2, 5)
    s3.reset_counts()
    segments = [(e, t, t + 1) for e in (0, 1) for t in range(5)] * 3
    asked = [[there.digest(w, *s) for s in segments] for w in workers]
    answers = ray.get([a for one in asked for a in one], timeout=BOUND)
    assert there.figures()["misses"] == 12
    assert 12 * MB <= s3.sent["GET"] < 13 * MB
    assert answers == [digest(there.direct().segment(*s)) for s in segments] * 2


def test_requests_for_some_experts_do_not_grow_with_the_others_of_their_set(caches, s3):
    asked = []
    for count in (4, 16):
        there = Store(f"s3://buffers/of-{count}", count, 2, size=10)
        s3.reset_counts()
        for expert in range(4):
            there.reader().segment(expert, 0, 1)
        asked.append(dict(s3.requests))
    assert asked[0] == asked[1]


def test_every_node_has_a_cache_of_its_own(store):
    there = store()
    nodes = [n["NodeID"] for n in ray.nodes()]
    assert len(nodes) == 2
    for node in nodes:
        worker = on(node, Worker).remote()
        for _ in range(3):
            ray.get(there.digest(worker, 0, 0, 1), timeout=BOUND)
    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]
    found = [n for n in names if n.startswith("ftd-cache-")]
    figures = [ray.get_actor(n, namespace="ftd").figures.remote() for n in found]
    counts = [(f["misses"], f["hits"]) for f in ray.get(figures, timeout=BOUND)]
    assert counts == [(2, 4), (2, 4)]


def test_trial_in_a_worker_has_the_bits_of_one_that_reads_the_store_itself(tmp_path, caches):
    config = parse_tiny(experts__rho=0.01)
    identity = config.identity(config.experts, describe(config.dataset))
    request = ExpertRequest(
        store_uri=str(tmp_path / "store"),
        identity=identity,
        dataset=config.dataset,
        experts=config.experts,
        numerics=config.resources.expert_numerics,
    )
    for expert in range(2):
        build_expert(request, expert, lambda snapshot: None)
    spec = TrialSpec(
        number=0,
        seed=0,
        repeat=0,
        dataset=config.dataset,
        network=config.experts.network,
        identity=identity,
        experts=2,
        distill=config.distill,
        evaluate=config.evaluate,
        numerics=config.resources.trial_numerics,
        store_uri=request.store_uri,
        cache_bytes=MB,
        folder=str(tmp_path / "directly"),
    )
    directly = [replace(r, seconds=0.0) for r in run_trial(spec)]
    here = ray.get_runtime_context().get_node_id()
    worker = on(here, ray.remote(TrialWorker))
    worker = worker.remote()
    worker.begin.remote(pickle.dumps(replace(spec, folder=f"{tmp_path}/w")))
    reports = []
    while not (reports and reports[-1].done):
        reports.append(pickle.loads(ray.get(worker.report.remote(), timeout=BOUND)[0]))
    assert [replace(r, seconds=0.0) for r in reports] == directly
    files = [tmp_path / name / "synthetic.npz" for name in ("directly", "w")]
    assert files[0].read_bytes() == files[1].read_bytes()
    figures = ray.get(node_cache(request.store_uri).figures.remote(), timeout=BOUND)
    assert figures["misses"] + figures["hits"] == 2 * config.distill.iterations


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_memory_is_bounded_by_the_limit_however_large_the_store(store, cluster):
    # 24 experts of 11 snapshots of 4 MB: 1.06 GB, read through 50 MB, on a node of its own.
    limit, size = 50 * MB, 4 * MB
    there = store(24, 10, size=MB)
    assert there.set.size() > 1000 * MB
    (node,) = cluster.worker_nodes
    workers = [on(node.node_id, Worker).remote() for _ in range(2)]
    ray.get([there.digest(w, 0, 0, 1) for w in workers], timeout=BOUND)
    processes = [psutil.Process(p) for p in ray.get([w.pid.remote() for w in workers])]
    processes += cache_processes()
    assert len(processes) == 3
    start = [resident(p) for p in processes]
    place = (there.uri, there.key, limit)
    busy = [w.read_at_random.remote(*place, 60, 24, 10) for w in workers]
    own, shared = [0, 0, 0], 0
    while ray.wait(busy, num_returns=2, timeout=0.5)[1]:
        now = [resident(p) for p in processes]
        own = [max(o, n[0] - s[0]) for o, n, s in zip(own, now, start, strict=True)]
        shared = max(shared, now[2][1])
    assert sum(ray.get(busy, timeout=BOUND)) * 2 * size > 3 * there.set.size()
    # Workers map what they read. The cache reads a snapshot in each of its threads.
    assert max(own[:2]) < 16 * MB
    assert own[2] < 64 * MB
    # In the object store, beside the limit: segments that are held, what is being read, and what
    # was dropped in the last second, which is how often Ray frees it.
    held = len(workers) * 3 * 2 * size
    dropped = len(workers) * 2 * size / STEP_SECONDS
    assert shared < limit + held + cache_module.READERS * size + dropped


def resident(process: psutil.Process) -> tuple[int, int]:
    """Bytes of a process's own memory, and of the object store as far as it was there."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return int(found["RssAnon"]) * 1024, int(found["RssShmem"]) * 1024


class ShortCache(SegmentCache):
    idle_seconds = 1.0


@ray.remote(num_cpus=0)
class Evaluating:
    """A worker that reads a segment, and then none for long."""

    def read(self, uri: str, key: str) -> None:
        cache_module.SegmentCache = ShortCache
        CachedExperts(uri, key, 1, 32 * MB).segment(0, 0, 1)

    def evaluate(self, seconds: float) -> None:
        time.sleep(seconds)


def cache_names() -> set[str]:
    found = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in found if actor["name"].startswith("ftd-cache-")}


def test_cache_stays_as_long_as_a_worker_that_has_used_it_and_ends_soon_after_it(store, caches):
    there, before = store(), cache_names()
    worker = on(ray.get_runtime_context().get_node_id(), Evaluating).remote()
    ray.get(worker.read.remote(there.uri, there.key), timeout=BOUND)
    (ours,) = cache_names() - before
    for _ in range(2):
        ray.get(worker.evaluate.remote(3 * ShortCache.idle_seconds), timeout=BOUND)
        assert ours in cache_names()
    ray.kill(worker)
    wait_until("the cache's end", lambda: ours not in cache_names())
