"""The trajectory store: all expert sets below one URI, each in a folder named by its key.

The layout of a set is ``ftd.trajectory``'s; this module finds sets and says what they hold.
"""

from typing import Any

from ftd.trajectory import ExpertSet, set_key
from ftd_ray.storage import join, open_uri


class TrajectoryStore:
    """The store at ``uri`` (a path, s3:// or gs://)."""

    def __init__(self, uri: str):
        self.uri = uri
        self._fs, self._path = open_uri(uri)

    def expert_set(self, identity: dict[str, Any]) -> ExpertSet:
        """The set of that identity; ``create`` it before writing."""
        return ExpertSet(self._fs, f"{self._path}/{set_key(identity)}", identity)

    def at(self, key: str) -> ExpertSet:
        """The set ``key``, which must be there."""
        return ExpertSet(self._fs, f"{self._path}/{key}")

    def location(self, key: str) -> str:
        """Where the set ``key`` lies."""
        return join(self.uri, key)
