"""What drivers and the broker tell each other: orders one way, the fleet's status the other."""

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from ftd.errors import Diverged, UserError


class GpuFull(UserError):
    """The GPU's memory, or the share of it that an expert may take, does not suffice."""


class ExpertDiverged(UserError, Diverged):
    """An expert that was asked for diverged, and would again: the same seed, the same end."""


class Urgency(IntEnum):
    """The smallest is built first."""

    TRIAL = 0
    """A trial waits for it."""
    FILL = 1
    """Somebody fills a store ahead of his trials."""
    AHEAD = 2
    """Trials are likely to ask for it: an actor that has nothing else to do may see to it, where
    that takes less than making way now and coming back later. No actor is started for it."""


@dataclass(frozen=True, kw_only=True)
class ExpertOrder:
    """An expert set that somebody wants: so many experts of so many epochs."""

    asker: str
    """The process that pays for what has to be built, and is told of it."""
    key: str
    identity: dict[str, Any]
    count: int
    epochs: int
    work: bytes
    """A pickled ``ftd_ray.experts.build.ExpertRequest``."""
    cpus: float
    gpus: float | None
    """None for a share of a GPU that is measured."""
    memory: int = 0
    """Bytes that an expert books; 0 for none."""
    at_once: int | None = None
    """Experts of that size in training at a time, at most; of several limits the largest counts."""
    urgency: Urgency = Urgency.TRIAL


@dataclass(kw_only=True)
class SetStatus:
    """One expert set, as one asker sees it.

    What grows with what is done (``present``, ``built``, ``curves``) is told once: where an answer
    goes on from another (``FleetStatus.whole``), there is only what is new in it, and ``after``
    puts the two together.
    """

    needed: int
    epochs: int
    present: frozenset[int]
    """Experts of those needed that are in the store."""
    built: dict[int, float]
    """Expert -> seconds, of those that were built because of this asker."""
    running: dict[int, int]
    """Expert in training -> its last finished epoch."""
    ours: frozenset[int]
    """Experts under way, in training or not, because of this asker."""
    epochs_left: int
    curves: dict[int, dict[int, float]]
    """Expert -> epoch -> validation accuracy, of what was trained since the broker started."""
    broker: str
    """The process that says so; another one knows nothing of what the one before has built."""
    gpus: float = 0.0
    """The share of a GPU with which the last of them was built."""
    gone: frozenset[int] = frozenset()
    """Experts that were told as present and are not any more."""

    def after(self, before: "SetStatus") -> "SetStatus":
        """All that is known when this is heard after ``before``, whose curves go on in place."""
        for expert, curve in self.curves.items():
            before.curves.setdefault(expert, {}).update(curve)
        return replace(
            self,
            present=before.present - self.gone | self.present,
            built=before.built | self.built,
            curves=before.curves,
            gpus=self.gpus or before.gpus,
            gone=frozenset(),
        )

    def final_accuracies(self) -> list[float]:
        """Validation accuracy of each trained expert at the end of its trajectory so far."""
        return [c[max(c)] for i, c in self.curves.items() if i in self.present and c]


@dataclass(kw_only=True)
class NodeStatus:
    """One node of the fleet."""

    running: int = 0
    epochs_per_second: float = 0.0
    """Over the last minute."""


@dataclass(kw_only=True)
class FleetStatus:
    """What the broker knows, for progress lines and for MLflow."""

    sets: dict[str, SetStatus] = field(default_factory=dict)
    nodes: dict[str, NodeStatus] = field(default_factory=dict)
    starting: int = 0
    """Expert actors that wait for room on the cluster."""
    notes: tuple[str, ...] = ()
    """What a user should know, such as experts that were found damaged."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Nodes that failed again and again, by their id, and why: they get no more work."""
    mark: tuple[str, int] = ("", 0)
    """(broker, number) of this answer: who names it, hears what is new since then."""
    whole: bool = True
    """Whether this is all; else ``sets`` and ``notes`` go on from the answer that was named."""

    @property
    def epochs_per_second(self) -> float:
        """Of all nodes."""
        return sum((n.epochs_per_second for n in self.nodes.values()), 0.0)
