"""Data sets as tensors: where images come from, how they are kept, how they are normalised.

``folders``, ``tables`` and ``arrays`` find images, ``registry`` has them by name; ``survey`` looks
at every one with ``decode``; ``cache`` keeps what it finds, and the pixels, once a node; ``splits``
says which are train, validation and test; ``normalise`` maps pixels to network space and back;
``dataset`` puts them together, and ``inspection`` tells of single images.
"""

from ftd.data.config import FRACTIONS, DatasetConfig
from ftd.data.dataset import Dataset, Sender, Split, describe, load, open_arrays
from ftd.data.inspection import Inspection, inspect
from ftd.data.normalise import Normalisation
from ftd.data.registry import DATASETS
from ftd.data.survey import Progress
from ftd.data.unreadable import Unreadable

__all__ = [
    "DATASETS", "FRACTIONS", "Dataset", "DatasetConfig", "Inspection", "Normalisation", "Progress",
    "Sender", "Split", "Unreadable", "describe", "inspect", "load", "open_arrays",
]  # fmt: skip
