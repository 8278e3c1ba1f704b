"""A crew that stands: as many workers as a sweep would have, which measure all at once.

Workers that share a machine's memory, caches and power slow each other down: the pace that counts
is the one that they have together.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from ftd.errors import UserError
from ftd_ray.cluster import start_ray
from ftd_ray.new.crew import Crew, crew_of, mean_pace
from ftd_ray.new.pace import Pace, Task, measure
from ftd_ray.nodes import standing_nodes

PLACE_SECONDS = 60
"""In which a worker has found its place; those that have not are done without."""


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


@contextlib.contextmanager
def standing(address: str | None) -> Iterator[Stand]:
    """A crew on the cluster at ``address``, or on this machine. Raises UserError."""
    began = time.monotonic()
    start_ray(address)
    try:
        crew = crew_of([n["Resources"] for n in standing_nodes()])
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
