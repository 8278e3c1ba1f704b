"""What is known of the images of a data set one by one, for whoever sets up a sweep for them."""

from dataclasses import dataclass

import numpy as np

from ftd.data.config import DatasetConfig
from ftd.data.sources import PARTS
from ftd.data.survey import Progress, report
from ftd.data.unreadable import Unreadable, unreadable_of


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
    unused: tuple[str, ...] = ()
    """Images and folders of images that are of no part and no class."""


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
        unused=tuple(facts["unused"]),
    )
