"""What says something about a node, and nothing about the work that it was given.

CUDA that fails, memory of a GPU that strangers hold, a data set that is not there, a disk that is
full: such work is done again elsewhere. Where the store or the sweep's own folder is out of reach,
that is a ``PlaceError``, and memory that the work itself is too large for is its own.

This module imports no torch until there is an error to look at, and Ray only in workers: light
processes import it.
"""

import contextlib
import re
from collections.abc import Iterator

from ftd.errors import UserError

GPU_SLACK = 0.1
"""Share of a GPU's memory that contexts and caches of its other users may take beyond theirs."""

UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = r"(\d+(?:\.\d+)?) (bytes|[KMGT]iB|B)\b"

FULL = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation", re.I)
CUDA = re.compile(
    r"\bCUDA\b|\bcuda[A-Z]\w+|\bcuDNN\b|CUDNN_STATUS|CUBLAS_STATUS|CUSOLVER_STATUS|CUFFT_|NCCL|"
    r"NVIDIA|NVML|no kernel image",
)


class NodeFault(Exception):
    """A node cannot do its work. ``kind`` is gpu, full, data, disk or check."""

    def __init__(self, kind: str, reason: str):
        super().__init__(kind, reason)  # as Ray pickles it
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return self.reason


class GpuMemory(UserError):
    """The work itself is too large for the GPU, or for the share of it that it was given."""


@contextlib.contextmanager
def faults_of_the_node(gpus: float = 0.0) -> Iterator[None]:
    """Raises errors that say something about this node as NodeFault.

    And as GpuMemory what work outgrows that was given ``gpus`` GPUs.
    """
    try:
        yield
    except Exception as error:
        found = fault_of(error, gpus)
        if found is None:
            raise
        raise found from error


@contextlib.contextmanager
def needs_the_data() -> Iterator[None]:
    """Around the reading of the data set, which the driver has read: here it must be there too."""
    try:
        yield
    except (UserError, OSError) as error:
        raise NodeFault("data", f"the data set cannot be read there: {_line(error)}") from error


def assigned(resource: str) -> float:
    """What Ray has given this process of a resource, memory in bytes; 0 where it is no actor."""
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return 0.0
    return float(ray.get_runtime_context().get_assigned_resources().get(resource, 0.0))


def gpus_here() -> float:
    """GPUs that this process was given."""
    return assigned("GPU")


def fault_of(error: BaseException, gpus: float = 0.0) -> NodeFault | GpuMemory | None:
    """What an error says about the node it happened on; None for one of the work itself."""
    import torch

    if isinstance(error, NodeFault | UserError):  # PlaceErrors too: those are of all nodes
        return None
    text = _line(error)
    accelerator: tuple[type, ...] = (torch.OutOfMemoryError, torch.AcceleratorError)
    if isinstance(error, accelerator) or (
        isinstance(error, RuntimeError | AssertionError) and CUDA.search(text)
    ):
        return _memory(text, gpus) if FULL.search(text) else NodeFault("gpu", f"its GPU: {text}")
    if isinstance(error, OSError):
        return NodeFault("disk", f"its disk or system: {text}")
    return None


def _memory(text: str, gpus: float) -> NodeFault | GpuMemory:
    """Who took a GPU's memory, by the words in which torch says that it is full."""
    wanted = _size(r"Tried to allocate ", text)
    total, free = _size("total capacity of ", text), _size("of which ", text)
    own = _size("this process has ", text) or _size("Of the allocated memory ", text)
    needs = f"{own / 2**30:.1f} GiB and {wanted / 2**30:.2f} GiB more" if wanted else "more"
    if total:
        others, share = max(0.0, total - free - own), min(1.0, gpus or 1.0)
        if others > total * (1 - share + GPU_SLACK):
            return NodeFault(
                "full",
                f"its GPU is taken: other processes hold {others / 2**30:.1f} of "
                f"{total / 2**30:.1f} GiB",
            )
        needs += f" of a GPU of {total / 2**30:.1f} GiB, on a share of {share:g}"
    return GpuMemory(f"it ran out of GPU memory: it needs {needs}")


def _size(before: str, text: str) -> float:
    found = re.search(before + SIZE, text)
    return float(found[1]) * UNITS[found[2]] if found else 0.0


def _line(error: BaseException) -> str:
    """An error in one line, without the advice that CUDA adds to it."""
    text = " ".join(str(error).split()) or type(error).__name__
    for noise in ("CUDA kernel errors might be", "For debugging consider", "Search for `cuda"):
        text = text.split(noise)[0].strip()
    return text[:400]
