"""What a worker may take of memory: its share of a GPU, or on CPUs what is booked for it."""

import torch

from ftd.memory import OVERHEAD, limit_memory

LEFT = {"cuda": 0.85, "cpu": 0.5}
"""Share of a worker's memory that is left for tensors: cuDNN works in the rest, or oneDNN."""


def limit_worker(share: float | None, booked: float) -> None:
    """Keeps this process to its share of its GPU; without one, batches to the memory booked.

    What is booked on a node limits no more than batches: Ray itself ends who takes too much.
    """
    if share and torch.cuda.is_available():
        limit_gpu_memory(share)
    elif booked and not share:
        limit_memory(max(1, int(LEFT["cpu"] * (booked - OVERHEAD["cpu"]))))
    else:
        limit_memory(None)


def limit_gpu_memory(share: float) -> None:
    """Keeps this process to its share of its GPU, so that it cannot push its neighbours out."""
    total = torch.cuda.get_device_properties(0).total_memory
    mine = for_tensors(share, total)
    if share < 1:  # else nobody is beside it
        torch.cuda.set_per_process_memory_fraction(mine / total)
    limit_memory(int(LEFT["cuda"] * mine))


def for_tensors(share: float, total: int) -> int:
    """Bytes for tensors of a worker with a share of a GPU of ``total``, where CUDA itself takes its
    part of every share."""
    return max(1, int(share * total) - OVERHEAD["cuda"])


def own_use(reserved: int, used: int, reserved_now: int) -> int:
    """Bytes of a GPU that a process takes which had ``reserved`` at its peak.

    ``used`` is what everybody takes there now, and ``reserved_now`` its own part of that: the rest
    is CUDA's context, and others. Of that, no more is counted than a context may take.
    """
    rest = used - reserved_now
    return reserved + min(max(rest, OVERHEAD["cuda"]), 2 * OVERHEAD["cuda"])
