"""Segments of expert trajectories in a node's memory, shared by all trials of the node.

One actor a node reads the store and keeps snapshots in Ray's object store as numpy arrays, which
the workers of the node map without a copy. The actor owns them, so they outlive the worker that
asked for them first; the least recently used go when their bytes exceed a limit.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from ftd import __version__
from ftd.trajectory import SCHEMA_VERSION, DamagedError, ExpertSet
from ftd_ray.actors import Lingering, shared_actor
from ftd_ray.store import TrajectoryStore

READERS = 4
"""Snapshots that a node reads at a time."""
SETS_OPEN = 8
"""Sets whose files a reader keeps open."""
OBJECT_STORE_SHARE = 0.5
"""Of a node's object store, at most, whatever limit is asked for."""
IDLE_SECONDS = 30
"""After the last worker of its node has ended, a cache does not keep that node any longer."""
ATTEMPTS = 3
"""Times that a worker asks a cache that dies; then it reads the store itself."""

Place = tuple[str, int, int, str]
"""(set, expert, epoch, part file): the file's name holds its checksum: equal places, equal bits."""
T = TypeVar("T")


class SegmentCache(Lingering):
    """The actor. Snapshots are read once, however many ask for them at the same time."""

    idle_seconds = IDLE_SECONDS

    def __init__(self, store_uri: str, schema: int, version: str) -> None:
        self._most = int(_object_store_bytes() * OBJECT_STORE_SHARE)
        self._limit = 0
        self._readers = [_Reader(store_uri) for _ in range(READERS)]
        self._files: dict[tuple[str, int], dict[int, str]] = {}
        """(set, expert) -> epoch -> part file, all by one manifest."""
        self._kept: OrderedDict[Place, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._reading: dict[Place, asyncio.Task[Any]] = {}
        self._hits = self._misses = 0

    async def get(self, key: str, expert: int, epochs: tuple[int, ...], limit: int) -> list[Any]:
        """References to (P,) float32 arrays of an expert at these epochs of one trajectory.

        Of several limits, in bytes, the largest counts.
        """
        self.used()
        self._limit = max(self._limit, min(limit, self._most))
        try:
            return await self._segment(key, expert, epochs)
        except DamagedError:  # or taken away and trained anew: then all epochs are of the new one
            return await self._segment(key, expert, epochs)

    async def figures(self) -> dict[str, int]:
        """hits, misses, bytes and limit, for tests and benchmarks."""
        return {
            "hits": self._hits,
            "misses": self._misses,
            "bytes": self._bytes,
            "limit": self._limit,
        }

    async def _segment(self, key: str, expert: int, epochs: tuple[int, ...]) -> list[Any]:
        reader = self._readers[expert % READERS]
        try:
            files = self._files.get((key, expert), {})
            if not files.keys() >= set(epochs):
                files = await reader.run(reader.files, key, expert, {*files, *epochs})
                self._files[key, expert] = files
            return await asyncio.gather(*(self._one((key, expert, e, files[e])) for e in epochs))
        except DamagedError:  # it will be built anew: nothing may stay open or known of the old
            self._files = {place: f for place, f in self._files.items() if place[0] != key}
            await reader.run(reader.forget, key)
            raise

    async def _one(self, place: Place) -> Any:
        if place in self._kept:
            self._hits += 1
            self._kept.move_to_end(place)
            return self._kept[place][0]
        task = self._reading.get(place)
        if task is None:
            self._misses += 1
            task = self._reading[place] = asyncio.create_task(self._fetch(place))
            task.add_done_callback(lambda _: self._reading.pop(place))
        else:
            self._hits += 1
        return await asyncio.shield(task)

    async def _fetch(self, place: Place) -> Any:
        reader = self._readers[place[1] % READERS]
        ref, size = await reader.run(reader.read, *place)
        if size <= self._limit:
            self._kept[place] = (ref, size)
            self._bytes += size
            while self._bytes > self._limit:
                _, (_, gone) = self._kept.popitem(last=False)
                self._bytes -= gone
        return ref


class _Reader:
    """A thread with open files of its own. An expert is always read by the same one."""

    def __init__(self, store_uri: str) -> None:
        self._uri = store_uri
        self._thread = ThreadPoolExecutor(1, "read")
        self._sets: dict[str, ExpertSet] = {}

    async def run(self, method: Callable[..., T], *args: Any) -> T:
        """Calls one of the methods below in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, method, *args)

    def files(self, key: str, expert: int, epochs: Iterable[int]) -> dict[int, str]:
        """The part files of epochs; the last first, which may need a further manifest."""
        experts = self._set(key)
        return {e: experts.part(expert, e).file for e in sorted(epochs, reverse=True)}

    def read(self, key: str, expert: int, epoch: int, file: str) -> tuple[Any, int]:
        experts = self._set(key)
        array = experts.params(expert, epoch)
        if experts.part(expert, epoch).file != file:
            raise DamagedError(f"{file} of expert {expert} of set {key} was taken away.")
        return ray.put(array), array.nbytes

    def forget(self, key: str) -> None:
        self._sets.pop(key, None)

    def _set(self, key: str) -> ExpertSet:
        experts = self._sets.pop(key, None)
        if experts is None:
            experts = TrajectoryStore(self._uri).at(key)
            experts.published()  # one listing of the set, in place of one of each expert
        while len(self._sets) >= SETS_OPEN:
            self._sets.pop(next(iter(self._sets)))
        self._sets[key] = experts  # the last used are the last
        return experts


class CachedExperts:
    """The first ``count`` experts of a set, read through the cache of this worker's node."""

    at_once = READERS

    def __init__(self, store_uri: str, key: str, count: int, limit: int):
        self.experts = count
        self._uri, self._key, self._limit = store_uri, key, limit
        self._cache: Any = None
        self._one = threading.Lock()
        self._direct: ExpertSet | None = None

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Parameters (P,), read-only, of an expert at two epochs. Raises what the store raises."""
        for _ in range(ATTEMPTS):
            cache = None
            try:
                cache = self._joined()
                get = cache.get.remote(self._key, expert, (start, end), self._limit)
                first, last = ray.get(get)
                return ray.get(first), ray.get(last)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except RayError:  # the cache died, and its arrays with it
                with self._one:
                    self._cache = None if self._cache is cache else self._cache
        with self._one:  # a set has one reader at a time
            self._direct = self._direct or TrajectoryStore(self._uri).at(self._key)
            return self._direct.segment(expert, start, end)

    def _joined(self) -> Any:
        """The node's cache, which does not end before this actor."""
        with self._one:
            if self._cache is None:
                self._cache = node_cache(self._uri)
                if ray.get_runtime_context().get_actor_id() is not None:
                    self._cache.join.remote(ray.get_runtime_context().current_actor)
            return self._cache


def node_cache(store_uri: str) -> Any:
    """The cache of a store on this node."""
    here = ray.get_runtime_context().get_node_id()
    return shared_actor(SegmentCache, "cache", store_uri, SCHEMA_VERSION, __version__, node=here)


def _object_store_bytes() -> float:
    here = ray.get_runtime_context().get_node_id()
    node = next(n for n in ray.nodes() if n["NodeID"] == here)
    return float(node["Resources"].get("object_store_memory", 0))
