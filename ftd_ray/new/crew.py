"""The workers that a sweep would have here or on a cluster, and their common pace."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ftd.errors import UserError
from ftd_ray.new.pace import Pace

MOST_ON_A_NODE = 16
"""Workers of CPUs; where there are more CPUs, each worker has several."""

MOST_ON_A_GPU = 4


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The workers that a sweep can have, all of one size."""

    workers: int
    cpus: int
    """Of each."""
    gpus: float
    """Of each: a share of one."""
    nodes: int
    node_memory: int
    """Bytes that the smallest of their nodes may book."""
    start: float = 0.0
    """Seconds from the start of Ray until they stand."""

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def on_a_node(self) -> int:
        """Workers, at most."""
        return -(-self.workers // self.nodes)


def crew_of(nodes: Sequence[Mapping[str, float]]) -> Crew:
    """The workers for nodes of such resources, as Ray counts them: GPUs where there are some.

    Raises UserError when there is room for none.
    """
    with_gpus = [n for n in nodes if n.get("GPU", 0) >= 1 and n.get("CPU", 0) >= 1]
    with_cpus = [n for n in nodes if n.get("CPU", 0) >= 1]
    used = with_gpus or with_cpus
    if not used:
        raise UserError("no node has a CPU to work on. Add nodes to the cluster.")
    if with_gpus:
        per_gpu = min(MOST_ON_A_GPU, *(int(n["CPU"] // n["GPU"]) or 1 for n in used))
        cpus, gpus = 1, 1 / per_gpu
        workers = sum(min(int(n["CPU"]), int(n["GPU"]) * per_gpu) for n in used)
    else:
        least = min(int(n["CPU"]) for n in used)
        cpus, gpus = max(1, least // MOST_ON_A_NODE), 0.0
        workers = sum(int(n["CPU"]) // cpus for n in used)
    return Crew(
        workers=workers,
        cpus=cpus,
        gpus=gpus,
        nodes=len(used),
        node_memory=int(min(n.get("memory", math.inf) for n in used)),
    )


def mean_pace(paces: Sequence[Pace]) -> Pace:
    """The mean time of several workers, and the most memory that one of them took."""
    return Pace(
        plain=fmean(p.plain for p in paces),
        flat=fmean(p.flat for p in paces),
        step=fmean(p.step for p in paces),
        fresh=fmean(p.fresh for p in paces),
        classify=fmean(p.classify for p in paces),
        memory=max(p.memory for p in paces),
        gpu_share=max(p.gpu_share for p in paces),
    )
