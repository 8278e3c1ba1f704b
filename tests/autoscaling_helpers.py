"""A cluster that starts and ends nodes on demand: Ray's own autoscaler over its fake provider."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray_helpers import wait_until

FAKE = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
IDLE_MINUTES = 0.15
"""After which an autoscaler gives an idle node back."""


@dataclass(frozen=True)
class Autoscaling:
    """A running cluster of that kind."""

    address: str
    log: Path


@contextlib.contextmanager
def autoscaling_cluster(
    folder: Path,
    worker_types: dict[str, Any],
    *,
    max_workers: int = 8,
    v2: bool = True,
    provider: str = FAKE,
) -> Iterator[Autoscaling]:
    """A head without CPUs, and an autoscaler that may add nodes of these types.

    ``worker_types`` is as ``available_node_types`` of a cluster's file. Everything that it starts
    ends with it; other clusters of this machine are left alone.
    """
    here, port = ray.util.get_node_ip_address(), free_port()
    address = f"{here}:{port}"
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    types = {
        name: {"resources": {}, "node_config": {}, "min_workers": 0} | worker
        for name, worker in worker_types.items()
    }
    options = {
        "type": "external",  # Ray ships the fake provider without its defaults
        "module": provider,
        "gcs_address": address,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
    }
    file = {
        "cluster_name": "fake",
        "max_workers": max_workers,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 100,
        "provider": options,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "available_node_types": {FAKE_HEAD_NODE_TYPE: head} | types,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
    }
    for commands in ("initialization", "setup", "head_setup", "worker_setup"):
        file[f"{commands}_commands"] = []
    for commands in ("head_start_ray", "worker_start_ray"):
        file[f"{commands}_commands"] = []
    path = folder / "cluster.yaml"
    path.write_text(json.dumps(file))
    env = dict(os.environ) | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": str(int(v2)),
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-"),  # a short path: sockets lie below it
    }
    env.pop("RAY_ADDRESS", None)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
        f"--port={port}", f"--node-ip-address={here}", "--num-cpus=0", "--num-gpus=0",
        "--include-dashboard=false", f"--autoscaling-config={path}",
        "--object-store-memory=200000000",
    ]  # fmt: skip
    log = folder / "head.txt"
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until(f"the head ({log})", lambda: answers(process, here, port), seconds=240)
        yield Autoscaling(address, folder)
    finally:
        end_cluster(process, address)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def answers(process: subprocess.Popen[bytes], host: str, port: int) -> bool:
    assert process.poll() is None, "the head ended"
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def end_cluster(process: subprocess.Popen[bytes], address: str) -> None:
    """Ends the head and all that the cluster has started: each names its address."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(address in word for word in other.cmdline()):
                other.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


class SoldOut(FakeMultiNodeProvider):
    """A cloud that has none of the machines that it is asked for."""

    def create_node_with_resources_and_labels(self, *_: Any) -> None:
        raise NodeLaunchException("SoldOut", "no g5.2xlarge is left", None)
