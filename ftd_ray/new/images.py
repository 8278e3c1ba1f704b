"""What a sweep's sizes depend on of the images: how many, of what, how large."""

from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from ftd.data import DATASETS, DatasetConfig, describe
from ftd.data.inspection import Inspection
from ftd.data.sources import PARTS
from ftd.data.splits import split
from ftd.errors import UserError

RGB = 3
"""Channels of image files, also of grey ones."""

VALIDATION_IMAGES = 200
"""From which on the validation part ranks trials: an accuracy near 50 % is known to 3.5 points."""

VALIDATION_SHARES = (0.1, 0.2)
"""The share of train that is held out lies between them."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """A data set as a sweep sees it. Counts are images of each class, after the split."""

    dataset: DatasetConfig
    """As the sweep says it, but for the resolution where the sweep chooses one."""
    found: Inspection
    channels: int
    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]

    @property
    def classes(self) -> int:
        return len(self.train)

    @property
    def side(self) -> int:
        """Pixels of the shorter side, of the image in the middle."""
        return int(median(min(size) for size in self.found.sizes))


def images_of(dataset: DatasetConfig, found: Inspection) -> Images:
    """The images, with what is to be done about them: unreadable ones, the validation part.

    Raises UserError when a sweep could not use them.
    """
    if not found.sizes:
        raise UserError(
            f"{dataset.root}: none of {len(found.unreadable)} images can be read "
            f"({found.unreadable[0].reason}). Point at other images."
        )
    if found.unreadable:
        dataset = replace(dataset, on_unreadable="skip")
    if "val" not in found.counts and dataset.val_fraction is None:
        dataset = replace(dataset, val_fraction=_val_fraction(dataset, found))
    names = found.class_names
    parts = [PARTS.index(part) for part in found.counts]
    labels = np.concatenate([np.repeat(range(len(names)), n) for n in found.counts.values()])
    of_part = np.repeat(parts, [sum(n) for n in found.counts.values()])
    counts = [
        tuple(np.bincount(labels[index], minlength=len(names)).tolist())
        for index in split(dataset, labels, of_part, names)
    ]
    channels = RGB if DATASETS[dataset.name].encoded else describe(dataset).channels
    return Images(
        dataset=dataset,
        found=found,
        channels=channels,
        train=counts[0],
        val=counts[1],
        test=counts[2],
    )


def _val_fraction(dataset: DatasetConfig, found: Inspection) -> float:
    """The share of train that is held out to rank trials: enough images, as far as there are."""
    left = sum(found.counts["train"])
    if "test" not in found.counts:
        left = round(left * (1 - (dataset.test_fraction or 0.2)))
    least, most = VALIDATION_SHARES
    return round(min(max(VALIDATION_IMAGES / max(1, left), least), most), 2)
