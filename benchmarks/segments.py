"""Reading segments: our store against a pickle of ten experts, as in the published code.

The published code loads a buffer file of ten whole experts and uses it for ten outer steps; here a
step reads the two snapshots that it needs. Cold: the files are not in the page cache.
"""

import contextlib
import importlib
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import ray
import torch

from benchmarks.report import ROOT, spread
from ftd.data import DatasetConfig, load
from ftd.distill import DistillConfig, distill
from ftd.expert import ExpertConfig, Numerics, Snapshot, identity, network_for
from ftd.networks import Network
from ftd.seeds import generator
from ftd.trajectory import PART_EPOCHS, ExpertSet
from ftd_ray.cache import CachedExperts, node_cache
from ftd_ray.store import TrajectoryStore

DATA = DatasetConfig(name="digits", resolution=32)
EXPERTS = ExpertConfig(network="ConvNetD3", epochs=50)
COUNT = 10
READS = 40
MEMORY_LIMIT = 200 * 2**20
MEMORY_EXPERTS = 80
"""Of 65 MB each: a store of 5 GB."""
STEPS = 25


def run() -> dict[str, Any]:
    """Times, bytes and requests a segment; waiting of a distillation; memory of the readers."""
    data = load(DATA)
    network = network_for(EXPERTS.network, data.description)
    who = identity(EXPERTS, data.description, data.strategy, Numerics.on("cpu", 1))
    folder = Path(tempfile.mkdtemp(prefix="ftd-bench-"))
    try:
        local = str(folder / "store")
        fill(TrajectoryStore(local).expert_set(who), network, COUNT)
        pickled = folder / "buffer.pt"
        torch.save(snapshots_of(network), pickled)
        out: dict[str, Any] = {"parameters": network.size, "pickle_bytes": os.stat(pickled).st_size}
        out["local"] = read_local(TrajectoryStore(local), who)
        out["pickle"] = read_pickle(pickled)
        with s3_server() as (uri, proxied):
            fill(TrajectoryStore(uri).expert_set(who), network, COUNT)
            out["s3"] = read_s3(uri, who, proxied)
            with ray_here():
                out["cache"] = {n: read_cache(u, who) for n, u in (("local", local), ("s3", uri))}
                out["waiting"] = {
                    n: waiting(u, who, data) for n, u in (("local", local), ("s3", uri))
                }
        print({k: round(v["second"], 4) for k, v in out["waiting"].items()}, flush=True)
        many = str(folder / "many")
        fill(TrajectoryStore(many).expert_set(who), network, MEMORY_EXPERTS)
        with ray_here():
            out["memory"] = memory(many, who)
        print(out["memory"], flush=True)
        return out
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- what is read ---------------------------------------------------------------------------


def snapshots_of(network: Network) -> list[list[torch.Tensor]]:
    """Ten experts as nested lists; one tensor a snapshot, which favours the pickle."""
    return [[s.params_P for s in trajectory(network, i, 0, EXPERTS.epochs)] for i in range(COUNT)]


def trajectory(network: Network, index: int, first: int, last: int) -> list[Snapshot]:
    """An expert that drifts at random: the bytes matter, not what they mean."""
    start = network.init(generator(0, "bench", index))
    out = []
    for epoch in range(first, last + 1):
        gen = generator(0, "bench", index, epoch)
        moved = start + 0.01 * torch.randn(network.size, generator=gen)
        out.append(Snapshot(epoch, moved, None, 0.0, 0.0))
    return out


def fill(experts: ExpertSet, network: Network, count: int) -> None:
    """Publishes experts in parts, as training does."""
    experts.create()
    for index in range(count):
        for last in range(PART_EPOCHS, EXPERTS.epochs + 1, PART_EPOCHS):
            first = 0 if last == PART_EPOCHS else last - PART_EPOCHS + 1
            experts.append(index, trajectory(network, index, first, last))


def picks(count: int, experts: int | None = None) -> list[tuple[int, int, int]]:
    """(expert, start, end) of random segments of two epochs."""
    rng = random.Random(0)
    starts = EXPERTS.epochs - 2
    return [
        (rng.randrange(experts or COUNT), (t := rng.randrange(starts)), t + 2) for _ in range(count)
    ]


# --- files ----------------------------------------------------------------------------------


def read_local(store: TrajectoryStore, who: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for name, cold in (("cold", True), ("warm", False)):
        experts = store.expert_set(who)
        for p in () if cold else picks(READS):
            experts.segment(*p)
        seconds, sizes = [], []
        for p in picks(READS):
            if cold:
                forget(Path(experts.path))
                experts = store.expert_set(who)
            took, size = timed(partial(experts.segment, *p))
            seconds.append(took)
            sizes.append(size)
        out[name] = {"seconds": seconds, "bytes": statistics.median(sizes)}
    return out


def read_pickle(path: Path) -> dict[str, Any]:
    out = {}
    for name in ("cold", "warm"):
        seconds = []
        for _ in range(3):
            if name == "cold":
                forget(path.parent)
            took, size = timed(lambda: torch.load(path))
            seconds.append(took)
        out[name] = {"seconds": seconds, "bytes": size}
    return out


def timed(read: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of a call, and bytes that the process read by system calls during it."""
    before = psutil.Process().io_counters().read_chars
    began = time.perf_counter()
    read()
    return time.perf_counter() - began, psutil.Process().io_counters().read_chars - before


def forget(folder: Path) -> None:
    """Takes the files below a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- S3 -------------------------------------------------------------------------------------


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, Any]]:
    """(URI of a folder on a real S3 server on loopback, a proxy before it that counts)."""
    sys.path.insert(0, str(ROOT / "tests"))
    helpers = importlib.import_module("s3_helpers")
    with (
        helpers.S3Server() as server,
        helpers.FaultProxy(server.address) as proxy,
        mock.patch.dict(os.environ, helpers.s3_environment(server.address)),
    ):
        yield f"s3://{server.bucket}/bench", proxy


def read_s3(uri: str, who: dict[str, Any], proxy: Any) -> dict[str, Any]:
    out = {}
    for name, cold in (("cold", True), ("warm", False)):
        seconds = _s3_times(uri, who, cold)
        with mock.patch.dict(os.environ, {"AWS_ENDPOINT_URL": proxy.address}):
            experts = TrajectoryStore(uri).expert_set(who)
            for p in () if cold else picks(READS):
                experts.segment(*p)
            proxy.reset_counts()
            for p in picks(READS):
                experts = TrajectoryStore(uri).expert_set(who) if cold else experts
                experts.segment(*p)
        out[name] = {
            "seconds": seconds,
            "bytes": sum(proxy.sent.values()) / READS,
            "requests": sum(proxy.requests.values()) / READS,
        }
    return out


def _s3_times(uri: str, who: dict[str, Any], cold: bool) -> list[float]:
    experts = TrajectoryStore(uri).expert_set(who)
    for p in () if cold else picks(READS):
        experts.segment(*p)
    seconds = []
    for p in picks(READS):
        began = time.perf_counter()
        experts = TrajectoryStore(uri).expert_set(who) if cold else experts
        experts.segment(*p)
        seconds.append(time.perf_counter() - began)
    return seconds


# --- the node's cache -----------------------------------------------------------------------


@contextlib.contextmanager
def ray_here() -> Iterator[None]:
    """A Ray of this machine's own."""
    ray.init(
        "local",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=10**9,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _key(uri: str, who: dict[str, Any]) -> str:
    return TrajectoryStore(uri).expert_set(who).key


def read_cache(uri: str, who: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of a segment through the cache: read for it, and already in it."""
    reader = CachedExperts(uri, _key(uri, who), COUNT, 2**30)
    reader.segment(0, 0, 1)
    out: dict[str, list[float]] = {}
    for name in ("miss", "hit"):
        out[name] = []
        for p in picks(READS):
            began = time.perf_counter()
            reader.segment(*p)
            out[name].append(time.perf_counter() - began)
    return out


def waiting(uri: str, who: dict[str, Any], data: Any) -> dict[str, float]:
    """Share of its time that a distillation waits for segments: first time, and again."""
    torch.set_num_threads(1)  # as a trial's worker of one CPU
    config = DistillConfig(
        syn_steps=4, expert_epochs=2, max_start_epoch=40, iterations=STEPS, lr_img=1.0, lr_lr=0.0
    )
    ray.kill(node_cache(uri))
    out = {}
    for name in ("first", "second"):
        reader = CachedExperts(uri, _key(uri, who), COUNT, 2**30)
        waited, began = 0.0, 0.0
        for _, record in distill(config, data, reader, EXPERTS.network, epochs=41, seed=0):
            if record.step == 1:  # nothing could be read ahead of it
                began = time.perf_counter()
                continue
            waited += record.waited
        total = time.perf_counter() - began
        out[name] = waited / total
        out["step_seconds"] = total / (STEPS - 1)
    return out


class _Reader:
    """A worker that reads random segments."""

    def pid(self) -> int:
        return os.getpid()

    def read(self, uri: str, key: str, picked: list[tuple[int, int, int]]) -> float:
        reader = CachedExperts(uri, key, MEMORY_EXPERTS, MEMORY_LIMIT)
        return sum(float(np.sum(reader.segment(*p)[1][:4])) for p in picked)


def memory(uri: str, who: dict[str, Any]) -> dict[str, float]:
    """Peak PSS of a worker, the cache and Ray's object store above their idle state, in MiB."""
    key = _key(uri, who)
    worker = ray.remote(_Reader).options(num_cpus=1).remote()
    cache = node_cache(uri)
    ray.get(worker.read.remote(uri, key, picks(1)))
    here = psutil.Process()
    watched = [
        p
        for p in here.children(recursive=True)
        if "raylet" in p.name() or p.name().startswith(("ray::_Reader", "ray::SegmentCache"))
    ]
    idle = _pss(watched)
    began, peak = time.perf_counter(), idle
    answer = worker.read.remote(uri, key, picks(4000, MEMORY_EXPERTS))
    while not ray.wait([answer], timeout=0.2)[0]:
        peak = max(peak, _pss(watched))
    ray.get(answer)
    figures = ray.get(cache.figures.remote())
    size = sum(f.stat().st_size for f in Path(uri).rglob("*") if f.is_file())
    return {
        "store_mib": size / 2**20,
        "limit_mib": MEMORY_LIMIT / 2**20,
        "cached_mib": figures["bytes"] / 2**20,
        "idle_mib": idle,
        "peak_above_idle_mib": peak - idle,
        "seconds_a_segment": (time.perf_counter() - began) / 4000,
        "hits": figures["hits"],
        "misses": figures["misses"],
        "processes": len(watched),
    }


def _pss(processes: list[psutil.Process]) -> float:
    return sum(p.memory_full_info().pss for p in processes) / 2**20


# --- what is shown --------------------------------------------------------------------------


def render(results: dict[str, Any]) -> list[str]:
    per_snapshot = results["parameters"] * 4 / 1e6
    pickle_mb = results["pickle_bytes"] / 1e6

    def ms(values: list[float], steps: int = 1) -> str:
        return spread([1000 * v / steps for v in values], "{:.1f} ms")

    rows = []
    for name in ("cold", "warm"):
        ours, theirs = results["local"][name], results["pickle"][name]
        ratio = statistics.median(theirs["seconds"]) / 10 / statistics.median(ours["seconds"])
        rows.append(
            f"| local, {name} | {ms(ours['seconds'])}, {ours['bytes'] / 1e6:.1f} MB "
            f"| {ms(theirs['seconds'], 10)}, {theirs['bytes'] / 1e7:.0f} MB | x {ratio:.1f} |"
        )
    for name, what in (("cold", "set opened anew"), ("warm", "set open")):
        ours = results["s3"][name]
        rows.append(
            f"| S3, {what} | {ms(ours['seconds'])}, {ours['bytes'] / 1e6:.1f} MB in "
            f"{ours['requests']:.1f} requests | {pickle_mb / 10:.0f} MB | |"
        )
    c, w, m = results["cache"], results["waiting"], results["memory"]
    lines = [
        f"Ten experts of 51 snapshots of {per_snapshot:.2f} MB (ConvNet D3, width 128): a pickle "
        f"of {pickle_mb:.0f} MB",
        "that is loaded every ten steps (shown: a tenth of it), against two snapshots "
        f"({2 * per_snapshot:.1f} MB)",
        "a step. S3 is a real server on loopback that keeps objects in memory; a network adds its",
        "own time to every byte.",
        "",
        "| where | our segment | a tenth of the pickle | pickle ÷ ours |",
        "|---|---|---|---|",
        *rows,
        "",
        "Through the node's cache (Ray's object store, mapped without a copy):",
        "",
        "| store | not in the cache yet | in the cache |",
        "|---|---|---|",
        *(f"| {n} | {ms(c[n]['miss'])} | {ms(c[n]['hit'])} |" for n in c),
        "",
        "Share of its time that a distillation (IPC 1, N = 4, one thread) waits for its segments,",
        "with the next one read while a step computes:",
        "",
        "| store | step | while the cache fills | once it is warm |",
        "|---|---|---|---|",
        *(
            f"| {n} | {v['step_seconds']:.2f} s | {100 * v['first']:.2f} % "
            f"| {100 * v['second']:.2f} % |"
            for n, v in w.items()
        ),
        "",
        f"Memory: 4,000 random segments of a store of {m['store_mib'] / 1024:.1f} GiB under a "
        f"limit of {m['limit_mib']:.0f} MiB",
        f"({m['misses']} read, {m['hits']} found): the worker, the cache and Ray's object store "
        "together peak at",
        f"{m['peak_above_idle_mib']:.0f} MiB above their idle state; "
        f"{1000 * m['seconds_a_segment']:.1f} ms a segment.",
    ]
    return lines
