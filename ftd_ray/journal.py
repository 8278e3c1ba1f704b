"""Where the study's journal lies: a file of lines that Optuna appends to.

On a disk it is that file. Object stores have no append: there the driver, the only writer, keeps
the file on its own machine, and puts what is new beside what is there:

    study.journal                           the beginning
    study.journal.d/000000012345-0f3a99c1   what follows on byte 12345, up to which the CRC is this

A segment counts if it goes on where the one before ends; one that begins earlier is contained in
what was merged. ``MERGED`` segments of a level become one, so they stay few and each byte travels a
few times, however long the journal grows; ``close`` makes it one file again. Each of these steps
is one put, and then deletions of what that contains, so whoever is killed leaves a whole journal.
"""

import contextlib
import os
import re
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from zlib import crc32

import pyarrow as pa

from ftd.errors import UserError
from ftd_ray.storage import (
    files_below,
    is_local,
    join,
    move_file,
    read_bytes,
    remove_file,
    remove_tree,
    write_bytes,
)

STUDY_FILE = "study.journal"
SEGMENTS = f"{STUDY_FILE}.d"

SYNC_SECONDS = 10
"""On an object store what is new is put there at most this often."""

MERGED = 16
"""Segments of one level that are merged to one of the next."""

AT_ONCE = 8
"""Segments that are read, or deleted, at the same time."""

ATTEMPTS = 5
"""Times that a reader looks, when segments are merged under its eyes."""

_SEGMENT = re.compile(r"(\d{12,})-([0-9a-f]{8})")


class Journal:
    """The journal of the study in ``folder``; ``path`` is the local file to append to."""

    def __init__(self, folder: str):
        self._synced = 0.0
        self._lock = threading.Lock()
        self._there: _Segments | None = None
        if is_local(folder):
            self.path = join(folder, STUDY_FILE).removeprefix("file://")
            drop_torn_line(self.path)
        else:
            kept = read_journal(folder)
            self.path = os.path.join(tempfile.mkdtemp(prefix="ftd-study-"), STUDY_FILE)
            if kept is not None:
                with open(self.path, "wb") as f:
                    f.write(kept)
            self._there = _Segments(folder, self.path)

    def sync(self, *, force: bool = False) -> None:
        """Puts what is new where it belongs, at once or if that was not done lately.

        Any thread may call it.
        """
        now = time.monotonic()
        if self._there is not None and (force or now - self._synced > SYNC_SECONDS):
            with self._lock:
                self._there.put_what_is_new()
                self._synced = now

    def close(self) -> None:
        """Puts what is new where it belongs, all in one file; there is no local one any more."""
        if self._there is None:
            return
        try:
            self.sync(force=True)
            with self._lock, contextlib.suppress(OSError, UserError, pa.ArrowException):
                self._there.compact()  # it is whole without, too
        finally:
            shutil.rmtree(os.path.dirname(self.path), ignore_errors=True)


@dataclass
class _Segment:
    name: str
    start: int
    level: int = 0


class _Segments:
    """A journal on an object store, kept as far as the local file at ``path`` by one writer."""

    def __init__(self, folder: str, path: str):
        self._folder, self._path = folder, path
        self._end = 0
        """Bytes that are there."""
        self._crc = 0
        """Of them."""
        self._segments: list[_Segment] = []
        self._stale = files_below(join(folder, SEGMENTS))
        """Names of segments that are contained in what is there, to be deleted."""
        self._begun = False
        """Whether this writer has put its first file, which holds all that it found."""

    def put_what_is_new(self) -> None:
        if not os.path.exists(self._path):
            return
        if not self._begun:
            self.compact()
        data = self._bytes(self._end)
        if not data:
            return
        segment = _Segment(f"{self._end:012d}-{self._crc:08x}", self._end)
        self._put(segment.name, data)
        self._stale = [name for name in self._stale if name != segment.name]
        self._segments.append(segment)
        self._end += len(data)
        self._crc = crc32(data, self._crc)
        self._merge()

    def compact(self) -> None:
        """Makes it one file."""
        if self._begun and not self._segments and not self._stale:
            return
        data = self._bytes(0)
        write_bytes(join(self._folder, STUDY_FILE), data)
        self._begun = True
        self._end, self._crc = len(data), crc32(data)
        self._stale += [s.name for s in self._segments]
        self._segments = []
        self._delete_stale()

    def _merge(self) -> None:
        """Makes one segment of the last ones, where there are enough of their level."""
        while self._segments:
            level = self._segments[-1].level
            first = next(i for i, s in enumerate(self._segments) if s.level == level)
            run = self._segments[first:]
            if len(run) < MERGED:
                break
            self._put(run[0].name, self._bytes(run[0].start)[: self._end - run[0].start])
            self._segments[first:] = [_Segment(run[0].name, run[0].start, level + 1)]
            self._stale += [s.name for s in run[1:]]
        self._delete_stale()

    def _delete_stale(self) -> None:
        if not (gone := self._stale):
            return
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda name: remove_file(join(self._folder, SEGMENTS, name)), gone))
        self._stale = []

    def _put(self, name: str, data: bytes) -> None:
        write_bytes(join(self._folder, SEGMENTS, name), data)

    def _bytes(self, start: int) -> bytes:
        """Whole lines from there on: somebody may be writing the last one."""
        with open(self._path, "rb") as f:
            f.seek(start)
            data = f.read()
        return data[: data.rfind(b"\n") + 1]


def read_journal(folder: str) -> bytes | None:
    """All whole lines of a journal; None where there is none. Its writer may be at work."""
    kept = None
    for attempt in range(1, ATTEMPTS + 1):
        try:
            kept = read_bytes(join(folder, STUDY_FILE)) if is_local(folder) else _joined(folder)
            break
        except _Merged:
            if attempt == ATTEMPTS:
                raise _damaged(folder, "a segment of it is gone") from None
    return None if kept is None else kept[: kept.rfind(b"\n") + 1]


class _Merged(Exception):
    """A segment went while it was read."""


def _joined(folder: str) -> bytes | None:
    """A journal on an object store, with what may be half a line at its end."""
    names = files_below(join(folder, SEGMENTS))  # first, for what goes is contained in what comes
    kept = read_bytes(join(folder, STUDY_FILE))
    if kept is None:
        if names:
            raise _damaged(folder, "its beginning is gone")
        return None
    found = sorted((int(m[1]), m[2], m[0]) for n in names if (m := _SEGMENT.fullmatch(n)))
    ahead = [f for f in found if f[0] >= len(kept)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        read = pool.map(lambda f: read_bytes(join(folder, SEGMENTS, f[2])), ahead)
        crc = crc32(kept)
        for (start, before, _), data in zip(ahead, read, strict=True):
            if start < len(kept):
                continue
            if data is None:
                raise _Merged
            if start > len(kept) or int(before, 16) != crc:
                raise _damaged(folder, f"what follows on byte {len(kept)} is gone")
            kept += data
            crc = crc32(data, crc)
    return kept


def _damaged(folder: str, what: str) -> UserError:
    return UserError(
        f"{join(folder, STUDY_FILE)} is damaged: {what}. Restore it and {SEGMENTS} from a copy, or "
        "give another output.dir."
    )


def set_journal_aside(folder: str, name: str) -> None:
    """Gives the journal another name in its folder. Killed in between, it is to be done again."""
    if not is_local(folder) and (kept := _joined(folder)) is not None:
        write_bytes(join(folder, STUDY_FILE), kept)
        remove_tree(join(folder, SEGMENTS))
    move_file(join(folder, STUDY_FILE), join(folder, name))


def drop_torn_line(path: str) -> None:
    """A full disk or a power cut leaves half a line, onto which the next one would be written."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as f:
        content = f.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            f.truncate(whole)
