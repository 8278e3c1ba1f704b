"""A driver's side of the broker: its orders, and what came of them, kept over a broker's death."""

import contextlib
import pickle
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from ftd.data.dataset import Description
from ftd.expert import ExpertConfig, set_key
from ftd_ray.config import SweepConfig
from ftd_ray.experts.broker import broker
from ftd_ray.experts.build import ExpertRequest
from ftd_ray.experts.orders import ExpertOrder, FleetStatus, Urgency
from ftd_ray.nodes import address_of, failed_text
from ftd_ray.shipping import Shipment, ship

POLL_SECONDS = 1.0
TOUCH_SECONDS = 60


class BrokerClient:
    """Orders expert sets of one sweep and follows them; ``status`` is the broker's latest word."""

    def __init__(self, config: SweepConfig, data: Description):
        self._config, self._data = config, data
        self.shipment: Shipment | None = None
        """The data set for nodes that have not got it, once ``ship`` was called."""
        self._touched = time.monotonic()
        self._asker = uuid.uuid4().hex
        self._broker: Any = None
        self._found = float("-inf")
        self.status = FleetStatus()
        self._pending: Any = None
        self._polled = 0.0
        self._notes_told = 0
        self.left_out: dict[str, str] = {}
        """Nodes that get no more work, by their id, in words."""

    def ship(self) -> None:
        """Makes the data set of this machine that of every node; it is kept open by ``poll``."""
        self.shipment = ship(self._config.dataset)

    @property
    def broker(self) -> Any:
        """The broker's handle; it is started when there is none, or not any more."""
        if time.monotonic() - self._found > POLL_SECONDS:  # asking takes milliseconds
            self._broker = broker(self._config.store.uri)
            self._found = time.monotonic()
        return self._broker

    def order(self, experts: ExpertConfig, urgency: Urgency) -> ExpertOrder:
        """The order for the set of ``experts``, which may be given to anyone to place."""
        config, r = self._config, self._config.resources
        identity = config.identity(experts, self._data)
        request = ExpertRequest(
            store_uri=config.store.uri,
            identity=identity,
            dataset=config.dataset,
            sender=self.shipment,
            experts=experts,
            numerics=r.expert_numerics,
        )
        return ExpertOrder(
            asker=self._asker,
            key=set_key(identity),
            identity=identity,
            count=experts.count,
            epochs=experts.epochs,
            work=pickle.dumps(request),
            cpus=r.cpus_per_expert,
            gpus=r.expert_gpus,
            memory=r.expert_memory,
            at_once=r.max_experts_at_once,
            urgency=urgency,
        )

    def expect(self, sets: Iterable[ExpertConfig]) -> None:
        """Tells the broker what trials will ask for, so that it may build ahead."""
        self.broker.expect.remote([self.order(experts, Urgency.AHEAD) for experts in sets])

    def poll(self) -> bool:
        """Asks about once a second, without waiting; says whether an answer came."""
        if self.shipment is not None and time.monotonic() - self._touched > TOUCH_SECONDS:
            self._touched = time.monotonic()
            self.shipment.keep()
        if self._pending is None:
            if time.monotonic() - self._polled < POLL_SECONDS:
                return False
            self._polled = time.monotonic()
            self._pending = self.broker.status.remote(self._asker, self.status.mark)
        ready, _ = ray.wait([self._pending], timeout=0)
        if not ready:
            return False
        pending, self._pending = self._pending, None
        with contextlib.suppress(RayError):
            self._take(ray.get(pending))
            return True
        return False

    def look(self) -> FleetStatus:
        """Asks now, and waits for the answer."""
        self._pending = None  # it would be older than this one
        self._take(ray.get(self.broker.status.remote(self._asker, self.status.mark)))
        return self.status

    def end(self) -> None:
        """Says that this driver wants nothing more: what only it wanted is not built."""
        with contextlib.suppress(RayError):
            ray.get(self.broker.withdraw.remote(self._asker), timeout=10)

    def new_notes(self) -> list[str]:
        """What the user should know and was not told yet."""
        told, self._notes_told = self._notes_told, len(self.status.notes)
        new = self.status.left_out.keys() - self.left_out.keys()
        reasons = {n: failed_text(address_of(n), self.status.left_out[n]) for n in new}
        out = {n: f"{reason} It is left out." for n, reason in reasons.items()}
        self.left_out |= out
        return [*self.status.notes[told:], *out.values()]

    def leave_out(self, nodes: dict[str, str]) -> None:
        """Tells the broker of nodes that failed trials, by their id and why."""
        if nodes.keys() - self.status.left_out.keys():
            self.broker.leave_out.remote(nodes)

    def _take(self, status: FleetStatus) -> None:
        """A broker that came back knows less than the one before: what was built stays known.

        So does what was under way for us then and is there now.
        """
        known, merged = self.status.sets, {}
        for key, s in status.sets.items():
            before = known.get(key)
            if before and before.broker == s.broker and not status.whole:
                s = s.after(before)
            elif before:
                since = before.ours & s.present if before.broker != s.broker else ()
                built = dict.fromkeys(since, 0.0) | before.built | s.built
                s = replace(s, built=built, gpus=s.gpus or before.gpus)
            merged[key] = s
        if status.whole:
            self._notes_told = min(self._notes_told, len(status.notes))
        else:
            status = replace(status, notes=self.status.notes + status.notes)
        self.status = replace(status, sets=known | merged)
