"""Data sets that come as arrays: scikit-learn's digits, and torchvision's."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ftd.data.sources import TEST, TRAIN, Source, Stats, digest_of, missing

if TYPE_CHECKING:
    from ftd.data.config import DatasetConfig


def open_digits(config: "DatasetConfig") -> Source:
    """The 1,797 handwritten digits (8 x 8, grey) bundled with scikit-learn; a quarter is test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = raw.target.astype(np.int64)
    _, test_index = train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0
    )
    test = np.zeros(len(labels), bool)
    test[test_index] = True
    names = tuple(str(i) for i in range(10))
    return _source(images, labels, test, names, None)


def torchvision_opener(
    cls_name: str, stats: Stats | None = None
) -> Callable[["DatasetConfig"], Source]:
    """Opens a data set of torchvision that is images and targets in two parts."""

    def open_it(config: "DatasetConfig") -> Source:
        import torchvision.datasets

        cls = getattr(torchvision.datasets, cls_name)
        try:
            parts = [cls(config.root, train=t, download=config.download) for t in (True, False)]
        except (RuntimeError, OSError) as error:
            raise missing(config, f"the files of torchvision's {cls_name}", error) from error
        images = [np.asarray(p.data) for p in parts]
        labels = np.concatenate([np.asarray(p.targets, np.int64) for p in parts])
        stacked = np.concatenate(images)
        stacked = stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
        test = np.arange(len(labels)) >= len(images[0])
        names = tuple(str(c) for c in parts[0].classes)
        return _source(np.ascontiguousarray(stacked), labels, test, names, stats)

    return open_it


def _source(
    images: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    names: tuple[str, ...],
    stats: Stats | None,
) -> Source:
    return Source(
        labels=labels,
        parts=np.where(test, TEST, TRAIN),
        class_names=names,
        channels=images.shape[1],
        native_resolution=images.shape[2],
        digest=lambda _: digest_of(images, labels, test),
        arrays=images,
        stats=stats,
    )
