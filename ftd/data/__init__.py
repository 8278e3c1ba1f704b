"""Data sets as tensors: where images come from, how they are kept, how they are normalised.

``sources`` finds and decodes, ``cache`` keeps the decoded pixels once a node, ``normalise`` maps
pixels to network space and back, ``dataset`` puts them together.
"""

from ftd.data.dataset import Dataset, DatasetConfig, Sender, Split, describe, load, open_arrays
from ftd.data.normalise import Normalisation
from ftd.data.sources import DATASETS

__all__ = [
    "DATASETS", "Dataset", "DatasetConfig", "Normalisation", "Sender", "Split", "describe", "load",
    "open_arrays",
]  # fmt: skip
