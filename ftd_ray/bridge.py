"""The study as Ray Tune's searcher and scheduler: Optuna decides, Tune executes.

Tune's own OptunaSearch tells pruned trials as complete and cannot reopen a study; here both
hooks of Tune lead to the same ``SweepStudy``, and what happens to a trial is told to a listener
(progress, MLflow) at the same place.

Only a trial's own behaviour fails it. One whose process was lost is an error for Tune and still
open for the study, which hands it out again under its number, as a new trial of Tune's: as often as
it takes, while any trial gets further. (Tune's own ``max_failures`` is not for that: it does not
take up a trial whose actor dies while it is handed on, nor any when a process ends for memory.)
"""

import itertools
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray import tune
from ray.exceptions import RayError, RayTaskError
from ray.tune import Callback, Stopper, TuneError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ftd.errors import UserError
from ftd_ray.nodes import NODE_LABEL
from ftd_ray.search import Ended, Suggestion, SweepStudy
from ftd_ray.trial import Report
from ftd_ray.workers import LIGHT_BYTES, SweepTrial, TrialOrder

LOST_IN_A_ROW = 20
"""Processes of trials that are lost while no trial reports anything, before the sweep stops. They
lie beside the driver and only pass things on, so what ends so many of them ends them all."""


class Listener(Protocol):
    """Hears what happens to trials, in order, in the driver."""

    def trial_started(self, suggestion: Suggestion) -> None: ...

    def trial_reported(self, number: int, report: Report) -> None: ...

    def trial_ended(self, ended: Ended) -> None: ...

    def halted(self, number: int, reason: str) -> None: ...


class DriverOnly:
    """Tune pickles its parts for ``Tuner.restore``, which is not used here: the study resumes."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "DriverOnly":
        return self


@dataclass
class Course:
    """What a listener was told of trials that may be taken up again, over all runs of Tune."""

    started: set[int] = field(default_factory=set)
    steps: dict[int, int] = field(default_factory=dict)
    """Trial -> its last report."""
    lost: int = 0
    """Processes, since any trial's last report."""

    def is_new(self, number: int, step: int) -> bool:
        """Whether that report was not told yet. What was lost may have to be worked out again."""
        self.lost = 0
        new = step > self.steps.get(number, -1)
        self.steps[number] = max(step, self.steps.get(number, -1))
        return new


class StudySearcher(DriverOnly, Searcher):
    """Tune asks for trials here."""

    def __init__(
        self,
        study: SweepStudy,
        order: Callable[[Suggestion], TrialOrder],
        listener: Listener,
        over: Callable[[], bool],
        course: Course,
    ):
        super().__init__(metric="val_accuracy", mode="max")
        self._study, self._order, self._listener, self._over = study, order, listener, over
        self._course = course

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._over():  # Tune asks for trials before it asks whether to stop
            return Searcher.FINISHED
        suggestion = self._study.next()
        if suggestion is None:  # not yet the end: what is under way may be lost, and come again
            return None if self._study.live() else Searcher.FINISHED
        order = self._order(suggestion)
        if suggestion.number not in self._course.started:
            self._course.started.add(suggestion.number)
            self._listener.trial_started(suggestion)
        return {"number": suggestion.number, "order": order}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the scheduler hears of it with the trial in hand."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""


class StudyScheduler(DriverOnly, FIFOScheduler):
    """Tune reports here; the study's pruner says whether a trial goes on."""

    def __init__(self, study: SweepStudy, listener: Listener, course: Course):
        super().__init__()
        self._study, self._listener, self._course = study, listener, course
        self._failures: dict[int, tuple[str, bool]] = {}
        """Why a trial fails, and whether it diverged."""

    def on_trial_result(
        self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        number = _number(trial)
        if "halt" in result:
            self._listener.halted(number, result["halt"])
            return TrialScheduler.CONTINUE
        if "failure" in result:
            self._failures[number] = result["failure"], result["diverged"]
            return TrialScheduler.CONTINUE  # the trial raises at its next step
        report: Report = pickle.loads(result["report"])
        if not self._course.is_new(number, report.step):
            return TrialScheduler.CONTINUE
        prune = self._report(number, report)
        pruned = self._study.prune(number) if prune and not report.done else None
        self._listener.trial_reported(number, report)
        if pruned is None:
            return TrialScheduler.CONTINUE
        self._listener.trial_ended(pruned)
        return TrialScheduler.STOP

    def on_trial_complete(
        self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]
    ) -> None:
        number = _number(trial)
        _lighten(trial)
        trial.last_result.pop("report", None)
        if not self._study.is_live(number):  # pruned, and this is the report that it was pruned at
            return
        if "report" in result:  # the last one comes here instead of to on_trial_result
            report: Report = pickle.loads(result["report"])
            if self._course.is_new(number, report.step):
                self._report(number, report)
                self._listener.trial_reported(number, report)
        self._listener.trial_ended(self._study.complete(number))

    def _report(self, number: int, report: Report) -> bool:
        return self._study.report(
            number,
            report.step,
            report.val_accuracy,
            seconds=report.seconds,
            networks=report.networks,
        )

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        number = _number(trial)
        _lighten(trial)
        if not self._study.is_live(number):
            return
        reason, diverged = self._failures.pop(number, (_own_behaviour(trial), False))
        if reason is None:
            self.lost(number)
        else:
            self._listener.trial_ended(self._study.fail(number, reason, diverged=diverged))

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        if self._study.is_live(number := _number(trial)):
            self.lost(number)

    def lost(self, number: int) -> None:
        """A trial's process is gone, and with it what Tune knew."""
        self._study.take_up(number)
        self._course.lost += 1
        if self._course.lost == LOST_IN_A_ROW:
            self._listener.halted(
                number,
                f"{LOST_IN_A_ROW} processes of trials were lost on this machine, one after the "
                "other, and none got further. Is there memory and room for processes?",
            )


class Halt(DriverOnly, Stopper):
    """Ends the search when it is told to; trials under way stay unfinished in the study."""

    def __init__(self, over: Callable[[], bool]):
        self._over = over

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._over()


class Ticker(DriverOnly, Callback):
    """Calls back after every turn of Tune's event loop."""

    def __init__(self, tick: Callable[[], None]):
        self._tick = tick

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._tick()


def run_search(
    study: SweepStudy,
    listener: Listener,
    *,
    order: Callable[[Suggestion], TrialOrder],
    tick: Callable[[], None],
    over: Callable[[], bool],
    concurrency: int,
) -> tune.ResultGrid:
    """Has Tune run the trials of the study that are left, in actors that one takes from the other.

    ``order`` says what work a suggestion is; ``tick`` is called at every turn of Tune's loop, and
    what it raises ends the search; ``over`` ends it in good order, with trials under way left as
    they are in the study. Returns Tune's own table of its last run, in which a trial that was lost
    is an error and stands again further down.
    """
    course = Course()
    scheduler = StudyScheduler(study, listener, course)
    scratch = tempfile.mkdtemp(prefix="ftd-tune-")
    beside_the_driver = tune.PlacementGroupFactory(
        [{"CPU": 0, "memory": LIGHT_BYTES}],
        bundle_label_selector=[{NODE_LABEL: ray.get_runtime_context().get_node_id()}],
    )
    try:
        for run in itertools.count():
            try:
                return tune.Tuner(
                    tune.with_resources(SweepTrial, beside_the_driver),
                    tune_config=tune.TuneConfig(
                        search_alg=StudySearcher(study, order, listener, over, course),
                        scheduler=scheduler,
                        num_samples=-1,  # the study knows how many
                        max_concurrent_trials=concurrency,
                        reuse_actors=True,
                    ),
                    run_config=tune.RunConfig(
                        name=f"trials-{run}",
                        storage_path=scratch,
                        verbose=0,
                        callbacks=[Ticker(tick)],
                        stop=Halt(over),
                    ),
                ).fit()
            except (TuneError, RuntimeError) as error:
                if own := _own_error(error):
                    raise own from None
                if not isinstance(error.__cause__, RayError):
                    raise
                for number in study.live():  # such as of a process that was ended for memory
                    scheduler.lost(number)
        raise AssertionError("not reached")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _own_error(error: BaseException | None) -> BaseException | None:
    """What one of our hooks raised, such as of a full disk: Tune wraps it, in text too."""
    while error is not None:
        if isinstance(error, UserError | OSError | pa.ArrowException):
            return error
        error = error.__cause__ or error.__context__
    return None


def _number(trial: TuneTrial) -> int:
    number: int = trial.config["number"]
    return number


def _lighten(trial: TuneTrial) -> None:
    """Tune keeps every trial to the end; one that is over needs no order any more."""
    for kept in (trial.config, trial.evaluated_params):
        kept.pop("order", None)


def _own_behaviour(trial: TuneTrial) -> str | None:
    """What the code of a trial raised, in one line; None where its process was lost under it."""
    if not trial.pickled_error_file or not os.path.exists(trial.pickled_error_file):
        return None
    with open(trial.pickled_error_file, "rb") as f:
        error = ray.cloudpickle.load(f)
    if not isinstance(error, RayTaskError) or isinstance(error.cause, RayError):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error.cause).__name__
