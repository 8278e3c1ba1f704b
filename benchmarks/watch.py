"""What processes take while something runs: their processor time and memory, again and again."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import psutil

EVERY_SECONDS = 2.0
LOOK_SECONDS = 15.0
"""Processes below this one are looked through this often, for those that have come."""

Sample = dict[str, Any]
"""``time``, ``done`` and for each role {"cpu": seconds so far, "mib": resident memory, "count"}."""


class Watch:
    """Samples the processes below this one by the role that their command, or title, gives them.

    ``roles`` are the words that tell them, of which the first role counts; ``done`` says how far
    the work is. Processor time of processes that have ended stays with their role.
    """

    def __init__(self, roles: Mapping[str, Sequence[str]], done: Callable[[], int]) -> None:
        self._roles, self._done = roles, done
        self._known: dict[int, tuple[str, psutil.Process]] = {}
        self._cpu: dict[int, tuple[str, float]] = {}
        self._looked = float("-inf")
        self._over = threading.Event()
        self.samples: list[Sample] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self.sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self.sample()

    def _run(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            self.sample()

    def sample(self) -> None:
        """Takes one sample now."""
        if time.monotonic() - self._looked > LOOK_SECONDS or len(self.samples) < 10:
            self._look()
        found: Sample = {"time": time.time(), "done": self._done()}
        for role in self._roles:
            found[role] = {"cpu": 0.0, "mib": 0.0, "count": 0}
        for pid, (role, process) in list(self._known.items()):
            try:
                self._cpu[pid] = role, sum(process.cpu_times()[:2])
                found[role]["mib"] += process.memory_info().rss / 2**20
                found[role]["count"] += 1
            except psutil.Error:
                del self._known[pid]
        for role, seconds in self._cpu.values():
            found[role]["cpu"] += seconds
        self.samples.append(found)

    def _look(self) -> None:
        """Finds the processes; a worker of Ray's that was idle has a role by now."""
        self._looked = time.monotonic()
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline()).partition(" --")[0]
                if role := self._role(command):
                    known = self._known.get(process.pid, (role, process))[1]
                    self._known[process.pid] = role, known

    def _role(self, command: str) -> str | None:
        found = (r for r, words in self._roles.items() if any(w in command for w in words))
        return next(found, None)
