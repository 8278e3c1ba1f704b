"""Image files that cannot be read: how they are listed, and when they stop everything."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ftd.data.cache import write_text
from ftd.data.config import DatasetConfig
from ftd.data.survey import Facts
from ftd.errors import UserError

MOST_NAMED = 20
"""Images that one line names; a longer list is a file in the cache."""


@dataclass(frozen=True)
class Unreadable:
    """An image file that cannot be read."""

    where: str
    """A path below the folder of the data, or a Parquet file and a row."""
    reason: str


def unreadable_of(facts: Facts) -> tuple[Unreadable, ...]:
    """Those that a survey found."""
    return tuple(Unreadable(where, reason) for where, reason in facts["unreadable"])


def check_readable(config: DatasetConfig, facts: Facts) -> None:
    """Raises UserError with every image that cannot be read, unless they are to be left out."""
    if config.on_unreadable == "skip" or not (unreadable := unreadable_of(facts)):
        return
    n = len(facts["labels"]) + len(unreadable)
    raise UserError(
        f"dataset.root={config.root}: {len(unreadable)} of {n} images cannot be read. Remove or "
        f"mend them, or set dataset.on_unreadable=skip: {listed(unreadable)}"
    )


def listed(unreadable: Sequence[Unreadable]) -> str:
    """All of them with their reasons, or the first and the file that has the whole list."""
    entries = [f"{u.where} ({u.reason})" for u in unreadable]
    if len(entries) <= MOST_NAMED:
        return ", ".join(entries)
    text = "".join(f"{entry}\n" for entry in entries)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = write_text(f"unreadable/{name}.txt", text)
    return f"{', '.join(entries[:MOST_NAMED])}, ...; all {len(entries)} are in {path}"
