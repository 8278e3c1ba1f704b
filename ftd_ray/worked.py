"""When there was work: intervals of it, as they become known, and how much time they cover."""

import time


class Worked:
    """Collects intervals that may overlap."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def just_now(self, seconds: float) -> None:
        """Something that took so long has ended now."""
        now = time.monotonic()
        self._spans.append((now - seconds, now))

    def covered(self) -> float:
        """Seconds in which at least one of them was under way."""
        total, until = 0.0, float("-inf")
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total
