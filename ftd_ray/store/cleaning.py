"""Making room: sets that nobody uses, what dead writers left, and old quarantines.

Nothing goes that a running sweep uses, and whoever is killed in the middle leaves a store that is
whole: a set's manifests go first, so that it has no experts, and its ``set.json`` last.
"""

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pyarrow import fs as pafs

from ftd_ray.store.inventory import File, Inventory, SetEntry, is_manifest, look_at
from ftd_ray.store.text import age_text, plural, size_text

DAY = 86400.0

GRACE_SECONDS = DAY
"""Leftovers and quarantines stay for so long: a writer may be about to name its part."""

DELETERS = 16
"""Files that are deleted at the same time."""


@dataclass(frozen=True)
class Removal:
    """Something that goes, or would go."""

    kind: str
    """set, leftovers, quarantine or empty (a folder without a file)."""
    name: str
    """Below the store; of leftovers the set that they are in, "" for the store itself."""
    bytes: int
    last_used: float
    why: str


@dataclass(frozen=True)
class CleaningPlan:
    """What would go, and what would have gone but stays."""

    removals: tuple[Removal, ...]
    kept: tuple[str, ...]
    before: int
    """Bytes of the store."""

    @property
    def bytes(self) -> int:
        return sum(r.bytes for r in self.removals)


def plan_cleaning(
    store: Inventory, now: float, *, keep_days: float | None = None, max_bytes: int | None = None
) -> CleaningPlan:
    """What goes: sets not used for ``keep_days``, or the least recently used above ``max_bytes``.

    Leftovers and quarantines older than a day go in any case.
    """
    removals = [
        Removal("quarantine", q.name, q.bytes, q.since, "quarantined more than a day ago")
        for q in [*store.quarantined, *(q for s in store.sets for q in s.quarantined)]
        if now - q.since > GRACE_SECONDS
    ]
    for entry in (None, *store.sets):
        old = _old_leftovers(store.leftovers if entry is None else entry, now)
        if old:
            size, newest = sum(f.bytes for f in old), max(f.modified for f in old)
            why = f"{plural(len(old), 'file')} of writers that died"
            removals.append(Removal("leftovers", entry.key if entry else "", size, newest, why))
    left = store.bytes - sum(r.bytes for r in removals)
    kept = []
    removals += [
        Removal("empty", s.key, 0, now, "an empty folder") for s in store.sets if not s.files
    ]
    for entry in sorted(store.sets, key=lambda s: s.last_used):
        own = sum(f.bytes for f in entry.files if f not in entry.foreign)
        if len(entry.files) == len(entry.foreign):
            continue
        unused = now - entry.last_used
        if keep_days is not None:
            if unused <= keep_days * DAY:
                continue
            why = f"not used for {keep_days:g} days"
        else:
            assert max_bytes is not None
            if left <= max_bytes:
                break
            why = "least recently used"
        if (reason := _untouchable(entry, now)) is not None:
            kept.append(f"{entry.key} stays: {reason}")
            continue
        going = [r for r in removals if r.name.split("/")[0] == entry.key]
        removals = [r for r in removals if r not in going]  # they go with their set
        left -= own - sum(r.bytes for r in going)
        removals.append(Removal("set", entry.key, own, entry.last_used, why))
    if max_bytes is not None and left > max_bytes:
        kept.append(
            f"{size_text(left)} would be left, above {size_text(max_bytes)}: "
            "what remains is in use, or not for this command to delete"
        )
    return CleaningPlan(tuple(removals), tuple(kept), store.bytes)


def clean(store: Inventory, plan: CleaningPlan, now: float) -> Iterator[tuple[Removal, str | None]]:
    """Deletes what the plan names; yields each with None, or with why it stayed after all."""
    with ThreadPoolExecutor(DELETERS) as pool:
        for removal in plan.removals:
            yield removal, _remove(store, removal, now, pool)


def _remove(store: Inventory, removal: Removal, now: float, pool: ThreadPoolExecutor) -> str | None:
    key = removal.name.partition("/")[0]
    if removal.kind == "quarantine":
        every = [*store.quarantined, *(q for s in store.sets for q in s.quarantined)]
        files = next(q.files for q in every if q.name == removal.name)
        _delete(store, files, pool)
        _delete_empty(store, removal.name)
        return None
    if not key:
        _delete(store, _old_leftovers(store.leftovers, now), pool)
        return None
    (entry,) = look_at(store, [key])  # as it is now: a sweep may have begun
    if removal.kind == "leftovers":
        files = tuple(_old_leftovers(entry, now))
        _delete(store, files, pool)
        for folder in {f.name.rpartition("/")[0] for f in files} - {key}:
            _delete_empty(store, folder)
        return None if files else "somebody began to use the set"
    if (reason := _untouchable(entry, now)) is not None:
        return reason
    if entry.last_used > removal.last_used:
        return "it was used just now"
    _delete_set(store, entry, pool)
    return None


def _delete_set(store: Inventory, entry: SetEntry, pool: ThreadPoolExecutor) -> None:
    identity = [f for f in entry.files if f.name == f"{entry.key}/set.json"]
    manifests = [f for f in entry.files if is_manifest(f)]
    spared = {*identity, *manifests, *entry.foreign}
    _delete(store, manifests, pool)
    _delete(store, [f for f in entry.files if f not in spared], pool)
    (now,) = look_at(store, [entry.key])
    if all(f in spared for f in now.files):  # else somebody began to use it meanwhile
        _delete(store, identity, pool)
        _delete_empty(store, entry.key)


def _untouchable(entry: SetEntry, now: float) -> str | None:
    """Why a set is not deleted, whatever its age."""
    if running := entry.running(now):
        user = running[0]
        return f"{user.name} uses it ({user.place}, {age_text(now - user.renewed)} ago)"
    if entry.state == "newer" or any(e.newer for e in entry.experts.values()):
        return "of another schema version"
    if entry.state in ("damaged", "misplaced"):
        return f"{entry.state}; `verify --repair` takes it away"
    return None


def _old_leftovers(place: SetEntry | list[File], now: float) -> list[File]:
    """Leftovers that may go: none of a set that somebody uses."""
    if isinstance(place, SetEntry):
        if place.running(now):
            return []
        place = place.leftovers
    return [f for f in place if now - f.modified > GRACE_SECONDS]


def _delete(store: Inventory, files: Iterable[File], pool: ThreadPoolExecutor) -> None:
    def delete(file: File) -> None:
        with contextlib.suppress(FileNotFoundError):  # somebody else cleans, too
            delete_file(store.fs, f"{store.path}/{file.name}")

    list(pool.map(delete, files))


def delete_file(filesystem: pafs.FileSystem, path: str) -> None:
    """The one place where files of a store are deleted."""
    filesystem.delete_file(path)


def _delete_empty(store: Inventory, folder: str) -> None:
    """Deletes a folder and the folders in it, unless there is a file."""
    path = f"{store.path}/{folder}"
    found = store.fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    if not any(f.type == pafs.FileType.File for f in found):
        with contextlib.suppress(FileNotFoundError):
            store.fs.delete_dir(path)
