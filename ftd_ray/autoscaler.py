"""The autoscaler of a cluster: whether there is one, what it may start, why nothing comes.

Ray tells none of this to drivers, but the head shows it: an autoscaler runs there by the option
``--autoscaling-config=FILE`` of ``ray start``, which ``ray up`` gives, and FILE says what it may
start. In Kubernetes it runs beside the head, whose own start command then has ``--no-monitor``.
"""

import contextlib
import functools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import ray
import yaml
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftd_ray.nodes import GPU_KIND, standing_nodes

T = TypeVar("T")

OPTION = "--autoscaling-config"
LOOK_SECONDS = 60
"""A cluster's file may change while it runs; it is read again after so long."""
LOG_BYTES = 2**20
"""So much of the end of the autoscaler's log is looked through."""
FAILED = "Failed to launch "
"""Comes before what it could not start, and why."""
ANSWER_SECONDS = 120
"""The head, or Ray's own command, is waited for so long."""


def fitting(
    resources: dict[str, float], cpus: float, gpus: float, memory: int, kind: str | None = None
) -> int:
    """How many actors of that size a node of these resources holds; with a kind of GPU, on those
    only."""
    if kind is not None and not resources.get(GPU_KIND + kind):
        return 0
    room = math.floor(resources.get("CPU", 0) / cpus + 1e-9)
    if gpus:  # what is left over of two GPUs does not add up to a share
        room = min(room, math.floor(resources.get("GPU", 0)) * math.floor(1 / gpus + 1e-9))
    if memory:
        room = min(room, math.floor(resources.get("memory", 0) / memory))
    return room


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind that an autoscaler may start."""

    name: str
    most: float
    resources: dict[str, float] | None
    """As Ray counts them; None where the cluster's file leaves them to the machine."""


@dataclass(frozen=True)
class Autoscaler:
    """What an autoscaler may start, beside the head."""

    types: tuple[NodeType, ...] | None = None
    """None where its file is out of sight, as in Kubernetes."""
    most: float = math.inf
    """Nodes of all types together."""

    def room_for(self, cpus: float, gpus: float, memory: int = 0, kind: str | None = None) -> float:
        """How many actors of that size all that it may start would hold; infinite if unknown.

        With a ``kind`` of GPU, how many on those.
        """
        if self.types is None:
            return math.inf
        holds = [
            (math.inf if t.resources is None else fitting(t.resources, cpus, gpus, memory, kind), t)
            for t in self.types
        ]
        room, left = 0.0, self.most
        for each, of in sorted(holds, key=lambda pair: -pair[0]):
            count = min(left, of.most)
            room += each * count if each and count else 0
            left -= count if count < math.inf else left
        return room

    def kinds(self) -> list[dict[str, float]] | None:
        """The resources of every kind of node; None if those of some are unknown."""
        known = [t.resources for t in self.types or () if t.resources is not None]
        return known if self.types is not None and len(known) == len(self.types) else None

    def __str__(self) -> str:
        if self.types is None:
            return "nodes of its own choice"
        kinds = [f"{t.most:g} {t.name}" for t in self.types]
        text = " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
        both = sum(t.most for t in self.types) > self.most
        return (text or "no nodes") + (f", {self.most:g} nodes in all" if both else "")


def read_file(config: dict[str, Any]) -> Autoscaler:
    """What a cluster's file allows."""
    most = config.get("max_workers", math.inf)
    head = config.get("head_node_type")
    types = []
    for name, kind in (config.get("available_node_types") or {}).items():
        count = kind.get("max_workers", 0 if name == head else most)
        if count:
            types.append(NodeType(name, count, kind.get("resources") or None))
    return Autoscaler(tuple(types), most)


def _options(gcs_address: str) -> dict[str, str]:
    """Those of the autoscaler's process of that cluster, if it runs on this machine."""
    port = gcs_address.rpartition(":")[2]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = dict(w.split("=", 1) for w in process.cmdline() if w[:2] == "--" and "=" in w)
            if OPTION in words and words.get("--gcs-address", "").endswith(f":{port}"):
                return words
    return {}


def look(gcs_address: str) -> Autoscaler | None:
    """What this machine, on which the head of that cluster runs, shows of its autoscaler."""
    options = _options(gcs_address)
    if options:
        try:
            with open(os.path.expanduser(options[OPTION])) as f:
                return read_file(yaml.safe_load(f))
        except (OSError, yaml.YAMLError, AttributeError):
            return Autoscaler()
    if "--no-monitor" in os.environ.get("KUBERAY_GEN_RAY_START_CMD", ""):
        return Autoscaler()
    return None


def last_failure(gcs_address: str) -> str:
    """What the autoscaler on this machine has written of the last node that it could not start.

    ``ray status`` does not say what the cloud had answered.
    """
    log = os.path.join(_options(gcs_address).get("--logs-dir", ""), "monitor.log")
    with contextlib.suppress(OSError), open(log, "rb") as f:
        f.seek(max(0, os.path.getsize(log) - LOG_BYTES))
        lines = f.read().decode(errors="replace").splitlines()
        found = [line for line in lines if FAILED in line]
        return found[-1].partition(FAILED)[2].strip() if found else ""
    return ""


def of_late(find: Callable[[], T]) -> Callable[[], T | None]:
    """Remembers for a minute what was found of the cluster that this process has joined.

    While the cluster does not answer, what was found before holds.
    """
    known: dict[str, tuple[float, T | None]] = {}

    @functools.wraps(find)
    def found() -> T | None:
        address = ray.get_runtime_context().gcs_address
        when, what = known.get(address, (-math.inf, None))
        if time.monotonic() - when >= LOOK_SECONDS:
            with contextlib.suppress(RayError):
                what = find()
            known[address] = time.monotonic(), what
        return what

    return found


@of_late
def find_autoscaler() -> Autoscaler | None:
    """The autoscaler of the cluster that this process has joined."""
    return _on_head(look)


def _on_head(function: Callable[[str], T]) -> T:
    """What a function of the cluster's address says on the cluster's head."""
    context = ray.get_runtime_context()
    head = head_node()
    if head in (None, context.get_node_id()):
        return function(context.gcs_address)
    place = NodeAffinitySchedulingStrategy(head, soft=False)
    task = ray.remote(function).options(num_cpus=0, scheduling_strategy=place)
    return ray.get(task.remote(context.gcs_address), timeout=ANSWER_SECONDS)


@of_late
def head_node() -> str | None:
    """The id of the cluster's head: the one node that no autoscaler takes away."""
    heads = [n for n in standing_nodes() if "node:__internal_head__" in n["Resources"]]
    return heads[0]["NodeID"] if heads else None


def status_words() -> str:
    """What ``ray status`` and the autoscaler's log say of nodes that do not come, in a line."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--verbose"]
    command += ["--address", ray.get_runtime_context().gcs_address]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return "ray status does not answer"
    failure = ""
    with contextlib.suppress(RayError):
        failure = _on_head(last_failure)
    return read_status(said.stdout) + (f"; last: {failure}" if failure else "")


def read_status(text: str) -> str:
    """The nodes that are on their way and those that failed, of what ``ray status`` says."""
    parts: dict[str, list[str]] = {}
    part: list[str] = []
    for line in text.splitlines():
        if line.endswith(":") and line[:1].strip():
            part = parts.setdefault(line.rstrip(":"), [])
        elif not line.strip():
            part = []
        else:
            part.append(line.strip())
    if "Pending" not in parts or "Recent failures" not in parts:
        return "ray status does not say"
    pending, failures = ("; ".join(parts[k]) for k in ("Pending", "Recent failures"))
    return f"pending: {pending}; recent failures: {failures}"
