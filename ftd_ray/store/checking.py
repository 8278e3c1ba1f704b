"""Reading every byte that a store promises, and moving away what is damaged."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ftd.errors import UserError
from ftd.trajectory import DamagedError, move_tree, quarantine_stamp
from ftd_ray.storage import is_local
from ftd_ray.store.inventory import QUARANTINE, Expert, Inventory, SetEntry

READERS = 4
"""Experts that are read at the same time; each takes the memory of one part."""


@dataclass(frozen=True)
class Finding:
    """Something in the store that is not as it should be."""

    kind: str
    """damaged, misplaced, unreadable, newer, foreign or leftover; the first three are damage."""
    where: str
    text: str
    mended: bool = False

    @property
    def is_damage(self) -> bool:
        return self.kind in ("damaged", "misplaced", "unreadable")


def check(
    store: Inventory, *, repair: bool, done: Callable[[int], None] = lambda _: None
) -> Iterator[Finding]:
    """All that is wrong with a store; ``done`` gets the bytes of each expert that was read.

    With ``repair`` damaged experts go to their set's quarantine, and sets that are no use as a
    whole to the store's.
    """
    for name in store.foreign:
        yield Finding("foreign", name, "is no part of a store, and is left alone")
    for file in store.leftovers:
        yield Finding("leftover", file.name, "was left by a writer that died, and does no harm")
    with ThreadPoolExecutor(READERS) as pool:
        for entry in store.sets:
            yield from _check_set(store, entry, repair, done, pool)


def _check_set(
    store: Inventory,
    entry: SetEntry,
    repair: bool,
    done: Callable[[int], None],
    pool: ThreadPoolExecutor,
) -> Iterator[Finding]:
    for file in entry.foreign:
        yield Finding("foreign", file.name, "is no part of a set, and is left alone")
    for file in entry.leftovers:
        yield Finding("leftover", file.name, "was left by a writer that died, and does no harm")
    if entry.state == "newer":
        yield Finding("newer", entry.key, str(entry.problem))
    elif entry.state in ("damaged", "misplaced"):
        target = _move_set(store, entry) if repair else None
        yield _finding(entry.state, entry.key, str(entry.problem), target)
    if entry.state != "whole":
        done(entry.bytes)
        return

    def verdict(expert: Expert) -> Exception | None:
        assert entry.experts_set is not None
        try:
            entry.experts_set.verify(expert.index)
        except (DamagedError, UserError) as error:
            return error
        except OSError as error:
            if not is_local(store.uri):
                raise  # the server, not the file
            return error
        return None

    experts = [e for _, e in sorted(entry.experts.items())]
    for expert, error in zip(experts, pool.map(verdict, experts), strict=True):
        done(expert.bytes)
        where = f"{entry.key}/expert-{expert.index:04d}"
        if isinstance(error, DamagedError):
            target = _move_expert(entry, expert) if repair else None
            yield _finding("damaged", where, str(error), target)
        elif isinstance(error, UserError):
            yield Finding("newer", where, str(error))
        elif error is not None:
            yield Finding("unreadable", where, f"{error}.")


def _finding(kind: str, where: str, text: str, target: str | None) -> Finding:
    mended = "" if target is None else f" Moved to {target}."
    return Finding(kind, where, text + mended, mended=target is not None)


def _move_expert(entry: SetEntry, expert: Expert) -> str:
    assert entry.experts_set is not None
    return entry.experts_set.quarantine(expert.index)


def _move_set(store: Inventory, entry: SetEntry) -> str:
    target = f"{store.path}/{QUARANTINE}/{entry.key}-{quarantine_stamp()}"
    move_tree(store.fs, f"{store.path}/{entry.key}", target)
    return target
