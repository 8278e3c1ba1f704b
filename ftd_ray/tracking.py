"""MLflow: the only module that imports it.

One parent run a sweep, one child a trial (only the varied parameters and one common final metric,
``val_accuracy``, so that the compare page shows what differs), one child an expert set, told
apart by the tag ``ftd.kind``. The driver is the only writer.
"""

import contextlib
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote, urlencode

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from PIL import Image

from ftd.errors import UserError
from ftd_ray.experts.orders import FleetStatus, SetStatus
from ftd_ray.search import Ended, Suggestion
from ftd_ray.trial import Report

logging.getLogger("mlflow").setLevel(logging.ERROR)
logging.getLogger("alembic").setLevel(logging.ERROR)

FINISHED = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}
FLEET_SECONDS = 10
"""Between two words of the experts' progress."""
MAX_VALUE = 5_900
"""Characters of a parameter's value that MLflow takes, with some room."""


class Tracker:
    """Writes one sweep to MLflow. Creating it checks that the tracking server answers."""

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
            raise UserError(
                f"tracking.uri={uri} does not answer ({_one_line(error)}). "
                "Start the MLflow server, or correct the address."
            ) from error
        self._experiment, self._artifacts = experiment, artifacts
        self.experiment_id = found.experiment_id if found else ""
        self.parent_id = ""
        self._names: dict[str, str] = {}
        self._runs: dict[int, str] = {}
        self._sets: dict[str, str] = {}
        self._told: set[str] = set()
        self._fleet_told = 0.0
        self._fleet_seen = False
        self._opened = 0.0
        """When the parent run began, in seconds: the fleet's curves run over the time since."""
        self._monitor: SystemMetricsMonitor | None = None

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

        ``names`` maps the keys of the search space to the names that children carry.
        """
        self._names = names
        if not self.experiment_id:
            self.experiment_id = self._client.create_experiment(self._experiment, self._artifacts)
        if parent_id is not None and self._reopen(parent_id):
            self.parent_id = parent_id
            self._close_orphans()
        else:
            tags = {"ftd.kind": kind, "mlflow.note.content": note}
            run = self._client.create_run(self.experiment_id, run_name=name, tags=tags)
            self.parent_id = run.info.run_id
            fixed = _flat({k: v for k, v in resolved.items() if k not in ("tracking", "output")})
            params = [Param(k, str(v)[:MAX_VALUE]) for k, v in fixed.items() if k not in names]
            for start in range(0, len(params), 100):
                self._client.log_batch(self.parent_id, params=params[start : start + 100])
            for key, short in names.items():
                self._client.set_tag(self.parent_id, f"ftd.search.{short}", str(fixed.get(key, "")))
        self._opened = self._client.get_run(self.parent_id).info.start_time / 1000
        with contextlib.suppress(Exception):  # a nicety: psutil may be refused some counters
            self._monitor = SystemMetricsMonitor(
                self.parent_id, resume_logging=True, tracking_uri=self.uri
            )
            self._monitor.start()

    def trials_path(self) -> str:
        """Where a browser finds the sweep's trials as charts, below the server's address.

        Sorted by a metric, since MLflow folds children into their parent otherwise.
        """
        query = {
            "compareRunsMode": "CHART",
            "searchFilter": f"tags.`ftd.kind` = 'trial' AND tags.`mlflow.parentRunId` = "
            f"'{self.parent_id}'",
            "orderByKey": "metrics.`val_accuracy`",
            "orderByAsc": "false",
        }
        return f"/#/experiments/{self.experiment_id}/runs?{urlencode(query, quote_via=quote)}"

    def finish(self, status: str) -> None:
        """Ends the parent and whatever still runs below it: FINISHED, FAILED or KILLED."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        if not self.parent_id:
            return
        self._close_orphans()
        self._client.set_terminated(self.parent_id, status)

    def log_summary(self, summary: dict[str, Any]) -> None:
        """The sweep's result as metrics and tags of the parent."""
        metrics = {"seconds": summary["seconds"]}
        if best := summary.get("best"):
            metrics["val_accuracy"] = best["val_accuracy"]
            metrics["test_accuracy"] = best["test_accuracy"]["mean"]
            metrics["test_accuracy_std"] = best["test_accuracy"]["std"]
            metrics["random_real_accuracy"] = summary["baseline"]["random_real"]["mean"]
            self._client.set_tag(self.parent_id, "ftd.best_trial", str(best["trial"]))
            for key, value in best["params"].items():
                self._client.set_tag(
                    self.parent_id, f"ftd.best.{self._names.get(key, key)}", str(value)
                )
            for run_id in self._search(f"tags.`ftd.trial` = '{best['trial']}'"):
                self._client.set_tag(run_id, "ftd.best", "true")
        self._metrics(self.parent_id, metrics, 0)
        self._client.log_dict(self.parent_id, summary, "summary.json")

    def log_text(self, text: str, name: str) -> None:
        """A text file on the parent."""
        self._client.log_text(self.parent_id, text, name)

    def log_figure(self, figure: Any, name: str) -> None:
        """A matplotlib figure on the parent."""
        self._client.log_figure(self.parent_id, figure, name, save_kwargs={"dpi": 110})

    def log_files(self, files: dict[str, bytes], folder: str) -> None:
        """Files on the parent, in ``folder``."""
        with tempfile.TemporaryDirectory() as temporary:
            for name, data in files.items():
                path = Path(temporary) / name
                path.write_bytes(data)
                self._client.log_artifact(self.parent_id, str(path), folder)

    # --- expert sets ------------------------------------------------------------------------

    def expert_set(
        self, key: str, identity: dict[str, Any], source: str, varied: dict[str, Any]
    ) -> None:
        """Opens the child run of an expert set."""
        if key in self._sets:
            return
        existing = self._search(f"tags.`ftd.kind` = 'experts' AND tags.`ftd.expert_set` = '{key}'")
        if existing:
            self._sets[key] = existing[0]
            if self._client.get_run(existing[0]).info.status == "FINISHED":
                self._told.add(key)  # by an earlier session
            else:
                self._reopen(existing[0])
            return
        short = {self._names.get(k, k): v for k, v in varied.items()}
        label = ", ".join(f"{k} {v}" for k, v in short.items())
        run = self._client.create_run(
            self.experiment_id,
            run_name=f"experts {label}" if label else "experts",
            tags={
                "mlflow.parentRunId": self.parent_id,
                "ftd.kind": "experts",
                "ftd.expert_set": key,
                "ftd.source": source,
            },
        )
        self._sets[key] = run.info.run_id
        self._client.log_batch(run.info.run_id, params=[Param(k, str(v)) for k, v in short.items()])
        self._client.log_dict(run.info.run_id, identity, "identity.json")

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
        for key, s in status.sets.items():
            run_id = self._sets.get(key)
            if run_id is None or key in self._told:
                continue
            epochs = sum(max(c, default=0) for c in s.curves.values())
            values: dict[str, float] = {
                "experts_done": len(s.present),
                "experts_needed": s.needed,
            }
            if finals := [c[max(c)] for i, c in s.curves.items() if i in s.present and c]:
                values["expert_val_accuracy_so_far"] = fmean(finals)
            self._metrics(run_id, values, epochs)
            if len(s.present) >= s.needed:
                self._close_set(key, run_id, s)
        rate = sum((n.epochs_per_second for n in status.nodes.values()), 0.0)
        if rate or self._fleet_seen:
            self._fleet_seen = True
            values = {"fleet/epochs_per_second": rate}
            for name, node in status.nodes.items():
                values[f"fleet/{name}/epochs_per_second"] = node.epochs_per_second
                values[f"fleet/{name}/experts_running"] = node.running
            self._metrics(self.parent_id, values, int(time.time() - self._opened))

    def _close_set(self, key: str, run_id: str, status: SetStatus) -> None:
        self._told.add(key)
        by_epoch: dict[int, list[float]] = {}
        for curve in status.curves.values():
            for epoch, value in curve.items():
                by_epoch.setdefault(epoch, []).append(value)
        now = _now()
        metrics = [
            Metric("expert_val_accuracy", fmean(v), now, e) for e, v in sorted(by_epoch.items())
        ]
        metrics += [
            Metric("experts_built", len(status.built), now, 0),
            Metric("experts_reused", len(status.present - status.built.keys()), now, 0),
            Metric("seconds", sum(status.built.values()), now, 0),
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(run_id, metrics=metrics[start : start + 1000])
        self._client.set_terminated(run_id, "FINISHED")

    # --- trials -----------------------------------------------------------------------------

    def trial_started(self, suggestion: Suggestion, set_key: str, source: str) -> None:
        """Opens the child run of a trial, or the one that an interruption left."""
        number = suggestion.number
        existing = self._search(f"tags.`ftd.trial` = '{number}'")
        if existing and self._reopen(existing[0]):
            self._runs[number] = existing[0]
            return
        run = self._client.create_run(
            self.experiment_id,
            run_name=f"trial {number:03d}",
            tags={
                "mlflow.parentRunId": self.parent_id,
                "ftd.kind": "trial",
                "ftd.trial": str(number),
                "ftd.expert_set": set_key,
                "ftd.state": "running",
                **({"ftd.repeat": str(suggestion.repeat)} if suggestion.repeat else {}),
            },
        )
        run_id = self._runs[number] = run.info.run_id
        params = [Param(self._names[k], str(v)) for k, v in suggestion.params.items()]
        self._client.log_batch(run_id, params=params)
        experts = Dataset(
            name="experts", digest=set_key, source_type="local", source=json.dumps({"uri": source})
        )
        context = [InputTag("mlflow.data.context", "experts")]
        self._client.log_inputs(run_id, [DatasetInput(experts, context)])

    def trial_reported(self, number: int, report: Report) -> None:
        """Curves up to the report, its score and its picture."""
        run_id, now = self._runs[number], _now()
        metrics = [Metric("val_accuracy", report.val_accuracy, now, report.step)]
        metrics.append(Metric("val_accuracy_std", report.val_std, now, report.step))
        for record in report.curve:
            metrics.append(Metric("matching_loss", record.loss, now, record.step))
            metrics.append(Metric("syn_lr", record.syn_lr, now, record.step))
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(run_id, metrics=metrics[start : start + 1000])
        picture = Image.open(io.BytesIO(report.picture))
        self._client.log_image(run_id, picture, key="synthetic", step=report.step, synchronous=True)

    def trial_ended(self, ended: Ended) -> None:
        """Closes the child run. Pruned trials are FINISHED with a tag, for MLflow knows no more."""
        run_id = self._runs[ended.number]
        tags = [RunTag("ftd.state", ended.state)]
        if ended.state == "pruned":
            tags.append(RunTag("pruned", "true"))
        if ended.reason:
            tags.append(RunTag("ftd.reason", ended.reason[:MAX_VALUE]))
            tags.append(RunTag("mlflow.note.content", f"Failed: {ended.reason}"[:MAX_VALUE]))
        self._client.log_batch(run_id, tags=tags)
        self._client.set_terminated(run_id, FINISHED[ended.state])

    # --- within -----------------------------------------------------------------------------

    def _metrics(self, run_id: str, values: dict[str, float], step: int) -> None:
        now = _now()
        self._client.log_batch(
            run_id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()]
        )

    def _search(self, condition: str) -> list[str]:
        runs = self._client.search_runs(
            [self.experiment_id], f"{condition} and tags.mlflow.parentRunId = '{self.parent_id}'"
        )
        return [run.info.run_id for run in runs]

    def _reopen(self, run_id: str) -> bool:
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException:
            return False
        return True

    def _close_orphans(self) -> None:
        """No run below the parent stays RUNNING: what was not told its end was interrupted."""
        children = self._client.search_runs(
            [self.experiment_id],
            f"tags.mlflow.parentRunId = '{self.parent_id}' and attributes.status = 'RUNNING'",
            max_results=5000,
        )
        for run in children:
            self._client.set_terminated(run.info.run_id, "KILLED")


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


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


@contextlib.contextmanager
def tolerant(warn: Any) -> Iterator[None]:
    """A tracking server that goes away costs no trial: the first failure is said, once."""
    try:
        yield
    except Exception as error:
        what = f"{type(error).__name__}: {_one_line(error)}"
        warn(f"could not write to MLflow ({what}); the sweep goes on without.")


__all__: Sequence[str] = ["Tracker", "tolerant"]
