"""clusters/slurm.sh as Slurm runs it: Ray and the sweep are real, Slurm's own commands stand-ins.

The one for srun runs its command here, so a job's two nodes are two raylets of one machine.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray_helpers import write_sweep

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "clusters" / "slurm.sh"

STAND_INS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n',
    "scontrol": """case $1 in
    show) printf '%s\\n' node1 node2 ;;
    *) echo "$*" >> "$CALLS" ;;
esac
""",
    "squeue": 'echo "${STATE:-RUNNING}"\n',
}


def directives() -> dict[str, str]:
    """What the script asks Slurm for."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", SCRIPT.read_text(), re.M)
    return dict(found)


def test_slurm_warns_the_script_in_time_and_may_put_the_job_back() -> None:
    asked = directives()
    assert asked["signal"] == "B:TERM@300"  # the script itself, five minutes before
    assert "requeue" in asked
    assert asked["ntasks-per-node"] == "1"


def test_what_is_cached_lies_on_a_disk_of_the_node() -> None:
    text = SCRIPT.read_text()
    assert 'export FTD_CACHE="$scratch/' in text
    assert 'shared/store"' in text and "shared/runs/" in text


def test_its_ray_asks_for_a_token_that_only_this_job_has() -> None:
    text = SCRIPT.read_text()
    assert "export RAY_AUTH_MODE=token" in text
    assert re.search(r"RAY_AUTH_TOKEN=\$\(od .*/dev/urandom", text)


def test_bash_understands_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@dataclass
class Job:
    """One submission after the other of a sweep; the folder that its nodes share."""

    folder: Path
    sweep: Path

    def environment(self, number: int, state: str) -> dict[str, str]:
        stand_ins = self.folder / "bin"
        stand_ins.mkdir(exist_ok=True)
        for name, body in STAND_INS.items():
            (stand_ins / name).write_text(f"#!/bin/bash\n{body}")
            (stand_ins / name).chmod(0o755)
        project = self.folder / "project" / ".venv"
        project.parent.mkdir(exist_ok=True)
        if not project.exists():
            project.symlink_to(sys.prefix)
        return os.environ | {
            "PATH": f"{stand_ins}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CALLS": str(self.folder / "calls"),
            "STATE": state,
            "USER": "somebody",
            "SLURM_SUBMIT_DIR": str(project.parent),
            "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_MEM_PER_NODE": "2048",
            "FTD_SCRATCH": os.environ.get("RAY_TMPDIR", "/tmp"),
        }

    def submit(self, number: int, *overrides: str, state: str = "RUNNING") -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SCRIPT), str(self.sweep), *overrides],
            env=self.environment(number, state),
            stdout=(self.folder / f"log-{number}").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def log(self, number: int) -> str:
        return (self.folder / f"log-{number}").read_text()

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


def wait_for_line(job: Job, number: int, pattern: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not re.search(pattern, job.log(number), re.M):
        assert process.poll() is None, job.log(number)
        assert time.monotonic() < deadline, job.log(number)
        time.sleep(0.5)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, write_sweep(tmp_path))


@pytest.mark.heavy
def test_a_sweep_goes_through_a_time_limit_and_the_queue_to_its_end(job: Job) -> None:
    one = os.getpid() % 9000 + 500  # names the port
    long = ("search.trials=2", "distill.iterations=4000", "evaluate.every=50")
    first = job.submit(one, *long)
    try:
        wait_for_line(job, one, r"^trial +0 .*validation", first)
        first.send_signal(signal.SIGTERM)  # as --signal=B:TERM@300 does: the script alone
        assert first.wait(180) == 143, job.log(one)
    finally:
        end(first)
    assert job.calls() == [f"requeue {one}"]
    assert "the job goes back into the queue" in job.log(one)
    second = job.submit(one + 1, *long)
    try:
        assert second.wait(600) == 0, job.log(one + 1)
    finally:
        end(second)
    summary = json.loads(
        (job.folder / "project" / "shared" / "runs" / "sweep" / "summary.json").read_text()
    )
    assert summary["state"] == "done"
    assert sum(summary["trials"].values()) == 2 and summary["trials"]["failed"] == 0
    assert job.calls() == [f"requeue {one}"]  # an end is none of Slurm's business


@pytest.mark.heavy
def test_a_cancelled_job_is_not_put_back(job: Job) -> None:
    number = os.getpid() % 9000 + 502
    process = job.submit(number, state="COMPLETING")
    try:
        wait_for_line(job, number, "Ray runtime started", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 143, job.log(number)
    finally:
        end(process)
    assert job.calls() == []


def end(process: subprocess.Popen[str]) -> None:
    """Whatever is left of a job, raylets too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(20)
