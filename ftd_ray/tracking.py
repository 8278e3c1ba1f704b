"""MLflow: the only module that imports it.

One parent run a sweep, one child a trial (only the varied parameters and one common final metric,
``val_accuracy``, so that the compare page shows what differs), one child an expert set, told
apart by the tag ``ftd.kind``. The driver is the only writer, and does not wait: what it logs goes
through an outbox, with the times at which it happened. Everything that is sent may be sent twice
(after a timeout nobody knows whether the first one arrived), so all of it is idempotent.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pickle
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote, urlencode

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the outbox tries again
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.multimedia import compress_image_size
from PIL import Image

from ftd.errors import UserError
from ftd_ray.experts.orders import FleetStatus, SetStatus
from ftd_ray.outbox import Outbox, one_line
from ftd_ray.search import Ended, Suggestion
from ftd_ray.trial import Report

logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # a locked database is a traceback there
logging.getLogger("alembic").setLevel(logging.ERROR)

FINISHED = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}
FLEET_SECONDS = 10
"""Between two words of the experts' progress."""
FINISH_SECONDS, OUTAGE_SECONDS = 60, 5
"""How long the end waits for what is not sent yet, and for a server that does not answer."""
MAX_VALUE = 5_900
"""Characters of a parameter's value that MLflow takes, with some room."""
PAGE = 5_000
"""Runs of one search."""

Target = int | str | None
"""The run of a trial (its number), of an expert set (its key), or the parent."""
Point = tuple[str, float, int, int]
"""Of a metric: key, value, milliseconds, step."""


@dataclass(frozen=True)
class _Part:
    """What is written to a run at once; parts of a run that wait in a row are written together."""

    metrics: bytes = b""
    """Pickled points, which take a fifth of the memory: there may be many in an outage."""
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    picture: Path | None = None
    end: tuple[str, int] | None = None
    """Status and milliseconds."""


MAKING = ".mlflow-making-"
"""Begins the name of the folder in which a database is made."""


def create_database(path: str) -> None:
    """Makes MLflow's SQLite file, if there is none, by one link when its tables are all there.

    MLflow makes them in place, one after another, and cannot go on with a file that a killed
    process left half made.
    """
    if os.path.exists(path):
        return
    folder = os.path.dirname(path) or "."
    with contextlib.ExitStack() as stack:
        lock = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, lock)
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in Path(folder).glob(f"{MAKING}*"):  # by a killed process
            shutil.rmtree(left, ignore_errors=True)
        made = stack.enter_context(tempfile.TemporaryDirectory(prefix=MAKING, dir=folder))
        file = os.path.join(made, "mlflow.db")
        try:
            client = MlflowClient(tracking_uri=f"sqlite:///{file}")
            client.search_experiments(max_results=1)
            client._tracking_client.store.engine.dispose()
            with contextlib.closing(sqlite3.connect(file)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            try:
                os.link(file, path)
            except FileExistsError:  # where nothing could be locked, somebody was faster
                pass
            except OSError:  # no hard links here
                os.rename(file, path)
        except Exception as error:  # of sqlalchemy, sqlite3 and the disk
            raise UserError(
                f"tracking.uri=sqlite:///{path} cannot be made ({one_line(error)}). Make room, or "
                "give another place."
            ) from error


class Tracker:
    """Writes one sweep to MLflow. Creating it checks that the tracking server answers.

    After ``start`` no method waits or raises, but for ``finish``, which waits a while. What a user
    should know of the server, such as that it went away, is in ``new_notes``.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str | None = None):
        self.uri = uri
        try:
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            if found and found.lifecycle_stage != "active":
                raise UserError(
                    f"the MLflow experiment {experiment!r} was deleted. Restore it, or set "
                    "tracking.experiment to another name."
                )
        except UserError:
            raise
        except Exception as error:  # MLflow lets errors of requests and sqlalchemy through
            raise self._silent(error) from error
        self._experiment, self._artifacts = experiment, artifacts
        self.experiment_id = found.experiment_id if found else ""
        self.parent_id = ""
        self._left = 0
        self._outbox = Outbox("MLflow", transient, self._blames)
        self._names: dict[str, str] = {}
        self._kind = ""
        self._runs: dict[Target, str] = {}
        """Which run is whose; after ``start`` of the outbox's thread alone."""
        self._tried: set[str] = set()
        """Children that were asked for without an answer."""
        self._found: dict[int, Run] = {}
        """Runs of trials that an interrupted sweep left."""
        self._twins: list[str] = []
        self._reported: dict[int, set[int]] = {}
        """Steps of each trial that this session reported."""
        self._sets: set[str] = set()
        self._told: set[str] = set()
        self._fleet_told = 0.0
        self._fleet_seen = False
        self._opened = 0.0
        """When the parent run began, in seconds: the fleet's curves run over the time since."""
        self._monitor: _Machine | None = None

    # --- the sweep --------------------------------------------------------------------------

    def start(
        self,
        name: str,
        resolved: dict[str, Any],
        names: dict[str, str],
        parent_id: str | None,
        *,
        kind: str = "sweep",
        note: str = "A sweep; its trials lie below.",
    ) -> None:
        """Opens the parent run, or the one of an interrupted sweep again.

        ``names`` maps the keys of the search space to the names that children carry. Raises
        UserError when the server does not answer.
        """
        self._names, self._kind = names, kind
        try:
            self._start(name, resolved, parent_id, note)
        except Exception as error:
            raise self._silent(error) from error
        with contextlib.suppress(Exception):  # a nicety: psutil may be refused some counters
            self._monitor = _Machine(self.parent_id, self.uri, self._machine)
            self._monitor.start()

    def _start(self, name: str, resolved: dict[str, Any], parent_id: str | None, note: str) -> None:
        names = self._names
        if not self.experiment_id:
            self.experiment_id = self._new_experiment()
        if parent_id is not None and self._reopen(parent_id):
            run = self._client.get_run(parent_id)
            self.parent_id = parent_id
            self._take_children()
        else:
            fixed = _flat({k: v for k, v in resolved.items() if k not in ("tracking", "output")})
            tags = {"ftd.kind": self._kind, "mlflow.note.content": note}
            tags |= {f"ftd.search.{s}": str(fixed.get(key, "")) for key, s in names.items()}
            run = self._client.create_run(self.experiment_id, run_name=name, tags=tags)
            self.parent_id = run.info.run_id
            params = [Param(k, str(v)[:MAX_VALUE]) for k, v in fixed.items() if k not in names]
            self._client.log_batch(self.parent_id, params=params)
        self._runs[None] = self.parent_id
        self._opened = run.info.start_time / 1000

    def _new_experiment(self) -> str:
        try:
            return self._client.create_experiment(self._experiment, self._artifacts)
        except MlflowException:
            found = self._client.get_experiment_by_name(self._experiment)
            if found is None:  # else another sweep was quicker
                raise
            return found.experiment_id

    def _take_children(self) -> None:
        """Learns what an interrupted sweep left, in one search; what was running, it killed."""
        now = _now()
        for run in sorted(self._search(), key=_fullness, reverse=True):
            run_id, status, tags = run.info.run_id, run.info.status, run.data.tags
            number = tags.get("ftd.trial")
            target: Target = tags.get("ftd.expert_set") if number is None else int(number)
            if target in self._runs:
                self._twins.append(run_id)
            elif target is not None:
                self._runs[target] = run_id
                if isinstance(target, int):
                    self._found[target] = run
                elif status == "FINISHED":
                    self._told.add(target)  # by an earlier session
            if status == "RUNNING":
                self._outbox.put(partial(self._interrupt, run, now))

    def reconcile(self, ended: Sequence[Ended], sets: Callable[[Ended], tuple[str, str]]) -> None:
        """Brings the children of a resumed sweep in line with the study, which is always right.

        A driver that was killed did not send its last seconds. ``sets`` gives the expert set of a
        trial and where that lies.
        """
        for e in ended:
            run = self._found.pop(e.number, None)
            if run is None or not self._params(e.params).items() <= run.data.params.items():
                self.trial_started(Suggestion(e.number, e.params, e.repeat), *sets(e))
                self.trial_ended(e)
            elif not _agrees(run, e):
                self.trial_ended(e)
        for run_id in self._twins:  # of requests that were answered too late
            self._outbox.put(partial(self._client.delete_run, run_id))
        self._found, self._twins = {}, []

    def trials_path(self) -> str:
        """Where a browser finds the sweep's trials as charts, below the server's address."""
        return trials_path(self.experiment_id, self.parent_id)

    def finish(self, status: str) -> None:
        """Ends the parent and whatever still runs below it: FINISHED, FAILED or KILLED.

        Waits for what is not sent yet, not for ever; ``unsent`` counts what was not.
        """
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        if self.parent_id:
            now = _now()
            self._outbox.put(partial(self._close_orphans, now))
            self._outbox.put(partial(self._client.set_terminated, self.parent_id, status, now))
            left = self._outbox.drain(FINISH_SECONDS, OUTAGE_SECONDS)
            if left:
                were = "1 entry was" if left == 1 else f"{left} entries were"
                self._outbox.note(f"MLflow did not answer to the end; {were} not sent to it.")
            self._left += left
        self._outbox.close()

    @property
    def waiting(self) -> int:
        """Entries that MLflow did not get until ``finish``, and would take."""
        return self._left

    @property
    def unsent(self) -> int:
        """Entries that MLflow refused, or did not get until ``finish``."""
        return self._left + self._outbox.refused

    def drain(self, seconds: float) -> int:
        """Waits until MLflow has all that was logged; returns how many entries are left."""
        return self._outbox.drain(seconds)

    def new_notes(self) -> list[str]:
        """What the user should know of MLflow and was not told yet."""
        return self._outbox.new_notes()

    def log_summary(self, summary: dict[str, Any]) -> None:
        """The sweep's result as metrics and tags of the parent."""
        metrics, tags = {"seconds": summary["seconds"]}, {}
        if best := summary.get("best"):
            metrics["val_accuracy"] = best["val_accuracy"]
            metrics["test_accuracy"] = best["test_accuracy"]["mean"]
            metrics["test_accuracy_std"] = best["test_accuracy"]["std"]
            for name, baseline in summary["baseline"].items():
                metrics[f"{name}_accuracy"] = baseline["mean"]
            tags["ftd.best_trial"] = str(best["trial"])
            tags |= {f"ftd.best.{k}": v for k, v in self._params(best["params"]).items()}
            self._write(best["trial"], tags={"ftd.best": "true"})
        self._write(None, metrics=_at(metrics, _now(), 0), tags=tags)
        self.log_text(json.dumps(summary, indent=2), "summary.json")

    def log_text(self, text: str, name: str) -> None:
        """A text file on the parent."""
        self._file(None, name, text.encode())

    def log_files(self, files: Mapping[str, bytes], folder: str | None = None) -> None:
        """Files on the parent, in ``folder``."""
        for name, data in files.items():
            self._file(None, name, data, folder)

    # --- expert sets ------------------------------------------------------------------------

    def expert_set(
        self, key: str, identity: dict[str, Any], source: str, varied: dict[str, Any]
    ) -> None:
        """Opens the child run of an expert set."""
        if key in self._sets or key in self._told:
            return
        self._sets.add(key)
        params = self._params(varied)
        label = ", ".join(f"{k} {v}" for k, v in params.items())
        tags = {"ftd.kind": "experts", "ftd.expert_set": key, "ftd.source": source}
        self._child(key, f"experts {label}" if label else "experts", tags, params)
        self._file(key, "identity.json", json.dumps(identity, indent=2).encode())

    def fleet(self, status: FleetStatus, *, last: bool = False) -> None:
        """How far the experts are: on the run of each set, and for the fleet on the parent.

        Written every few seconds while experts are in training. The run of a set that is complete
        is closed with what it cost and its mean validation accuracy by epoch.
        """
        if not last and time.monotonic() - self._fleet_told < FLEET_SECONDS:
            done = {k for k, s in status.sets.items() if len(s.present) >= s.needed}
            if done <= self._told:
                return
        self._fleet_told = time.monotonic()
        now = _now()
        for key, s in status.sets.items():
            if key not in self._sets or key in self._told:
                continue
            epochs = sum(max(c, default=0) for c in s.curves.values())
            values: dict[str, float] = {
                "experts_done": len(s.present),
                "experts_needed": s.needed,
            }
            if finals := s.final_accuracies():
                values["expert_val_accuracy_so_far"] = fmean(finals)
            self._write(key, metrics=_at(values, now, epochs))
            if len(s.present) >= s.needed:
                self._close_set(key, s, now)
        rate = status.epochs_per_second
        if rate or self._fleet_seen:
            self._fleet_seen = True
            values = {"fleet/epochs_per_second": rate}
            for name, node in status.nodes.items():
                values[f"fleet/{name}/epochs_per_second"] = node.epochs_per_second
                values[f"fleet/{name}/experts_running"] = node.running
            self._write(None, metrics=_at(values, now, int(now / 1000 - self._opened)))

    def _close_set(self, key: str, status: SetStatus, now: int) -> None:
        self._told.add(key)
        by_epoch: dict[int, list[float]] = {}
        for curve in status.curves.values():
            for epoch, value in curve.items():
                by_epoch.setdefault(epoch, []).append(value)
        metrics = [("expert_val_accuracy", fmean(v), now, e) for e, v in sorted(by_epoch.items())]
        account = {
            "experts_built": len(status.built),
            "experts_reused": len(status.present - status.built.keys()),
            "seconds": sum(status.built.values()),
        }
        self._write(key, metrics=metrics + _at(account, now, 0), end=("FINISHED", now))

    # --- trials -----------------------------------------------------------------------------

    def trial_started(self, suggestion: Suggestion, set_key: str, source: str) -> None:
        """Opens the child run of a trial, or the one that an interruption left."""
        number = suggestion.number
        self._reported[number] = set()
        tags = {
            "ftd.kind": "trial",
            "ftd.trial": str(number),
            "ftd.expert_set": set_key,
            "ftd.state": "running",
            **({"ftd.repeat": str(suggestion.repeat)} if suggestion.repeat else {}),
            **({"ftd.start_from": suggestion.start_from} if suggestion.start_from else {}),
        }
        experts = Dataset(
            name="experts", digest=set_key, source_type="local", source=json.dumps({"uri": source})
        )
        context = [InputTag("mlflow.data.context", "experts")]
        params = self._params(suggestion.params)
        self._child(number, f"trial {number:03d}", tags, params, [DatasetInput(experts, context)])

    def trial_reported(self, number: int, report: Report) -> None:
        """Curves up to the report, its score and its picture."""
        now = _now()
        self._reported.setdefault(number, set()).add(report.step)
        metrics = _at(
            {"val_accuracy": report.val_accuracy, "val_accuracy_std": report.val_std},
            now,
            report.step,
        )
        for record in report.curve:
            metrics.append(("matching_loss", record.loss, now, record.step))
            metrics.append(("syn_lr", record.syn_lr, now, record.step))
        if report.first_picture:
            self._write(number, picture=self._picture(report.first_picture, 0, now))
        picture = self._picture(report.picture, report.step, now)
        self._write(number, metrics=metrics, picture=picture)

    def trial_ended(self, ended: Ended) -> None:
        """Closes the child run. Pruned trials are FINISHED with a tag, for MLflow knows no more."""
        now = _now()
        reported = self._reported.pop(ended.number, set())
        if earlier := {s: v for s, v in ended.reports.items() if s not in reported}:
            self._outbox.put(partial(self._fill_in, ended.number, earlier, now))
        metrics = _at(_costs(ended), now, max(ended.reports, default=0))
        end = (FINISHED[ended.state], now)
        self._write(ended.number, metrics=metrics, tags=_tags(ended), end=end)

    def _picture(self, data: bytes, step: int, now: int) -> Path | None:
        name = f"synthetic+step+{step}+timestamp+{now}+{uuid.uuid4()}.png"
        return self._kept(name, data) if data else None

    # --- into the outbox --------------------------------------------------------------------

    def _write(
        self,
        target: Target,
        metrics: Sequence[Point] = (),
        picture: Path | None = None,
        **rest: Any,
    ) -> None:
        part = _Part(metrics=pickle.dumps(metrics) if metrics else b"", picture=picture, **rest)
        files = [picture] if picture else []
        self._outbox.put_part(partial(self._send, target), part, ("run", target), files)

    def _file(self, target: Target, name: str, data: bytes, folder: str | None = None) -> None:
        if path := self._kept(name, data):
            self._outbox.put(partial(self._send_file, target, path, folder), [path])

    def _kept(self, name: str, data: bytes) -> Path | None:
        try:
            return self._outbox.keep(name, data)
        except OSError as error:
            self._outbox.note(f"{name} is not logged to MLflow ({one_line(error)}).")
            return None

    def _child(
        self,
        target: Target,
        name: str,
        tags: dict[str, str],
        params: dict[str, str],
        inputs: Sequence[DatasetInput] = (),
    ) -> None:
        tags = {"mlflow.parentRunId": self.parent_id, **tags}
        self._outbox.put(partial(self._open, target, name, tags, inputs, _now()))
        self._write(target, params=params)

    def _machine(self, values: dict[str, float], step: int) -> None:
        self._write(None, metrics=_at(values, _now(), step))

    def _params(self, varied: Mapping[str, Any]) -> dict[str, str]:
        return {self._names.get(k, k): str(v) for k, v in varied.items()}

    # --- in the outbox's thread -------------------------------------------------------------

    def _open(
        self,
        target: Target,
        name: str,
        tags: dict[str, str],
        inputs: Sequence[DatasetInput],
        start: int,
    ) -> None:
        known = self._runs.get(target)
        if known is not None and self._reopen(known):
            self._client.log_batch(known, tags=[RunTag(*t) for t in tags.items()])
        else:
            known = self._runs[target] = self._create(name, tags, start)
        if inputs:
            self._client.log_inputs(known, inputs)

    def _create(self, name: str, tags: dict[str, str], start: int) -> str:
        key = "ftd.trial" if "ftd.trial" in tags else "ftd.expert_set"
        mark = f"tags.`ftd.kind` = '{tags['ftd.kind']}' and tags.`{key}` = '{tags[key]}'"
        found: Run | None = None
        if mark in self._tried:  # it may be there, although nobody heard so
            found = next(self._search(mark), None)
        self._tried.add(mark)
        if found is None:
            found = self._client.create_run(
                self.experiment_id, start_time=start, run_name=name, tags=tags
            )
        self._tried.discard(mark)
        return found.info.run_id

    def _send(self, target: Target, parts: Sequence[_Part]) -> None:
        run_id = self._run_of(target)
        metrics = [Metric(*m) for p in parts if p.metrics for m in pickle.loads(p.metrics)]
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for part in parts:
            params.update(part.params)
            tags.update(part.tags)
            if part.picture:
                tags["mlflow.loggedImages"] = "True"
        self._client.log_batch(
            run_id,
            metrics=metrics,
            params=[Param(*p) for p in params.items()],
            tags=[RunTag(*t) for t in tags.items()],
        )
        for part in parts:
            if part.picture:
                self._send_picture(run_id, part.picture)
            if part.end:
                self._client.set_terminated(run_id, *part.end)

    def _send_picture(self, run_id: str, path: Path) -> None:
        """As ``MlflowClient.log_image``, with names of its own that do not change on a retry."""
        preview = path.with_name(f"{path.stem}+compressed.webp")
        with Image.open(path) as picture:
            compress_image_size(picture).save(preview)
        for file in (path, preview):
            self._client.log_artifact(run_id, str(file), "images")

    def _send_file(self, target: Target, path: Path, folder: str | None) -> None:
        self._client.log_artifact(self._run_of(target), str(path), folder)

    def _fill_in(self, number: int, reports: dict[int, float], now: int) -> None:
        run_id = self._run_of(number)
        there = {m.step for m in self._client.get_metric_history(run_id, "val_accuracy")}
        metrics = [Metric("val_accuracy", v, now, s) for s, v in reports.items() if s not in there]
        self._client.log_batch(run_id, metrics=metrics)

    def _run_of(self, target: Target) -> str:
        if target not in self._runs:
            raise LookupError(f"{target} has no run, since that was refused")
        return self._runs[target]

    def _search(self, condition: str = "") -> Iterator[Run]:
        """Children of the parent."""
        ours = f"tags.mlflow.parentRunId = '{self.parent_id}'"
        where, token = f"{ours} and {condition}" if condition else ours, None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], where, max_results=PAGE, page_token=token
            )
            yield from page
            if not (token := page.token):
                return

    def _reopen(self, run_id: str) -> bool:
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if transient(error):
                raise
            return False
        return True

    def _close_orphans(self, now: int) -> None:
        """No run below the parent stays RUNNING: what was not told its end was interrupted."""
        for run in list(self._search("attributes.status = 'RUNNING'")):
            self._interrupt(run, now)

    def _interrupt(self, run: Run, now: int) -> None:
        """Closes the run of what did not come to its end."""
        if "ftd.trial" in run.data.tags:
            self._client.set_tag(run.info.run_id, "ftd.state", "interrupted")
        self._client.set_terminated(run.info.run_id, "KILLED", now)

    def _blames(self, error: Exception) -> bool:
        """Whether MLflow fails on this entry alone, and takes others."""
        unanswered = _unanswered(error.__cause__ or error.__context__)
        if unanswered or not isinstance(error, MlflowException):
            return False
        try:
            self._client.set_tag(self.parent_id, "ftd.kind", self._kind)
        except Exception:
            return False
        return True

    def _silent(self, error: Exception) -> UserError:
        return UserError(
            f"tracking.uri={self.uri} does not answer ({one_line(error)}). "
            "Start the MLflow server, or correct the address."
        )


class _Machine(SystemMetricsMonitor):
    """MLflow's metrics of this machine through the outbox: its own end with the first outage."""

    def __init__(self, run_id: str, uri: str, send: Callable[[dict[str, float], int], None]):
        super().__init__(run_id, resume_logging=True, tracking_uri=uri)
        self._send = send

    def monitor(self) -> None:
        with contextlib.suppress(Exception):
            self.collect_metrics()
            while not self._shutdown_event.wait(self.sampling_interval):
                self.publish_metrics(self.aggregate_metrics())
                self.collect_metrics()

    def publish_metrics(self, metrics: dict[str, float]) -> None:
        self._send({f"system/{k}": v for k, v in metrics.items()}, self._logging_step)
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()


# --- looking --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepPage:
    """A sweep that MLflow holds, and where a browser finds it."""

    name: str
    began: datetime
    best: float | None
    """Validation accuracy."""
    path: str


def newest_sweeps(uri: str, limit: int) -> list[SweepPage]:
    """The sweeps that began last, the newest first."""
    client = MlflowClient(tracking_uri=uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    if not experiments:
        return []
    runs = client.search_runs(
        experiments,
        "tags.`ftd.kind` = 'sweep'",
        max_results=limit,
        order_by=["attributes.start_time DESC"],
    )
    pages = []
    for run in runs:
        experiment, run_id = run.info.experiment_id, run.info.run_id
        best = client.search_runs(
            [experiment],
            f"tags.`ftd.state` = 'complete' and tags.mlflow.parentRunId = '{run_id}'",
            max_results=1,
            order_by=["metrics.val_accuracy DESC"],
        )
        pages.append(
            SweepPage(
                name=run.info.run_name,
                began=datetime.fromtimestamp(run.info.start_time / 1000),
                best=best[0].data.metrics.get("val_accuracy") if best else None,
                path=trials_path(experiment, run_id),
            )
        )
    return pages


def trials_path(experiment_id: str, parent_id: str) -> str:
    """Where a browser finds a sweep's trials as charts, below the server's address.

    Sorted by a metric, since MLflow folds children into their parent otherwise.
    """
    query = {
        "compareRunsMode": "CHART",
        "searchFilter": f"tags.`ftd.kind` = 'trial' AND tags.`mlflow.parentRunId` = '{parent_id}'",
        "orderByKey": "metrics.`val_accuracy`",
        "orderByAsc": "false",
    }
    return f"/#/experiments/{experiment_id}/runs?{urlencode(query, quote_via=quote)}"


# --- within ---------------------------------------------------------------------------------

LATER = {
    "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED",
    "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED",
}  # fmt: skip
"""Codes of MLflow's errors after which the same may succeed; no answer at all is the first."""
NO_ANSWER = {
    "ConnectionError", "Timeout", "TimeoutError", "ChunkedEncodingError",
    "HTTPClientError", "OperationalError", "InterfaceError",
}  # fmt: skip
"""By name: of Python, requests, botocore (which need not be installed) and SQLAlchemy."""
LATER_ERRNO = {
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EPIPE,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ECONNABORTED, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN,
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOLCK,
}  # fmt: skip


def transient(error: Exception) -> bool:
    """Whether the same may succeed later: no answer, 5xx, a locked database, a full disk."""
    if isinstance(error, MlflowException):
        return error.error_code in LATER
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return _unanswered(error) or (isinstance(error, OSError) and error.errno in LATER_ERRNO)


def _unanswered(error: BaseException | None) -> bool:
    return any(c.__name__ in NO_ANSWER for c in type(error).__mro__)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and not {"choice", "int", "float"} & set(value)
        if nested:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _now() -> int:
    return int(time.time() * 1000)


def _at(values: Mapping[str, float], now: int, step: int) -> list[Point]:
    return [(k, float(v), now, step) for k, v in values.items()]


def _tags(ended: Ended) -> dict[str, str]:
    tags = {"ftd.state": ended.state}
    if ended.state == "pruned":
        tags["pruned"] = "true"
    if ended.reason:
        tags["ftd.reason"] = ended.reason[:MAX_VALUE]
        tags["mlflow.note.content"] = f"Failed: {ended.reason}"[:MAX_VALUE]
    return tags


def _costs(ended: Ended) -> dict[str, float]:
    costs = {k: v for k, v in ended.values.items() if k != "accuracy"}
    return costs | ({"seconds": ended.seconds} if ended.seconds > 0 else {})


def _agrees(run: Run, ended: Ended) -> bool:
    """Whether a run says what the study says. Reports come in order: the last one tells."""
    last = {m.key: (m.step, m.value) for m in run.data._metric_objs}.get("val_accuracy")
    step = max(ended.reports, default=None)
    return (
        run.info.status == FINISHED[ended.state]
        and _tags(ended).items() <= run.data.tags.items()
        and _costs(ended).items() <= run.data.metrics.items()
        and (step is None or last == (step, ended.reports[step]))
    )


def _fullness(run: Run) -> tuple[Any, ...]:
    """Of several runs of one trial the fullest is kept, and of equals the first."""
    return run.info.status == "FINISHED", len(run.data.metrics), -run.info.start_time


__all__: Sequence[str] = ["SweepPage", "Tracker", "newest_sweeps", "trials_path"]
