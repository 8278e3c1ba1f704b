"""The Ray shells of a trial: a light Tune trainable, and the actor that does its work.

The trainable waits for experts holding no CPU or GPU; then it takes a worker from the sweep's
pool, outside its own placement group and in the resources of a trial, and hands Tune one report at
a time. When the trial has ended the worker is given back, and the next trial takes it as it
is, warm; one that nobody takes ends within seconds. A worker that dies is started again and
goes on from the trial's checkpoint. A trainable that dies is started again too, and the worker, if
it lives, goes on as if nothing had happened.

A trainable only passes things on, so they travel pickled and this module imports no torch: a
waiting trial costs a tenth of the memory and starts at once.
"""

import asyncio
import contextlib
import pickle
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftd.errors import Diverged, UserError
from ftd.trajectory import DamagedError
from ftd_ray.cache import CachedExperts
from ftd_ray.experts.orders import ExpertOrder
from ftd_ray.node_faults import GpuMemory, NodeFault, assigned, faults_of_the_node, gpus_here
from ftd_ray.nodes import Health, beside, nodes_able, standing_nodes
from ftd_ray.storage import PlaceError

if TYPE_CHECKING:
    from ftd_ray.trial import Report, TrialSpec

WORKER_ATTEMPTS = 8
"""Times that a worker is started for one report: lost so often in a row on nodes that are still
there, it is no accident."""

MEND_ATTEMPTS = 3
"""Times that a trial is given its experts, when it finds them damaged."""

HALT_SECONDS = 1
"""Before a trial that cannot reach its files tries again, if it still lives."""

IDLE_SECONDS = 3
"""For which a worker keeps its CPU or GPU after a trial, for the next one to take it over."""

NODE_SECONDS = 10
"""For which a worker that is lost is waited for to say where it was."""

LIGHT_BYTES = 64 * 2**20
"""Memory that a waiting trial books, in place of a CPU."""


FULL_ATTEMPTS = 3
"""Times that a trial may outgrow a GPU for one report: there may be larger ones elsewhere."""


@dataclass(frozen=True, kw_only=True)
class TrialOrder:
    """What Tune is given for one trial."""

    number: int
    spec: bytes = field(repr=False)  # Tune names trials by what it reads in their configuration
    """A pickled ``ftd_ray.trial.TrialSpec``."""
    experts: ExpertOrder = field(repr=False)
    broker: Any = field(repr=False)
    """The handle of ``ftd_ray.experts.broker.Broker``."""
    pool: Any = field(repr=False)
    """The handle of the sweep's ``WorkerPool``."""


class OnNode:
    """An actor that says where it stands."""

    def node(self) -> str:
        """The id of the node."""
        return str(ray.get_runtime_context().get_node_id())


class TrialWorker(OnNode):
    """Shell of ``run_trial``: one pickled report a call, and whether it was the last."""

    _spec: "TrialSpec | None" = None
    """Of the trial that it is at."""
    _reports: "Iterator[Report]" = iter(())
    _last: tuple[bytes, bool] | None = None
    _again: tuple[bytes, bool] | None = None
    """The last report, when it may not have arrived."""

    def begin(self, spec: bytes) -> None:
        """Takes up a trial, in the place of the one before.

        If it is at that very trial, whoever asked for it before was lost: its work goes on, and the
        last report comes again.
        """
        from ftd.expert import set_key
        from ftd_ray.trial import run_trial

        trial: TrialSpec = pickle.loads(spec)
        if trial == self._spec:
            self._again = self._last
            return
        self._forget()

        def cached(spec: "TrialSpec") -> CachedExperts:
            key = set_key(spec.identity)
            return CachedExperts(spec.store_uri, key, spec.experts, spec.cache_bytes)

        self._spec, self._reports = trial, run_trial(trial, cached)

    def report(self) -> tuple[bytes, bool]:
        again, self._again = self._again, None
        if again is not None:
            return again
        try:
            with faults_of_the_node(gpus_here()):
                if self._spec is not None:
                    self._settle(self._spec.numerics)
                report = next(self._reports)
        except BaseException:
            self._spec = None  # what is asked for next, begins at the checkpoint
            raise
        self._last = pickle.dumps(report), report.done
        return self._last

    def call(self, function: Callable[[Any], Any], spec: Any) -> tuple[Any, float]:
        """What a function makes of a specification, and the seconds that it took."""
        self._forget()
        with faults_of_the_node(gpus_here()):
            self._settle(spec.numerics)
            began = time.perf_counter()
            return function(spec), time.perf_counter() - began

    def _settle(self, numerics: Any) -> None:
        """Keeps to this worker's part of memory; then work may begin."""
        from ftd_ray.limits import limit_worker

        limit_worker(gpus_here(), assigned("memory"))
        self.check(numerics)

    def check(self, numerics: Any) -> None:
        """Raises NodeFault where the device does not compute what it should."""
        from ftd_ray.probe import check

        check(numerics)

    def _forget(self) -> None:
        """Frees what the trial before holds, for a neighbour on the same GPU too."""
        import torch

        self._spec, self._reports, self._last, self._again = None, iter(()), None, None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@dataclass(eq=False)
class Worker:
    """A worker of the pool, and what comes to say on which node it stands."""

    actor: Any
    where: "asyncio.Future[str]"

    async def node(self) -> str | None:
        """None of one that died before it said so."""
        await asyncio.wait([self.where], timeout=NODE_SECONDS)
        return self.known_node

    @property
    def known_node(self) -> str | None:
        """None of one that has no place yet, too."""
        known = self.where.done() and not self.where.cancelled() and not self.where.exception()
        return self.where.result() if known else None


class WorkerPool:
    """The trial workers of one sweep: an actor of the driver's that books nothing itself."""

    def __init__(
        self, cpus: float, gpus: float, memory: int, worker: type, *, worked: bool = False
    ) -> None:
        self._worker, self._size = worker, (cpus, gpus, memory)
        self._worked = worked
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory}
        self._health = Health()
        self._busy: dict[int, Worker] = {}
        self._idle: list[tuple[Worker, asyncio.Task[None]]] = []
        """Workers, each with the task that ends it soon."""
        self._closed = False

    async def close(self) -> None:
        """Ends all workers, in the middle of whatever they do; there will be no others."""
        self._closed = True
        for _, leaving in self._idle:
            leaving.cancel()
        for worker in (*self._busy.values(), *(w for w, _ in self._idle)):
            ray.kill(worker.actor)
        self._busy, self._idle = {}, []

    async def take(self, number: int) -> Any:
        """The worker of a trial: the one that it has, an idle one, or a new one.

        Raises NothingLeft when every node that could have one is left out.
        """
        if self._closed:
            raise UserError("the search is over")
        if number not in self._busy and self._idle:
            self._busy[number], leaving = self._idle.pop()
            leaving.cancel()
        if number not in self._busy:
            self._busy[number] = self._start()
        return self._busy[number].actor

    def _start(self) -> Worker:
        apart = beside(self._health.avoid(nodes_able(*self._size)))
        actor = ray.remote(self._worker).options(**self._options, **apart).remote()
        return Worker(actor, asyncio.ensure_future(actor.node.remote()))

    async def worked(self, number: int) -> None:
        """A trial's worker has done something: its node can."""
        worker = self._busy.get(number)
        if worker is not None and (node := await worker.node()):
            self._health.worked(node)
            self._worked = True

    async def others_fit(self) -> bool:
        """Whether any trial of the sweep has ever come so far as to report; waits for those at it.

        To be asked by a trial that has given its worker back.
        """
        while not self._worked and self._busy:
            await asyncio.sleep(0.2)
        return self._worked

    async def left_out(self, others: dict[str, str]) -> dict[str, str]:
        """Nodes that get no worker any more, and why; ``others`` are what somebody else found."""
        self._health.leave_out(others)
        self._end_left_out()
        return self._health.left_out

    async def places(self) -> tuple[int, int]:
        """How many trials wait for a worker's place on the cluster, and how many have one."""
        waiting = sum(not worker.where.done() for worker in self._busy.values())
        return waiting, len(self._busy) - waiting

    async def give_back(self, number: int, *, clean: bool) -> None:
        """A trial has ended: its worker waits a moment for the next one, if it is ``clean``."""
        worker = self._busy.pop(number, None)
        if worker is None:  # it never had one, or has given it back
            return
        if not clean:
            ray.kill(worker.actor)
            return
        self._idle.append((worker, asyncio.create_task(self._end(worker))))

    async def lost(self, number: int, fault: NodeFault | None = None) -> bool:
        """A trial's worker is gone or of no use; says whether that may be the trial's own doing.

        It is not when the node has gone, or the pool of before, with which all its workers end.
        Nor is the ``fault`` of a node, but for one of its GPU where others have worked.
        """
        worker = self._busy.get(number)
        if worker is None:
            return False
        node = await worker.node()
        if self._busy.get(number) is worker:
            await self.give_back(number, clean=False)
        if node is None:
            return fault is None
        if fault is None:
            self._health.suspect(node)
            return any(node == n["NodeID"] for n in standing_nodes())
        own = fault.kind == "gpu"
        self._health.failed(node, number, fault.reason, own=own)
        self._end_left_out()
        return own and self._health.is_proven(node)

    def _end_left_out(self) -> None:
        """Idle workers of nodes that are left out are handed to nobody."""
        for worker, leaving in self._idle:
            if worker.known_node in self._health.left_out:
                leaving.cancel()
                ray.kill(worker.actor)
        self._idle = [(w, t) for w, t in self._idle if w.known_node not in self._health.left_out]

    async def _end(self, worker: Worker) -> None:
        """Ends an idle worker, unless it is taken before."""
        await asyncio.sleep(IDLE_SECONDS)
        self._idle = [(w, leaving) for w, leaving in self._idle if w is not worker]
        ray.kill(worker.actor)


def start_pool(
    cpus: float,
    gpus: float,
    memory: int = 0,
    *,
    worker: type = TrialWorker,
    worked: bool = False,
) -> Any:
    """A pool of this process, whose workers have that size each; it ends with the process.

    ``worked`` says whether such workers have brought a trial to its end before.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    pool = ray.remote(WorkerPool).options(scheduling_strategy=here, **options)
    return pool.remote(cpus, gpus, memory, worker, worked=worked)


class SweepTrial(tune.Trainable):
    """A trial as Tune sees it; ``config`` has its number and its TrialOrder.

    A report is the result {"report": pickled Report}. A trial that cannot go on says why in
    {"failure": reason, "diverged": whether a training of it or of its experts did} and raises at
    the next step, so that Tune books it as an error. When the store or the sweep's folder is out of
    reach it says {"halt": reason}: that ends the sweep, to be resumed, and is no result of the
    trial. Nor is it the trial's own that no share of a GPU suffices when none has sufficed yet.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._order: TrialOrder = config["order"]
        self.config: dict[str, Any] = {}  # Tune adds it to every report
        self._worker: Any = None
        self._failure: str | None = None
        self._ready = False

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Tune hands the actor of a trial that has ended to the next one."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self._failure is not None:
            raise RuntimeError(self._failure)
        try:
            report, done = self._mended_report()
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            if isinstance(cause, ray.exceptions.RayError):  # a process of somebody else's is gone
                raise cause from None
            expected = isinstance(cause, Diverged | UserError)
            reason = (str(cause).strip().splitlines() or ["without a word"])[-1]
            reason = reason if expected else f"{type(cause).__name__}: {reason}"
            if isinstance(cause, PlaceError | OSError):  # a full disk says nothing about a trial
                time.sleep(HALT_SECONDS)
                return {"halt": reason}
            if isinstance(cause, Diverged):  # a trial's own end; the next one may have the worker
                self._order.pool.give_back.remote(self._order.number, clean=True)
            return self._fail(reason, diverged=isinstance(cause, Diverged))
        except PlaceError as error:
            return {"halt": str(error)}
        except UserError as error:
            return self._fail(str(error))
        return {"report": report, "done": done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the worker keeps its own checkpoints in the sweep's folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, likewise."""

    def _mended_report(self) -> tuple[bytes, bool]:
        """The next report; damaged experts are built anew first, and the trial goes on."""
        mended = unseen = 0
        while True:
            if not self._ready:
                ray.get(self._order.broker.ensure.remote(self._order.experts))
                self._ready = True
            try:
                return self._next_report()
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, DamagedError) or mended == MEND_ATTEMPTS - 1:
                    raise
                reason = str(error.cause)
            if ray.get(self._order.broker.mend.remote(self._order.experts)):
                mended += 1
                self._let_go()
            elif unseen:  # they are well, and again that node does not see them
                self._lost(NodeFault("data", f"the experts cannot be read there: {reason}"))
            else:  # another trial may have had them mended
                unseen += 1
                self._let_go()
            self._ready = False

    def _next_report(self) -> tuple[bytes, bool]:
        order, losses, full = self._order, 0, 0
        while True:
            new, fault = self._worker is None, None
            try:
                if self._worker is None:
                    self._worker = ray.get(order.pool.take.remote(order.number))
                    self._worker.begin.remote(order.spec)
                report = ray.get(self._worker.report.remote())
                if new:
                    order.pool.worked.remote(order.number)
                return report
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, GpuMemory):
                    full += 1
                    if full == FULL_ATTEMPTS:
                        self._let_go()
                        own = ray.get(order.pool.others_fit.remote())
                        raise (UserError if own else PlaceError)(
                            f"{error.cause}. {GPU_REMEDY}"
                        ) from None
                elif isinstance(error.cause, NodeFault):
                    fault = error.cause
                else:
                    raise
                why = str(error.cause)
            except ray.exceptions.RayError as error:  # its process or node is gone, or its memory
                why = memory_text(error)
            losses += self._lost(fault)
            if losses == WORKER_ATTEMPTS:
                raise UserError(f"its worker was lost {WORKER_ATTEMPTS} times. {why}")

    def _lost(self, fault: NodeFault | None) -> bool:
        """Has the pool forget the worker; says whether it may be the trial's own doing."""
        self._worker = None
        return bool(ray.get(self._order.pool.lost.remote(self._order.number, fault)))

    def _let_go(self) -> None:
        self._worker = None
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._order.pool.give_back.remote(self._order.number, clean=False))

    def _fail(self, reason: str, *, diverged: bool = False) -> dict[str, Any]:
        self._failure = reason
        return {"failure": reason, "diverged": diverged}


GPU_REMEDY = (
    "Raise resources.gpus_per_trial, so that fewer share a GPU, or lower distill.ipc, "
    "distill.syn_steps, distill.batch_syn or the network's width."
)


def memory_text(error: BaseException) -> str:
    """What may help where processes of trials end."""
    found = re.search(r"was (\S+B ?/ ?\S+B)", str(error))
    full = isinstance(error, ray.exceptions.OutOfMemoryError)
    held = f"The node's memory was full{f' ({found[1]})' if found else ''}. " if full else ""
    return (
        f"{held}Does a trial need more memory than there is? Set resources.memory_per_trial to "
        "what it needs, so that a node takes no more of them than it holds."
    )


def run_calls(
    pool: Any,
    calls: Sequence[tuple[Callable[[Any], Any], Any]],
    *,
    at_once: int,
    tick: Callable[[], None],
    worked: Callable[[float], None] = lambda seconds: None,
) -> list[tuple[Any, float]]:
    """The results of functions of one argument, worked out by workers of the pool.

    Each with the seconds that it took, which ``worked`` is told at once. ``tick`` is called again
    and again while it lasts.
    """
    results: list[Any] = [None] * len(calls)
    waiting, lost = deque(range(len(calls))), Counter[int]()
    free = list(range(-at_once, 0))
    running: dict[Any, tuple[int, int]] = {}
    while waiting or running:
        while waiting and free:
            call, lane = waiting.popleft(), free.pop()
            try:
                worker = ray.get(pool.take.remote(lane))
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, PlaceError) else error from None
            running[worker.call.remote(*calls[call])] = call, lane
        ready, _ = ray.wait(list(running), timeout=0.5)
        tick()
        for ref in ready:
            call, lane = running.pop(ref)
            fault = None
            try:
                results[call] = ray.get(ref)
                worked(results[call][1])
                pool.worked.remote(lane)
                if waiting:
                    free.append(lane)
                else:  # a worker that has found no room yet waits for this one's
                    pool.give_back.remote(lane, clean=False)
                continue
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, GpuMemory):
                    why = f"{error.cause}. {GPU_REMEDY}"
                elif isinstance(error.cause, NodeFault):
                    fault, why = error.cause, str(error.cause)
                else:
                    raise
            except ray.exceptions.RayError as error:  # its process or node is gone, or its memory
                why = memory_text(error)
            lost[call] += ray.get(pool.lost.remote(lane, fault))
            if lost[call] == WORKER_ATTEMPTS:
                raise PlaceError(f"a worker was lost {WORKER_ATTEMPTS} times. {why}")
            waiting.append(call)
            free.append(lane)
    return results
