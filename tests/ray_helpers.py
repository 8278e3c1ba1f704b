"""What the tests of ``ftd_ray`` share: a tiny sweep, real processes of it, and bounded waits."""

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]

SWEEP_TIMEOUT = 240
"""Seconds after which a tiny sweep is taken for hung."""

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 0,
    "dataset": {"name": "digits", "val_fraction": 0.15},
    "experts": {
        "network": "ConvNetD1W8",
        "count": 2,
        "epochs": 3,
        "batch_size": 256,
        "lr": 0.05,
        "sharpness": "sam",
        "rho": {"choice": [0.0, 0.01]},
    },
    "distill": {
        "ipc": 1,
        "syn_steps": 2,
        "expert_epochs": 1,
        "max_start_epoch": 3,
        "iterations": 4,
        "lr_img": {"choice": [10, 100]},
        "lr_lr": 1e-5,
        "lr_init": 0.02,
        "ema_decay": 0.5,
    },
    "evaluate": {
        "every": 2,
        "search_networks": 1,
        "search_epochs": 3,
        "networks": 2,
        "epochs": 5,
    },
    "search": {"trials": 3, "concurrency": 1, "sampler": "random", "pruner": "none"},
}


def tiny(**changes: Any) -> dict[str, Any]:
    """The tiny sweep with values in the place of others: ``tiny(search__trials=4)``."""
    tree = copy.deepcopy(TINY)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""Of Ray: a node that is gone is taken for dead after a few seconds."""

# Trials of three kinds: eta = 1e-9 trains nothing and is pruned against a good one, and a
# learning rate of eta of 1e30 leaves the numbers. The grid's order by this seed is: complete,
# failed, failed, complete, pruned.
MIXED = tiny(
    seed=17,
    experts__lr=0.1,
    distill__lr_img=10,
    distill__lr_lr={"choice": [0.0, 1e30]},
    distill__lr_init={"choice": [1e-9, 0.05]},
    evaluate={"every": 2, "search_networks": 2, "search_epochs": 60, "networks": 2, "epochs": 60},
    search={
        "trials": 5,
        "concurrency": 1,
        "sampler": "grid",
        "pruner": "asha",
        "reduction_factor": 2,
    },
)


def write_sweep(folder: Path, tree: dict[str, Any] | None = None) -> Path:
    """A sweep file in ``folder``, whose store, tracking and output will lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(TINY if tree is None else tree, sort_keys=False))
    return path


def environment(**changes: str | None) -> dict[str, str]:
    """The environment of a sweep's process; None removes a variable."""
    env = dict(os.environ)
    env.pop("RAY_ADDRESS", None)
    for key, value in changes.items():
        env.pop(key, None)
        if value is not None:
            env[key] = value
    return env


@contextlib.contextmanager
def running_sweep(
    folder: Path,
    *args: str,
    env: dict[str, str] | None = None,
    module: str = "ftd_ray.sweep",
) -> Iterator[subprocess.Popen[str]]:
    """``python -m ftd_ray.sweep`` in ``folder``, with output to files; killed at the end."""
    with open(folder / "stdout.txt", "w") as out, open(folder / "stderr.txt", "w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *args],
            cwd=folder,
            env=env or environment(),
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


@dataclass(frozen=True)
class Ran:
    """A sweep's process that is over."""

    code: int
    out: str
    err: str


def run_sweep(
    folder: Path,
    *args: str,
    env: dict[str, str] | None = None,
    timeout: float = SWEEP_TIMEOUT,
    module: str = "ftd_ray.sweep",
) -> Ran:
    """Runs the sweep command to its end."""
    with running_sweep(folder, *args, env=env, module=module) as process:
        code = process.wait(timeout=timeout)
    return finished(folder, code)


def finished(folder: Path, code: int) -> Ran:
    """What a process of ``running_sweep`` left."""
    return Ran(code, (folder / "stdout.txt").read_text(), (folder / "stderr.txt").read_text())


def wait_until(
    what: str, look: Callable[[], Any], *, seconds: float = 120, every: float = 0.05
) -> Any:
    """The first true value of ``look``; fails with ``what`` when it does not come."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := look():
            return value
        time.sleep(every)
    raise AssertionError(f"{what} did not come within {seconds:.0f} s")


def summary_of(folder: Path, name: str = "tiny") -> dict[str, Any]:
    """The sweep's summary.json."""
    return json.loads((folder / "runs" / name / "summary.json").read_text())


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def mlflow_runs(folder: Path, experiment: str = "tiny") -> Sequence[Any]:
    """All runs of a sweep in ``folder``."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else client.search_runs([found.experiment_id], max_results=1000)


def parse_tiny(**changes: Any) -> Any:
    """``tiny`` as a checked configuration."""
    from ftd_ray.config import parse_config

    return parse_config(tiny(**changes))
