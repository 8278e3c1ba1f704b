"""What MLflow holds of a sweep, whatever became of its server and of the driver meanwhile."""

import contextlib
import gc
import io
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image
from ray_helpers import (
    SWEEP_TIMEOUT,
    run_sweep,
    running_sweep,
    summary_of,
    tiny,
    wait_until,
    write_sweep,
)

from ftd.distill import StepRecord
from ftd.errors import UserError
from ftd_ray import ui
from ftd_ray.search import Ended, Suggestion
from ftd_ray.tracking import database, outbox, runs
from ftd_ray.tracking import tracker as tracking
from ftd_ray.tracking.database import create_database
from ftd_ray.tracking.pages import newest_sweeps
from ftd_ray.tracking.tracker import Tracker
from ftd_ray.trial import Report

NAMES = {"distill.lr_lr": "lr_lr", "experts.rho": "rho"}
SETS = "0123456789abcdef", "/store/0123456789abcdef"


def picture(width: int = 40, height: int = 10) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def suggestion(number: int, **given: Any) -> Suggestion:
    return Suggestion(number, {"distill.lr_lr": 0.1 * number, "experts.rho": 0.01} | given, 0)


def report(step: int, png: bytes | None = None) -> Report:
    curve = [
        StepRecord(
            step=s,
            expert=0,
            start_epoch=0,
            loss=1 / s,
            syn_lr=0.02,
            grad_norm=1.0,
            waited=0.0,
        )
        for s in range(step - 4, step + 1)
    ]
    return Report(
        networks={},
        step=step,
        val_accuracy=step / 100,
        val_std=0.01,
        curve=tuple(curve),
        seconds=1.0,
        picture=picture() if png is None else png,
        done=False,
    )


def ended(number: int, *steps: int, state: str = "complete", **given: Any) -> Ended:
    reports = {s: s / 100 for s in steps}
    return Ended(
        number,
        state,
        suggestion(number).params,
        reports[max(steps)] if steps else None,
        "it diverged" if state == "failed" else None,
        reports,
        **given,
    )


def whole_trial(tracker: Tracker, number: int, *steps: int, state: str = "complete") -> Ended:
    """A trial from its start to its end."""
    tracker.trial_started(suggestion(number), *SETS)
    for step in steps:
        tracker.trial_reported(number, report(step))
    over = ended(number, *steps, state=state)
    tracker.trial_ended(over)
    return over


class Look:
    """What MLflow holds, seen by another client."""

    def __init__(self, uri: str, tracker: Tracker) -> None:
        self.client = MlflowClient(tracking_uri=uri)
        self._parent, self._experiment = tracker.parent_id, tracker.experiment_id

    def runs(self, kind: str = "trial") -> list[Any]:
        """Children, by number."""
        found = self.client.search_runs(
            [self._experiment],
            f"tags.`ftd.kind` = '{kind}' and tags.mlflow.parentRunId = '{self._parent}'",
            max_results=5000,
        )
        return sorted(found, key=lambda r: int(r.data.tags.get("ftd.trial", 0)))

    def trial(self, number: int) -> Any:
        (run,) = (r for r in self.runs() if r.data.tags["ftd.trial"] == str(number))
        return run

    def parent(self) -> Any:
        return self.client.get_run(self._parent)

    def history(self, run: Any, metric: str = "val_accuracy") -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, metric)]

    def pictures(self, run: Any) -> list[str]:
        found = self.client.list_artifacts(run.info.run_id, "images")
        return sorted(Path(f.path).name for f in found)

    def agrees_with(self, study: Sequence[Ended]) -> None:
        """Every trial is one run, which says what the study says."""
        runs = self.runs()
        assert [int(r.data.tags["ftd.trial"]) for r in runs] == [e.number for e in study]
        for run, e in zip(runs, study, strict=True):
            assert run.info.status == ("FAILED" if e.state == "failed" else "FINISHED")
            assert run.data.tags["ftd.state"] == e.state
            assert run.data.tags.get("ftd.reason") == e.reason
            assert self.history(run) == sorted(e.reports.items())
            assert run.data.params == {"lr_lr": str(0.1 * e.number), "rho": "0.01"}
            assert [i.dataset.digest for i in run.inputs.dataset_inputs] == [SETS[0]]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, which take a while to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(tables: Path, tmp_path: Path) -> str:
    shutil.copy(tables, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(outbox, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(outbox, "LONGEST_WAIT", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


@pytest.fixture
def opened(tmp_path) -> Iterator[Callable[..., Tracker]]:
    """Trackers of a sweep; each is a session of its own."""
    made: list[Tracker] = []

    def opened(uri: str, parent: str | None = None, mark: str = "") -> Tracker:
        tracker = Tracker(uri, "tiny", str(tmp_path / "art") if uri.startswith("sqlite") else None)
        tracker.start("tiny", {"experts": {"network": "ConvNetD1W8"}}, NAMES, parent, mark=mark)
        made.append(tracker)
        return tracker

    yield opened
    for tracker in made:
        end(tracker)


def end(tracker: Tracker) -> None:
    """Ends a session as a killed driver does: what was not sent is lost."""
    tracker._outbox.close()
    if tracker._monitor is not None:
        tracker._monitor.finish()


class Faulty:
    """A client whose methods fail on demand, before or after what they do."""

    def __init__(self, tracker: Tracker) -> None:
        self._client = tracker._runs._client
        tracker._runs._client = self
        self.error: Exception | None = None
        self.after: set[str] = set()
        """Methods of which the answer is lost once."""
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **given: Any) -> Any:
            self.calls.append(name)
            if self.error is not None:
                raise self.error
            result = getattr(self._client, name)(*args, **given)
            if name in self.after:
                self.after.discard(name)
                raise MlflowException("timed out", error_code=tracking_code("INTERNAL_ERROR"))
            return result

        return call


def tracking_code(name: str) -> int:
    from mlflow.protos.databricks_pb2 import ErrorCode

    return ErrorCode.Value(name)


LOCKED = MlflowException("database is locked", error_code=tracking_code("TEMPORARILY_UNAVAILABLE"))


# --- the parent -----------------------------------------------------------------------------


def test_driver_killed_before_it_could_note_its_run_finds_it_by_its_mark(uri, opened):
    killed, other = opened(uri, mark="ours"), opened(uri, mark="theirs")
    end(killed)
    resumed = opened(uri, mark="ours")
    assert resumed.parent_id == killed.parent_id != other.parent_id
    assert opened(uri).parent_id not in (killed.parent_id, other.parent_id)


def test_parent_that_was_made_and_no_more_gets_what_it_lacks(uri, opened):
    known = opened(uri)
    client = MlflowClient(tracking_uri=uri)
    bare = client.create_run(known.experiment_id, tags={"ftd.sweep": "ours"}).info.run_id
    resumed = opened(uri, mark="ours")
    assert resumed.parent_id == bare
    assert client.get_run(bare).data.params == client.get_run(known.parent_id).data.params != {}
    gone = opened(uri, "0" * 32, mark="ours")  # what was noted is of another server
    assert gone.parent_id == bare


def test_parent_of_which_only_the_making_was_heard_is_closed(uri, opened, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise LOCKED

    tracker = Tracker(uri, "tiny")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", refuse)
        with pytest.raises(UserError, match="does not answer"):
            tracker.start("tiny", {"experts": {"network": "ConvNetD1W8"}}, NAMES, None)
    tracker.finish("FAILED")
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(tracker.parent_id).info.status == "FAILED"


# --- an outage ------------------------------------------------------------------------------


def test_trials_that_began_and_ended_in_an_outage_come_out_whole_with_their_own_times(uri, opened):
    tracker = opened(uri)
    server = Faulty(tracker)
    server.error = LOCKED
    before = int(time.time() * 1000)
    study = [
        whole_trial(tracker, 0, 5, 10),
        whole_trial(tracker, 1, 5, state="pruned"),
        whole_trial(tracker, 2, state="failed"),
    ]
    after = int(time.time() * 1000)
    wait_until("a try", lambda: server.calls)
    wait_until("a later time", lambda: time.time() * 1000 > after + 50)
    (said,) = wait_until("a note", tracker.new_notes)
    assert "MLflow does not answer (database is locked)" in said
    server.error = None
    assert tracker.drain(60) == 0
    look = Look(uri, tracker)
    look.agrees_with(study)
    for run in look.runs():
        assert before <= run.info.start_time <= run.info.end_time <= after
        times = [m.timestamp for m in look.client.get_metric_history(run.info.run_id, "syn_lr")]
        assert all(before <= t <= after for t in times)
    assert look.trial(1).data.tags["pruned"] == "true"
    assert len(look.pictures(look.trial(0))) == 4
    (said,) = tracker.new_notes()
    assert "MLflow answers again" in said
    tracker.finish("FINISHED")
    assert tracker.unsent == 0
    assert look.parent().info.status == "FINISHED"


def test_trial_does_not_wait_for_a_server_that_hangs(uri, opened):
    tracker = opened(uri)
    free = threading.Event()
    tracker._outbox.put(lambda: bool(free.wait(60)))
    study = [whole_trial(tracker, n, 5) for n in range(20)]
    assert Look(uri, tracker).runs() == []
    free.set()
    assert tracker.drain(60) == 0
    Look(uri, tracker).agrees_with(study)


def test_requests_that_arrived_although_their_answers_were_lost_leave_no_second_run(uri, opened):
    tracker = opened(uri)
    server = Faulty(tracker)
    server.after = {"create_run", "log_batch", "log_inputs", "log_artifact", "set_terminated"}
    study = [whole_trial(tracker, 0, 5, 10), whole_trial(tracker, 1, 5)]
    tracker.expert_set("aaaa", {"experts": 1}, "/store/aaaa", {"experts.rho": 0.01})
    assert tracker.drain(60) == 0
    assert server.after == set()
    look = Look(uri, tracker)
    look.agrees_with(study)
    assert len(look.pictures(look.trial(0))) == 4
    assert len(look.history(look.trial(0), "matching_loss")) == 10
    assert len(look.runs("experts")) == 1


def test_pictures_that_wait_take_no_memory(uri, opened):
    tracker = opened(uri)
    Faulty(tracker).error = LOCKED
    png = picture(400, 100)
    references = sys.getrefcount(png)
    tracker.trial_started(suggestion(0), *SETS)
    for step in range(5, 105, 5):
        tracker.trial_reported(0, report(step, png))
    gc.collect()
    assert sys.getrefcount(png) == references
    spool = Path(tracker._outbox._folder.name)
    assert [p.read_bytes() for p in spool.rglob("*.png")] == [png] * 20
    end(tracker)
    assert not spool.exists()


def test_what_mlflow_refuses_is_left_out_alone(uri, opened):
    tracker = opened(uri)
    tracker.trial_started(suggestion(0), *SETS)
    assert tracker.drain(60) == 0
    free = threading.Event()
    tracker._outbox.put(lambda: bool(free.wait(60)))
    tracker.trial_started(suggestion(0, **{"distill.lr_lr": "another"}), *SETS)
    tracker.trial_reported(0, report(5))
    tracker.trial_ended(ended(0, 5))
    good = whole_trial(tracker, 1, 5)
    free.set()
    assert tracker.drain(60) == 0
    (said,) = tracker.new_notes()
    assert said.startswith("MLflow refuses an entry") and "INVALID_PARAMETER_VALUE" in said
    look = Look(uri, tracker)
    bad = look.trial(0)
    assert (bad.info.status, bad.data.tags["ftd.state"]) == ("FINISHED", "complete")
    assert look.history(bad) == [(5, 0.05)] and bad.data.params["lr_lr"] == "0.0"
    assert look.history(look.trial(1)) == sorted(good.reports.items())
    assert look.trial(1).data.params["rho"] == "0.01"
    tracker.finish("FINISHED")
    assert tracker.unsent == 1


def test_end_of_a_sweep_does_not_wait_for_a_server_that_is_gone(uri, opened, monkeypatch):
    monkeypatch.setattr(tracking, "OUTAGE_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 1000)
    tracker = opened(uri)
    tracker.trial_started(suggestion(0), *SETS)
    assert tracker.drain(60) == 0
    Faulty(tracker).error = LOCKED
    tracker.trial_reported(0, report(5))
    tracker.trial_ended(ended(0, 5))
    tracker.finish("FINISHED")
    assert tracker.unsent == 4  # the report, the end, what else runs, and the parent's end
    assert "4 entries were not sent" in tracker.new_notes()[-1]


@pytest.mark.parametrize(
    ("error", "later"),
    [
        (LOCKED, True),
        (MlflowException("API request failed with exception"), True),
        (MlflowException("no", error_code=tracking_code("INVALID_PARAMETER_VALUE")), False),
        (MlflowException("no", error_code=tracking_code("RESOURCE_DOES_NOT_EXIST")), False),
        (MlflowException("no", error_code=tracking_code("UNAUTHENTICATED")), False),
        (ConnectionRefusedError(111, "refused"), True),
        (TimeoutError(), True),
        (OSError(28, "No space left on device"), True),
        (PermissionError(13, "Permission denied"), False),
        (FileNotFoundError(2, "No such file"), False),
        (ValueError("no"), False),
    ],
    ids=str,
)
def test_errors_that_pass_are_told_from_those_that_stay(error, later):
    assert tracking.transient(error) is later


def test_errors_of_requests_pass_when_nobody_answered_or_the_server_was_at_fault():
    import requests

    def answered(status: int) -> Exception:
        response = requests.Response()
        response.status_code = status
        return requests.HTTPError("no", response=response)

    assert tracking.transient(requests.ConnectionError("nobody"))
    assert tracking.transient(requests.ReadTimeout("nobody"))
    assert tracking.transient(answered(503)) and tracking.transient(answered(429))
    assert not tracking.transient(answered(404))


# --- what a trial leaves --------------------------------------------------------------------


def test_costs_of_a_trial_are_metrics_beside_its_accuracy(uri, opened):
    tracker = opened(uri)
    tracker.trial_started(suggestion(0), *SETS)
    tracker.trial_reported(0, report(5))
    values = {"accuracy": 0.05, "gpu_seconds": 3.0, "ipc": 10.0}
    tracker.trial_ended(ended(0, 5, values=values, seconds=12.5))
    whole_trial(tracker, 1, 5)
    assert tracker.drain(60) == 0
    metrics = Look(uri, tracker).trial(0).data.metrics
    assert (metrics["gpu_seconds"], metrics["ipc"], metrics["seconds"]) == (3.0, 10.0, 12.5)
    assert "accuracy" not in metrics
    assert "seconds" not in Look(uri, tracker).trial(1).data.metrics


def test_pictures_have_the_names_by_which_mlflow_shows_them(uri, opened):
    tracker = opened(uri)
    whole_trial(tracker, 0, 5)
    assert tracker.drain(60) == 0
    look = Look(uri, tracker)
    run = look.trial(0)
    preview, full = look.pictures(run)
    assert full.startswith("synthetic+step+5+timestamp+") and full.endswith(".png")
    assert preview == full.removesuffix(".png") + "+compressed.webp"
    assert run.data.tags["mlflow.loggedImages"] == "True"
    local = look.client.download_artifacts(run.info.run_id, f"images/{full}")
    assert Path(local).read_bytes() == picture()


# --- after a kill ---------------------------------------------------------------------------


def test_after_a_kill_all_children_agree_with_the_study(uri, opened):
    tracker = opened(uri)
    study = [whole_trial(tracker, 0, 5, 10), whole_trial(tracker, 1, 5, state="pruned")]
    tracker.trial_started(suggestion(2), *SETS)
    tracker.trial_reported(2, report(5))
    tracker.trial_started(suggestion(3), *SETS)
    tracker.trial_reported(3, report(5))
    assert tracker.drain(60) == 0
    Faulty(tracker).error = LOCKED
    tracker.trial_reported(2, report(10))  # from here on MLflow hears nothing
    tracker.trial_reported(2, report(15))
    tracker.trial_ended(ended(2, 5, 10, 15))
    tracker.trial_reported(3, report(10))
    costs = {"accuracy": 0.05, "gpu_seconds": 3.0}
    study += [
        ended(2, 5, 10, 15, values=costs, seconds=9.0),
        whole_trial(tracker, 4, 5, state="failed"),
        whole_trial(tracker, 5, 5),
    ]
    end(tracker)

    again = opened(uri, tracker.parent_id)
    again.reconcile(study[:3], lambda e: SETS)
    again.reconcile(study[3:], lambda e: SETS)
    assert again.drain(60) == 0
    look = Look(uri, again)
    live = look.trial(3)
    assert live.info.status == "KILLED"
    assert look.trial(2).data.metrics["gpu_seconds"] == 3.0
    assert look.trial(2).data.metrics["seconds"] == 9.0
    again.trial_started(suggestion(3), *SETS)
    assert again.drain(60) == 0
    assert look.trial(3).info.status == "RUNNING"
    again.trial_reported(3, report(15))
    study.insert(3, ended(3, 5, 10, 15))
    again.trial_ended(study[3])
    again.finish("FINISHED")
    assert sorted(look.history(look.trial(3))) == [(5, 0.05), (10, 0.1), (15, 0.15)]
    for e in study[2:]:
        run = look.trial(e.number)
        assert dict(look.history(run)) == e.reports
        assert run.data.tags["ftd.state"] == e.state
        assert run.info.status == ("FAILED" if e.state == "failed" else "FINISHED")
        assert run.data.params["rho"] == "0.01" and run.inputs.dataset_inputs
    assert [int(r.data.tags["ftd.trial"]) for r in look.runs()] == list(range(6))


def test_run_that_was_created_and_no_more_is_made_whole(uri, opened):
    tracker = opened(uri)
    tags = {"mlflow.parentRunId": tracker.parent_id, "ftd.kind": "trial", "ftd.trial": "0"}
    look = Look(uri, tracker)
    look.client.create_run(tracker.experiment_id, tags=tags)
    look.client.create_run(tracker.experiment_id, tags=tags | {"ftd.trial": "1"})
    look.client.set_terminated(look.trial(1).info.run_id, "FINISHED")
    look.client.set_tag(look.trial(1).info.run_id, "ftd.state", "complete")
    end(tracker)
    again = opened(uri, tracker.parent_id)
    study = [ended(0, 5, start_from="ftd-cifar10-ipc10"), ended(1)]
    again.reconcile(study, lambda e: SETS)
    assert again.drain(60) == 0
    look.agrees_with(study)
    assert look.trial(0).data.tags["ftd.start_from"] == "ftd-cifar10-ipc10"


def test_new_parent_gets_all_trials_of_the_study(uri, opened):
    first = opened(uri)
    study = [whole_trial(first, 0, 5, 10), whole_trial(first, 1, 5, state="failed")]
    first.finish("KILLED")
    MlflowClient(tracking_uri=uri).delete_run(first.parent_id)
    again = opened(uri, first.parent_id)
    assert again.parent_id != first.parent_id
    again.reconcile(study, lambda e: SETS)
    assert again.drain(60) == 0
    Look(uri, again).agrees_with(study)


def test_of_several_runs_of_one_trial_the_fullest_is_kept(uri, opened):
    tracker = opened(uri)
    study = [whole_trial(tracker, 0, 5), whole_trial(tracker, 1, 5)]
    assert tracker.drain(60) == 0
    look = Look(uri, tracker)
    kept = look.trial(1).info.run_id
    tags = {k: v for k, v in look.trial(1).data.tags.items() if k.startswith("ftd.")}
    tags["mlflow.parentRunId"] = tracker.parent_id
    for start in (1, None):
        look.client.create_run(tracker.experiment_id, start, tags)
    notes = {"mlflow.parentRunId": tracker.parent_id}
    strangers = [look.client.create_run(tracker.experiment_id, tags=notes) for _ in range(2)]
    end(tracker)
    again = opened(uri, tracker.parent_id)
    again.reconcile(study, lambda e: SETS)
    again.finish("FINISHED")
    look.agrees_with(study)
    assert look.trial(1).info.run_id == kept
    for run in strangers:  # somebody else's, who may have several
        assert look.client.get_run(run.info.run_id).info.lifecycle_stage == "active"


def copies(path: Path, run_id: str, count: int) -> None:
    """Makes ``count`` trials like one, numbered after it, in the database itself."""
    with sqlite3.connect(path) as db:
        for table in ("runs", "params", "tags", "metrics", "latest_metrics"):
            cursor = db.execute(f"select * from {table} where run_uuid = ?", (run_id,))
            columns = [c[0] for c in cursor.description]
            rows = []
            for row in cursor.fetchall():
                for i in range(1, count + 1):
                    new = dict(zip(columns, row, strict=True)) | {
                        "run_uuid": f"{run_id[:26]}{i:06d}"
                    }
                    if table == "tags" and new["key"] == "ftd.trial":
                        new["value"] = str(i)
                    if table == "params" and new["key"] == "lr_lr":
                        new["value"] = str(0.1 * i)
                    rows.append(tuple(new.values()))
            marks = ", ".join("?" * len(columns))
            db.executemany(f"insert into {table} values ({marks})", rows)


def test_thousand_trials_that_agree_cost_one_search(uri, opened, tmp_path):
    tracker = opened(uri)
    first = whole_trial(tracker, 0, 5, 10)
    assert tracker.drain(60) == 0
    look = Look(uri, tracker)
    run = look.trial(0)
    end(tracker)
    copies(tmp_path / "mlflow.db", run.info.run_id, 999)
    study = [first, *(ended(n, 5, 10) for n in range(1, 1000))]
    again = Tracker(uri, "tiny")
    server = Faulty(again)
    again.start("tiny", {}, NAMES, tracker.parent_id)
    again.reconcile(study, lambda e: SETS)
    assert again.drain(60) == 0
    end(again)
    assert server.calls == ["update_run", "get_run", "search_runs"]
    study[500] = ended(500, 5, 10, 15)
    again = opened(uri, tracker.parent_id)
    again.reconcile(study, lambda e: SETS)
    assert again.drain(60) == 0
    assert look.history(look.trial(500)) == [(5, 0.05), (10, 0.1), (15, 0.15)]
    assert len(look.runs()) == 1000


def test_children_are_found_over_several_pages(uri, opened, monkeypatch):
    monkeypatch.setattr(runs, "PAGE", 2)
    tracker = opened(uri)
    study = [whole_trial(tracker, n, 5) for n in range(5)]
    assert tracker.drain(60) == 0
    end(tracker)
    again = opened(uri, tracker.parent_id)
    again.reconcile(study, lambda e: SETS)
    assert again.drain(60) == 0
    Look(uri, again).agrees_with(study)


def test_interrupt_ends_all_runs_before_anything_else_is_sent(uri, opened):
    tracker = opened(uri)
    client = Faulty(tracker)
    study = [whole_trial(tracker, 0, 5)]
    tracker.trial_started(suggestion(1), *SETS)
    tracker.expert_set(SETS[0], {}, SETS[1], {})
    assert tracker.drain(60) == 0
    gate, calls = threading.Event(), len(client.calls)
    tracker._outbox.put(lambda: gate.wait(60) and None)
    tracker.trial_reported(1, report(5))
    study.append(whole_trial(tracker, 2, 5))
    tracker.trial_started(suggestion(3), *SETS)
    tracker.trial_reported(3, report(5))
    tracker.interrupt()
    gate.set()
    assert tracker.drain(60) == 0
    first = client.calls[calls : calls + 5]
    assert first == ["set_terminated", "search_runs", *["set_terminated"] * 2, "set_tag"]
    look = Look(uri, tracker)
    assert look.parent().info.status == "KILLED"
    assert [r.info.status for r in look.runs("experts")] == ["KILLED"]
    ends = ["FINISHED", "KILLED", "FINISHED", "KILLED"]
    assert [r.info.status for r in look.runs()] == ends
    states = ["complete", "interrupted", "complete", "interrupted"]
    assert [r.data.tags["ftd.state"] for r in look.runs()] == states
    assert [look.history(r) for r in look.runs()] == [[(5, report(5).val_accuracy)]] * 4
    tracker.finish("KILLED")
    assert tracker.unsent == 0
    again = opened(uri, tracker.parent_id)
    again.reconcile(study, lambda e: SETS)
    assert again.drain(60) == 0
    assert [r.info.status for r in look.runs()] == ends


# --- a server over HTTP ---------------------------------------------------------------------


class Server:
    """``mlflow server`` on one SQLite file, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with open(self.folder / "server.txt", "a") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | ui.LEAN,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until("MLflow's server", self.answers, seconds=120, every=0.2)

    def answers(self) -> bool:
        assert self._process.poll() is None, (self.folder / "server.txt").read_text()
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        return False

    def signal(self, signum: int) -> None:
        os.killpg(self._process.pid, signum)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def server(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(tables, folder / "mlflow.db")
    made = Server(folder)
    made.start()
    yield made
    made.kill()


@pytest.mark.heavy
def test_server_that_is_killed_and_started_again_gets_everything_once(server, opened, capfd):
    tracker = opened(server.uri)
    study = [whole_trial(tracker, 0, 5, 10)]
    tracker.trial_started(suggestion(1), *SETS)
    tracker.trial_reported(1, report(5))  # some of this may be under way
    server.kill()
    tracker.trial_reported(1, report(10))
    study.append(ended(1, 5, 10, state="pruned"))
    tracker.trial_ended(study[1])
    study += [whole_trial(tracker, n, 5, 10, 15) for n in range(2, 8)]
    tracker.log_text("a: 1", "sweep.yaml")
    (said,) = wait_until("a note", tracker.new_notes)
    assert "MLflow does not answer" in said
    assert tracker.drain(0) > 0
    server.start()
    assert tracker.drain(60) == 0
    (said,) = tracker.new_notes()
    assert "MLflow answers again" in said
    tracker.finish("FINISHED")
    assert tracker.unsent == 0
    look = Look(server.uri, tracker)
    look.agrees_with(study)
    assert [len(look.pictures(r)) for r in look.runs()] == [4, 4, *[6] * 6]
    assert look.parent().info.status == "FINISHED"
    assert [f.path for f in look.client.list_artifacts(tracker.parent_id)] == ["sweep.yaml"]
    assert capfd.readouterr() == ("", "")  # MLflow's own words would break the progress lines


@pytest.mark.heavy
def test_server_that_hangs_is_an_outage_and_gets_everything_once(server, opened, monkeypatch):
    tracker = opened(server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server.signal(signal.SIGSTOP)
    try:
        study = [whole_trial(tracker, n, 5, 10) for n in range(3)]
        (said,) = wait_until("a note", tracker.new_notes)
        assert "MLflow does not answer" in said
    finally:
        server.signal(signal.SIGCONT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    assert tracker.drain(60) == 0
    tracker.finish("FINISHED")
    again = opened(server.uri, tracker.parent_id)  # a create_run may have been served too late
    again.reconcile(study, lambda e: SETS)
    assert again.drain(60) == 0
    Look(server.uri, again).agrees_with(study)


@pytest.mark.heavy
def test_sweep_whose_server_was_gone_to_the_end_is_whole_after_a_resume(
    server, opened, monkeypatch
):
    monkeypatch.setattr(tracking, "OUTAGE_SECONDS", 0.2)
    tracker = opened(server.uri)
    study = [whole_trial(tracker, 0, 5, 10)]
    assert tracker.drain(60) == 0
    tracker.trial_started(suggestion(1), *SETS)
    server.kill()
    tracker.trial_reported(1, report(5))
    study.append(ended(1, 5, 10, state="pruned"))
    tracker.trial_ended(study[1])
    tracker.finish("KILLED")
    assert tracker.unsent > 0
    with pytest.raises(UserError, match="does not answer"):
        Tracker(server.uri, "tiny")
    server.start()
    again = opened(server.uri, tracker.parent_id)
    again.reconcile(study, lambda e: SETS)
    assert again.drain(60) == 0
    Look(server.uri, again).agrees_with(study)


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_server_that_goes_away_costs_a_sweep_nothing_and_is_told_later(server, tmp_path):
    write_sweep(tmp_path, tiny(experts__rho=0.01, search__trials=4, tracking={"uri": server.uri}))
    with running_sweep(tmp_path, "sweep.yaml") as process:
        output = tmp_path / "stdout.txt"
        wait_until(
            "the second trial",
            lambda: "trial   1  step" in output.read_text(),
            seconds=SWEEP_TIMEOUT,
        )
        server.kill()
        code = process.wait(timeout=240)
    try:
        said = output.read_text()
        assert code == 0, said + (tmp_path / "stderr.txt").read_text()
        assert said.count("MLflow does not answer") == 1
        summary = summary_of(tmp_path)
        assert summary["state"] == "done" and sum(summary["trials"].values()) == 4
        assert summary["mlflow"]["waiting"] > 0
    finally:
        server.start()
    later = run_sweep(tmp_path, "sweep.yaml", "--resume")
    assert later.code == 0 and "it has everything now" in later.out, later.out + later.err
    summary = summary_of(tmp_path)
    assert summary["mlflow"]["waiting"] == 0
    client = MlflowClient(server.uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "tiny")
    parent = summary["mlflow"]["parent_run_id"]
    children = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    trials = [r for r in children if r.data.tags["ftd.kind"] == "trial"]
    assert sorted(int(r.data.tags["ftd.trial"]) for r in trials) == [0, 1, 2, 3]
    assert {r.data.tags["ftd.state"] for r in trials} == {"complete"}
    assert {r.info.status for r in trials} == {"FINISHED"}
    whole = client.get_run(parent)
    assert whole.info.status == "FINISHED" and "test_accuracy" in whole.data.metrics


# --- the page -------------------------------------------------------------------------------


def test_newest_sweeps_come_first_with_their_best_accuracy_and_their_page(uri, opened):
    assert newest_sweeps(uri, 5) == []
    trackers = []
    for best in (5, 10, 15):
        tracker = opened(uri)
        whole_trial(tracker, 0, best)
        whole_trial(tracker, 1, 90, state="pruned")
        tracker.finish("FINISHED")
        trackers.append(tracker)
        time.sleep(0.002)  # to have another start
    pages = newest_sweeps(uri, 2)
    assert [p.best for p in pages] == [0.15, 0.1]
    assert [p.path for p in pages] == [t.trials_path() for t in reversed(trackers[1:])]
    assert {p.name for p in pages} == {"tiny"}


KILLED_WHILE_MAKING = """
import os, sys
from mlflow import MlflowClient
from ftd_ray.tracking.database import create_database
MlflowClient.search_experiments = lambda *_, **__: os._exit(9)  # its tables are half there
create_database(sys.argv[1])
"""


def test_driver_killed_while_mlflow_makes_its_database_leaves_none(tmp_path):
    path = tmp_path / "mlflow.db"
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_MAKING, str(path)])
    assert killed.returncode == 9
    assert [p.name[: len(database.MAKING)] for p in tmp_path.iterdir()] == [database.MAKING]
    create_database(str(path))
    assert list(tmp_path.iterdir()) == [path]
    before = path.read_bytes()
    create_database(str(path))
    assert path.read_bytes() == before
    assert Tracker(f"sqlite:///{path}", "sweeps").experiment_id == ""


def test_making_a_database_says_nothing(tmp_path):
    code = "import sys; from ftd_ray.tracking.database import create_database as make; "
    made = subprocess.run(
        [sys.executable, "-c", f"{code} make(sys.argv[1])", str(tmp_path / "mlflow.db")],
        capture_output=True,
        text=True,
    )
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")


def test_sweeps_that_begin_together_make_one_database(tmp_path):
    path = tmp_path / "mlflow.db"
    making = [threading.Thread(target=create_database, args=(str(path),)) for _ in range(2)]
    for thread in making:
        thread.start()
    for thread in making:
        thread.join()
    assert list(tmp_path.iterdir()) == [path]
    assert MlflowClient(f"sqlite:///{path}").get_experiment("0").name == "Default"


def test_database_that_cannot_be_made_is_one_clear_line(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MlflowClient, "search_experiments", full)
    path = tmp_path / "mlflow.db"
    with pytest.raises(UserError, match=r"mlflow\.db cannot be made \(.*No space left"):
        create_database(str(path))
    assert list(tmp_path.iterdir()) == []


def test_page_of_no_database_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ui.main(["--no-browser"]) == 2
    said = capsys.readouterr().err
    assert "there is no file mlflow.db" in said and said.count("\n") == 1
    assert not (tmp_path / "mlflow.db").exists()


def test_port_that_is_taken_is_one_clear_line(uri, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ui.main(["--no-browser", "--uri", uri, "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"--port {port}" in said and f"PORT={port + 1}" in said and said.count("\n") == 1


@pytest.mark.heavy
def test_page_is_served_at_the_newest_sweep_until_ctrl_c(uri, opened, tmp_path):
    tracker = opened(uri)
    whole_trial(tracker, 0, 50)
    tracker.finish("FINISHED")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ftd_ray.ui", "--no-browser", "--uri", uri]
    with open(tmp_path / "said.txt", "w") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out)
    try:
        said = wait_until("the address", (tmp_path / "said.txt").read_text, seconds=120, every=0.2)
        assert f"http://127.0.0.1:{port}{tracker.trials_path()}" in said
        assert "best validation 50.0 %" in said and said.count("\n") == 1
        page = f"http://127.0.0.1:{port}/"
        assert urllib.request.urlopen(page, timeout=30).status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait(timeout=30)
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)) != 0
