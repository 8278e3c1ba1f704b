"""Segments of expert trajectories in a node's memory, shared by all trials of the node.

One actor a node reads the store and keeps snapshots in Ray's object store as numpy arrays, which
the workers of the node map without a copy. The actor owns them, so they outlive the worker that
asked for them first; the least recently used go when their bytes exceed a limit.
"""

import asyncio
import threading
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from ftd import __version__
from ftd.trajectory import SCHEMA_VERSION, DamagedError, ExpertSet
from ftd_ray.actors import Lingering, shared_actor
from ftd_ray.store import TrajectoryStore

READERS = 4
"""Snapshots that a node reads at a time."""
OBJECT_STORE_SHARE = 0.5
"""Of a node's object store, at most, whatever limit is asked for."""
ATTEMPTS = 3
"""Times that a worker asks a cache that dies; then it reads the store itself."""

Place = tuple[str, str, int]
"""(set, part file, epoch): the part's name holds its checksum, so equal places, equal bits."""


class SegmentCache(Lingering):
    """The actor. Snapshots are read once, however many ask for them at the same time."""

    def __init__(self, store_uri: str, schema: int, version: str) -> None:
        self._uri = store_uri
        self._limit = 0
        self._kept: OrderedDict[Place, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._reading: dict[tuple[str, int, int], asyncio.Task[Any]] = {}
        self._pool = ThreadPoolExecutor(READERS, "read")
        self._local = threading.local()
        self._rounds: dict[str, int] = defaultdict(int)
        """Set -> how often its files were found damaged."""
        self._hits = self._misses = 0

    async def allow(self, limit: int) -> None:
        """Lets the cache take ``limit`` bytes; of several limits the largest counts."""
        self.used()
        most = await asyncio.to_thread(_object_store_bytes)
        self._limit = max(self._limit, min(limit, int(most * OBJECT_STORE_SHARE)))

    async def get(self, key: str, expert: int, epochs: tuple[int, ...]) -> list[Any]:
        """References to (P,) float32 arrays of an expert at these epochs."""
        self.used()
        return await asyncio.gather(*(self._one(key, expert, e) for e in epochs))

    async def figures(self) -> dict[str, int]:
        """hits, misses, bytes and limit, for tests and benchmarks."""
        return {
            "hits": self._hits,
            "misses": self._misses,
            "bytes": self._bytes,
            "limit": self._limit,
        }

    async def _one(self, key: str, expert: int, epoch: int) -> Any:
        name = (key, expert, epoch)
        task = self._reading.get(name)
        if task is None:
            task = self._reading[name] = asyncio.create_task(self._fetch(*name))
            task.add_done_callback(lambda _: self._reading.pop(name, None))
        return await asyncio.shield(task)

    async def _fetch(self, key: str, expert: int, epoch: int) -> Any:
        loop = asyncio.get_running_loop()
        file = await loop.run_in_executor(self._pool, self._file, key, expert, epoch)
        place = (key, file, epoch)
        if place in self._kept:
            self._hits += 1
            self._kept.move_to_end(place)
            return self._kept[place][0]
        self._misses += 1
        ref, size = await loop.run_in_executor(self._pool, self._read, key, expert, epoch)
        if size <= self._limit and place not in self._kept:
            self._kept[place] = (ref, size)
            self._bytes += size
            while self._bytes > self._limit:
                _, (_, gone) = self._kept.popitem(last=False)
                self._bytes -= gone
        return ref

    def _file(self, key: str, expert: int, epoch: int) -> str:
        return self._set(key).part(expert, epoch).file

    def _read(self, key: str, expert: int, epoch: int) -> tuple[Any, int]:
        try:
            array = self._set(key).params(expert, epoch)
        except DamagedError:  # it will be built anew: no thread may keep the old files open
            self._rounds[key] += 1
            raise
        return ray.put(array), array.nbytes

    def _set(self, key: str) -> ExpertSet:
        """This thread's own reader: open files are not shared between threads."""
        sets = self._local.__dict__.setdefault("sets", {})
        name = (key, self._rounds[key])
        if name not in sets:
            sets[name] = TrajectoryStore(self._uri).at(key)
        return sets[name]


class CachedExperts:
    """The first ``count`` experts of a set, read through the cache of this worker's node."""

    def __init__(self, store_uri: str, key: str, count: int, limit: int):
        self.experts = count
        self._uri, self._key, self._limit = store_uri, key, limit
        self._cache: Any = None
        self._direct: ExpertSet | None = None

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Parameters (P,), read-only, of an expert at two epochs. Raises what the store raises."""
        for _ in range(ATTEMPTS):
            try:
                if self._cache is None:
                    self._cache = node_cache(self._uri, self._limit)
                first, last = ray.get(self._cache.get.remote(self._key, expert, (start, end)))
                return ray.get(first), ray.get(last)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except RayError:  # the cache died, and its arrays with it
                self._cache = None
        self._direct = self._direct or TrajectoryStore(self._uri).at(self._key)
        return self._direct.segment(expert, start, end)


def node_cache(store_uri: str, limit: int) -> Any:
    """The cache of a store on this node, allowed ``limit`` bytes."""
    here = ray.get_runtime_context().get_node_id()
    cache = shared_actor(SegmentCache, "cache", store_uri, SCHEMA_VERSION, __version__, node=here)
    ray.get(cache.allow.remote(limit))
    return cache


def _object_store_bytes() -> float:
    here = ray.get_runtime_context().get_node_id()
    node = next(n for n in ray.nodes() if n["NodeID"] == here)
    return float(node["Resources"].get("object_store_memory", 0))
