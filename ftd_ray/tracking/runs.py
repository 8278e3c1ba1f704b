"""The runs of one sweep: a parent, a child for each trial, and one for each expert set.

All of this talks to the server, and raises what MLflow raises. It may be done twice (after a
timeout nobody knows whether the first request arrived), so all of it is idempotent.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.multimedia import compress_image_size
from PIL import Image

from ftd.errors import UserError
from ftd_ray.tracking.faults import transient, unanswered

PAGE = 5_000
"""Runs of one search."""

Target = int | str | None
"""The run of a trial (its number), of an expert set (its key), or the parent."""
Point = tuple[str, float, int, int]
"""Of a metric: key, value, milliseconds, step."""


@dataclass(frozen=True)
class Part:
    """What is written to a run at once; parts of a run that wait in a row are written together."""

    metrics: bytes = b""
    """Pickled points, which take a fifth of the memory: there may be many in an outage."""
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    picture: Path | None = None
    end: tuple[str, int] | None = None
    """Status and milliseconds."""


class Runs:
    """After ``Tracker.start`` they belong to the outbox's thread."""

    def __init__(self, uri: str, experiment: str, artifacts: str | None):
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        if found and found.lifecycle_stage != "active":
            raise UserError(
                f"the MLflow experiment {experiment!r} was deleted. Restore it, or set "
                "tracking.experiment to another name."
            )
        self._experiment, self._artifacts = experiment, artifacts
        self.experiment_id = found.experiment_id if found else ""
        self.parent_id = ""
        self.known: dict[Target, str] = {}
        """Which run is whose."""
        self._tried: set[str] = set()
        """Children that were asked for without an answer."""
        self._kind = ""
        self._interrupted = False

    # --- the parent -------------------------------------------------------------------------

    def open_parent(
        self, name: str, tags: dict[str, str], params: dict[str, str], parent_id: str | None
    ) -> Run:
        """A new one, or the one of an interrupted sweep again: by its id, or by its mark.

        The tag ``ftd.sweep`` marks what a driver made that was killed before it could say so.
        """
        self._kind = tags["ftd.kind"]
        if not self.experiment_id:
            self.experiment_id = self._new_experiment()
        run = self._again(parent_id) or self._again(self._marked(tags.get("ftd.sweep")))
        if run is None:
            run = self._client.create_run(self.experiment_id, run_name=name, tags=tags)
        self.parent_id = self.known[None] = run.info.run_id
        if not run.data.params:
            self._client.log_batch(self.parent_id, params=[Param(*p) for p in params.items()])
        return run

    def _again(self, run_id: str | None) -> Run | None:
        """The run, RUNNING; None when there is none of that id."""
        return self._client.get_run(run_id) if run_id and self._reopen(run_id) else None

    def _marked(self, mark: str | None) -> str | None:
        if not mark:
            return None
        found = self._client.search_runs([self.experiment_id], f"tags.`ftd.sweep` = '{mark}'")
        return found[0].info.run_id if found else None

    def _new_experiment(self) -> str:
        try:
            return self._client.create_experiment(self._experiment, self._artifacts)
        except MlflowException:
            found = self._client.get_experiment_by_name(self._experiment)
            if found is None:  # else another sweep was quicker
                raise
            return found.experiment_id

    def end_parent(self, status: str, now: int) -> None:
        self._client.set_terminated(self.parent_id, status, now)

    # --- children ---------------------------------------------------------------------------

    def children(self, condition: str = "") -> Iterator[Run]:
        """Those below the parent that meet a condition."""
        ours = f"tags.mlflow.parentRunId = '{self.parent_id}'"
        where, token = f"{ours} and {condition}" if condition else ours, None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], where, max_results=PAGE, page_token=token
            )
            yield from page
            if not (token := page.token):
                return

    def open(
        self,
        target: Target,
        name: str,
        tags: dict[str, str],
        inputs: Sequence[DatasetInput],
        start: int,
    ) -> None:
        if self._interrupted and "ftd.state" in tags:
            tags = tags | {"ftd.state": "interrupted"}
        known = self.known.get(target)
        if known is not None and self._reopen(known):
            self._client.log_batch(known, tags=[RunTag(*t) for t in tags.items()])
        else:
            known = self.known[target] = self._create(name, tags, start)
        if self._interrupted:
            self._client.set_terminated(known, "KILLED", start)
        if inputs:
            self._client.log_inputs(known, inputs)

    def _create(self, name: str, tags: dict[str, str], start: int) -> str:
        key = "ftd.trial" if "ftd.trial" in tags else "ftd.expert_set"
        mark = f"tags.`ftd.kind` = '{tags['ftd.kind']}' and tags.`{key}` = '{tags[key]}'"
        found: Run | None = None
        if mark in self._tried:  # it may be there, although nobody heard so
            found = next(self.children(mark), None)
        self._tried.add(mark)
        if found is None:
            found = self._client.create_run(
                self.experiment_id, start_time=start, run_name=name, tags=tags
            )
        self._tried.discard(mark)
        return found.info.run_id

    def send(self, target: Target, parts: Sequence[Part]) -> None:
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

    def send_file(self, target: Target, path: Path, folder: str | None) -> None:
        self._client.log_artifact(self._run_of(target), str(path), folder)

    def fill_in(self, number: int, reports: dict[int, float], now: int) -> None:
        """Validation accuracies (by outer step) that a trial's run may not have."""
        run_id = self._run_of(number)
        there = {m.step for m in self._client.get_metric_history(run_id, "val_accuracy")}
        metrics = [Metric("val_accuracy", v, now, s) for s, v in reports.items() if s not in there]
        self._client.log_batch(run_id, metrics=metrics)

    def interrupt(self, run: Run, now: int) -> None:
        """Closes the run of what did not come to its end."""
        if "ftd.trial" in run.data.tags:
            self._client.set_tag(run.info.run_id, "ftd.state", "interrupted")
        self._client.set_terminated(run.info.run_id, "KILLED", now)

    def interrupt_all(self, now: int) -> None:
        """Ends all runs, by one request each: there may be little time. Those to come end at once.

        What is still to be written to them can be; a trial that had ended gets its own end by that.
        """
        self._interrupted = True
        self.end_parent("KILLED", now)
        running = list(self.children("attributes.status = 'RUNNING'"))
        for run in running:
            self._client.set_terminated(run.info.run_id, "KILLED", now)
        for run in running:
            if "ftd.trial" in run.data.tags:
                self._client.set_tag(run.info.run_id, "ftd.state", "interrupted")

    def close_orphans(self, now: int) -> None:
        """No run below the parent stays RUNNING: what was not told its end was interrupted."""
        for run in list(self.children("attributes.status = 'RUNNING'")):
            self.interrupt(run, now)

    def delete(self, run_id: str) -> None:
        self._client.delete_run(run_id)

    def _reopen(self, run_id: str) -> bool:
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if transient(error):
                raise
            return False
        return True

    def _run_of(self, target: Target) -> str:
        if target not in self.known:
            raise LookupError(f"{target} has no run, since that was refused")
        return self.known[target]

    # --- faults -----------------------------------------------------------------------------

    def blames(self, error: Exception) -> bool:
        """Whether MLflow fails on this entry alone, and takes others."""
        if unanswered(error.__cause__ or error.__context__):
            return False
        if not isinstance(error, MlflowException):
            return False
        try:
            self._client.set_tag(self.parent_id, "ftd.kind", self._kind)
        except Exception:
            return False
        return True
