"""What a store has of each set, as a process remembers it that many ask: no request a question.

The rule. What is *there* is remembered for ``REMEMBER_SECONDS``. What is *missing* is looked up
again before anybody acts on it, so what another cluster published meanwhile is found and not
trained twice. What another cluster took away is noticed at the next look, or by the first reader
that misses it, who says so (``forget``). What this process's own builds publish is known at once.
A look is one listing of the set, however many experts it has (``ExpertSet.published``).
"""

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from ftd.trajectory import ExpertSet, set_key
from ftd_ray.store import TrajectoryStore

REMEMBER_SECONDS = 60


@dataclass
class _Known:
    """One set."""

    experts: ExpertSet | None = None
    """As far as its set.json is known to be this identity's."""
    epochs: dict[int, int] = field(default_factory=dict)
    looked: float = float("-inf")
    look: "asyncio.Task[None] | None" = None
    meanwhile: dict[int, int] = field(default_factory=dict)
    """What was built since the look under way began."""


class PublishedExperts:
    """Lives in one event loop; looks are made in threads, one at a time for a set."""

    def __init__(self, store: TrajectoryStore) -> None:
        self._store = store
        self._sets: defaultdict[str, _Known] = defaultdict(_Known)

    async def epochs(
        self, identity: dict[str, Any], count: int, epochs: int, *, read: bool = False
    ) -> dict[int, int]:
        """Expert -> its last published epoch; at least one look if any of ``count`` lacks epochs.

        With ``read`` every manifest is read too. Raises DamagedError for what cannot be used.
        """
        known = self._sets[set_key(identity)]
        fresh = time.monotonic() - known.looked < REMEMBER_SECONDS
        whole = all(known.epochs.get(i, -1) >= epochs for i in range(count))
        if read or not (fresh and whole):
            while read and known.look is not None:  # one that may not read
                await asyncio.wait([known.look])
            if known.look is None:
                known.meanwhile = {}
                known.look = asyncio.create_task(self._look(known, identity, read))
            await asyncio.shield(known.look)
        return dict(known.epochs)

    def built(self, key: str, expert: int, epochs: int) -> None:
        """An expert was published by a build of this process."""
        known = self._sets[key]
        for place in (known.epochs, known.meanwhile):
            place[expert] = max(epochs, place.get(expert, -1))

    def forget(self, key: str) -> None:
        """Somebody missed something of a set: the next question is asked of the store."""
        self._sets.pop(key, None)

    async def _look(self, known: _Known, identity: dict[str, Any], read: bool) -> None:
        began = time.monotonic()
        try:
            found = await asyncio.to_thread(self._published, known, identity, read)
        finally:
            known.look = None
        known.epochs = found
        known.looked = began
        for expert, epochs in known.meanwhile.items():
            known.epochs[expert] = max(epochs, known.epochs.get(expert, -1))

    def _published(self, known: _Known, identity: dict[str, Any], read: bool) -> dict[int, int]:
        experts = known.experts or self._store.expert_set(identity)
        published = experts.published()
        known.experts = experts if published else None  # else it may be another set by then
        if read:
            for error in experts.damaged_manifests().values():
                raise error
        return published
