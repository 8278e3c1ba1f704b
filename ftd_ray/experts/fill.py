"""Filling a store ahead of a sweep: one order for each expert set, followed to the end."""

import time
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError
from rich.console import Console

from ftd.errors import UserError
from ftd_ray.cluster import check_cluster, start_ray
from ftd_ray.config import SweepConfig
from ftd_ray.experts.client import BrokerClient
from ftd_ray.experts.orders import Urgency
from ftd_ray.pictures import short_names
from ftd_ray.plan import Plan
from ftd_ray.progress import Progress, duration
from ftd_ray.signals import Interrupted, Signals
from ftd_ray.storage import PlaceError, place_error
from ftd_ray.store import TrajectoryStore
from ftd_ray.store.usage import Usage
from ftd_ray.tracking.tracker import Tracker
from ftd_ray.waiting import NodeWatch


class Fill:
    """One run of ``python -m ftd_ray.experts``."""

    def __init__(
        self, config: SweepConfig, plan: Plan, tracker: Tracker, console: Console, signals: Signals
    ):
        self.config, self.plan, self.tracker, self._signals = config, plan, tracker, signals
        self._client = BrokerClient(config, plan.data)
        self._store = TrajectoryStore(config.store.uri)
        self._usage = Usage(
            self._store, [s.key for s in plan.sets], f"{config.name} (filled)", config.store.uri
        )
        self._progress = Progress(console, 0, 0, short_names(config.space))
        self._say = self._progress.say

    def run(self, address: str | None) -> int:
        """Runs to the end; returns the exit code. Raises UserError or Interrupted."""
        began = time.monotonic()
        start_ray(address)
        self._signals.arm()  # Ray has taken SIGTERM for itself
        self._signals.at_once(self.tracker.interrupt)
        state = "FAILED"
        try:
            autoscaler = check_cluster(self.config, experts_only=True)
            self._nodes = NodeWatch(self.config, autoscaler, self._say, experts_only=True)
            self._nodes.announce()
            if address is not None:  # nodes may come that have not got the data set
                self._client.ship()
            self._usage.renew()
            self._open_tracker()
            with self._progress:
                failures = self._build()
            state = "FAILED" if failures else "FINISHED"
        except (OSError, pa.ArrowException) as error:
            raise place_error(self.config.store.uri, "store.uri", error) from error
        except Interrupted:
            state = "KILLED"
            self._say("interrupted. What is trained is in the store; the same command goes on.")
            raise
        finally:
            self.tracker.finish(state)
            self._client.end()
            self._usage.end()
            self._tell_notes()
            ray.shutdown()
        sets = self._client.status.sets.values()
        built, there = sum(len(s.built) for s in sets), sum(len(s.present) for s in sets)
        for key, reason in failures.items():
            self._say(f"failed     {key}: {reason}")
        took = duration(time.monotonic() - began)
        self._say(f"done in {took}: {built} experts built, {there - built} were there")
        return 1 if failures else 0

    def _build(self) -> dict[str, str]:
        """Orders every set and follows that to the end; key -> reason of those that failed."""
        place = self._client.broker.ensure
        pending = {}
        for planned in self.plan.sets:
            order = self._client.order(planned.experts, Urgency.FILL)
            pending[place.remote(order)] = planned.key
        failures = {}
        while pending:
            ready, _ = ray.wait(list(pending), timeout=0.5)
            for ref in ready:
                key = pending.pop(ref)
                try:
                    ray.get(ref)
                except RayTaskError as error:
                    if isinstance(error.cause, PlaceError):  # no other set could be built either
                        raise error.cause from None
                    if not isinstance(error.cause, UserError):
                        raise
                    failures[key] = str(error.cause)
            self._tick()
        self._client.look()
        self._tell(last=True)
        return failures

    def _tick(self) -> None:
        self._signals.check()
        if self._client.poll():
            self._usage.renew()
            self._tell()
            self._nodes.look(self._client.status)

    def _tell(self, *, last: bool = False) -> None:
        self._progress.experts(self._client.status)
        self.tracker.fleet(self._client.status, last=last)
        self._tell_notes()

    def _open_tracker(self) -> None:
        config, names = self.config, short_names(self.config.space)
        self.tracker.start(
            f"{config.name} experts",
            config.resolved(),
            names,
            None,
            kind="fill",
            note="Experts trained ahead of a sweep; their sets lie below.",
        )
        for s in self.plan.sets:
            identity: dict[str, Any] = config.identity(s.experts, self.plan.data)
            self.tracker.expert_set(s.key, identity, self._store.location(s.key), s.params)

    def _tell_notes(self) -> None:
        for note in [*self._client.new_notes(), *self.tracker.new_notes()]:
            self._say(f"warning    {note}")
