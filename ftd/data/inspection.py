"""What is known of the images of a data set one by one, for whoever sets up a sweep for them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftd.data.cache import write_text
from ftd.data.config import DatasetConfig
from ftd.data.sources import PARTS
from ftd.data.survey import Facts, Progress, report
from ftd.errors import UserError


@dataclass(frozen=True)
class Unreadable:
    """An image file that cannot be read."""

    where: str
    """A path below the folder of the data, or a Parquet file and a row."""
    reason: str


@dataclass(frozen=True)
class Inspection:
    """A data set as it lies there, before any split. Images are the readable ones."""

    class_names: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    """Part (train, val, test; those that the data have) -> images of each class."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each image, upright, in order."""
    grey: int
    """Images stored without colour."""
    unreadable: tuple[Unreadable, ...]
    duplicates: tuple[tuple[str, str], ...]
    """An image of val or test, and an image of train that is the same file or the same picture."""


def inspect(config: DatasetConfig, progress: Progress | None = None) -> Inspection:
    """Looks at every image, once: what it finds is kept in the cache.

    Nothing is refused but data that are missing; what a sweep needs, ``ftd.data.describe`` checks.
    """
    facts, found = report(config, progress)
    labels, parts = np.asarray(facts["labels"], np.int64), np.asarray(facts["parts"], np.int64)
    names = tuple(facts["class_names"])
    counts = {
        name: tuple(np.bincount(labels[parts == part], minlength=len(names)).tolist())
        for part, name in enumerate(PARTS)
        if (parts == part).any()
    }
    return Inspection(
        class_names=names,
        counts=counts,
        sizes=tuple((w, h) for w, h in found["sizes"]),
        grey=found["grey"],
        unreadable=unreadable_of(facts),
        duplicates=tuple((one, other) for one, other in found["duplicates"]),
    )


MOST_NAMED = 20
"""Unreadable images that one line names; a longer list is a file in the cache."""


def unreadable_of(facts: Facts) -> tuple[Unreadable, ...]:
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
    name = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
    path = write_text(f"unreadable/{name}.txt", text)
    return f"{', '.join(entries[:MOST_NAMED])}, ...; all {len(entries)} are in {path}"
