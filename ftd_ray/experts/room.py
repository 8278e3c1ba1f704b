"""How much the cluster has room for, now or once its autoscaler has done what it may."""

import math
from typing import Any

import ray


def room_for(cpus: float, gpus: float, memory: int = 0) -> int:
    """How many actors of that size there is room for; those that wait are demand. At least 1."""
    here = sum(_fitting(n["Resources"], cpus, gpus, memory) for n in ray.nodes() if n["Alive"])
    return max(1, here, _fitting(_possible(), cpus, gpus, memory))


def capacity() -> dict[str, float]:
    """CPUs, GPUs and so on of the cluster, as it is or as its autoscaler may make it."""
    total, possible = ray.cluster_resources(), _possible()
    return {k: max(total.get(k, 0), possible.get(k, 0)) for k in {*total, *possible}}


def _possible() -> dict[str, Any]:
    return ray._private.state.state.get_max_resources_from_cluster_config() or {}


def _fitting(resources: dict[str, Any], cpus: float, gpus: float, memory: int) -> int:
    room = math.floor(resources.get("CPU", 0) / cpus + 1e-9)
    if gpus:  # what is left over of two GPUs does not add up to a share
        room = min(room, math.floor(resources.get("GPU", 0)) * math.floor(1 / gpus + 1e-9))
    if memory:
        room = min(room, math.floor(resources.get("memory", 0) / memory))
    return room
