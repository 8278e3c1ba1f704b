"""Joining or starting Ray, and whether the cluster can do what a sweep asks of it."""

import contextlib
import logging
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftd.errors import UserError
from ftd_ray.autoscaler import Autoscaler, find_autoscaler
from ftd_ray.config import SweepConfig
from ftd_ray.local import ask_for_token
from ftd_ray.nodes import standing_nodes
from ftd_ray.plan import Need, needs
from ftd_ray.storage import is_local, join, write_bytes


def start_ray(address: str | None) -> None:
    """Joins or starts Ray, quietly: what is worth saying, the driver says itself."""
    if address is None:
        ask_for_token()
    for key, value in {
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # Tune's own list of all trials, which nobody reads
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore")
    if address is not None:
        _check_answers(address)
    options: dict[str, Any] = {"address": address or "local"}
    if address is None:
        options["include_dashboard"] = False
    said: list[str] = []
    try:
        with contextlib.nullcontext() if address is None else _words_kept(said):
            ray.init(
                log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options
            )
    except Exception as error:  # Ray has no class of its own for a start that failed
        if isinstance(error, AuthenticationError) or "Unauthenticated" in "".join(said):
            raise UserError(
                f"the Ray cluster at {address or 'this machine'} asks for another token, or for "
                "one at all. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that its "
                "nodes have (else it is ~/.ray/auth_token)."
            ) from error
        if address is None:
            raise UserError(f"Ray could not be started here ({error}).") from error
        raise _unreachable(address, error) from error
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _words_kept(said: list[str]) -> Iterator[None]:
    """Keeps what is written to stderr in ``said`` if this fails; else it is written at the end.

    Why it cannot join a cluster, Ray's native code writes there, a line a second, and nowhere else.
    """
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            said.append(kept.read().decode(errors="replace"))
            raise
        else:
            kept.seek(0)
            os.write(before, kept.read())
        finally:
            os.dup2(before, 2)
            os.close(before)


def _check_answers(address: str) -> None:
    """Ray tries for minutes to reach a cluster that is not there."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():  # such as auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or error) from error


def _unreachable(address: str, reason: object) -> UserError:
    return UserError(
        f"no Ray cluster answers at {address} ({reason}). "
        "Correct --address or RAY_ADDRESS, or leave both out for a local one."
    )


def check_cluster(config: SweepConfig, *, experts_only: bool = False) -> Autoscaler | None:
    """The cluster's autoscaler, if it has one.

    Raises UserError when no node, of those that stand and those that it may start, can run a
    worker, or when local places are not shared. With ``experts_only`` trials and the sweep's folder
    do not matter.
    """
    nodes = standing_nodes()
    autoscaler = find_autoscaler()
    for need in needs(config, experts_only=experts_only):
        _check_held(need, [n["Resources"] for n in nodes], autoscaler)
    if len(nodes) > 1:
        places = {"store.uri": config.store.uri}
        if not experts_only:
            places["output.dir"] = config.output_dir
        _check_shared(places, nodes)
    return autoscaler


def _check_held(need: Need, nodes: list[dict[str, float]], autoscaler: Autoscaler | None) -> None:
    """Some node must hold a worker, now or later on."""
    later = [] if autoscaler is None else autoscaler.kinds()
    if later is None:
        return
    kinds = [*nodes, *later]
    if not all(need.lacking(resources) for resources in kinds):
        return
    of_each = {what: [k.get(what, 0.0) for k in kinds] for what in ("CPU", "GPU", "memory")}
    largest = need.lacking({what: max(amounts) for what, amounts in of_each.items()})
    if autoscaler is not None:
        where = f"any node that stands or that the cluster's autoscaler may start ({autoscaler})"
        remedy = "add such a type of node to the cluster's file"
    elif in_all := need.lacking({what: sum(amounts) for what, amounts in of_each.items()}):
        raise UserError(f"{in_all[0]} in the cluster. Lower resources.*, or add such nodes.")
    else:
        where, remedy = "any one node", "add larger nodes"
    reason = f"{largest[0]} on {where}" if largest else f"{need} has no room on {where}"
    raise UserError(f"{reason}. Lower resources.*, or {remedy}.")


def _check_shared(places: dict[str, str], nodes: list[dict[str, Any]]) -> None:
    """Local places must be the same place on every node: a probe file tells."""
    for key, uri in places.items():
        if not is_local(uri):
            continue
        name = f".probe-{os.getpid()}-{time.time_ns()}"
        write_bytes(join(uri, name), b"")
        try:
            sees = ray.remote(os.path.exists)
            for node in nodes:
                strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                place = {"num_cpus": 0, "scheduling_strategy": strategy}
                try:
                    there = ray.get(sees.options(**place).remote(join(uri, name)))
                except RayError:  # it has just left
                    continue
                if not there:
                    raise UserError(
                        f"{key}={uri} is not the same folder on node "
                        f"{node['NodeManagerAddress']}. Give a place that all nodes share, "
                        "such as s3://."
                    )
        finally:
            os.unlink(join(uri, name))
