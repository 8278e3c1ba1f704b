"""The broker: one actor for a store on a cluster, which makes every build happen once.

A trial asks for an expert set and waits, holding no CPU or GPU. The broker looks into the store,
has what is missing trained by expert actors, each in the resources of one expert, and answers
everybody who asked for the same thing at the same time. It holds nothing that the store does not
say, so it can die; it imports no torch, so it is small.
"""

import asyncio
import hashlib
import pickle
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from ftd import __version__
from ftd.errors import Diverged, UserError
from ftd.trajectory import SCHEMA_VERSION as STORE_SCHEMA
from ftd_ray.store import TrajectoryStore

NAMESPACE = "ftd"
BUILD_ATTEMPTS = 4
"""Times that an expert is tried when its actor or node dies."""
IDLE_SECONDS = 600
"""A broker without work ends after this long."""
RECOUNT_SECONDS = 2
"""While experts wait, the cluster's size is looked at this often."""


@dataclass(frozen=True, kw_only=True)
class ExpertOrder:
    """An expert set that somebody wants: so many experts of so many epochs."""

    key: str
    identity: dict[str, Any]
    count: int
    epochs: int
    work: bytes
    """A pickled ``ftd_ray.experts.ExpertRequest``."""
    cpus: float
    gpus: float


class ExpertActor:
    """Shell of ``ftd_ray.experts.build_expert``: trains one expert after another."""

    def build(self, pickled: bytes, key: str, index: int, broker: Any) -> float:
        """Builds an expert of a pickled ExpertRequest; returns the seconds that it took."""
        from ftd_ray.experts import build_expert

        request = pickle.loads(pickled)
        began = time.monotonic()
        last = began

        def on_epoch(snapshot: Any) -> None:
            nonlocal last
            now = time.monotonic()
            broker.epoch_done.remote(key, index, snapshot.epoch, snapshot.val_accuracy, now - last)
            last = now

        build_expert(request, index, on_epoch)
        return time.monotonic() - began


@dataclass
class SetProgress:
    """What the broker knows of one expert set, for progress lines and for MLflow."""

    identity: dict[str, Any]
    needed: int = 0
    epochs: int = 0
    reused: set[int] = field(default_factory=set)
    built: set[int] = field(default_factory=set)
    running: dict[int, int] = field(default_factory=dict)
    """Expert -> its last finished epoch."""
    seconds: float = 0.0
    """Of all builds together."""
    epoch_seconds: list[float] = field(default_factory=list)
    curves: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    """Expert -> epoch -> validation accuracy, of what was built here."""


class Slots:
    """A fair semaphore whose size is asked for again and again, since clusters grow."""

    def __init__(self, room: Callable[[], int]) -> None:
        self._room = room
        self._active = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> bool:
        return bool(self._queue)

    async def acquire(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        self._admit()
        while not turn.done():
            await asyncio.wait([turn], timeout=RECOUNT_SECONDS)
            self._admit()

    def release(self) -> None:
        self._active -= 1
        self._admit()

    def _admit(self) -> None:
        while self._queue and self._active < self._room():
            self._active += 1
            self._queue.popleft().set_result(None)


class Broker:
    """One for a store on a cluster: ``ensure`` returns when an expert set is in the store."""

    def __init__(self, store_uri: str) -> None:
        self._store = TrajectoryStore(store_uri)
        self._progress: dict[str, SetProgress] = {}
        self._inflight: dict[tuple[str, int], tuple[int, asyncio.Task[None]]] = {}
        self._idle: dict[tuple[float, float], list[Any]] = defaultdict(list)
        self._slots: dict[tuple[float, float], Slots] = {}
        self._diverged: dict[tuple[str, int], str] = {}
        self._last_used = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

    async def ensure(self, order: ExpertOrder) -> list[int]:
        """Waits until the first ``count`` experts have ``epochs`` epochs; returns their numbers.

        Raises UserError when an expert cannot be built.
        """
        self._last_used = time.monotonic()
        self._watch = self._watch or asyncio.create_task(self._end_when_idle())
        count, epochs = order.count, order.epochs
        progress = self._progress.setdefault(order.key, SetProgress(order.identity))
        progress.needed = max(progress.needed, count)
        progress.epochs = max(progress.epochs, epochs)
        experts = self._store.expert_set(order.identity)
        published = set(await asyncio.to_thread(experts.complete, epochs))
        for index in published & set(range(count)):
            if index not in progress.built:
                progress.reused.add(index)
        tasks = [self._task(order, i) for i in range(count) if i not in published]
        await asyncio.gather(*(asyncio.shield(t) for t in tasks))
        return list(range(count))

    async def epoch_done(
        self, key: str, index: int, epoch: int, val_accuracy: float, seconds: float
    ) -> None:
        """An expert actor finished an epoch."""
        progress = self._progress.get(key)
        if progress is None:  # this broker is a new one, and the word was for the one before
            return
        if index in progress.running:  # else word of the last epoch came after that of the end
            progress.running[index] = epoch
        progress.curves[index][epoch] = val_accuracy
        if epoch:
            progress.epoch_seconds.append(seconds)

    async def progress(self) -> dict[str, SetProgress]:
        """What is known of every set that was asked for; asking keeps the broker alive."""
        self._last_used = time.monotonic()
        return self._progress

    def _task(self, order: ExpertOrder, index: int) -> asyncio.Task[None]:
        """The build of one expert: the one under way if it goes far enough, else a new one."""
        key = (order.key, index)
        epochs, task = self._inflight.get(key, (0, None))
        if task is not None and not task.done() and epochs >= order.epochs:
            return task
        before = task if task is not None and not task.done() else None
        task = asyncio.create_task(self._build(order, index, before))
        self._inflight[key] = (order.epochs, task)
        return task

    async def _build(
        self, order: ExpertOrder, index: int, before: asyncio.Task[None] | None
    ) -> None:
        if before is not None:  # a shorter build of the same expert: go on from its end
            await asyncio.wait([before])
        progress = self._progress[order.key]
        size = (order.cpus, order.gpus)
        if reason := self._diverged.get((order.key, index)):
            raise UserError(reason)  # it would again: the same seed, the same end
        slots = self._slots.setdefault(size, Slots(lambda: room_for(*size)))
        await slots.acquire()
        actor = None
        try:
            for attempt in range(BUILD_ATTEMPTS):
                actor = self._idle[size].pop() if self._idle[size] else _start(*size)
                progress.running[index] = 0
                try:
                    me = ray.get_runtime_context().current_actor
                    progress.seconds += await actor.build.remote(order.work, order.key, index, me)
                    break
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, Diverged):
                        self._diverged[order.key, index] = str(error.cause)
                    if isinstance(cause := error.cause, Diverged | UserError | OSError):
                        raise UserError(str(cause)) from None
                    raise
                except ray.exceptions.RayError:  # its process or its node is gone, or its memory
                    actor = None
                    if attempt == BUILD_ATTEMPTS - 1:
                        raise UserError(
                            f"expert {index} of set {order.key} was lost {BUILD_ATTEMPTS} times "
                            "with its process. Does an expert need more memory than there is?"
                        ) from None
            progress.built.add(index)
        finally:
            progress.running.pop(index, None)
            self._last_used = time.monotonic()
            if actor is not None:
                self._idle[size].append(actor)
            slots.release()
            if not slots.waiting:  # its CPUs and GPUs are for the trials now
                for idle in self._idle.pop(size, []):
                    ray.kill(idle)

    async def _end_when_idle(self) -> None:
        while time.monotonic() - self._last_used < IDLE_SECONDS or any(
            not t.done() for _, t in self._inflight.values()
        ):
            await asyncio.sleep(IDLE_SECONDS / 10)
        ray.kill(ray.get_runtime_context().current_actor)


def broker(store_uri: str) -> Any:
    """The broker of a store on this cluster; started by whoever asks first."""
    identity = f"{store_uri}\0{STORE_SCHEMA}\0{__version__}"
    name = f"ftd-broker-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    return (
        ray.remote(Broker)
        .options(
            name=name,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_concurrency=10_000,
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote(store_uri)
    )


def _start(cpus: float, gpus: float) -> Any:
    return ray.remote(ExpertActor).options(num_cpus=cpus, num_gpus=gpus).remote()


def room_for(cpus: float, gpus: float) -> int:
    """How many expert actors the cluster has room for, or could have: pending ones are demand."""
    total = capacity()
    room = int(total.get("CPU", 0) / cpus)
    return max(1, min(room, int(total.get("GPU", 0) / gpus)) if gpus else room)


def capacity() -> dict[str, float]:
    """CPUs, GPUs and so on of the cluster, as it is or as its autoscaler may make it."""
    total = dict(ray.cluster_resources())
    possible = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {k: max(total.get(k, 0), possible.get(k, 0)) for k in {*total, *possible}}
