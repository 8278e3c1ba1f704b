"""What a sweep's experts came to, over all its sessions: built for it or found, and at what cost.

Kept with the study as entries that are added up: an entry holds what is new in one set since the
one before, so the thousandth expert writes as much as the first.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from ftd_ray.experts.orders import FleetStatus, SetStatus
from ftd_ray.search import SweepStudy

PREFIX = "experts:"


@dataclass
class SetAccount:
    """One expert set."""

    built: set[int] = field(default_factory=set)
    reused: set[int] = field(default_factory=set)
    seconds: float = 0.0
    gpu_seconds: float = 0.0

    def add(self, entry: dict[str, Any]) -> None:
        """What is built once is not reused, whichever was heard first."""
        self.built.update(entry["built"])
        self.reused.update(entry["reused"])
        self.reused -= self.built
        self.seconds += entry["seconds"]
        self.gpu_seconds += entry["gpu_seconds"]


class ExpertAccount:
    """Follows the fleet's word. A killed driver's account goes on where the study has it."""

    def __init__(self, study: SweepStudy, gpus: float):
        """``gpus`` is what one expert takes of a GPU, as far as that is known."""
        self._study, self._gpus = study, gpus
        self.sets: dict[str, SetAccount] = {}
        kept = study.recall_all(PREFIX)
        for name, entry in kept.items():  # a set, or of older sweeps all of it without a number
            self.sets.setdefault(name.partition(":")[0], SetAccount()).add(entry)
        self._entries = len(kept)
        self._heard: dict[str, SetStatus] = {}
        self._counted: dict[str, dict[int, float]] = {}
        """Set -> expert -> its seconds of this session, as far as they are in the account."""
        self._since: dict[tuple[str, int], float] = {}
        """When experts in training for this sweep were first seen."""

    def update(self, status: FleetStatus) -> list[float]:
        """Takes the fleet's word, and keeps what is new; the seconds of what was built since."""
        spent: list[float] = []
        for key, s in status.sets.items():
            if self._heard.get(key) is not s:  # else nothing was heard of it since
                self._heard[key] = s
                spent += self._take(key, s)
        running = {(k, i) for k, s in status.sets.items() for i in s.running.keys() & s.ours}
        now = time.monotonic()
        self._since = {who: self._since.get(who, now) for who in running}
        return spent

    def _take(self, key: str, s: SetStatus) -> list[float]:
        account = self.sets.setdefault(key, SetAccount())
        counted = self._counted.setdefault(key, {})
        spent = {i: n - counted.get(i, 0.0) for i, n in s.built.items() if counted.get(i) != n}
        counted.update({i: s.built[i] for i in spent})
        seconds = sum(spent.values())
        entry = {
            "built": sorted(s.built.keys() - account.built),
            "reused": sorted(s.present - account.reused - account.built - s.built.keys()),
            "seconds": seconds,
            "gpu_seconds": seconds * (s.gpus or self._gpus),
        }
        if any(entry.values()):
            account.add(entry)
            self._study.remember(f"{PREFIX}{key}:{self._entries}", entry)
            self._entries += 1
        return list(spent.values())

    @property
    def built(self) -> list[tuple[str, int]]:
        """(set, expert) of all that were built for this sweep."""
        return [(key, i) for key, s in sorted(self.sets.items()) for i in sorted(s.built)]

    @property
    def reused(self) -> int:
        return sum(len(s.reused) for s in self.sets.values())

    @property
    def seconds(self) -> float:
        return sum(s.seconds for s in self.sets.values())

    @property
    def gpu_seconds(self) -> float:
        """Also of experts that are in training."""
        now = time.monotonic()
        under_way = sum(now - began for began in self._since.values()) * self._gpus
        return under_way + sum(s.gpu_seconds for s in self.sets.values())
