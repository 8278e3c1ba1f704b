"""The lab: a room of one head and two workers, S3 at its desk, and Ray by clusters/on-prem.yaml.

The file is used as it stands, by ``ray up`` from the desk, but for two things: its EDIT lines are
edited, and nothing is installed, as there is no way out; every host sees a Python of this machine.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from lab import DESK, HOME, Host, Room
from ray_helpers import REPOSITORY, wait_until
from s3_helpers import s3_environment

CLUSTER_FILE = REPOSITORY / "clusters" / "on-prem.yaml"
CHECKOUT = HOME / "ftd-ray"
"""Where the file puts the project on every host, and where it lies on the desk."""

VENV = HOME / "ftd-venv"
"""Where the file looks for Python."""

PYTHON = Path(sys.prefix) / "lab"
"""What is there: this environment's packages, and what `ray job submit` takes beside them, which
would slow every other cluster of the tests down (Makefile)."""

SWEEP = "sweeps/digits.yaml"
RAY_PORT, CLIENT_PORT = 6379, 10001

S3 = f"http://{DESK}:9000"
BUCKET = "lab"
TRACKING = "http://127.0.0.1:5000"
DASHBOARD = "http://127.0.0.1:8265"
"""Both listen on the head alone, where the sweep's driver runs."""

LEFT_OUT = (".venv", ".git", "runs", "store", "data", "mlflow.db*", "mlartifacts", ".*_cache")
"""What lies at the top of a checkout and is not the project."""

SECONDS = 600
"""After which a cluster or a sweep is taken for hung."""

JOIN_SECONDS = 90
"""In which workers that are called join a cluster, on a machine that has other things to do."""

ATTEMPTS = 3

REQUEST = re.compile(r'^(\S+) - - \[[^]]*\] "(\S+) ([^\s?]+)\S* \S+" (\d+)', re.M)
"""A line of S3's log, but for the query of its address."""


@dataclass(frozen=True)
class Request:
    """A request that S3 has answered; ``host`` is the address that it came from."""

    host: str
    method: str
    path: str
    status: int


def environment(cpus: int) -> dict[str, str]:
    """What ~/.bashrc of a host says: where S3 is, and what makes Ray small and quick to notice."""
    return s3_environment(S3) | {
        "PYTHONPATH": str(CHECKOUT),  # as `pip install -e .` would do
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": cpus}),
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "200000000",
        "RAY_health_check_initial_delay_ms": "2000",
        "RAY_health_check_period_ms": "2000",
        "RAY_health_check_timeout_ms": "4000",
        "RAY_health_check_failure_threshold": "5",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "20",  # then a worker without a head ends
        "PATIENCE": "40",  # of MLflow, when Ray has ended
        "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "15",
        "GIT_PYTHON_REFRESH": "quiet",
    }


def edited(head: Host, workers: Sequence[Host]) -> dict[str, Any]:
    """The cluster file with its EDIT lines edited for these hosts."""
    text = CLUSTER_FILE.read_text()
    shared = "/mnt/shared/ftd"
    assert shared in text
    file = yaml.safe_load(text.replace(shared, f"s3://{BUCKET}"))
    file["provider"] |= {"head_ip": head.address, "worker_ips": [w.address for w in workers]}
    file["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    setup = [c for c in file["setup_commands"] if "pip install" not in c]
    assert len(setup) == len(file["setup_commands"]) - 1
    return file | {"setup_commands": setup}


def left_out(folder: str, names: list[str]) -> set[str]:
    """Of a checkout's files, those that the desk does without."""
    patterns = LEFT_OUT if Path(folder) == REPOSITORY else ("__pycache__",)
    return shutil.ignore_patterns(*patterns)(folder, names)


class Lab:
    """Three hosts with room for one worker of a sweep each, and a desk; ends with its block.

    Beside them stands a host that has nothing to do with them.
    """

    def __init__(self, folder: Path):
        head, worker = environment(cpus=2), environment(cpus=1)  # its other one: trials' tokens
        names = {"head": head, "worker-1": worker, "worker-2": worker, "stranger": {}}
        self._log = folder / "s3.txt"
        self.room = Room(folder, names, desk=environment(cpus=0), programs=PYTHON / "bin")
        self.desk = self.room.desk
        *self.hosts, self.stranger = self.room.hosts
        self.head, *self.workers = self.hosts

    def __enter__(self) -> Self:
        for host in self.hosts:
            host.home.mkdir(parents=True)
            (host.home / VENV.name).symlink_to(PYTHON)
        checkout = self.desk.home / CHECKOUT.name
        shutil.copytree(REPOSITORY, checkout, ignore=left_out)
        file = edited(self.head, self.workers)
        (checkout / "lab.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
        self.room.__enter__()
        try:
            self._serve_s3()
            self.desk.check("ray", "get-auth-token", "--generate")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every host, whatever runs there."""
        self.room.__exit__()

    def _serve_s3(self) -> None:
        at = urllib.parse.urlsplit(S3)
        serve = f"from moto.server import main; main(['-H', '{at.hostname}', '-p', '{at.port}'])"
        self.desk.spawn("python", "-c", serve, log=self._log)
        put = (
            "import urllib.request as r; "
            f"r.urlopen(r.Request('{S3}/{BUCKET}', method='PUT'), timeout=20)"
        )
        wait_until(
            "a bucket",
            lambda: self.desk.run("python", "-c", put).returncode == 0,
            seconds=SECONDS,
            every=1,
        )

    def at_desk(self, command: str) -> subprocess.CompletedProcess[str]:
        """Does what somebody types in the project's folder."""
        return self.desk.run("bash", "-c", f"cd {CHECKOUT} && {command}", timeout=SECONDS)

    # --- the cluster ------------------------------------------------------------------------

    def assemble(self) -> None:
        """Power on every host, and every host in the cluster.

        Ray gives a host that starts one try of some seconds, which a busy machine can miss; then
        it takes another ``ray up``.
        """
        for host in self.hosts:
            if not host.is_on:
                self.room.power_on(host)
        ups: list[str] = []
        while not self._joined():
            assert len(ups) < ATTEMPTS, ups
            ran = self.at_desk("RAY_UP_enable_autoscaler_v2=0 ray up --yes lab.yaml")
            ups.append(ran.stdout + ran.stderr)

    def _joined(self) -> bool:
        """Whether all hosts are in the cluster, now or soon; False at once without a cluster."""
        everyone = sorted(h.address for h in self.hosts)
        end = time.monotonic() + JOIN_SECONDS
        while (nodes := self._alive()) and time.monotonic() < end:
            if sorted(nodes.values()) == everyone:
                return True
            time.sleep(3)
        return False

    def down(self) -> None:
        """``ray down``, which ends the head; workers end when they miss it."""
        ran = self.at_desk("ray down --yes lab.yaml")
        assert ran.returncode == 0, ran.stdout + ran.stderr

    def ray(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """``ray`` on the head, with the cluster's token."""
        return self.head.run("env", "RAY_AUTH_MODE=token", "ray", *words, timeout=timeout)

    def _listed(self, what: str) -> list[dict[str, Any]]:
        ran = self.ray("list", what, "--format=json", "--limit=10000")
        return json.loads(ran.stdout) if ran.returncode == 0 else []

    def _alive(self) -> dict[str, str]:
        """The address of every node that Ray takes for alive, by its id."""
        nodes = self._listed("nodes")
        return {n["node_id"]: n["node_ip"] for n in nodes if n["state"] == "ALIVE"}

    def places(self, actor: str) -> set[str]:
        """The addresses of hosts that have had an actor of that class."""
        nodes = self._alive()
        actors = self._listed("actors")
        return {nodes[a["node_id"]] for a in actors if a["class_name"] == actor}

    # --- sweeps -----------------------------------------------------------------------------

    def submit(self, job: str, sweep: str, *overrides: str, wait: bool = True) -> str:
        """``ray job submit`` of the digits' sweep into the folder ``sweep`` of the bucket."""
        places = {
            "output.dir": f"s3://{BUCKET}/{sweep}/run",
            "store.uri": f"s3://{BUCKET}/{sweep}/store",
            "tracking.uri": TRACKING,
            "name": sweep,
        }
        words = [SWEEP, *(f"{k}={v}" for k, v in places.items()), *overrides]
        run = f"cd {CHECKOUT} && exec python -m ftd_ray.sweep {shlex.join(words)}"
        options = [f"--address={DASHBOARD}", f"--submission-id={job}"]
        options += [] if wait else ["--no-wait"]
        ran = self.ray("job", "submit", *options, "--", "bash", "-c", run, timeout=SECONDS)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def log(self, job: str) -> str:
        """What a job has said so far."""
        return self.head.check("cat", f"/tmp/ray/session_latest/logs/job-driver-{job}.log")

    def wait_for(self, job: str) -> None:
        """Until a job has succeeded."""
        address = f"--address={DASHBOARD}"
        self.ray("job", "logs", address, "--follow", job, timeout=SECONDS)
        status = self.ray("job", "status", address, job).stdout
        assert "succeeded" in status, status + self.log(job)

    def results(self, sweep: str) -> dict[str, Any]:
        """What ``lab_results.py`` says of a sweep."""
        places = (f"s3://{BUCKET}/{sweep}/run", f"s3://{BUCKET}/{sweep}/store", TRACKING)
        return json.loads(self.head.check("python", f"{CHECKOUT}/tests/lab_results.py", *places))

    def published(self, sweep: str) -> list[Request]:
        """Every publication of a state of an expert, in the order in which S3 took them."""
        found = (Request(h, m, p, int(s)) for h, m, p, s in REQUEST.findall(self._log.read_text()))
        folder = f"/{BUCKET}/{sweep}/store/"
        return [
            r for r in found
            if r.method == "PUT" and r.path.startswith(folder) and "/manifest-" in r.path
        ]  # fmt: skip
