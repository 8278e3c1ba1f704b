"""SIGINT and SIGTERM: noted when they come, raised where it is safe.

An exception raised by the handler itself could come out of the middle of Ray's or Python's own
code and be lost there; so the handler only notes the signal, and the driver asks at every turn.
"""

import contextlib
import signal
from collections.abc import Iterator
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

    def arm(self) -> None:
        """Sets the handlers, again too: Ray takes SIGTERM for itself when it starts."""
        for s in HANDLED:
            signal.signal(s, self._note)

    def check(self) -> None:
        """Raises Interrupted when a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _note(self, signum: int, frame: Any) -> None:
        self._received = signum
        signal.signal(signum, signal.SIG_DFL)


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Handles signals while it lasts."""
    before = {s: signal.getsignal(s) for s in HANDLED}
    handled = Signals()
    handled.arm()
    try:
        yield handled
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
