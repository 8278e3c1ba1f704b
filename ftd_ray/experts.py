"""Expert sets on a cluster: a broker that makes every build happen once, and expert actors.

A trial asks the broker for an expert set and waits, holding no CPU or GPU. The broker looks into
the store, has what is missing trained by expert actors, each in the resources of one expert, and
answers everybody who asked for the same thing at the same time. Expert actors publish in parts,
so one that dies costs a few epochs; the broker itself holds nothing that the store does not say.
"""

import asyncio
import hashlib
import pickle
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import ray

from ftd import __version__
from ftd.data import Dataset, DatasetConfig, load
from ftd.errors import Diverged, UserError
from ftd.expert import SCHEMA_VERSION, ExpertConfig, Numerics, Snapshot, set_key, train_expert
from ftd.trajectory import PART_EPOCHS
from ftd_ray.store import TrajectoryStore

NAMESPACE = "ftd"
BUILD_ATTEMPTS = 4
"""Times that an expert is tried when its actor or node dies."""
IDLE_SECONDS = 600
"""A broker without work ends after this long."""


@dataclass(frozen=True, kw_only=True)
class ExpertRequest:
    """An expert set that somebody wants: so many experts of so many epochs."""

    store_uri: str
    identity: dict[str, Any]
    dataset: DatasetConfig
    experts: ExpertConfig
    numerics: Numerics
    cpus: float
    gpus: float

    @property
    def key(self) -> str:
        return set_key(self.identity)


OnEpoch = Callable[[Snapshot], None]


def build_expert(request: ExpertRequest, index: int, on_epoch: OnEpoch) -> None:
    """Trains expert ``index`` of a request into the store, on from what is published of it."""
    device = request.numerics.apply()
    data = _dataset(request.dataset, str(device))
    experts = TrajectoryStore(request.store_uri).expert_set(request.identity)
    experts.create()
    waiting: list[Snapshot] = []
    epochs = request.experts.epochs
    for snapshot in train_expert(
        request.experts,
        data,
        index,
        epochs=epochs,
        resume=experts.resume_point(index),
        device=device,
    ):
        waiting.append(snapshot)
        if snapshot.epoch == epochs or (snapshot.epoch and snapshot.epoch % PART_EPOCHS == 0):
            experts.append(index, waiting)
            waiting = []
        on_epoch(snapshot)


@lru_cache(maxsize=1)
def _dataset(config: DatasetConfig, device: str) -> Dataset:
    return load(config, device)


class ExpertActor:
    """Shell of ``build_expert``: one process that trains one expert after another."""

    def build(self, request: ExpertRequest, index: int, broker: Any) -> float:
        """Returns the seconds that the build took."""
        began = time.monotonic()
        last = began

        def on_epoch(snapshot: Snapshot) -> None:
            nonlocal last
            now = time.monotonic()
            broker.epoch_done.remote(
                request.key, index, snapshot.epoch, snapshot.val_accuracy, now - last
            )
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


class Broker:
    """One for a store on a cluster: ``ensure`` returns when an expert set is in the store."""

    def __init__(self, store_uri: str) -> None:
        self._store = TrajectoryStore(store_uri)
        self._progress: dict[str, SetProgress] = {}
        self._inflight: dict[tuple[str, int], tuple[int, asyncio.Task[None]]] = {}
        self._idle: dict[tuple[float, float], list[Any]] = defaultdict(list)
        self._slots: dict[tuple[float, float], asyncio.Semaphore] = {}
        self._waiting = 0
        self._last_used = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

    async def ensure(self, pickled: bytes) -> list[int]:
        """Waits until the first ``count`` experts have ``epochs`` epochs; returns their numbers.

        Takes a pickled ExpertRequest. Raises UserError when an expert cannot be built.
        """
        request: ExpertRequest = pickle.loads(pickled)
        self._last_used = time.monotonic()
        self._watch = self._watch or asyncio.create_task(self._end_when_idle())
        count, epochs = request.experts.count, request.experts.epochs
        progress = self._progress.setdefault(request.key, SetProgress(request.identity))
        progress.needed = max(progress.needed, count)
        progress.epochs = max(progress.epochs, epochs)
        experts = self._store.expert_set(request.identity)
        published = set(await asyncio.to_thread(experts.complete, epochs))
        for index in published & set(range(count)):
            if index not in progress.built:
                progress.reused.add(index)
        tasks = [self._task(request, i) for i in range(count) if i not in published]
        await asyncio.gather(*(asyncio.shield(t) for t in tasks))
        return list(range(count))

    async def epoch_done(
        self, key: str, index: int, epoch: int, val_accuracy: float, seconds: float
    ) -> None:
        """An expert actor finished an epoch."""
        progress = self._progress[key]
        if index in progress.running:  # else word of the last epoch came after that of the end
            progress.running[index] = epoch
        progress.curves[index][epoch] = val_accuracy
        if epoch:
            progress.epoch_seconds.append(seconds)

    async def progress(self) -> dict[str, SetProgress]:
        """What is known of every set that was asked for; asking keeps the broker alive."""
        self._last_used = time.monotonic()
        return self._progress

    def _task(self, request: ExpertRequest, index: int) -> asyncio.Task[None]:
        """The build of one expert: the one under way if it goes far enough, else a new one."""
        key = (request.key, index)
        epochs, task = self._inflight.get(key, (0, None))
        if task is not None and not task.done() and epochs >= request.experts.epochs:
            return task
        before = task if task is not None and not task.done() else None
        task = asyncio.create_task(self._build(request, index, before))
        self._inflight[key] = (request.experts.epochs, task)
        return task

    async def _build(
        self, request: ExpertRequest, index: int, before: asyncio.Task[None] | None
    ) -> None:
        if before is not None:  # a shorter build of the same expert: go on from its end
            await asyncio.wait([before])
        progress = self._progress[request.key]
        size = (request.cpus, request.gpus)
        slots = self._slots.setdefault(size, asyncio.Semaphore(_room_for(*size)))
        self._waiting += 1
        await slots.acquire()
        self._waiting -= 1
        actor = None
        try:
            for attempt in range(BUILD_ATTEMPTS):
                actor = self._idle[size].pop() if self._idle[size] else _start(*size)
                progress.running[index] = 0
                try:
                    me = ray.get_runtime_context().current_actor
                    progress.seconds += await actor.build.remote(request, index, me)
                    break
                except ray.exceptions.ActorError:
                    actor = None
                    if attempt == BUILD_ATTEMPTS - 1:
                        raise UserError(
                            f"expert {index} of set {request.key} was lost {BUILD_ATTEMPTS} times "
                            "with its process. Does an expert need more memory than there is?"
                        ) from None
                except ray.exceptions.RayTaskError as error:
                    if isinstance(cause := error.cause, Diverged | UserError | OSError):
                        raise UserError(str(cause)) from None
                    raise
            progress.built.add(index)
        finally:
            progress.running.pop(index, None)
            self._last_used = time.monotonic()
            if actor is not None:
                self._idle[size].append(actor)
            slots.release()
            if not self._waiting:  # its CPUs and GPUs are for the trials now
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
    identity = f"{store_uri}\0{SCHEMA_VERSION}\0{__version__}"
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
        )
        .remote(store_uri)
    )


def _start(cpus: float, gpus: float) -> Any:
    return ray.remote(ExpertActor).options(num_cpus=cpus, num_gpus=gpus).remote()


def _room_for(cpus: float, gpus: float) -> int:
    """How many expert actors the cluster has room for: pending ones show as demand."""
    total = ray.cluster_resources()
    room = int(total.get("CPU", 0) / cpus)
    return max(1, min(room, int(total.get("GPU", 0) / gpus)) if gpus else room)
