"""What happens in a sweep, as MLflow is told of it.

One parent run a sweep, one child a trial (only the varied parameters and one common final metric,
``val_accuracy``, so that the compare page shows what differs), one child an expert set, told
apart by the tag ``ftd.kind``. The driver is the only writer, and does not wait: what it logs goes
through an outbox, with the times at which it happened.
"""

import contextlib
import json
import pickle
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Run

from ftd.errors import UserError
from ftd_ray.experts.orders import FleetStatus, SetStatus
from ftd_ray.search import Ended, Suggestion
from ftd_ray.tracking.faults import transient
from ftd_ray.tracking.machine import Machine
from ftd_ray.tracking.outbox import Outbox, one_line
from ftd_ray.tracking.pages import trials_path
from ftd_ray.tracking.runs import Part, Point, Runs, Target
from ftd_ray.trial import Report

FINISHED = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}
FLEET_SECONDS = 10
"""Between two words of the experts' progress."""
FINISH_SECONDS, OUTAGE_SECONDS = 60, 5
"""How long the end waits for what is not sent yet, and for a server that does not answer."""
MAX_VALUE = 5_900
"""Characters of a parameter's value that MLflow takes, with some room."""


class Tracker:
    """Writes one sweep to MLflow. Creating it checks that the tracking server answers.

    After ``start`` no method waits or raises, but for ``finish``, which waits a while. What a user
    should know of the server, such as that it went away, is in ``new_notes``.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str | None = None):
        self.uri = uri
        try:
            self._runs = Runs(uri, experiment, artifacts)
        except UserError:
            raise
        except Exception as error:  # MLflow lets errors of requests and sqlalchemy through
            raise self._silent(error) from error
        self._left = 0
        self._interrupted = False
        self._outbox = Outbox("MLflow", transient, self._runs.blames)
        self._names: dict[str, str] = {}
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
        self._monitor: Machine | None = None

    @property
    def experiment_id(self) -> str:
        """MLflow's experiment; empty while there is none of that name."""
        return self._runs.experiment_id

    @property
    def parent_id(self) -> str:
        """The run of the sweep; empty before ``start``."""
        return self._runs.parent_id

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
        mark: str = "",
    ) -> None:
        """Opens the parent run, or the one of an interrupted sweep again.

        ``names`` maps the keys of the search space to the names that children carry; ``mark`` is
        the sweep's own, by which its run is found without ``parent_id``. Raises UserError when the
        server does not answer.
        """
        self._names = names
        fixed = _flat({k: v for k, v in resolved.items() if k not in ("tracking", "output")})
        tags = {"ftd.kind": kind, "mlflow.note.content": note}
        tags |= {"ftd.sweep": mark} if mark else {}
        tags |= {f"ftd.search.{s}": str(fixed.get(key, "")) for key, s in names.items()}
        params = {k: str(v)[:MAX_VALUE] for k, v in fixed.items() if k not in names}
        try:
            run = self._runs.open_parent(name, tags, params, parent_id)
            self._take_children()
        except Exception as error:
            raise self._silent(error) from error
        self._opened = run.info.start_time / 1000
        with contextlib.suppress(Exception):  # a nicety: psutil may be refused some counters
            self._monitor = Machine(self.parent_id, self.uri, self._machine)
            self._monitor.start()

    def _take_children(self) -> None:
        """Learns what an interrupted sweep left, in one search; what was running, it killed."""
        now = _now()
        for run in sorted(self._runs.children(), key=_fullness, reverse=True):
            run_id, status, tags = run.info.run_id, run.info.status, run.data.tags
            number = tags.get("ftd.trial")
            target: Target = tags.get("ftd.expert_set") if number is None else int(number)
            if target is None:
                continue
            if target in self._runs.known:
                self._twins.append(run_id)
            else:
                self._runs.known[target] = run_id
                if isinstance(target, int):
                    self._found[target] = run
                elif status == "FINISHED":
                    self._told.add(target)  # by an earlier session
            if status == "RUNNING":
                self._outbox.put(partial(self._runs.interrupt, run, now))

    def reconcile(self, ended: Sequence[Ended], sets: Callable[[Ended], tuple[str, str]]) -> None:
        """Brings the children of a resumed sweep in line with the study, which is always right.

        A driver that was killed did not send its last seconds. ``sets`` gives the expert set of a
        trial and where that lies.
        """
        for e in ended:
            run = self._found.pop(e.number, None)
            if run is None or not self._params(e.params).items() <= run.data.params.items():
                again = Suggestion(e.number, e.params, e.repeat, e.start_from)
                self.trial_started(again, *sets(e))
                self.trial_ended(e)
            elif not _agrees(run, e):
                self.trial_ended(e)
        for run_id in self._twins:  # of requests that were answered too late
            self._outbox.put(partial(self._runs.delete, run_id))
        self._found, self._twins = {}, []

    def drop_trials(self) -> None:
        """Deletes the runs of the trials that an interrupted sweep left: it begins anew."""
        for number, run in self._found.items():
            del self._runs.known[number]
            self._outbox.put(partial(self._runs.delete, run.info.run_id))
        self._found = {}

    def trials_path(self) -> str:
        """Where a browser finds the sweep's trials as charts, below the server's address."""
        return trials_path(self.experiment_id, self.parent_id)

    def interrupt(self) -> None:
        """Has all runs end as KILLED before anything else is sent. Any thread may call it.

        It neither waits nor ends the tracker: ``finish`` does.
        """
        if self.parent_id and not self._interrupted:
            self._interrupted = True
            self._outbox.put_first(partial(self._runs.interrupt_all, _now()))

    def finish(self, status: str) -> None:
        """Ends the parent and whatever still runs below it: FINISHED, FAILED or KILLED.

        Waits for what is not sent yet, not for ever; ``unsent`` counts what was not.
        """
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        if self.parent_id:
            now = _now()
            self._outbox.put(partial(self._runs.close_orphans, now))
            self._outbox.put(partial(self._runs.end_parent, status, now))
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
            ours = {k: s for k, s in status.sets.items() if k in self._sets}
            done = {k for k, s in ours.items() if len(s.present) >= s.needed}
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
            self._outbox.put(partial(self._runs.fill_in, ended.number, earlier, now))
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
        part = Part(metrics=pickle.dumps(metrics) if metrics else b"", picture=picture, **rest)
        files = [picture] if picture else []
        self._outbox.put_part(partial(self._runs.send, target), part, ("run", target), files)

    def _file(self, target: Target, name: str, data: bytes, folder: str | None = None) -> None:
        if path := self._kept(name, data):
            self._outbox.put(partial(self._runs.send_file, target, path, folder), [path])

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
        self._outbox.put(partial(self._runs.open, target, name, tags, inputs, _now()))
        self._write(target, params=params)

    def _machine(self, values: dict[str, float], step: int) -> None:
        self._write(None, metrics=_at(values, _now(), step))

    def _params(self, varied: Mapping[str, Any]) -> dict[str, str]:
        return {self._names.get(k, k): str(v) for k, v in varied.items()}

    def _silent(self, error: Exception) -> UserError:
        return UserError(
            f"tracking.uri={self.uri} does not answer ({one_line(error)}). "
            "Start the MLflow server, or correct the address."
        )


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
