"""The broker: one actor for a store on a cluster, which makes every build happen once.

A trial asks for an expert set and waits, holding no CPU or GPU. The broker looks into the store,
has what is missing trained by the fleet, and answers everybody who asked for the same thing at the
same time. It holds nothing that the store does not say, so it can die; it imports no torch, so it
is small.
"""

import asyncio
import itertools
import json
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ftd import __version__
from ftd.errors import Diverged, UserError
from ftd.trajectory import SCHEMA_VERSION as STORE_SCHEMA
from ftd.trajectory import DamagedError
from ftd_ray.actors import Lingering, shared_actor
from ftd_ray.experts.fleet import ATTEMPTS, GPU_HEADROOM, Build, Fleet, gpu_share, start_actor
from ftd_ray.experts.orders import ExpertOrder, FleetStatus, GpuFull, NodeStatus, SetStatus
from ftd_ray.store import TrajectoryStore

SILENT_SECONDS = 300
"""What is only wanted by askers that did not ask for the status for so long is dropped."""
RATE_SECONDS = 60
"""Epochs per second are counted over this long."""


class Withdrawn(UserError):
    """Nobody wants that expert any more."""


@dataclass
class _Job:
    """The build of one expert, and who wants it."""

    epochs: int
    askers: list[str]
    """The first one pays."""
    task: "asyncio.Task[None]"
    build: Build | None = None
    fleet: Fleet | None = None


@dataclass
class _Wanted:
    """What one asker asked for of one set, and what came of it."""

    count: int = 0
    epochs: int = 0
    present: set[int] = field(default_factory=set)
    built: dict[int, float] = field(default_factory=dict)


@dataclass
class _Asker:
    heard: float
    sets: dict[str, _Wanted] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Broker(Lingering):
    """One for a store on a cluster: ``ensure`` returns when an expert set is in the store."""

    def __init__(self, store_uri: str, schema: int, version: str) -> None:
        self._store = TrajectoryStore(store_uri)
        self._askers: dict[str, _Asker] = {}
        self._jobs: dict[tuple[str, int], _Job] = {}
        self._fleets: dict[tuple[float, float, bool], Fleet] = {}
        self._needs: dict[str, asyncio.Task[list[int]]] = {}
        self._diverged: dict[tuple[str, int], str] = {}
        self._curves: dict[str, dict[int, dict[int, float]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        self._ticks: deque[tuple[float, str]] = deque()
        """(when, node) of the epochs of the last minute."""
        self._mending: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._turns = itertools.count()
        self._listening: asyncio.Task[None] | None = None

    # --- for those who ask ------------------------------------------------------------------

    async def ensure(self, order: ExpertOrder) -> list[int]:
        """Waits until the first ``count`` experts have ``epochs`` epochs; returns their numbers.

        Raises UserError when an expert cannot be built.
        """
        asker = self._heard(order.asker)
        self._listening = self._listening or asyncio.create_task(self._drop_the_silent())
        wanted = asker.sets.setdefault(order.key, _Wanted())
        wanted.count = max(wanted.count, order.count)
        wanted.epochs = max(wanted.epochs, order.epochs)
        published = await self._published(order)
        wanted.present |= published & set(range(order.count))
        turn = next(self._turns)
        missing = [i for i in range(order.count) if i not in published]
        tasks = [self._job(order, i, turn).task for i in missing]
        try:
            await asyncio.gather(*(asyncio.shield(t) for t in tasks))
        except BaseException:
            self._drop(order.asker, [order.key])  # without one expert, the others serve nobody
            raise
        return list(range(order.count))

    async def status(self, asker: str) -> FleetStatus:
        """What came of an asker's orders so far; asking says that it is still there."""
        me = self._heard(asker)
        sets = {key: self._set_status(key, wanted) for key, wanted in me.sets.items()}
        fleets = self._fleets.values()
        starting = sum(w.node is None for f in fleets for w in f.workers)
        return FleetStatus(sets=sets, nodes=self._nodes(), starting=starting, notes=tuple(me.notes))

    async def withdraw(self, asker: str) -> None:
        """An asker ends: what nobody else wants is not built. Parts that are there stay."""
        if asker in self._askers:
            self._drop(asker, list(self._askers.pop(asker).sets))

    async def mend(self, order: ExpertOrder) -> list[int]:
        """Takes damaged experts of a set out of it, so that they are built anew; says which."""
        self._heard(order.asker)
        async with self._mending[order.key]:
            found = await asyncio.to_thread(self._quarantine_damaged, order)
        for index, reason in found.items():
            self._note(order.key, index, reason)
        return list(found)

    # --- for the fleet ----------------------------------------------------------------------

    async def epoch_done(self, key: str, index: int, epoch: int, val_accuracy: float) -> None:
        """An expert actor finished an epoch."""
        self._curves[key][index][epoch] = val_accuracy
        job = self._jobs.get((key, index))
        if epoch and job is not None and job.build is not None and job.build.node:
            self._ticks.append((time.monotonic(), job.build.node))

    # --- builds -----------------------------------------------------------------------------

    def _job(self, order: ExpertOrder, index: int, turn: int) -> _Job:
        """The build of one expert: the one under way if it goes far enough, else a new one."""
        place = (order.key, index)
        rank = (0 if order.urgent else 1, turn, index)
        job = self._jobs.get(place)
        before = None
        if job is not None and not job.task.done():
            if job.askers and job.epochs >= order.epochs:
                if order.asker not in job.askers:
                    job.askers.append(order.asker)
                if job.build is not None and job.fleet is not None:
                    job.fleet.hasten(job.build, rank)
                return job
            before = job.task
        job = _Job(order.epochs, [order.asker], None)  # type: ignore[arg-type]
        job.task = asyncio.create_task(self._build(order, index, rank, job, before))
        self._jobs[place] = job
        return job

    async def _build(
        self,
        order: ExpertOrder,
        index: int,
        rank: tuple[int, int, int],
        job: _Job,
        before: "asyncio.Task[None] | None",
    ) -> None:
        if before is not None:  # a shorter build of the same expert: go on from its end
            await asyncio.wait([before])
        if reason := self._diverged.get((order.key, index)):
            raise UserError(reason)  # it would again: the same seed, the same end
        for attempt in range(ATTEMPTS):
            job.fleet = await self._fleet(order)
            if not job.askers:
                raise Withdrawn(f"expert {index} of set {order.key} is not wanted any more")
            done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
            job.build = Build(rank, order.key, index, order.work, done)
            try:
                seconds = await job.fleet.run(job.build)
                break
            except asyncio.CancelledError:
                raise Withdrawn(
                    f"expert {index} of set {order.key} is not wanted any more"
                ) from None
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, Diverged):
                    self._diverged[order.key, index] = str(cause)
                last = attempt == ATTEMPTS - 1
                if isinstance(cause, DamagedError) and not last:
                    await self.mend(order)
                elif isinstance(cause, GpuFull) and order.gpus is None and not last:
                    await self._shrink(order)
                elif isinstance(cause, Diverged | UserError | OSError):
                    raise UserError(str(cause)) from None
                else:
                    raise
        for number, asker in enumerate(job.askers):
            wanted = self._askers[asker].sets.get(order.key) if asker in self._askers else None
            if wanted is not None:
                wanted.present.add(index)
                if number == 0:
                    wanted.built[index] = wanted.built.get(index, 0.0) + seconds

    async def _fleet(self, order: ExpertOrder) -> Fleet:
        """The actors of the size that the order says, or that a measurement says."""
        measured = order.gpus is None
        gpus = gpu_share(*await self._need(order)) if order.gpus is None else order.gpus
        size = (order.cpus, gpus, measured)
        if size not in self._fleets:
            self._fleets[size] = Fleet(order.cpus, gpus, share=gpus if measured else None)
        return self._fleets[size]

    async def _need(self, order: ExpertOrder) -> list[int]:
        """[bytes of its GPU that one such expert takes, bytes that there are], measured once."""
        name = footprint(order.identity)
        task = self._needs.get(name)
        if task is None or (task.done() and task.exception() is not None):
            task = self._needs[name] = asyncio.create_task(self._measure(order))
        return await asyncio.shield(task)

    async def _measure(self, order: ExpertOrder) -> list[int]:
        actor = start_actor(order.cpus, 1.0)  # alone on its GPU
        try:
            return list(await actor.gpu_need.remote(order.work))
        except RayTaskError as error:
            raise UserError(
                f"the GPU memory of an expert could not be measured: {error.cause}"
            ) from None
        except RayError as error:
            raise UserError(
                f"the GPU memory of an expert could not be measured ({type(error).__name__}). "
                "Give resources.gpus_per_expert as a number."
            ) from None
        finally:
            ray.kill(actor)

    async def _shrink(self, order: ExpertOrder) -> None:
        """An expert did not fit its measured share after all: one less on each GPU."""
        need = await self._need(order)
        per_gpu = round(1 / gpu_share(*need))
        if per_gpu == 1:
            raise UserError("an expert does not fit on a GPU by itself. Lower experts.batch_size.")
        need[0] = int(need[1] * GPU_HEADROOM / (per_gpu - 1))

    def _drop(self, asker: str, keys: Iterable[str]) -> None:
        wanted = set(keys)
        for (key, _), job in self._jobs.items():
            if key in wanted and asker in job.askers and not job.task.done():
                job.askers.remove(asker)
                if not job.askers and job.build is not None and job.fleet is not None:
                    job.fleet.drop(job.build)

    # --- the store --------------------------------------------------------------------------

    async def _published(self, order: ExpertOrder) -> set[int]:
        def look() -> set[int]:
            return set(self._store.expert_set(order.identity).complete(order.epochs))

        try:
            return await asyncio.to_thread(look)
        except DamagedError:
            await self.mend(order)
            return await asyncio.to_thread(look)

    def _quarantine_damaged(self, order: ExpertOrder) -> dict[int, str]:
        """Expert -> what was wrong with it and where it lies now."""
        experts = self._store.expert_set(order.identity)
        found = {}
        for index in experts.experts():
            try:
                experts.verify(index)
            except DamagedError as error:
                found[index] = f"{error} It lies in {experts.quarantine(index)}."
        return found

    def _note(self, key: str, index: int, reason: str) -> None:
        text = f"expert {index} of set {key} was damaged and is trained again: {reason}"
        for asker in self._askers.values():
            if key in asker.sets:
                asker.sets[key].present.discard(index)
                asker.notes.append(text)

    # --- what is told -----------------------------------------------------------------------

    def _set_status(self, key: str, wanted: _Wanted) -> SetStatus:
        running, left = {}, 0
        for i in range(wanted.count):
            job = self._jobs.get((key, i))
            if i in wanted.present or job is None or job.task.done():
                continue
            epoch = max(self._curves[key][i], default=0)
            left += max(0, wanted.epochs - epoch)
            if job.build is not None and job.build.node:
                running[i] = epoch
        return SetStatus(
            needed=wanted.count,
            epochs=wanted.epochs,
            present=frozenset(wanted.present),
            built=dict(wanted.built),
            running=running,
            epochs_left=left,
            curves={i: dict(c) for i, c in self._curves[key].items()},
        )

    def _nodes(self) -> dict[str, NodeStatus]:
        now = time.monotonic()
        while self._ticks and self._ticks[0][0] < now - RATE_SECONDS:
            self._ticks.popleft()
        nodes: dict[str, NodeStatus] = {}
        for fleet in self._fleets.values():
            for worker in fleet.workers:
                if worker.build is not None and worker.node is not None:
                    nodes.setdefault(worker.node, NodeStatus()).running += 1
        if self._ticks:
            span = max(1.0, now - self._ticks[0][0])
            for _, node in self._ticks:
                nodes.setdefault(node, NodeStatus()).epochs_per_second += 1 / span
        return nodes

    # --- its own end ------------------------------------------------------------------------

    def _heard(self, asker: str) -> _Asker:
        self.used()
        now = time.monotonic()
        known = self._askers.setdefault(asker, _Asker(now))
        known.heard = now
        return known

    async def _drop_the_silent(self) -> None:
        """A driver that was killed cannot say that it wants nothing more."""
        while True:
            await asyncio.sleep(SILENT_SECONDS / 10)
            silent = time.monotonic() - SILENT_SECONDS
            for name in [a for a, v in self._askers.items() if v.heard < silent]:
                await self.withdraw(name)

    def busy(self) -> bool:
        return any(not job.task.done() for job in self._jobs.values())


def footprint(identity: dict[str, Any]) -> str:
    """Names what an expert's memory depends on."""
    shaping = ("network", "batch_size", "momentum", "sharpness")
    experts = [identity["experts"].get(k) for k in shaping]
    return json.dumps([identity["data"]["shape"], identity["data"]["classes"], experts])


def broker(store_uri: str) -> Any:
    """The broker of a store on this cluster; started by whoever asks first."""
    return shared_actor(Broker, "broker", store_uri, STORE_SCHEMA, __version__)
