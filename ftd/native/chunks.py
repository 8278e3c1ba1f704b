"""A batch in chunks that fit the caches, and the arrays that a chunk works in."""

from math import ceil, prod
from threading import local

import torch
from torch import Tensor


def chunk_sizes(n: int, limit: int, threads: int) -> list[int]:
    """Sizes of the chunks of ``n`` images: near equal, at most ``limit``, shared out evenly.

    A function of its arguments alone, since it decides about the last bits of a sum.
    """
    pieces = ceil(ceil(n / limit) / threads) * threads
    pieces = min(pieces, n)
    return [n // pieces + (i < n % pieces) for i in range(pieces)]


class Workspace(local):
    """Arrays that a thread uses again for every chunk: fresh memory costs more than arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def array(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """The array ``name``, in any shape; what it held is gone."""
        key, size = (name, dtype), prod(shape)
        kept = self._kept.get(key)
        if kept is None or kept.numel() < size:
            kept = self._kept[key] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)
