"""Randomness by path: every draw comes from a generator named by what it is for.

A worker that is retried, resumed or reordered gets the same bits, because nothing depends on
how many numbers somebody else drew before.
"""

import hashlib
import json

import torch


def derive_seed(root: int, *path: str | int) -> int:
    """A 63-bit seed that depends on ``root`` and every element of ``path``, and nothing else.

    >>> derive_seed(0, "expert", 17) == derive_seed(0, "expert", 17)
    True
    """
    digest = hashlib.sha256(json.dumps([root, *path]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(root: int, *path: str | int) -> torch.Generator:
    """A CPU generator seeded by path. Draws happen on CPU, so that a GPU sees the same numbers."""
    return torch.Generator().manual_seed(derive_seed(root, *path))
