"""The data set for every node of a cluster: read where the driver runs, sent to a node once.

A node keeps what it got in its own cache (``ftd.data.cache``), under a lock, so ten workers that
start at once cause one transfer; they map it without a copy each.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from ftd.data import DatasetConfig, open_arrays
from ftd.errors import UserError
from ftd_ray.actors import NAMESPACE, Lingering, actor_name, shared_actor

CHUNK_BYTES = 16 * 2**20
CHUNKS_AHEAD = 3


class DataServer(Lingering):
    """The actor that has the data set open."""

    def __init__(self, config: DatasetConfig) -> None:
        self._config = config
        self._opened: asyncio.Task[tuple[dict[str, Any], dict[str, np.ndarray]]] | None = None

    async def open(self) -> dict[str, Any]:
        """Opens the data set, decoding it if it must; returns its facts."""
        self.used()
        if self._opened is None:
            self._opened = asyncio.create_task(asyncio.to_thread(open_arrays, self._config))
        facts, _ = await self._opened
        return facts

    async def rows(self, what: str, start: int, stop: int) -> np.ndarray:
        """Rows of one of its arrays."""
        await self.open()
        assert self._opened is not None
        return self._opened.result()[1][what][start:stop]


@dataclass(frozen=True)
class Shipment:
    """A data set that a node may send for (``ftd.data.Sender``). Pickles to plain data."""

    server: str
    config: DatasetConfig
    node: str
    facts: dict[str, Any] = field(compare=False, repr=False)

    def fill(self, what: str, out: np.ndarray) -> None:
        """Fetches an array, some chunks ahead."""
        rows = max(1, CHUNK_BYTES // max(1, out[:1].nbytes))
        try:
            server = ray.get_actor(self.server, namespace=NAMESPACE)
            for start, chunk in _ahead(server, what, len(out), rows):
                out[start : start + len(chunk)] = chunk
        except (RayTaskError, UserError):
            raise
        except (RayError, ValueError) as error:
            raise UserError(
                f"the data set did not arrive on this node ({type(error).__name__}): the node that "
                "has it left the cluster. Start the same command again where the data are."
            ) from error

    def keep(self) -> None:
        """Says that the data set is still wanted, and opens it again if its process died."""
        shared_actor(DataServer, "data", self.config, node=self.node).open.remote()


def ship(config: DatasetConfig) -> Shipment:
    """Opens the data set on this node for all others. Raises UserError when it is not there."""
    node = ray.get_runtime_context().get_node_id()
    server = shared_actor(DataServer, "data", config, node=node)
    try:
        facts = ray.get(server.open.remote())
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    return Shipment(actor_name("data", config, node=node), config, node, facts)


def _ahead(server: Any, what: str, count: int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    starts = iter(range(0, count, rows))
    waiting: list[tuple[int, Any]] = []
    while True:
        for start in starts:
            waiting.append((start, server.rows.remote(what, start, start + rows)))
            if len(waiting) >= CHUNKS_AHEAD:
                break
        if not waiting:
            return
        start, ref = waiting.pop(0)
        yield start, ray.get(ref)
