"""The Ray shells of a trial: a light Tune trainable, and the actor that does its work.

The trainable waits for experts holding no CPU or GPU; then it takes a worker from the sweep's
pool, outside its own placement group and in the resources of a trial, and hands Tune one report at
a time. When the trial has ended the worker is given back, and the next trial takes it as it
is, warm; one that nobody takes ends within seconds. A worker that dies is started again and
goes on from the trial's checkpoint.

A trainable only passes things on, so they travel pickled and this module imports no torch: a
waiting trial costs a tenth of the memory and starts at once.
"""

import asyncio
import contextlib
import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftd.errors import Diverged, UserError
from ftd.trajectory import DamagedError
from ftd_ray.cache import CachedExperts
from ftd_ray.experts.orders import ExpertOrder
from ftd_ray.storage import PlaceError

if TYPE_CHECKING:
    from ftd_ray.trial import Report

WORKER_ATTEMPTS = 4
"""Times that a worker is started for one report."""

MEND_ATTEMPTS = 3
"""Times that a trial is given its experts, when it finds them damaged."""

HALT_SECONDS = 1
"""Before a trial that cannot reach its files tries again, if it still lives."""

IDLE_SECONDS = 3
"""For which a worker keeps its CPU or GPU after a trial, for the next one to take it over."""

LIGHT_BYTES = 64 * 2**20
"""Memory that a waiting trial books, in place of a CPU."""


@dataclass(frozen=True, kw_only=True)
class TrialOrder:
    """What Tune is given for one trial."""

    number: int
    spec: bytes
    """A pickled ``ftd_ray.trial.TrialSpec``."""
    experts: ExpertOrder
    broker: Any
    """The handle of ``ftd_ray.experts.broker.Broker``."""
    pool: Any
    """The handle of the sweep's ``WorkerPool``."""


class TrialWorker:
    """Shell of ``run_trial``: one pickled report a call, and whether it was the last."""

    _reports: "Iterator[Report]" = iter(())

    def begin(self, spec: bytes) -> None:
        """Takes up a trial, in the place of the one before."""
        from ftd.expert import set_key
        from ftd_ray.trial import TrialSpec, run_trial

        self._forget()

        def cached(spec: TrialSpec) -> CachedExperts:
            key = set_key(spec.identity)
            return CachedExperts(spec.store_uri, key, spec.experts, spec.cache_bytes)

        self._reports = run_trial(pickle.loads(spec), cached)

    def report(self) -> tuple[bytes, bool]:
        report = next(self._reports)
        return pickle.dumps(report), report.done

    def call(self, function: Callable[[Any], Any], spec: Any) -> tuple[Any, float]:
        """What a function makes of a specification, and the seconds that it took."""
        self._forget()
        began = time.perf_counter()
        return function(spec), time.perf_counter() - began

    def _forget(self) -> None:
        """Frees what the trial before holds, and keeps to this worker's part of memory."""
        import torch

        from ftd_ray.limits import assigned, limit_worker

        self._reports = iter(())
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        limit_worker(assigned("GPU"), assigned("memory"))


class WorkerPool:
    """The trial workers of one sweep: an actor of the driver's that books nothing itself."""

    def __init__(self, cpus: float, gpus: float, memory: int, worker: type) -> None:
        self._worker = worker
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory}
        self._busy: dict[int, Any] = {}
        self._idle: list[tuple[Any, asyncio.Task[None]]] = []
        """Workers, each with the task that ends it soon."""
        self._closed = False

    async def close(self) -> None:
        """Ends all workers, in the middle of whatever they do; there will be no others."""
        self._closed = True
        for _, leaving in self._idle:
            leaving.cancel()
        for worker in (*self._busy.values(), *(w for w, _ in self._idle)):
            ray.kill(worker)
        self._busy, self._idle = {}, []

    async def take(self, number: int) -> Any:
        """The worker of a trial: the one that it has, an idle one, or a new one."""
        if self._closed:
            raise UserError("the search is over")
        if number not in self._busy and self._idle:
            self._busy[number], leaving = self._idle.pop()
            leaving.cancel()
        if number not in self._busy:
            self._busy[number] = ray.remote(self._worker).options(**self._options).remote()
        return self._busy[number]

    async def give_back(self, number: int, *, clean: bool) -> None:
        """A trial has ended: its worker waits a moment for the next one, if it is ``clean``."""
        worker = self._busy.pop(number, None)
        if worker is None:  # it never had one, or has given it back
            return
        if not clean:
            ray.kill(worker)
            return
        self._idle.append((worker, asyncio.create_task(self._end(worker))))

    async def _end(self, worker: Any) -> None:
        """Ends an idle worker, unless it is taken before."""
        await asyncio.sleep(IDLE_SECONDS)
        self._idle = [(w, leaving) for w, leaving in self._idle if w is not worker]
        ray.kill(worker)


def start_pool(cpus: float, gpus: float, memory: int = 0, *, worker: type = TrialWorker) -> Any:
    """A pool of this process, whose workers have that size each; it ends with the process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    pool = ray.remote(WorkerPool).options(scheduling_strategy=here, **options)
    return pool.remote(cpus, gpus, memory, worker)


class SweepTrial(tune.Trainable):
    """A trial as Tune sees it; ``config`` is {"order": TrialOrder}.

    A report is the result {"report": pickled Report}. A trial that cannot go on says why in
    {"failure": reason, "diverged": whether a training of it or of its experts did} and raises at
    the next step, so that Tune books it as an error. When the store or the sweep's folder is out of
    reach it says {"halt": reason}: that ends the sweep, to be resumed, and is no result of the
    trial.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._order: TrialOrder = config["order"]
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
            expected = isinstance(cause, Diverged | UserError)
            reason = (str(cause).strip().splitlines() or ["without a word"])[-1]
            reason = reason if expected else f"{type(cause).__name__}: {reason}"
            if isinstance(cause, PlaceError | OSError):  # a full disk says nothing about a trial
                time.sleep(HALT_SECONDS)
                return {"halt": reason}
            if isinstance(cause, Diverged):  # a trial's own end; the next one may have the worker
                self._order.pool.give_back.remote(self._order.number, clean=True)
            return self._fail(reason, diverged=isinstance(cause, Diverged))
        except UserError as error:
            return self._fail(str(error))
        return {"report": report, "done": done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the worker keeps its own checkpoints in the sweep's folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, likewise."""

    def _mended_report(self) -> tuple[bytes, bool]:
        """The next report; damaged experts are built anew first, and the trial goes on."""
        for attempt in range(MEND_ATTEMPTS):
            if not self._ready:
                ray.get(self._order.broker.ensure.remote(self._order.experts))
                self._ready = True
            try:
                return self._next_report()
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, DamagedError) or attempt == MEND_ATTEMPTS - 1:
                    raise
            self._let_go()
            ray.get(self._order.broker.mend.remote(self._order.experts))
            self._ready = False
        raise AssertionError("not reached")

    def _next_report(self) -> tuple[bytes, bool]:
        order = self._order
        for attempt in range(WORKER_ATTEMPTS):
            try:
                if self._worker is None:
                    self._worker = ray.get(order.pool.take.remote(order.number))
                    self._worker.begin.remote(order.spec)
                return ray.get(self._worker.report.remote())
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError:  # its process or its node is gone, or its memory
                self._let_go()
                if attempt == WORKER_ATTEMPTS - 1:
                    raise UserError(
                        f"its worker was lost {WORKER_ATTEMPTS} times. "
                        "Does a trial need more memory than there is?"
                    ) from None
        raise AssertionError("not reached")

    def _let_go(self) -> None:
        self._worker = None
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._order.pool.give_back.remote(self._order.number, clean=False))

    def _fail(self, reason: str, *, diverged: bool = False) -> dict[str, Any]:
        self._failure = reason
        return {"failure": reason, "diverged": diverged}


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
            worker = ray.get(pool.take.remote(lane))
            running[worker.call.remote(*calls[call])] = call, lane
        ready, _ = ray.wait(list(running), timeout=0.5)
        tick()
        for ref in ready:
            call, lane = running.pop(ref)
            try:
                results[call] = ray.get(ref)
                worked(results[call][1])
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError:  # its process or its node is gone, or its memory
                lost[call] += 1
                if lost[call] == WORKER_ATTEMPTS:
                    raise
                ray.get(pool.give_back.remote(lane, clean=False))
                waiting.append(call)
            if waiting:
                free.append(lane)
            else:  # a worker that has found no room yet waits for this one's
                pool.give_back.remote(lane, clean=False)
    return results
