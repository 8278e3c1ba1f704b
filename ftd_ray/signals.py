"""SIGINT and SIGTERM: noted when they come, raised where it is safe.

An exception raised by the handler itself could come out of the middle of Ray's or Python's own
code and be lost there; so the handler only notes the signal, and the driver asks at every turn.
What cannot wait for that, another thread does at once: the main one may be in a request that takes
long, in which Python does not even run handlers.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal arrived; it carries the signal's number."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class Signals:
    """Notes the first signal; a second one of the kind is not softened."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._action: Callable[[], None] | None = None

    def arm(self) -> None:
        """Sets the handlers, again too: Ray takes SIGTERM for itself when it starts."""
        for s in HANDLED:
            signal.signal(s, self._note)

    def check(self) -> None:
        """Raises Interrupted when a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)

    def at_once(self, action: Callable[[], None]) -> None:
        """Has ``action`` called by another thread when a signal comes, whatever this one does."""
        self._action = action

    def _note(self, signum: int, frame: Any) -> None:
        self._received = signum
        signal.signal(signum, signal.SIG_DFL)

    def _watch(self, arrivals: socket.socket) -> None:
        """Reads the numbers of signals, which Python writes there as they come."""
        while numbers := arrivals.recv(16):
            if self._action is not None and set(numbers) & set(HANDLED):
                self._action()


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Handles signals while it lasts."""
    before = {s: signal.getsignal(s) for s in HANDLED}
    handled = Signals()
    arrivals, written = socket.socketpair()
    written.setblocking(False)
    known = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=handled._watch, args=(arrivals,), name="signals", daemon=True).start()
    handled.arm()
    try:
        yield handled
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(known)
        written.close()  # with which the thread ends
