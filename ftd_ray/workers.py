"""The Ray shells of a trial: a light Tune trainable, and the actor that does its work.

The trainable waits for experts holding no CPU or GPU; then it starts a worker outside its own
placement group, in the resources of a trial, and hands Tune one report at a time. The worker dies
with the trainable; a worker that dies alone is started again and goes on from its checkpoint.

A trainable only passes things on, so they travel pickled and this module imports no torch: a
waiting trial costs a tenth of the memory and starts at once.
"""

import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ftd.errors import Diverged, UserError
from ftd.trajectory import DamagedError
from ftd_ray.cache import CachedExperts
from ftd_ray.experts.orders import ExpertOrder
from ftd_ray.storage import PlaceError

if TYPE_CHECKING:
    from ftd_ray.trial import FinalSpec, Report

WORKER_ATTEMPTS = 4
"""Times that a worker is started for one report."""

MEND_ATTEMPTS = 3
"""Times that a trial is given its experts, when it finds them damaged."""

HALT_SECONDS = 1
"""Before a trial that cannot reach its files tries again, if it still lives."""

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
    cpus: float
    gpus: float


class TrialWorker:
    """Shell of ``run_trial``: one pickled report a call, and whether it was the last."""

    def __init__(self, spec: bytes) -> None:
        from ftd.expert import set_key
        from ftd_ray.trial import TrialSpec, run_trial

        def cached(spec: TrialSpec) -> CachedExperts:
            key = set_key(spec.identity)
            return CachedExperts(spec.store_uri, key, spec.experts, spec.cache_bytes)

        self._reports: Iterator[Report] = run_trial(pickle.loads(spec), cached)

    def report(self) -> tuple[bytes, bool]:
        report = next(self._reports)
        return pickle.dumps(report), report.done


class SweepTrial(tune.Trainable):
    """A trial as Tune sees it; ``config`` is {"order": TrialOrder}.

    A report is the result {"report": pickled Report}. A trial that cannot go on says why in
    {"failure": reason} and raises at the next step, so that Tune books it as an error. When the
    store or the sweep's folder is out of reach it says {"halt": reason}: that ends the sweep, to
    be resumed, and is no result of the trial.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._order: TrialOrder = config["order"]
        self._worker: Any = None
        self._failure: str | None = None
        self._ready = False

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
            return self._fail(reason)
        except UserError as error:
            return self._fail(str(error))
        return {"report": report, "done": done}

    def cleanup(self) -> None:
        self._dismiss_worker()

    def _dismiss_worker(self) -> None:
        if self._worker is not None:
            ray.kill(self._worker)
            self._worker = None

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
            self._dismiss_worker()
            ray.get(self._order.broker.mend.remote(self._order.experts))
            self._ready = False
        raise AssertionError("not reached")

    def _next_report(self) -> tuple[bytes, bool]:
        for attempt in range(WORKER_ATTEMPTS):
            if self._worker is None:
                self._worker = (
                    ray.remote(TrialWorker)
                    .options(
                        num_cpus=self._order.cpus,
                        num_gpus=self._order.gpus,
                        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
                    )
                    .remote(self._order.spec)
                )
            try:
                return ray.get(self._worker.report.remote())
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError:  # its process or its node is gone, or its memory
                self._worker = None
                if attempt == WORKER_ATTEMPTS - 1:
                    raise UserError(
                        f"its worker was lost {WORKER_ATTEMPTS} times. "
                        "Does a trial need more memory than there is?"
                    ) from None
        raise AssertionError("not reached")

    def _fail(self, reason: str) -> dict[str, Any]:
        self._failure = reason
        return {"failure": reason}


def evaluate_finally(
    specs: "list[FinalSpec]",
    networks: int,
    *,
    cpus: float,
    gpus: float,
    at_once: int,
    tick: Callable[[], None],
) -> list[list[tuple[float, float]]]:
    """(validation, test) accuracies of ``networks`` fresh networks for every spec, in parallel.

    ``tick`` is called again and again while it lasts.
    """
    from ftd_ray.trial import final_scores

    task = ray.remote(final_scores).options(num_cpus=cpus, num_gpus=gpus, max_retries=3)
    size = -(-networks // max(1, at_once))
    shares = [range(i, min(i + size, networks)) for i in range(0, networks, size)]
    pending = [[task.remote(spec, share) for share in shares] for spec in specs]
    waiting = [ref for refs in pending for ref in refs]
    while waiting:
        _, waiting = ray.wait(waiting, timeout=0.5)
        tick()
    return [[score for part in ray.get(refs) for score in part] for refs in pending]
