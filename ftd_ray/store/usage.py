"""Who uses an expert set: ``<set>/users/<id>.json``, so that cleaning spares what is in use.

A record says when it was last renewed, because a sweep that is killed cannot say that it ended.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pyarrow as pa
from pyarrow import fs as pafs

from ftd.trajectory import put
from ftd_ray.storage import open_uri
from ftd_ray.store import TrajectoryStore

RENEW_SECONDS = 300
"""Between two writes of a record."""

IN_USE_SECONDS = 3600
"""A record renewed less than this ago is taken for a sweep that runs."""


@dataclass(frozen=True)
class User:
    """One sweep, or one filling of the store, that uses or used a set. Times are UTC seconds."""

    name: str
    place: str
    """Its output folder."""
    started: float
    renewed: float
    ended: float | None = None

    def is_running(self, now: float) -> bool:
        return self.ended is None and now - self.renewed < IN_USE_SECONDS


class Usage:
    """The records of one user in the sets that it uses, there or still to come."""

    def __init__(self, store: TrajectoryStore, keys: Iterable[str], name: str, place: str):
        self._uri = store.uri
        self._fs, path = open_uri(store.uri)
        record = hashlib.sha256(json.dumps([name, place]).encode()).hexdigest()[:16]
        self._files = [f"{path}/{key}/users/{record}.json" for key in sorted(set(keys))]
        self._name, self._place = name, place
        self._started = 0.0
        self._renewed: float | None = None

    def renew(self) -> None:
        """Says that the sets are in use. Cheap: it writes now and then only.

        Raises OSError the first time at most: later, a store out of reach is the business of
        those who read it, and nobody waits for it here.
        """
        now = time.time()
        if self._renewed is None:
            self._started = now
            self._write(User(self._name, self._place, now, now))
            self._fs, _ = open_uri(self._uri, patient=False)
        elif now - self._renewed < RENEW_SECONDS:
            return
        else:
            with contextlib.suppress(OSError, pa.ArrowException):
                self._write(User(self._name, self._place, self._started, now))
        self._renewed = now

    def end(self) -> None:
        """Says that the sets are no longer in use. Never raises OSError."""
        if self._renewed is not None:
            now = time.time()
            with contextlib.suppress(OSError, pa.ArrowException):
                self._write(User(self._name, self._place, self._started, now, ended=now))

    def _write(self, user: User) -> None:
        text = json.dumps(asdict(user), indent=1) + "\n"
        for file in self._files:
            self._fs.create_dir(file.rpartition("/")[0], recursive=True)
            put(self._fs, file, text.encode())


def read_user(filesystem: pafs.FileSystem, path: str, written: float) -> User | None:
    """A record; None if it is gone. One that cannot be parsed counts from when it was written."""
    try:
        with filesystem.open_input_stream(path) as stream:
            value = json.loads(stream.read())
        return User(
            name=str(value["name"]),
            place=str(value["place"]),
            started=float(value["started"]),
            renewed=float(value["renewed"]),
            ended=None if value["ended"] is None else float(value["ended"]),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return User(name="?", place=path, started=written, renewed=written)
