"""What a sweep asks of an autoscaler, and word of it when minutes have passed and no node came."""

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from ftd_ray.autoscaler import Autoscaler, status_words
from ftd_ray.config import SweepConfig
from ftd_ray.experts.orders import FleetStatus
from ftd_ray.nodes import standing_nodes
from ftd_ray.plan import Need, needs
from ftd_ray.storage import is_local

WAIT_SECONDS = 300
"""When nothing of a kind has had a place for so long, the user is told; after that at twice the
time, and so on."""


def asked_text(config: SweepConfig, autoscaler: Autoscaler, *, experts_only: bool = False) -> str:
    """What is asked of an autoscaler."""
    expert, *trial = needs(config, experts_only=experts_only)
    r = config.resources
    most = math.inf if r.max_experts_at_once is None else r.max_experts_at_once
    if r.expert_gpus is not None:  # else how many share a GPU is not known yet
        most = min(most, autoscaler.room_for(expert.cpus, expert.gpus, expert.memory))
    text = "room for every expert that is due"
    if most < math.inf:
        text += f", at most {most:g} at a time"
    if trial:
        text += f", and for {config.search.concurrency} trials at a time"
    return f"The autoscaler may start {autoscaler}. It is asked for {text}"


@dataclass
class _Wait:
    began: float
    tell: float
    """Seconds after which the user is told."""


class NodeWatch:
    """Notices that workers of a sweep wait for nodes that do not come.

    ``words`` says why, in a line; it may take its time.
    """

    def __init__(
        self,
        config: SweepConfig,
        autoscaler: Autoscaler | None,
        say: Callable[[str], None],
        *,
        experts_only: bool = False,
        words: Callable[[], str] = status_words,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._experts_only = config, experts_only
        self._needs = {n.what: n for n in needs(config, experts_only=experts_only)}
        self._autoscaler, self._say = autoscaler, say
        self._words, self._clock = words, clock
        self._waits: dict[str, _Wait] = {}
        self._asked: Any = None
        self._told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def announce(self) -> None:
        """Says what the autoscaler will be asked for, if there is one."""
        if self._autoscaler is not None:
            nodes = len(standing_nodes())
            asked = asked_text(self._config, self._autoscaler, experts_only=self._experts_only)
            self._say(f"nodes      {nodes} now. {asked}")
            places = {"store.uri": self._config.store.uri, "output.dir": self._config.output_dir}
            if self._experts_only:
                del places["output.dir"]
            for key, uri in places.items():
                if is_local(uri):
                    self._say(
                        f"warning    {key}={uri} must be the same folder on every node that comes"
                    )

    def look(self, status: FleetStatus | None, pool: Any = None) -> None:
        """To be called about once a second, with what is known of experts and trials."""
        if status is not None:
            running = sum(n.running for n in status.nodes.values())
            self._count("an expert", status.starting, running)
        if self._asked is None and pool is not None:
            self._asked = pool.places.remote()
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            asked, self._asked = self._asked, None
            with contextlib.suppress(RayError):
                self._count("a trial", *ray.get(asked))
        while not self._told.empty():
            self._say(self._told.get())

    def _count(self, what: str, waiting: int, placed: int) -> None:
        """Workers of a kind that wait for a place, and those that have one."""
        if placed or not waiting:
            self._waits.pop(what, None)
            return
        wait = self._waits.setdefault(what, _Wait(self._clock(), WAIT_SECONDS))
        if self._clock() - wait.began >= wait.tell:
            told = (self._needs[what], wait.tell)
            threading.Thread(target=self._find_out, args=told, daemon=True).start()
            wait.tell *= 2

    def _find_out(self, need: Need, seconds: float) -> None:
        if self._autoscaler is None:
            why = "The cluster has no autoscaler: make room, or add a node"
        else:
            why = f"The autoscaler may start {self._autoscaler}, and says: {self._words()}"
        minutes = f"{seconds / 60:.0f} min"
        self._told.put(f"warning    no node has had room for {need} for {minutes}. {why}")
