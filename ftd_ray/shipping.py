"""The data set for every node of a cluster: read where the driver runs, sent to a node once.

A node keeps what it got in its own cache (``ftd.data.cache``), under a lock, so ten workers that
start at once cause one transfer; they map it without a copy each.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from ftd.data import DatasetConfig, describe, open_arrays
from ftd.errors import UserError
from ftd_ray.actors import NAMESPACE, Lingering, actor_name, shared_actor

CHUNK_BYTES = 16 * 2**20
CHUNKS_AHEAD = 3


class DataServer(Lingering):
    """The actor that has the data set open. Drivers say every minute that they still want it."""

    idle_seconds = 180

    def __init__(self, config: DatasetConfig, fingerprint: str) -> None:
        self._config, self._fingerprint = config, fingerprint
        self._opened: asyncio.Task[tuple[dict[str, Any], dict[str, np.ndarray]]] | None = None

    async def open(self) -> dict[str, Any]:
        """Opens the data set, decoding it if it must; returns its facts."""
        facts, _ = await self._open()
        return facts

    async def rows(self, what: str, start: int, stop: int) -> np.ndarray:
        """Rows of one of its arrays."""
        _, arrays = await self._open()
        return arrays[what][start:stop]

    async def _open(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        self.used()
        if self._opened is None:
            self._opened = asyncio.create_task(asyncio.to_thread(self._read))
        task = self._opened
        try:
            return await asyncio.shield(task)
        except Exception:
            if self._opened is task:  # who asks next may have put right what was wrong
                self._opened = None
            raise

    def _read(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        opened = open_arrays(self._config)
        if describe(self._config).fingerprint != self._fingerprint:
            raise UserError(
                f"the images in dataset.root={self._config.root} changed while they were in use. "
                "Start the same command again."
            )
        return opened


@dataclass(frozen=True)
class Shipment:
    """A data set that a node may send for (``ftd.data.Sender``). Pickles to a few hundred bytes.

    It travels with every trial, so what grows with the data set, labels too, is fetched by each
    process once.
    """

    config: DatasetConfig
    fingerprint: str
    node: str
    name: str = field(compare=False, repr=False)
    """Of the data server, as the driver calls it: nodes may have other code."""

    @property
    def facts(self) -> dict[str, Any]:
        """What ``open_arrays`` returned where the files are."""
        return _fetched_facts(self.name)

    def fill(self, what: str, out: np.ndarray) -> None:
        """Fetches an array, some chunks ahead."""
        rows = max(1, CHUNK_BYTES // max(1, out[:1].nbytes))
        with _said():
            server = _standing_server(self.name)
            for start, chunk in _ahead(server, what, len(out), rows):
                out[start : start + len(chunk)] = chunk

    def keep(self) -> None:
        """Says that the data set is still wanted, and opens it again if its process died."""
        self.server().open.remote()

    def server(self) -> Any:
        """The handle of the data server; it is started when there is none."""
        return shared_actor(DataServer, "data", self.config, self.fingerprint, node=self.node)


def ship(config: DatasetConfig) -> Shipment:
    """Opens the data set on this node for all others. Raises UserError when it is not there."""
    node = ray.get_runtime_context().get_node_id()
    fingerprint = describe(config).fingerprint
    name = actor_name("data", config, fingerprint, node=node)
    shipment = Shipment(config, fingerprint, node, name)
    try:
        ray.get(shipment.server().open.remote())
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    return shipment


@lru_cache(maxsize=2)
def _fetched_facts(server: str) -> dict[str, Any]:
    with _said():
        return ray.get(_standing_server(server).open.remote())


def _standing_server(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError as error:
        raise _not_arrived(error) from error


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """Errors of a data server in the user's words."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise _not_arrived(error.cause) from error
    except RayError as error:
        raise _not_arrived(error) from error


def _not_arrived(error: object) -> UserError:
    return UserError(
        f"the data set did not arrive on this node ({type(error).__name__}): the process that has "
        "it, or its node, is gone. Start the same command again where the data are."
    )


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
