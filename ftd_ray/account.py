"""What a sweep's experts came to, over all its sessions: built for it or found, and at what cost.

Kept with the study set by set, so that what grows is written again only where it grew.
"""

import time
from dataclasses import asdict, dataclass, field

from ftd_ray.experts.orders import FleetStatus, SetStatus
from ftd_ray.search import SweepStudy

PREFIX = "experts:"


@dataclass
class SetAccount:
    """One expert set."""

    built: list[int] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)
    seconds: float = 0.0
    gpu_seconds: float = 0.0


class ExpertAccount:
    """Follows the fleet's word. A killed driver's account goes on where the study has it."""

    def __init__(self, study: SweepStudy, gpus: float):
        """``gpus`` is what one expert takes of a GPU, as far as that is known."""
        self._study, self._gpus = study, gpus
        self._before = {k: SetAccount(**v) for k, v in study.recall_all(PREFIX).items()}
        self.sets = dict(self._before)
        self._since: dict[tuple[str, int], float] = {}
        """When experts in training for this sweep were first seen."""

    def update(self, status: FleetStatus) -> list[float]:
        """Takes the fleet's word, and keeps what changed; the seconds of experts newly built."""
        new = []
        for key, s in status.sets.items():
            known = self.sets.get(key, SetAccount())
            self.sets[key] = self._account(key, s)
            if self.sets[key] != known:
                self._study.remember(f"{PREFIX}{key}", asdict(self.sets[key]))
            new += [s.built[i] for i in s.built if i not in known.built]
        running = {(k, i) for k, s in status.sets.items() for i in s.running.keys() & s.ours}
        now = time.monotonic()
        self._since = {who: self._since.get(who, now) for who in running}
        return new

    def _account(self, key: str, s: SetStatus) -> SetAccount:
        before = self._before.get(key, SetAccount())
        built = {*s.built, *before.built}
        seconds = sum(s.built.values())
        return SetAccount(
            built=sorted(built),
            reused=sorted({*s.present, *before.reused} - built),
            seconds=before.seconds + seconds,
            gpu_seconds=before.gpu_seconds + seconds * (s.gpus or self._gpus),
        )

    @property
    def built(self) -> list[tuple[str, int]]:
        """(set, expert) of all that were built for this sweep."""
        return [(key, i) for key, s in sorted(self.sets.items()) for i in s.built]

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
