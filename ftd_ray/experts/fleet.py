"""The fleet: expert actors of one size, as many as there is work for and the cluster has room for.

Room is also what the cluster's autoscaler may add: waiting actors are the demand that it sees. An
actor takes the next build when it stands, so one that still waits for a node holds no work up; with
the last build those that wait are withdrawn.
"""

import asyncio
import contextlib
import heapq
import itertools
import math
import pickle
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ftd.errors import UserError
from ftd_ray.experts.orders import GpuFull, Urgency
from ftd_ray.experts.room import room_for
from ftd_ray.node_faults import NodeFault, assigned, faults_of_the_node, gpus_here
from ftd_ray.nodes import GPU_KIND, Health, NothingLeft, beside, nodes_able, standing_nodes
from ftd_ray.storage import PlaceError

ATTEMPTS = 4
"""Times that actors are started in vain, one after the other."""
LOSSES = 8
"""Times that an expert may be lost with its process, on nodes that are still there, before it gets
further: it is no accident any more."""
LOSSES_FULL = 3
"""What counts for as many: that it does not fit on a GPU. There may be larger ones elsewhere."""
LEASE_SECONDS = 300
"""After so long an actor makes way for one that may have to wait: for trials, or other fleets."""
RECOUNT_SECONDS = 2
"""While there is work, the cluster's size is looked at this often."""
JUDGE_SECONDS = 0.2
"""Between two looks at those whose end is waited for."""
AHEAD_SECONDS = 20
"""An actor stays to build ahead when all of that takes no longer: about what it costs to make way
for trials and to start again, on each core."""


class OtherKind(Exception):
    """A build is to choose its kind of GPU anew: those, or what is known of them, have changed."""


FAULTS = RayError | NodeFault | GpuFull
"""After which a build is tried elsewhere. Whose share is measured, gets a larger one instead."""


class ExpertActor:
    """Shell of ``ftd_ray.experts.build``: trains one expert after another."""

    def node(self) -> str:
        """The node that the actor stands on."""
        return node_name()

    def build(
        self, work: bytes, key: str, index: int, share: float | None, broker: Any
    ) -> float | None:
        """Builds an expert of a pickled ExpertRequest.

        Returns the seconds that it took, None if there was nothing left to train.
        """
        from ftd_ray.experts.build import build_expert
        from ftd_ray.limits import limit_worker

        request, gpus = pickle.loads(work), gpus_here()
        with faults_of_the_node(gpus):
            limit_worker(share, assigned("memory"))
            self.check(request.numerics)
        began, trained = time.monotonic(), False

        def on_epoch(snapshot: Any) -> None:
            nonlocal trained
            trained = True
            broker.epoch_done.remote(key, index, snapshot.epoch, snapshot.val_accuracy)

        build_expert(request, index, on_epoch, gpus=gpus)
        return time.monotonic() - began if trained else None

    def gpu_need(self, work: bytes) -> tuple[int, int]:
        """Bytes of its GPU that one such expert takes, and that there are."""
        from ftd_ray.experts.build import gpu_need

        with faults_of_the_node(gpus_here()):
            return gpu_need(pickle.loads(work))

    def check(self, numerics: Any) -> None:
        """Raises NodeFault where the device does not compute what it should."""
        from ftd_ray.probe import check

        check(numerics)


@dataclass(eq=False)
class Build:
    """One expert to be trained. The smallest ``rank`` is next."""

    rank: tuple[int, int, int]
    """(Urgency, turn of the order, expert)."""
    key: str
    index: int
    kind: str
    """Builds of one kind take about as long an epoch."""
    epochs: int
    """That are left to train, at most."""
    work: bytes
    done: asyncio.Future[float | None]
    at_once: int | None = None
    """Builds of this size at a time, at most; of several limits the largest counts."""
    losses: int = 0
    """Of its actor, since it got further last."""
    worker: "Worker | None" = field(default=None, repr=False)
    fleet: "Fleet | None" = field(default=None, repr=False)
    """Whose actor took it last."""
    offered: "list[Fleet]" = field(default_factory=list, repr=False)
    """Where it waits until an actor takes it."""

    def __lt__(self, other: "Build") -> bool:
        return self.rank < other.rank

    @property
    def due(self) -> bool:
        """Whether somebody waits for it."""
        return self.rank[0] != Urgency.AHEAD

    @property
    def waits(self) -> bool:
        """Whether no actor has taken it, and nothing has become of it."""
        return self.worker is None and not self.done.done()

    @property
    def node(self) -> str | None:
        """Where it is being trained."""
        return self.worker.node if self.worker else None


@dataclass(eq=False)
class Worker:
    """One expert actor."""

    actor: Any
    node: str | None = None
    """None while the actor waits for a place."""
    build: Build | None = None
    life: "asyncio.Task[None] | None" = field(default=None, repr=False)


class Fleet:
    """Expert actors of (cpus, gpus, memory) each. Lives in the event loop of the broker.

    ``share`` limits each to that share of its GPU's memory. One that is ``measured`` holds for GPUs
    of ``kind``: actors are ``bound`` to that kind where the cluster has others; where it has not,
    they ask for any GPU, since an autoscaler may know no kinds, and one that comes to lie on
    another takes no build. When the cluster's kinds of GPU change, builds that wait are given back:
    OtherKind says so.
    """

    def __init__(
        self,
        cpus: float,
        gpus: float,
        memory: int = 0,
        *,
        share: float | None = None,
        measured: bool = False,
        kind: str | None = None,
        bound: bool = False,
        actor: type = ExpertActor,
        room: Callable[[float, float, int, str | None], float] | None = None,
        health: Health | None = None,
    ) -> None:
        self.size, self._share = (cpus, gpus, memory), share
        self.kind, self._measured = kind, measured
        self._only = kind if bound else None
        self._kinds: set[str | None] | None = None
        """Of GPUs, that the cluster had at the last look."""
        self._health = health or Health()
        self._actor, self._room = actor, room or room_for
        self._queue: list[Build] = []
        self.workers: set[Worker] = set()
        self._failed_starts = 0
        self._judging: set[asyncio.Task[None]] = set()
        self._pace: dict[str, float] = {}
        """Seconds that the last build of a kind took for an epoch."""
        self._keeper: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    async def run(self, build: Build) -> float | None:
        """Has it built; returns what the actor does. Raises what it raised, or UserError."""
        self.offer(build)
        return await build.done

    def offer(self, build: Build) -> None:
        """The build waits here, as it may elsewhere."""
        build.offered.append(self)
        self._push(build)

    def hasten(self, build: Build, rank: tuple[int, int, int]) -> None:
        """Moves a build that waits forward."""
        if rank < build.rank:
            build.rank = rank
            self.reorder()

    def reorder(self) -> None:
        """A build's rank has changed."""
        heapq.heapify(self._queue)
        self._attend()

    def drop(self, build: Build) -> None:
        """Nobody wants it any more. What its actor has published stays."""
        build.done.cancel()
        self._tidy()
        if build.worker in self.workers:
            self._dismiss(build.worker)
        self._wake.set()

    def _push(self, build: Build) -> None:
        if build not in self._queue:
            heapq.heappush(self._queue, build)
        self._attend()

    def _tidy(self) -> None:
        """Forgets builds that other fleets' actors have taken, and what nobody wants."""
        waiting = [build for build in self._queue if build.waits]
        if len(waiting) < len(self._queue):
            self._queue = waiting
            heapq.heapify(self._queue)

    def _empty(self) -> list[Build]:
        """Takes all builds that wait."""
        self._tidy()
        queue, self._queue = self._queue, []
        return queue

    def _attend(self) -> None:
        """Something has changed in the queue."""
        self._wake.set()
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep())

    def _due(self) -> int:
        """Builds that somebody waits for and no actor has taken yet."""
        self._tidy()
        return sum(build.due for build in self._queue)

    def _next(self) -> Build | None:
        """What an actor that is free should do now; None if it should make way.

        Only one stays for what is built ahead, and only if that is over soon.
        """
        self._tidy()
        if not self._queue:
            return None
        if not self._queue[0].due:
            stays = any(w.build is not None and not w.build.due for w in self.workers)
            seconds = sum(self._pace.get(b.kind, math.inf) * b.epochs for b in self._queue)
            if stays or seconds > AHEAD_SECONDS:
                return None
        return heapq.heappop(self._queue)

    async def _keep(self) -> None:
        """Starts and withdraws actors while there is work."""
        room = 1.0
        while self._due() or self.workers:
            self._wake.clear()
            with contextlib.suppress(Exception):  # the cluster does not answer just now
                room = await asyncio.to_thread(self._room, *self.size, self._only)
                await self._look_at_kinds()
            try:
                self._adjust(room)
            except Exception as error:  # askers must hear of it
                self._failed_start(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), RECOUNT_SECONDS)

    def _adjust(self, room: float) -> None:
        """Starts or withdraws actors until there are as many as work and room are there for."""
        self._tidy()
        busy = [w.build for w in self.workers if w.build is not None]
        due = [build for build in self._queue if build.due]
        limits = [math.inf if b.at_once is None else b.at_once for b in (*busy, *due)]
        wanted = int(min(room, len(busy) + len(due), max(limits, default=0)))
        for _ in range(wanted - len(self.workers)):
            apart = self._health.avoid(nodes_able(*self.size, self._only))
            worker = Worker(start_actor(*self.size, self._actor, apart, self._only))
            self.workers.add(worker)
            worker.life = asyncio.create_task(self._live(worker))
        surplus = [w for w in self.workers if w.node is None]
        for worker in surplus[: max(0, len(self.workers) - wanted)]:
            self._dismiss(worker)

    def _dismiss(self, worker: Worker) -> None:
        self.workers.discard(worker)
        with contextlib.suppress(RayError):
            ray.kill(worker.actor)

    async def _live(self, worker: Worker) -> None:
        """An actor's life: waits for a place, builds while there is something to build."""
        try:
            worker.node = await worker.actor.node.remote()
            self._failed_starts = 0
            if self.kind is not None and await asyncio.to_thread(
                has_others, worker.node, self.kind
            ):
                if (build := self._next()) is not None:  # it has a share of its own there
                    self._give_back([build], OtherKind(f"a GPU is not of the kind {self.kind}"))
                return
            end = time.monotonic() + LEASE_SECONDS
            while worker in self.workers and time.monotonic() < end and (build := self._next()):
                worker.build, build.worker, build.fleet = build, worker, self
                for fleet in build.offered:
                    fleet._wake.set()
                await self._one(worker.actor, build)
                worker.build = build.worker = None
        except Exception as error:  # its process, node, GPU or data are gone, above all
            if worker.build is not None:
                self._lost(worker.build, worker.node, error)
            elif worker in self.workers:  # not dismissed
                self._failed_start(error)
        finally:
            self._dismiss(worker)
            self._wake.set()

    async def _one(self, actor: Any, build: Build) -> None:
        me = ray.get_runtime_context().current_actor
        try:
            seconds = await actor.build.remote(build.work, build.key, build.index, self._share, me)
        except Exception as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            elsewhere = RayError | NodeFault if self._measured else FAULTS
            if isinstance(cause, elsewhere):
                raise cause from None  # the build may be tried again
            if not build.done.done():
                build.done.set_exception(error)
        else:
            if node := node_ids().get(build.node or ""):
                self._health.worked(node)
            if seconds is not None:
                self._pace[build.kind] = seconds / max(1, build.epochs)
            if not build.done.done():
                build.done.set_result(seconds)

    def _lost(self, build: Build, place: str | None, error: Exception) -> None:
        """A build is tried again elsewhere; what may be its own doing counts."""
        node = node_ids().get(place or "")
        build.worker = None
        if isinstance(error, GpuFull):
            build.losses += math.ceil(LOSSES / LOSSES_FULL)
        elif isinstance(error, NodeFault):
            own = error.kind == "gpu"
            if node is not None:
                self._health.failed(node, (build.key, build.index), error.reason, own=own)
                build.losses += own and self._health.is_proven(node)
        elif node is not None:  # else it went with its node
            self._health.suspect(node)
            build.losses += 1
        if build.done.done():
            return
        if build.losses < LOSSES:
            for fleet in build.offered:
                fleet._push(build)
        elif isinstance(error, GpuFull):
            self._judging.add(judging := asyncio.create_task(self._judge(build, error)))
            judging.add_done_callback(self._judging.discard)
        else:
            build.done.set_exception(
                UserError(
                    f"expert {build.index} of set {build.key} was lost {LOSSES} times with its "
                    "process and got no further. Does an expert need more memory than there is? "
                    "Set resources.memory_per_expert to what it needs, so that a node takes no "
                    "more of them than it holds."
                )
            )

    async def _judge(self, build: Build, error: GpuFull) -> None:
        """A share that no expert fits on is nobody's own fault; those at work will tell."""
        while not self._pace and any(w.build is not None for w in self.workers):
            await asyncio.sleep(JUDGE_SECONDS)
        if not build.done.done():
            build.done.set_exception(error if self._pace else PlaceError(str(error)))

    async def _look_at_kinds(self) -> None:
        """Has builds that wait shared out anew when a kind of GPU has come, or has gone.

        Nodes that are left out count for nothing; nor does it change anything when no GPU is left.
        """
        if not self._measured:
            return
        if kinds := await asyncio.to_thread(gpu_kinds, self._health.left_out):
            before, self._kinds = self._kinds, kinds
            if before not in (None, kinds) or (self._only is not None and self._only not in kinds):
                self.share_out_anew()

    def share_out_anew(self) -> None:
        """Gives all builds back that wait, if a share was measured on this kind of GPU."""
        if self._measured:
            self._give_back(self._empty(), OtherKind("other GPUs than before may be used"))

    @staticmethod
    def _give_back(builds: Iterable[Build], error: Exception) -> None:
        """They cannot be built here."""
        for build in builds:
            if not build.done.done():
                build.done.set_exception(error)

    def _failed_start(self, error: Exception) -> None:
        if isinstance(error, NothingLeft):
            self._give_back(self._empty(), error)
            return
        self._failed_starts += 1
        if self._failed_starts < ATTEMPTS or not self._due():
            return
        self._failed_starts = 0
        build = heapq.heappop(self._queue)
        if not any(build in fleet._queue for fleet in build.offered):
            reason = " ".join(str(error).split())[:200]
            build.done.set_exception(
                PlaceError(f"expert actors could not be started {ATTEMPTS} times ({reason}).")
            )


def start_actor(
    cpus: float,
    gpus: float,
    memory: int,
    actor: type = ExpertActor,
    avoid: Collection[str] = (),
    kind: str | None = None,
) -> Any:
    """A new expert actor, spread over the nodes but those to ``avoid``; it may have to wait.

    With ``kind`` only GPUs of that kind are a place for it.
    """
    size = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory, "accelerator_type": kind}
    options = size | {"scheduling_strategy": "SPREAD"} | beside(avoid)
    return ray.remote(actor).options(**options).remote()


def gpu_kinds(left_out: Collection[str] = ()) -> set[str | None]:
    """The kinds of GPU that the cluster has now, but for nodes that are ``left_out``.

    By the names that Ray gives them; None for those without a name.
    """
    nodes = (node for node in standing_nodes() if node["NodeID"] not in left_out)
    return {_kind(node) for node in nodes if node["Resources"].get("GPU", 0)}


def has_others(name: str, kind: str | None) -> bool:
    """Whether the GPUs of a node are of another kind; ``name`` is what ``node_name`` gives it."""
    here = node_ids().get(name)  # None of one that is gone
    return any(node["NodeID"] == here and _kind(node) != kind for node in standing_nodes())


def _kind(node: dict[str, Any]) -> str | None:
    names = (key.removeprefix(GPU_KIND) for key in node["Resources"] if key.startswith(GPU_KIND))
    return next(names, None)


def node_name() -> str:
    """This node's address; nodes that share theirs with others add the start of their id."""
    here = ray.get_runtime_context().get_node_id()
    return next(name for name, node in node_ids().items() if node == here)


def node_ids() -> dict[str, str]:
    """Name -> id of the cluster's nodes."""
    addresses = {n["NodeID"]: n["NodeManagerAddress"] for n in standing_nodes()}
    shared = Counter(addresses.values())
    tells = next(n for n in itertools.count(6) if len({i[:n] for i in addresses}) == len(addresses))
    return {a if shared[a] == 1 else f"{a}-{node[:tells]}": node for node, a in addresses.items()}
