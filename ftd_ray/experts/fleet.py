"""The fleet: expert actors of one size, as many as there is work for and the cluster has room for.

An actor takes the next build when it stands, so one that still waits for a node holds no work up.
Waiting actors are demand that an autoscaler sees; with the last build they are withdrawn.
"""

import asyncio
import contextlib
import heapq
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ftd.errors import UserError
from ftd_ray.experts.orders import Urgency
from ftd_ray.experts.room import room_for

ATTEMPTS = 4
"""Times that an expert is tried when its actor or node dies."""
LEASE_SECONDS = 300
"""After so long an actor makes way for one that may have to wait: for trials, or other fleets."""
RECOUNT_SECONDS = 2
"""While there is work, the cluster's size is looked at this often."""
AHEAD_SECONDS = 20
"""An actor stays to build ahead when all of that takes no longer: about what it costs to make way
for trials and to start again, on each core."""
_KIND = "accelerator_type:"
"""Before the name of a node's GPUs, among its resources."""


class OtherKind(Exception):
    """A GPU is of another kind than the one that the share was measured on."""


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
        from ftd_ray.limits import assigned, limit_worker

        limit_worker(share, assigned("memory"))
        began, trained = time.monotonic(), False

        def on_epoch(snapshot: Any) -> None:
            nonlocal trained
            trained = True
            broker.epoch_done.remote(key, index, snapshot.epoch, snapshot.val_accuracy)

        build_expert(pickle.loads(work), index, on_epoch)
        return time.monotonic() - began if trained else None

    def gpu_need(self, work: bytes) -> tuple[int, int]:
        """Bytes of its GPU that one such expert takes, and that there are."""
        from ftd_ray.experts.build import gpu_need

        return gpu_need(pickle.loads(work))


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
    losses: int = 0
    """Of its actor, since it got further last."""
    worker: "Worker | None" = field(default=None, repr=False)

    def __lt__(self, other: "Build") -> bool:
        return self.rank < other.rank

    @property
    def due(self) -> bool:
        """Whether somebody waits for it."""
        return self.rank[0] != Urgency.AHEAD

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

    ``share`` limits each to that share of its GPU's memory, which was measured on GPUs of ``kind``.
    Actors are ``bound`` to that kind where the cluster has others; where it has not, they ask for
    any GPU, since an autoscaler may know no kinds, and one that comes to lie on another takes no
    build: OtherKind says so.
    """

    def __init__(
        self,
        cpus: float,
        gpus: float,
        memory: int = 0,
        *,
        share: float | None = None,
        kind: str | None = None,
        bound: bool = False,
        actor: type = ExpertActor,
        room: Callable[[float, float, int], int] | None = None,
    ) -> None:
        self.size, self._share = (cpus, gpus, memory), share
        self.kind, self._bound = kind, bound
        self._actor, self._room = actor, room or room_for
        self._queue: list[Build] = []
        self.workers: set[Worker] = set()
        self._failed_starts = 0
        self._pace: dict[str, float] = {}
        """Seconds that the last build of a kind took for an epoch."""
        self._keeper: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    async def run(self, build: Build) -> float | None:
        """Has it built; returns what the actor does. Raises what it raised, or UserError."""
        self._push(build)
        return await build.done

    def hasten(self, build: Build, rank: tuple[int, int, int]) -> None:
        """Moves a build that waits forward."""
        if rank < build.rank:
            build.rank = rank
            heapq.heapify(self._queue)
            self._attend()

    @property
    def load(self) -> int:
        """Builds that wait or are under way."""
        return len(self._queue) + sum(w.build is not None for w in self.workers)

    def drop(self, build: Build) -> None:
        """Nobody wants it any more. What its actor has published stays."""
        if build in self._queue:
            self._queue.remove(build)
            heapq.heapify(self._queue)
        build.done.cancel()
        if build.worker is not None:
            self._dismiss(build.worker)
        self._wake.set()

    def _push(self, build: Build) -> None:
        heapq.heappush(self._queue, build)
        self._attend()

    def _attend(self) -> None:
        """Something has changed in the queue."""
        self._wake.set()
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep())

    def _due(self) -> int:
        """Builds that somebody waits for and no actor has taken yet."""
        return sum(build.due for build in self._queue)

    def _next(self) -> Build | None:
        """What an actor that is free should do now; None if it should make way.

        Only one stays for what is built ahead, and only if that is over soon.
        """
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
        room = 1
        while self._due() or self.workers:
            self._wake.clear()
            with contextlib.suppress(Exception):  # the cluster does not answer just now
                room = await asyncio.to_thread(self._room, *self.size)
            try:
                self._adjust(room)
            except Exception as error:  # askers must hear of it
                self._failed_start(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), RECOUNT_SECONDS)

    def _adjust(self, room: int) -> None:
        """Starts or withdraws actors until there are as many as work and room are there for."""
        busy = sum(w.build is not None for w in self.workers)
        wanted = min(room, busy + self._due())
        for _ in range(wanted - len(self.workers)):
            worker = Worker(
                start_actor(*self.size, self._actor, self.kind if self._bound else None)
            )
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
            if self.kind is not None and await asyncio.to_thread(kind_at, worker.node) != self.kind:
                self._redirect()
                return
            end = time.monotonic() + LEASE_SECONDS
            while worker in self.workers and time.monotonic() < end and (build := self._next()):
                worker.build, build.worker = build, worker
                await self._one(worker.actor, build)
                worker.build = build.worker = None
        except RayError as error:  # its process or its node is gone, or its memory
            if worker.build is not None:
                self._lost(worker.build)
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
            if isinstance(error, RayError) and not isinstance(error, RayTaskError):
                raise  # the actor is gone, and the build may be tried again
            if not build.done.done():
                build.done.set_exception(error)
        else:
            if seconds is not None:
                self._pace[build.kind] = seconds / max(1, build.epochs)
            if not build.done.done():
                build.done.set_result(seconds)

    def _lost(self, build: Build) -> None:
        build.worker = None
        build.losses += 1
        if build.done.done():
            return
        if build.losses < ATTEMPTS:
            self._push(build)
            return
        build.done.set_exception(
            UserError(
                f"expert {build.index} of set {build.key} was lost {ATTEMPTS} times with its "
                "process and got no further. Does an expert need more memory than there is?"
            )
        )

    def _redirect(self) -> None:
        """Gives the next build back: there is another kind of GPU now, with a share of its own."""
        if (build := self._next()) is not None and not build.done.done():
            build.done.set_exception(OtherKind(f"a GPU is not of the kind {self.kind}"))

    def _failed_start(self, error: Exception) -> None:
        self._failed_starts += 1
        if self._failed_starts < ATTEMPTS or not self._due():
            return
        self._failed_starts = 0
        build = heapq.heappop(self._queue)
        if not build.done.done():
            reason = " ".join(str(error).split())[:200]
            build.done.set_exception(
                UserError(f"expert actors could not be started {ATTEMPTS} times ({reason}).")
            )


def start_actor(
    cpus: float, gpus: float, memory: int, actor: type = ExpertActor, kind: str | None = None
) -> Any:
    """A new expert actor, spread over the nodes; it may have to wait for its place.

    With ``kind`` only GPUs of that kind are a place for it.
    """
    size = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory}
    options = ray.remote(actor).options(**size, accelerator_type=kind, scheduling_strategy="SPREAD")
    return options.remote()


def gpu_kinds() -> dict[str | None, float]:
    """Kind of GPU -> how many the cluster has now, by the names that Ray gives them; None for those
    without a name."""
    found: dict[str | None, float] = {}
    for node in ray.nodes():
        if node["Alive"] and (gpus := node["Resources"].get("GPU", 0)):
            found[_kind(node)] = found.get(_kind(node), 0) + gpus
    return found


def kind_at(name: str) -> str | None:
    """The kind of the GPUs of a node, by the name that ``node_name`` gives it."""
    for node in ray.nodes():
        address = node["NodeManagerAddress"]
        if node["Alive"] and name in (address, f"{address}-{node['NodeID'][:6]}"):
            return _kind(node)
    return None


def _kind(node: dict[str, Any]) -> str | None:
    names = (key.removeprefix(_KIND) for key in node["Resources"] if key.startswith(_KIND))
    return next(names, None)


def node_name() -> str:
    """This node's address; nodes that share theirs with others add the start of their id."""
    here = ray.get_runtime_context().get_node_id()
    addresses = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
    alone = list(addresses.values()).count(addresses[here]) == 1
    return addresses[here] if alone else f"{addresses[here]}-{here[:6]}"
