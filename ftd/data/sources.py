"""What the places that images come from have in common: a ``Source``, images before decoding."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ftd.errors import UserError

if TYPE_CHECKING:
    from ftd.data.config import DatasetConfig

PARTS = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)

Stats = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET_STATS: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR_STATS: Stats = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@dataclass(frozen=True)
class ImageFile:
    """An image as a file holds it."""

    where: str
    """As users are told: a path below the root, or a Parquet file and a row."""
    read: Callable[[], bytes]
    """May raise OSError."""


@dataclass(frozen=True)
class Source:
    """Images before decoding, of all parts in one sequence."""

    labels: np.ndarray
    """(N,) int64."""
    parts: np.ndarray
    """(N,) TRAIN, VAL or TEST. A part that no image is in is held out of train."""
    class_names: tuple[str, ...]
    channels: int
    native_resolution: int | None
    digest: Callable[[Sequence[bytes | None]], str]
    """Names the content, given the SHA-256 of every file in order, None for an unreadable one."""
    files: Callable[[], Iterator[ImageFile]] | None = None
    """The N image files; None where the images are ``arrays``."""
    arrays: np.ndarray | None = None
    """(N, C, H, W) uint8."""
    stats: Stats | None = None
    """The customary mean and std of the field, if there are any."""
    unused: tuple[str, ...] = ()
    """What lies there, looks like images and is of no part, in words."""


def missing(config: "DatasetConfig", wanted: str, error: Exception | None = None) -> UserError:
    """One line for data that are not where they were looked for."""
    reason = f" ({str(error).splitlines()[0]})" if error else ""
    return UserError(
        f"dataset.root={config.root!r} has no data for {config.name}: looked for {wanted} in "
        f"{Path(config.root or '.').resolve()}{reason}. Point dataset.root at the data"
        + ("" if config.download else ", or set dataset.download=true where there is a network")
        + "."
    )


def digest_of(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays with their shapes and types."""
    h = hashlib.sha256()
    for a in arrays:
        h.update(f"{a.shape}{a.dtype}".encode())
        h.update(np.ascontiguousarray(a).data)
    return h.hexdigest()
