"""How much the cluster has room for, now or once its autoscaler has done what it may."""

from ftd_ray.autoscaler import find_autoscaler, fitting, head_node
from ftd_ray.nodes import standing_nodes


def room_for(cpus: float, gpus: float, memory: int = 0, kind: str | None = None) -> float:
    """How many actors of that size there is room for; those that wait are demand. At least 1.

    With a ``kind`` of GPU, on those only. Infinite where nobody says what the autoscaler may start.
    """
    size = (cpus, gpus, memory, kind)
    nodes = {n["NodeID"]: n["Resources"] for n in standing_nodes()}
    here = {name: fitting(r, *size) for name, r in nodes.items()}
    autoscaler = find_autoscaler()
    later = autoscaler.room_for(*size) if autoscaler else 0
    return max(1, sum(here.values()), later + here.get(head_node() or "", 0))
