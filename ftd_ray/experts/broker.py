"""The broker: one actor for a store on a cluster, which makes every build happen once.

A trial asks for an expert set and waits, holding no CPU or GPU. The broker looks into the store,
has what is missing trained by the fleet, and answers everybody who asked for the same thing at the
same time. It holds nothing that the store does not say, so it can die; it imports no torch, so it
is small.
"""

import asyncio
import contextlib
import itertools
import json
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ftd import __version__
from ftd.errors import Diverged, UserError
from ftd.trajectory import PART_EPOCHS, DamagedError
from ftd.trajectory import SCHEMA_VERSION as STORE_SCHEMA
from ftd_ray.actors import Lingering, shared_actor
from ftd_ray.autoscaler import head_node
from ftd_ray.experts.fleet import (
    ATTEMPTS,
    Build,
    ExpertActor,
    Fleet,
    OtherKind,
    gpu_kinds,
    has_others,
    node_ids,
    start_actor,
)
from ftd_ray.experts.kinds import Kinds
from ftd_ray.experts.orders import (
    ExpertDiverged,
    ExpertOrder,
    FleetStatus,
    GpuFull,
    NodeStatus,
    SetStatus,
    Urgency,
)
from ftd_ray.experts.shares import GPU_HEADROOM, gpu_share
from ftd_ray.node_faults import NodeFault
from ftd_ray.nodes import Health, nodes_able
from ftd_ray.storage import PlaceError, place_error
from ftd_ray.store import TrajectoryStore
from ftd_ray.store.published import PublishedExperts

SILENT_SECONDS = 300
"""What is only wanted by askers that were not heard of for so long is dropped, until they are."""
OTHER_KINDS_SECONDS = 60
"""Where an expert was measured on one kind of GPU, the others are waited for at most so long. What
is measured later is used from then on."""
RATE_SECONDS = 60
"""Epochs per second are counted over this long."""


class Withdrawn(UserError):
    """Nobody wants that expert any more."""


@dataclass(eq=False)
class _Job:
    """The build of one expert, and who wants it."""

    epochs: int
    left: int
    """Epochs that the store has not got."""
    rank: tuple[int, int, int]
    askers: dict[int, str]
    """Turn of an order -> who placed it; the first one pays."""
    before: "_Job | None"
    """A shorter build of the same expert, which this one goes on from."""
    build: Build | None = None
    fleet: Fleet | Kinds | None = None
    task: "asyncio.Task[None]" = field(init=False)

    def want(self, turn: int, asker: str, rank: tuple[int, int, int]) -> None:
        """Another order wants it, or what comes after it, and may be in more of a hurry."""
        first = rank[0] != Urgency.AHEAD == self.rank[0]  # who only expects it, pays for nobody
        self.askers = {turn: asker} | self.askers if first else self.askers | {turn: asker}
        self.rank = min(self.rank, rank)
        if self.build is not None and self.fleet is not None:
            self.fleet.hasten(self.build, self.rank)
        if self.before is not None:
            self.before.want(turn, asker, rank)


@dataclass
class _Wanted:
    """What one asker asked for of one set, and what came of it."""

    count: int = 0
    epochs: int = 0
    present: set[int] = field(default_factory=set)
    built: dict[int, float] = field(default_factory=dict)
    gpus: float = 0.0
    expected: bool = True
    """It was not asked for so far, and nothing of it built: there is nothing to tell."""

    def want(self, order: ExpertOrder, published: dict[int, int]) -> None:
        """Takes an order, and the last epoch of each expert that the store has."""
        asked = order.urgency is not Urgency.AHEAD
        if self.expected:
            self.count, self.epochs, self.present = order.count, order.epochs, set()
        elif asked:
            self.count = max(self.count, order.count)
            if order.epochs > self.epochs:
                self.epochs, self.present = order.epochs, set()
        self.expected = self.expected and not asked
        self.present |= {i for i in range(self.count) if published.get(i, -1) >= self.epochs}


@dataclass(frozen=True)
class _Told:
    """What an asker has heard of a set."""

    present: frozenset[int] = frozenset()
    built: dict[int, float] = field(default_factory=dict)
    points: int = 0
    """Of its experts' curves."""
    now: tuple[Any, ...] = ()
    """All that does not grow."""


@dataclass(frozen=True)
class _Answer:
    """All that an asker has heard."""

    sets: dict[str, _Told] = field(default_factory=dict)
    notes: int = 0


@dataclass
class _Asker:
    heard: float
    sets: dict[str, _Wanted] = field(default_factory=dict)
    ahead: list[ExpertOrder] = field(default_factory=list)
    """What it will ask for later on."""
    notes: list[str] = field(default_factory=list)
    speaks: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared while it is silent."""
    answers: dict[int, _Answer] = field(default_factory=dict)
    """By number: the one that it named last, and the last one."""
    answered: int = 0


def _chain(job: _Job | None) -> Iterator[_Job]:
    """A job and those that it waits for, as far as they are under way."""
    while job is not None and not job.task.done():
        yield job
        job = job.before


class Broker(Lingering):
    """One for a store on a cluster: ``ensure`` returns when an expert set is in the store."""

    expert_actor: type = ExpertActor
    patience: float = OTHER_KINDS_SECONDS
    """With kinds of GPU that are not measured yet, where one is."""

    def __init__(self, store_uri: str, schema: int, version: str) -> None:
        self._store = TrajectoryStore(store_uri)
        self._published_experts = PublishedExperts(self._store)
        self._id = uuid.uuid4().hex
        self._askers: dict[str, _Asker] = {}
        self._jobs: dict[tuple[str, int], _Job] = {}
        self._fleets: dict[tuple[float, float, int, bool, str | None, bool], Fleet] = {}
        self._health = Health()
        self._first_gpus: dict[tuple[float, int], asyncio.Task[None]] = {}
        """(CPUs, memory) of an expert -> what waits for the first GPU that has room for it."""
        self._needs: dict[tuple[str, str | None], asyncio.Task[list[int]]] = {}
        """(what an expert's memory depends on, kind of GPU) -> how much of it it takes."""
        self._asked: dict[str, float] = {}
        """What an expert's memory depends on -> when it was to be measured first."""
        self._diverged: dict[tuple[str, int], tuple[int, str]] = {}
        """(set, expert) -> epochs that it did not reach, and why."""
        self._points: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
        """Set -> (expert, epoch, validation accuracy), in the order in which they came."""
        self._epochs: dict[str, dict[int, int]] = defaultdict(dict)
        """Set -> expert -> its last epoch of them."""
        self._ticks: deque[tuple[float, str]] = deque()
        """(when, node) of the epochs of the last minute."""
        self._mending: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._turns = itertools.count()
        self._placed: set[asyncio.Task[None]] = set()
        """Orders of what is built ahead; the event loop itself keeps no task alive."""
        self._listening: asyncio.Task[None] | None = None

    # --- for those who ask ------------------------------------------------------------------

    async def ensure(self, order: ExpertOrder) -> list[int]:
        """Waits until the first ``count`` experts have ``epochs`` epochs; returns their numbers.

        Raises UserError when an expert cannot be built, ExpertDiverged when it diverged.
        """
        self._listening = self._listening or asyncio.create_task(self._drop_the_silent())
        while True:
            asker = self._heard(order.asker)
            try:
                await self._ensure(order, asker)
                return list(range(order.count))
            except Withdrawn:
                await asker.speaks.wait()
                if self._askers.get(order.asker) is not asker:
                    raise

    async def expect(self, orders: list[ExpertOrder]) -> None:
        """An asker will want these later on; what is cheap enough is built while actors stand."""
        for order in orders:
            self._heard(order.asker).ahead.append(order)
        jobs = [job for last in self._jobs.values() for job in _chain(last) if job.build]
        for name in {order.asker for order in orders}:
            if any(name in job.askers.values() for job in jobs):
                self._build_ahead(name)  # its first order was quicker

    def _build_ahead(self, name: str) -> None:
        """Places what an asker expects, once something is built for it at all."""
        asker = self._askers.get(name)
        if asker is None:
            return
        orders, asker.ahead = asker.ahead, []
        for order in orders:
            if order.gpus is not None or self._is_measured(order):
                task = asyncio.create_task(self._ensure(order, asker))
                self._placed.add(task)
                task.add_done_callback(self._placed.discard)
                task.add_done_callback(lambda t: t.cancelled() or t.exception())  # told by others

    async def _ensure(self, order: ExpertOrder, asker: _Asker) -> None:
        published = await self._published(order)
        if self._askers.get(order.asker) is not asker:
            raise Withdrawn(f"set {order.key} is not wanted any more")
        asker.sets.setdefault(order.key, _Wanted()).want(order, published)
        turn = next(self._turns)
        left = {i: order.epochs - published.get(i, 0) for i in range(order.count)}
        tasks = [self._job(order, i, turn, n).task for i, n in left.items() if n > 0]
        try:
            await asyncio.gather(*(asyncio.shield(t) for t in tasks))
        except BaseException:  # without one expert, the others are of no use to this order
            self._drop(order.asker, turn)
            raise

    async def status(self, asker: str, since: tuple[str, int] = ("", 0)) -> FleetStatus:
        """What came of an asker's orders so far; asking says that it is still there.

        ``since`` is the mark of an answer that it has: then what it has heard is not told again.
        """
        me = self._heard(asker)
        broker, number = since
        told = me.answers.get(number) if broker == self._id else None
        before = told or _Answer()
        under_way: dict[str, dict[int, _Job]] = defaultdict(dict)
        for (key, index), job in self._jobs.items():
            if not job.task.done():
                under_way[key][index] = job
        sets, heard = {}, {}
        for key, wanted in me.sets.items():
            if not wanted.expected:
                known = before.sets.get(key, _Told())
                sets[key], heard[key] = self._set_status(key, wanted, asker, under_way[key], known)
        if told is not None:
            sets = {k: s for k, s in sets.items() if heard[k] != told.sets.get(k)}
        me.answered += 1
        kept = {} if told is None else {number: told}
        me.answers = {**kept, me.answered: _Answer(heard, len(me.notes))}
        starting = sum(w.node is None for f in self._fleets.values() for w in f.workers)
        starting += sum(not t.done() for t in (*self._first_gpus.values(), *self._needs.values()))
        return FleetStatus(
            sets=sets,
            nodes=self._nodes(),
            starting=starting,
            notes=tuple(me.notes[before.notes :]),
            left_out=dict(self._health.left_out),
            mark=(self._id, me.answered),
            whole=told is None,
        )

    async def leave_out(self, nodes: dict[str, str]) -> None:
        """Builds nothing more on nodes that failed somebody's trials: id -> why."""
        self._health.leave_out(nodes)

    async def withdraw(self, asker: str) -> None:
        """An asker ends: what nobody else wants is not built. Parts that are there stay."""
        if asker in self._askers:
            self._askers.pop(asker).speaks.set()
            self._drop(asker)

    async def mend(self, order: ExpertOrder) -> list[int]:
        """Takes damaged experts of a set out of it, so that they are built anew; says which."""
        self._heard(order.asker)
        return await self._mend(order)

    # --- for the fleet ----------------------------------------------------------------------

    async def epoch_done(self, key: str, index: int, epoch: int, val_accuracy: float) -> None:
        """An expert actor finished an epoch."""
        self._points[key].append((index, epoch, val_accuracy))
        self._epochs[key][index] = max(epoch, self._epochs[key].get(index, 0))
        for job in _chain(self._jobs.get((key, index))):
            if job.build is None:
                continue
            if epoch and job.build.node:
                self._ticks.append((time.monotonic(), job.build.node))
            if epoch and epoch % PART_EPOCHS == 0:  # that is published, whatever happens now
                job.build.losses = 0

    # --- builds -----------------------------------------------------------------------------

    def _job(self, order: ExpertOrder, index: int, turn: int, left: int) -> _Job:
        """The build of one expert: the one under way if it goes far enough, else a new one."""
        rank = (order.urgency, turn, index)
        before = self._jobs.get((order.key, index))
        if before is not None and not before.task.done():
            if before.askers:
                before.want(turn, order.asker, rank)
            if before.askers and before.epochs >= order.epochs:
                return before
        else:
            before = None
        job = _Job(order.epochs, left, rank, {turn: order.asker}, before)
        job.task = asyncio.create_task(self._build(order, index, job))
        job.task.add_done_callback(lambda _: self._over(order.key, index, job))
        self._jobs[order.key, index] = job
        return job

    def _over(self, key: str, index: int, job: _Job) -> None:
        if self._jobs.get((key, index)) is job:
            del self._jobs[key, index]

    async def _build(self, order: ExpertOrder, index: int, job: _Job) -> None:
        if job.before is not None:
            await asyncio.wait([job.before.task])
            job.left = min(job.left, max(0, job.epochs - job.before.epochs))
            job.before = None
        epochs, reason = self._diverged.get((order.key, index), (order.epochs + 1, ""))
        if order.epochs >= epochs:
            raise ExpertDiverged(reason)
        unwanted = Withdrawn(f"expert {index} of set {order.key} is not wanted any more")
        attempt = 0
        while True:
            job.fleet = await self._fleet(order)
            if not job.askers:
                raise unwanted
            done: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
            kind = json.dumps([order.identity["data"], order.identity["experts"]["network"]])
            job.build = Build(
                job.rank, order.key, index, kind, job.left, order.work, done, order.at_once
            )
            for asker in job.askers.values():
                self._build_ahead(asker)
            try:
                seconds = await job.fleet.run(job.build)
                break
            except asyncio.CancelledError:
                raise unwanted from None
            except OtherKind:  # nobody's doing: the cluster has changed
                continue
            except RayTaskError as error:
                attempt, cause = attempt + 1, error.cause
                if isinstance(cause, Diverged):
                    self._diverged[order.key, index] = order.epochs, str(cause)
                last = attempt == ATTEMPTS
                if isinstance(cause, DamagedError) and not last:
                    await self._mend(order)
                elif isinstance(cause, GpuFull) and order.gpus is None and not last:
                    assert job.build.fleet is not None
                    await self._shrink(order, job.build.fleet)
                elif isinstance(cause, OSError):
                    uri = self._store.uri
                    raise place_error(uri, "store.uri", cause, verb="written") from None
                elif isinstance(cause, Diverged):
                    raise ExpertDiverged(str(cause)) from None
                elif isinstance(cause, UserError):
                    raise cause from None
                else:
                    raise
        self._published_experts.built(order.key, index, job.epochs)
        payer = next(iter(job.askers.values()), None)
        for asker in set(job.askers.values()) & self._askers.keys():
            wanted = self._askers[asker].sets[order.key]
            wanted.expected = False
            if job.epochs >= wanted.epochs:
                wanted.present.add(index)
            if asker == payer and seconds is not None:
                wanted.built[index] = wanted.built.get(index, 0.0) + seconds
                took = job.build.fleet if job.build is not None else None
                wanted.gpus = took.size[1] if took is not None else order.gpus or 0.0

    async def _fleet(self, order: ExpertOrder) -> Fleet | Kinds:
        """The actors of the size that the order says, or that measurements say.

        Each kind of GPU has a share of its own, and actors of its own.
        """
        if order.gpus is not None:
            return self._fleet_of(order, order.gpus, measured=False)
        shares: dict[str | None, float] = {}
        while not shares:
            while not (kinds := await asyncio.to_thread(gpu_kinds, self._health.left_out)):
                await self._first_gpu(order)
            if bound := len(kinds) > 1:  # GPUs without a name cannot be told from the others
                kinds.discard(None)
            with contextlib.suppress(OtherKind):
                shares = await self._shares(order, list(kinds), bound)
        fleets = [self._fleet_of(order, share, kind, bound) for kind, share in shares.items()]
        return fleets[0] if len(fleets) == 1 else Kinds(fleets)

    async def _shares(
        self, order: ExpertOrder, kinds: list[str | None], bound: bool
    ) -> dict[str | None, float]:
        """The share of an expert on each kind of GPU that one fits on, as far as it is known soon.

        Raises UserError if one fits on none of them.
        """
        tasks = {kind: self._need(order, kind, bound) for kind in kinds}
        since = self._asked.setdefault(footprint(order.identity), time.monotonic())
        shares: dict[str | None, float] = {}
        refused: dict[str | None, UserError] = {}
        while not shares and len(refused) < len(tasks):
            waiting = [t for kind, t in tasks.items() if kind not in refused]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            left = since + self.patience - time.monotonic()
            await asyncio.wait(waiting, timeout=max(0, left))
            for kind, task in tasks.items():
                if task.done() and kind not in refused:
                    try:
                        shares[kind] = gpu_share(*task.result())
                    except UserError as error:
                        refused[kind] = error
        if not shares:
            raise next(iter(refused.values()))
        return shares

    async def _first_gpu(self, order: ExpertOrder) -> None:
        """Waits until the cluster has a GPU for such an expert: one actor for all that wait."""
        size = (order.cpus, order.memory)
        task = self._first_gpus.get(size)
        if task is None or task.done():
            task = self._first_gpus[size] = asyncio.create_task(self._await_gpu(*size))
        await asyncio.shield(task)

    async def _await_gpu(self, cpus: float, memory: int) -> None:
        for _ in range(ATTEMPTS):
            avoid = self._health.avoid(nodes_able(cpus, 1.0, memory))
            actor = start_actor(cpus, 1.0, memory, self.expert_actor, avoid)
            try:
                await actor.node.remote()
                return
            except RayError:  # the node is gone again
                continue
            finally:
                ray.kill(actor)
        raise PlaceError("no GPU stayed on the cluster. See what `ray status` says of its nodes.")

    def _fleet_of(
        self,
        order: ExpertOrder,
        gpus: float,
        kind: str | None = None,
        bound: bool = False,
        *,
        measured: bool = True,
    ) -> Fleet:
        size = (order.cpus, gpus, order.memory)
        key = (*size, measured, kind, bound)
        if key not in self._fleets:
            self._fleets[key] = Fleet(
                *size,
                share=gpus or None,
                measured=measured,
                kind=kind,
                bound=bound,
                actor=self.expert_actor,
                health=self._health,
            )
        return self._fleets[key]

    def _need(
        self, order: ExpertOrder, kind: str | None, bound: bool = False
    ) -> "asyncio.Task[list[int]]":
        """[bytes that one such expert takes of a GPU of that kind, bytes that there are]."""
        name = (footprint(order.identity), kind)
        task = self._needs.get(name)
        if task is None or (task.done() and task.exception() is not None):
            task = self._needs[name] = asyncio.create_task(self._measure(order, kind, bound))
            task.add_done_callback(lambda done: self._measured(*name, done))
        return task

    def _measured(self, name: str, kind: str | None, task: "asyncio.Task[list[int]]") -> None:
        """What waits for another kind of GPU may go to this one now."""
        others = any(of == name and other != kind for of, other in self._needs)
        if others and not task.cancelled() and task.exception() is None:
            for fleet in self._fleets.values():
                fleet.share_out_anew()

    def _is_measured(self, order: ExpertOrder) -> bool:
        """On some kind of GPU."""
        name = footprint(order.identity)
        tasks = [task for (of, _), task in self._needs.items() if of == name]
        return any(t.done() and not t.cancelled() and not t.exception() for t in tasks)

    async def _measure(self, order: ExpertOrder, kind: str | None, bound: bool) -> list[int]:
        alone, node = (order.cpus, 1.0, order.memory), ""  # on its GPU
        for attempt in range(1, ATTEMPTS + 1):
            only = kind if bound else None
            avoid = self._health.avoid(nodes_able(*alone, only))
            actor = start_actor(*alone, self.expert_actor, avoid, only)
            try:
                node = await actor.node.remote()
                if kind is not None and await asyncio.to_thread(has_others, node, kind):
                    if kind not in await asyncio.to_thread(gpu_kinds):
                        break
                    bound = True  # another kind has come just now
                    continue
                return list(await actor.gpu_need.remote(order.work))
            except RayTaskError as error:
                if isinstance(error.cause, NodeFault):
                    if here := node_ids().get(node):
                        self._health.suspect(here)
                    if attempt < ATTEMPTS:
                        continue
                    raise PlaceError(f"no GPU could be measured: {error.cause}.") from None
                raise UserError(
                    f"the GPU memory of an expert could not be measured: {error.cause}"
                ) from None
            except RayError as error:  # its process or its node is gone
                if attempt == ATTEMPTS:
                    raise UserError(
                        "the GPU memory of an expert could not be measured "
                        f"({type(error).__name__}). Give resources.gpus_per_expert as a number."
                    ) from None
            finally:
                ray.kill(actor)
        raise OtherKind(f"no GPU of the kind {kind} stayed on the cluster")

    async def _shrink(self, order: ExpertOrder, fleet: Fleet) -> None:
        """An expert did not fit its measured share after all: one less on each such GPU."""
        need = await self._need(order, fleet.kind)
        share = gpu_share(*need)
        if share != fleet.size[1]:
            return  # another expert has said so
        per_gpu = round(1 / share)
        if per_gpu == 1:
            raise UserError("an expert does not fit on a GPU by itself. Lower experts.batch_size.")
        need[0] = int(need[1] * GPU_HEADROOM / (per_gpu - 1))

    def _drop(self, asker: str, order: int | None = None) -> None:
        """All that an asker wants, or one order by its turn, is wanted by the others only."""
        for job in (job for last in self._jobs.values() for job in _chain(last)):
            left = {t: a for t, a in job.askers.items() if a != asker or order not in (None, t)}
            if job.askers and not left and job.build is not None and job.fleet is not None:
                job.fleet.drop(job.build)
            job.askers = left

    # --- the store --------------------------------------------------------------------------

    async def _published(self, order: ExpertOrder) -> dict[int, int]:
        """Expert -> its last published epoch, from memory where that is all that is wanted.

        Whoever fills a store has every manifest read; trials read those of their experts anyway.
        """
        look = partial(
            self._published_experts.epochs,
            order.identity,
            order.count,
            order.epochs,
            read=order.urgency is Urgency.FILL,
        )
        try:
            try:
                return await look()
            except DamagedError:
                await self._mend(order)
                return await look()
        except OSError as error:
            raise place_error(self._store.uri, "the store", error, verb="read") from error

    async def _mend(self, order: ExpertOrder) -> list[int]:
        async with self._mending[order.key]:
            found = await asyncio.to_thread(self._quarantine_damaged, order)
            self._published_experts.forget(order.key)  # or something of it was missed
        for index, reason in found.items():
            self._note(order, index, reason)
        return list(found)

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

    def _note(self, order: ExpertOrder, index: int, reason: str) -> None:
        text = f"expert {index} of set {order.key} was damaged and is trained again: {reason}"
        self._epochs[order.key].pop(index, None)
        for name, asker in self._askers.items():
            if order.key in asker.sets:
                asker.sets[order.key].present.discard(index)
            if order.key in asker.sets or name == order.asker:
                asker.notes.append(text)

    # --- what is told -----------------------------------------------------------------------

    def _set_status(
        self, key: str, wanted: _Wanted, asker: str, under_way: dict[int, _Job], told: _Told
    ) -> tuple[SetStatus, _Told]:
        """A set with what is new since it was told, and what has been told with that."""
        running, ours, left = {}, set(), 0
        for i, job in under_way.items():
            if i in wanted.present or i >= wanted.count:
                continue
            epoch = self._epochs[key].get(i, 0)
            left += max(0, wanted.epochs - epoch)
            job = job.before or job
            if job.build is not None and job.build.node:
                running[i] = epoch
            if next(iter(job.askers.values()), None) == asker:
                ours.add(i)
        points = self._points[key]
        curves: dict[int, dict[int, float]] = {}
        for i, epoch, accuracy in points[told.points :]:
            curves.setdefault(i, {})[epoch] = accuracy
        status = SetStatus(
            needed=wanted.count,
            epochs=wanted.epochs,
            present=frozenset(wanted.present - told.present),
            built={i: n for i, n in wanted.built.items() if told.built.get(i) != n},
            running=running,
            ours=frozenset(ours),
            epochs_left=left,
            curves=curves,
            broker=self._id,
            gpus=wanted.gpus,
            gone=told.present - wanted.present,
        )
        now = (status.needed, status.epochs, running, status.ours, left, status.gpus)
        present = told.present if told.present == wanted.present else frozenset(wanted.present)
        built = told.built if not status.built else dict(wanted.built)
        return status, _Told(present, built, len(points), now)

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
        known.speaks.set()
        return known

    async def _drop_the_silent(self) -> None:
        """A driver that was killed cannot say that it wants nothing more."""
        while True:
            await asyncio.sleep(SILENT_SECONDS / 10)
            since = time.monotonic() - SILENT_SECONDS
            for name, asker in self._askers.items():
                if asker.heard < since and asker.speaks.is_set():
                    asker.speaks.clear()
                    self._drop(name)

    def busy(self) -> bool:
        return any(not job.task.done() for job in self._jobs.values())


def footprint(identity: dict[str, Any]) -> str:
    """Names what an expert's memory depends on."""
    shaping = ("network", "batch_size", "momentum", "sharpness")
    experts = [identity["experts"].get(k) for k in shaping]
    return json.dumps([identity["data"]["shape"], identity["data"]["classes"], experts])


def broker(store_uri: str) -> Any:
    """The broker of a store on this cluster; started by whoever asks first.

    It stays on the head: elsewhere it would keep a node alive, or go with it.
    """
    return shared_actor(Broker, "broker", store_uri, STORE_SCHEMA, __version__, node=head_node())
