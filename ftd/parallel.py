"""Work that falls into independent pieces, over the threads that this process was given.

Each thread takes whole pieces and computes them alone, which costs less than many threads inside
every operation: nothing waits, and what a thread works on stays in its core's cache.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def each(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``function`` of every item, in this process's threads; results in the items' order."""
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        return [function(item) for item in items]
    torch.set_num_threads(1)  # inside a piece
    try:
        running = [_pool(threads).submit(function, item) for item in items]
        wait(running, return_when=FIRST_EXCEPTION)
        for future in running:
            future.cancel()  # what has not begun, if one has failed
        wait(running)
        return [future.result() for future in running if not future.cancelled()]
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "pieces", torch.set_num_threads, (1,))
