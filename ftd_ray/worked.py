"""When there was work: intervals of it, as they become known, and how much time they cover."""

import time
from collections.abc import Callable


class Worked:
    """Collects intervals that may overlap, and keeps those that do as one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spans: list[tuple[float, float]] = []
        """In order, with gaps between them."""

    def just_now(self, seconds: float) -> None:
        """Something that took so long has ended now."""
        now = self._clock()
        start = now - seconds
        while self._spans and self._spans[-1][1] >= start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, now))

    def covered(self) -> float:
        """Seconds in which at least one of them was under way."""
        return sum(end - start for start, end in self._spans)
