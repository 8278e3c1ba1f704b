"""An outbox: what is to be told to a server is sent in order by a thread of its own.

Whoever puts something in never waits and never sees an error. While the server does not answer,
what is to be sent stays in its order and is tried again with growing waits; what the server
refuses is dropped alone. Large things wait as files, so that an outage costs no memory. What a
user should know of all this is collected, and said by who asks for ``new_notes``.
"""

import shutil
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
"""Seconds between two tries."""
TRIES, DOUBTS = 6, 3
"""After so many tries it is asked whether the entry is to blame, and believed after so many."""
TOGETHER = 100
"""Parts of one key that are sent at once."""


@dataclass(frozen=True)
class _Entry:
    send: Callable[[Sequence[Any]], None]
    part: Any
    key: Hashable | None
    files: Sequence[Path]


class Outbox:
    """Sends what is put into it. Its thread and its folder begin with the first use.

    ``transient`` tells errors after which the same may succeed later; ``blames`` is asked about
    one that came again and again, whether it is the entry's own fault all the same.
    """

    def __init__(
        self,
        name: str,
        transient: Callable[[Exception], bool],
        blames: Callable[[Exception], bool] = lambda error: False,
    ):
        self._name, self._transient, self._blames = name, transient, blames
        self._changed = threading.Condition()
        self._queue: deque[_Entry] = deque()
        self._first: deque[_Entry] = deque()
        """Goes before all of the queue."""
        self._taken = self._queue
        """Of the two the one whose entries are being sent."""
        self._thread: threading.Thread | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0
        self._alone = 0
        """So many next entries are sent each by itself: one of them was refused among others."""
        self._hurry = False
        self._outage: float | None = None
        """Since when the server does not answer."""
        self._backlog: int | None = None
        """Entries left of an outage that the user knows of; None when there was none."""
        self._late = 0
        self._notes: list[str] = []
        self._refusals: Counter[str] = Counter()

    # --- for who has something to send ------------------------------------------------------

    def put(self, what: Callable[[], None], files: Sequence[Path] = ()) -> None:
        """Has ``what`` called, after all before it. It may be called again after an error.

        ``files`` of ``keep`` are removed when it is done.
        """
        self._append(_Entry(lambda _: what(), None, None, files))

    def put_first(self, what: Callable[[], None]) -> None:
        """Has ``what`` called next, before all that waits; in an outage it is tried at once."""
        self._append(_Entry(lambda _: what(), None, None, ()), self._first)

    def put_part(
        self,
        send: Callable[[Sequence[Any]], None],
        part: Any,
        key: Hashable,
        files: Sequence[Path] = (),
    ) -> None:
        """Has ``send`` called with ``part``, and with those of ``key`` that wait right behind."""
        self._append(_Entry(send, part, key, files))

    def keep(self, name: str, data: bytes) -> Path:
        """A file of that name and content, which lies there until an entry with it is done."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(
                prefix="ftd-outbox-", ignore_cleanup_errors=True
            )
        self._files += 1
        folder = Path(self._folder.name, str(self._files))
        folder.mkdir()
        (folder / name).write_bytes(data)
        return folder / name

    def note(self, text: str) -> None:
        """Something that the user should know."""
        with self._changed:
            self._notes.append(text)

    def new_notes(self) -> list[str]:
        """What the user should know and was not told yet."""
        with self._changed:
            notes, self._notes = self._notes, []
        return notes

    @property
    def refused(self) -> int:
        """Entries that were dropped, since the server did not take them."""
        return self._refusals.total()

    def __len__(self) -> int:
        """Entries that are not sent yet."""
        return len(self._first) + len(self._queue)

    def drain(self, seconds: float, patience: float | None = None) -> int:
        """Waits until all is sent, or the time is over; returns how many entries are left.

        ``patience`` is for how many of the ``seconds`` an outage is waited for.
        """
        began = time.monotonic()
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            try:
                while len(self):
                    end = began + seconds
                    if patience is not None and self._outage is not None:
                        end = min(end, max(began, self._outage) + patience)
                    if (left := end - time.monotonic()) <= 0:
                        break
                    self._changed.wait(left)
            finally:
                self._hurry = False
            return len(self)

    def close(self) -> None:
        """Forgets what is left, ends the thread and removes the files; a later put begins anew."""
        with self._changed:
            self._thread = None
            self._queue.clear()
            self._first.clear()
            self._alone, self._outage, self._backlog = 0, None, None
            self._changed.notify_all()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _append(self, entry: _Entry, queue: deque[_Entry] | None = None) -> None:
        with self._changed:
            (self._queue if queue is None else queue).append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    # --- the thread -------------------------------------------------------------------------

    def _work(self) -> None:
        tries = doubts = 0
        while entries := self._next():
            try:
                entries[0].send([e.part for e in entries])
            except Exception as error:  # whatever it is, the entries behind it want to be sent
                tries += 1
                doubts = doubts + 1 if tries >= TRIES and self._blames(error) else 0
                own_fault = doubts >= DOUBTS or not self._transient(error)
                if own_fault and len(entries) > 1:
                    self._alone, tries = len(entries), 0
                elif own_fault:
                    tries = 0
                    self._answered()
                    self._refuse(error)
                    self._done(entries)
                else:
                    self._fail(error)
                    self._wait(min(FIRST_WAIT * 2 ** (tries - 1), LONGEST_WAIT))
            else:
                tries = 0
                self._answered()
                self._done(entries)

    def _next(self) -> list[_Entry]:
        """The entries to send now; none when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: len(self) or self._over())
            if self._over():
                return []
            self._taken = self._first or self._queue
            entries = [self._taken[0]]
            if entries[0].key is not None and not self._alone:
                for entry in islice(self._queue, 1, TOGETHER):
                    if entry.key != entries[0].key:
                        break
                    entries.append(entry)
            return entries

    def _done(self, entries: list[_Entry]) -> None:
        for entry in entries:
            for file in entry.files:
                shutil.rmtree(file.parent, ignore_errors=True)
        with self._changed:
            if self._over():
                return
            for _ in entries:
                self._taken.popleft()
            self._changed.notify_all()
            if self._taken is self._first:
                return
            self._alone = max(0, self._alone - 1)
            if self._backlog is not None and self._outage is None:
                self._backlog -= len(entries)
                if self._backlog <= 0:
                    self._backlog = None
                    n = self._late
                    were = "1 entry was" if n == 1 else f"{n} entries were"
                    self._notes.append(f"{self._name} answers again; {were} sent.")

    def _over(self) -> bool:
        return threading.current_thread() is not self._thread

    def _answered(self) -> None:
        with self._changed:
            if self._outage is not None and not self._over():
                self._outage = None
                self._backlog = self._late = len(self._queue)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            if self._over():
                return
            if self._outage is None:
                self._outage = time.monotonic()
                if self._backlog is None:
                    why = one_line(_root(error))
                    self._notes.append(
                        f"{self._name} does not answer ({why}); what is to be logged is kept and "
                        "sent when it does."
                    )
                self._backlog = len(self._queue)
            self._changed.notify_all()

    def _refuse(self, error: Exception) -> None:
        kind = getattr(error, "error_code", None) or type(error).__name__
        with self._changed:
            if not self._refusals[kind]:
                self._notes.append(
                    f"{self._name} refuses an entry ({one_line(error)}); it is left out. More of "
                    f"the kind ({kind}) are not mentioned."
                )
            self._refusals[kind] += 1

    def _wait(self, seconds: float) -> None:
        began = time.monotonic()
        with self._changed:
            while not self._over():
                hurry = self._hurry or self._first
                end = began + (min(seconds, FIRST_WAIT) if hurry else seconds)
                if (left := end - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)


def one_line(error: BaseException) -> str:
    """The first line of an error, not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def _root(error: BaseException) -> BaseException:
    """What an error came from: clients wrap a refused connection several times."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


__all__ = ["Outbox", "one_line"]
