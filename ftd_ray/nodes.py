"""Which nodes of a cluster to keep work away from: those that fail, and for a while those that may.

A node that fails several times in a row, while nothing succeeds there, is left out. One that failed
once, or where a process was lost, is avoided for a minute if there are others: what was lost there
is done elsewhere.
"""

import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import ray

from ftd_ray.storage import PlaceError

GPU_KIND = "accelerator_type:"
"""Before the name of a node's GPUs, among its resources."""
FAILURES = 3
"""In a row, after which a node is left out. One may be chance, and a second its echo: the next work
meets what the first one left. A third in fresh processes, with nothing done in between, is the
node."""

SUSPECT_SECONDS = 60.0
"""For so long other nodes go before one where something was lost."""

NODE_LABEL = "ray.io/node-id"
"""The label by which Ray knows a node."""


class NothingLeft(PlaceError):
    """Every node that could do the work is left out."""


class Health:
    """What became of work on each node, by the node's id."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        name: Callable[[str], str] | None = None,
    ) -> None:
        self._clock, self._name = clock, name or address_of
        self._row: dict[str, list[Hashable]] = {}
        self._suspected: dict[str, float] = {}
        self._proven: set[str] = set()
        self.left_out: dict[str, str] = {}
        """Node -> why."""

    def failed(self, node: str, task: Hashable, reason: str, *, own: bool = False) -> None:
        """Work failed there, in a way that says something about the node.

        ``own``: it may be the work itself that breaks what it is done on. Then it counts once for
        each ``task`` where others have succeeded.
        """
        self.suspect(node)
        row = self._row.setdefault(node, [])
        if own and node in self._proven and task in row:
            return
        row.append(task)
        if len(row) >= FAILURES:
            self.left_out.setdefault(node, reason)

    def suspect(self, node: str) -> None:
        """Something was lost there."""
        self._suspected[node] = self._clock()

    def worked(self, node: str) -> None:
        """Something succeeded there."""
        self._row.pop(node, None)
        self._suspected.pop(node, None)
        self._proven.add(node)

    def is_proven(self, node: str) -> bool:
        """Whether anything ever succeeded there."""
        return node in self._proven

    def leave_out(self, told: dict[str, str]) -> None:
        """Takes over what somebody else found of nodes."""
        self.left_out = told | self.left_out

    def avoid(self, able: Iterable[str]) -> set[str]:
        """Of the nodes that are ``able`` to do some work, those that should not get it now.

        None able is no matter: one may come. Raises NothingLeft.
        """
        nodes = set(able)
        left = nodes - self.left_out.keys()
        if nodes and not left:
            raise NothingLeft(f"no node is left that could go on. {self.text(nodes)}")
        since = self._clock() - SUSPECT_SECONDS
        suspects = {n for n, when in self._suspected.items() if when > since}
        return set(self.left_out) | (suspects if left - suspects else set())

    def text(self, nodes: Iterable[str]) -> str:
        """Why nodes are left out, one sentence each."""
        return " ".join(failed_text(self._name(n), self.left_out[n]) for n in sorted(nodes))


def failed_text(name: str, reason: str) -> str:
    """Why a node is left out."""
    return f"Node {name} failed {FAILURES} times in a row: {reason.rstrip('.')}."


def address_of(node: str) -> str:
    """A node's address, and the start of its id, for several may share one."""
    known = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes()}
    return f"{known.get(node, 'unknown')} ({node[:8]})"


def standing_nodes() -> list[dict[str, Any]]:
    """The cluster's nodes as Ray describes them, without those that are gone."""
    return [node for node in ray.nodes() if node["Alive"]]


def nodes_able(cpus: float, gpus: float, memory: int, kind: str | None = None) -> set[str]:
    """Nodes on which an actor of that size has room, once nothing else is there.

    With a ``kind`` of GPU, only those that have it.
    """
    size = {"CPU": cpus, "GPU": gpus, "memory": memory}
    return {
        node["NodeID"]
        for node in standing_nodes()
        if all(node["Resources"].get(k, 0.0) >= v for k, v in size.items() if v)
        and (kind is None or GPU_KIND + kind in node["Resources"])
    }


def beside(avoid: Iterable[str]) -> dict[str, Any]:
    """Options of an actor that keep it away from nodes."""
    ids = sorted(avoid)
    return {"label_selector": {NODE_LABEL: f"!in({','.join(ids)})"}} if ids else {}
