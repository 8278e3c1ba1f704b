"""A sweep that is stopped as `ray job stop` does it: SIGTERM, and SIGKILL three seconds later.

Its folder is on S3 and its runs behind HTTP, as on a cluster; either may not answer just then.
"""

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray_helpers import (
    environment,
    run_sweep,
    running_sweep,
    tiny,
    wait_until,
    write_sweep,
)
from s3_helpers import FaultProxy, S3Server, free_port, s3_environment

from ftd_ray.journal import read_journal
from ftd_ray.search import read_study
from ftd_ray.storage import read_bytes
from ftd_ray.ui import serving

STOP_SECONDS = 3
TRIALS = 4


@dataclass
class Lab:
    """A sweep's folder, its places, and proxies before them that can be made to hang."""

    folder: Path
    runs: str
    s3: FaultProxy
    mlflow: FaultProxy
    environment: dict[str, str]

    def write(self, **changes: Any) -> None:
        places = {
            "output": {"dir": self.runs},
            "tracking": {"uri": self.mlflow.address, "experiment": self.folder.name},
        }
        write_sweep(self.folder, tiny(**changes) | places)

    def reports_told(self) -> int:
        return (self.folder / "stdout.txt").read_text().count("  step  ")

    def reports_kept(self) -> int:
        """In the study, as S3 has it now."""
        kept = read_journal(self.runs) or b""
        return kept.count(b'"intermediate_value"')

    def statuses(self) -> list[tuple[str, str]]:
        """(kind, status) of all runs, as MLflow has them now."""
        client = MlflowClient(f"http://{self.mlflow.upstream}")
        found = client.get_experiment_by_name(self.folder.name)
        runs = client.search_runs([found.experiment_id]) if found else []
        return sorted((r.data.tags["ftd.kind"], r.info.status) for r in runs)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(scope="module")
def tracking(tmp_path_factory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with serving(f"sqlite:///{path}", free_port()) as mlflow:
        wait_until("MLflow's server", mlflow.answers, seconds=180, every=0.2)
        yield mlflow.url


@pytest.fixture
def lab(tmp_path, server, tracking, monkeypatch, request) -> Iterator[Lab]:
    for key, value in s3_environment(server.address).items():
        monkeypatch.setenv(key, value)
    with FaultProxy(server.address) as s3, FaultProxy(tracking) as mlflow:
        env = environment(**s3_environment(s3.address))
        yield Lab(tmp_path, f"s3://buffers/{tmp_path.name}", s3, mlflow, env)


ENDLESS = {"distill__iterations": 100_000, "search__trials": 2, "search__concurrency": 2}


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_study_is_saved_while_mlflow_does_not_answer(lab):
    lab.write(experts__rho=0.01, **ENDLESS)
    with running_sweep(lab.folder, "sweep.yaml", env=lab.environment) as process:
        wait_until("reports", lambda: lab.reports_told() > 5, seconds=300)
        lab.mlflow.inject("hang")
        told = wait_until("more", lambda: n if (n := lab.reports_told()) > 10 else 0, seconds=120)
        process.send_signal(signal.SIGTERM)
        wait_until("the study", lambda: lab.reports_kept() >= told, seconds=60)
        assert process.poll() is None  # MLflow is waited for, after that
        process.kill()


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_runs_are_closed_while_s3_does_not_answer(lab):
    lab.write(experts__rho=0.01, **ENDLESS)
    with running_sweep(lab.folder, "sweep.yaml", env=lab.environment) as process:
        wait_until("reports", lambda: lab.reports_told() > 5, seconds=300)
        running = [("experts", "FINISHED"), *[(k, "RUNNING") for k in ("sweep", "trial", "trial")]]
        wait_until("the runs", lambda: lab.statuses() == running, seconds=60)
        hangs = lab.s3.inject("hang")
        wait_until("a request that hangs", lambda: hangs.hits, seconds=120)
        process.send_signal(signal.SIGTERM)
        killed = [(kind, status.replace("RUNNING", "KILLED")) for kind, status in running]
        wait_until("the end of the runs", lambda: lab.statuses() == killed, seconds=60)
        assert process.poll() is None  # the study is still to be saved
        process.kill()


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_sweep_stopped_as_a_job_goes_on_to_exact_counts(lab):
    lab.write(
        experts__lr=0.1,
        distill__iterations=40,
        distill__syn_steps={"choice": [2, 3]},
        evaluate={
            "every": 10, "search_networks": 1, "search_epochs": 40, "networks": 2, "epochs": 40,
        },
        search={"trials": TRIALS, "concurrency": 2, "sampler": "random", "pruner": "none"},
    )  # fmt: skip
    with running_sweep(lab.folder, "sweep.yaml", env=lab.environment) as process:
        wait_until("a report", lab.reports_told, seconds=300)
        process.send_signal(signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
    resumed = run_sweep(lab.folder, "sweep.yaml", "--resume", env=lab.environment, timeout=600)
    assert resumed.code == 0, resumed.out + resumed.err
    trials, _ = read_study(lab.runs) or ([], None)
    assert [(t.number, t.state) for t in trials] == [(n, "complete") for n in range(TRIALS)]
    summary = json.loads(read_bytes(f"{lab.runs}/summary.json") or b"{}")
    assert summary["trials"] == {"complete": TRIALS, "pruned": 0, "failed": 0}
    kinds = (
        [("experts", "FINISHED")] * 2 + [("sweep", "FINISHED")] + [("trial", "FINISHED")] * TRIALS
    )
    assert lab.statuses() == kinds
