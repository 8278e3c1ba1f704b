"""As many workers as a sweep would have here or on a cluster, which measure all at once.

Workers that share a machine's memory, caches and power slow each other down: the pace that counts
is the one that they have together.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from ftd.errors import UserError
from ftd_ray.cluster import start_ray
from ftd_ray.new.pace import Pace, Task, measure

MOST_ON_A_NODE = 16
"""Workers of CPUs; where there are more CPUs, each worker has several."""

MOST_ON_A_GPU = 4

PLACE_SECONDS = 60
"""In which a worker has found its place; those that have not are done without."""


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


class Measurer:
    """Shell of ``ftd_ray.new.pace.measure``."""

    def ready(self) -> None:
        """Returns when the worker stands, with all that it imports."""

    def measure(self, task: Task) -> Pace | None:
        """The pace at a task; None where its GPU's memory does not do."""
        try:
            return measure(task)
        except torch.OutOfMemoryError:
            return None


class Stand:
    """A crew that stands, ready to be measured."""

    def __init__(self, crew: Crew, actors: Sequence[Any]):
        self.crew, self._actors = crew, actors

    def pace(self, task: Task) -> Pace | None:
        """The mean pace of all workers at once; None where their memory does not do."""
        try:
            paces = ray.get([actor.measure.remote(task) for actor in self._actors])
        except RayTaskError as error:
            raise error.cause from None
        except RayError:  # a worker is gone: its memory was not enough
            return None
        found = [p for p in paces if p is not None]
        if len(found) < len(paces):
            return None
        return mean_pace(found)


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


@contextlib.contextmanager
def standing(address: str | None) -> Iterator[Stand]:
    """A crew on the cluster at ``address``, or on this machine. Raises UserError."""
    began = time.monotonic()
    start_ray(address)
    try:
        crew = crew_of([n["Resources"] for n in ray.nodes() if n["Alive"]])
        size = {"num_cpus": crew.cpus, "num_gpus": crew.gpus, "scheduling_strategy": "SPREAD"}
        actors = [ray.remote(Measurer).options(**size).remote() for _ in range(crew.workers)]
        waiting = {actor.ready.remote(): actor for actor in actors}
        ready, _ = ray.wait(list(waiting), num_returns=len(actors), timeout=PLACE_SECONDS)
        if not ready:
            raise UserError(
                f"no worker of {crew.cpus} CPU found a place within {PLACE_SECONDS} s. Is the "
                "cluster busy? Wait for its work to end, or give another --address."
            )
        crew = replace(crew, workers=len(ready), start=time.monotonic() - began)
        yield Stand(crew, [waiting[ref] for ref in ready])
    finally:
        ray.shutdown()
