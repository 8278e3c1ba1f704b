"""The study as Ray Tune's searcher and scheduler: Optuna decides, Tune executes.

Tune's own OptunaSearch tells pruned trials as complete and cannot reopen a study; here both
hooks of Tune lead to the same ``SweepStudy``, and what happens to a trial is told to a listener
(progress, MLflow) at the same place.
"""

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

import pyarrow as pa
from ray import tune
from ray.tune import Callback, Stopper, TuneError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ftd.errors import UserError
from ftd_ray.search import Ended, Suggestion, SweepStudy
from ftd_ray.trial import Report
from ftd_ray.workers import LIGHT_BYTES, SweepTrial, TrialOrder


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


class StudySearcher(DriverOnly, Searcher):
    """Tune asks for trials here."""

    def __init__(
        self,
        study: SweepStudy,
        order: Callable[[Suggestion], TrialOrder],
        listener: Listener,
        over: Callable[[], bool],
    ):
        super().__init__(metric="val_accuracy", mode="max")
        self._study, self._order, self._listener, self._over = study, order, listener, over

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._over():  # Tune asks for trials before it asks whether to stop
            return Searcher.FINISHED
        suggestion = self._study.next()
        if suggestion is None:
            return Searcher.FINISHED
        order = self._order(suggestion)
        self._listener.trial_started(suggestion)
        return {"order": order}

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

    def __init__(self, study: SweepStudy, listener: Listener):
        super().__init__()
        self._study, self._listener = study, listener
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
        if not self._study.is_live(number):  # pruned, and this is the report that it was pruned at
            return
        if "report" in result:  # the last one comes here instead of to on_trial_result
            report: Report = pickle.loads(result["report"])
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
        self._fail(trial)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._fail(trial)

    def _fail(self, trial: TuneTrial) -> None:
        number = _number(trial)
        if self._study.is_live(number):
            reason, diverged = self._failures.get(number) or (_last_line(trial), False)
            self._listener.trial_ended(self._study.fail(number, reason, diverged=diverged))


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
    trials: int,
    concurrency: int,
) -> tune.ResultGrid:
    """Has Tune run ``trials`` more trials of the study, in actors that one takes from the other.

    ``order`` says what work a suggestion is; ``tick`` is called at every turn of Tune's loop, and
    what it raises ends the search; ``over`` ends it in good order, with trials under way left as
    they are in the study. Returns Tune's own table, in which failed trials alone are errors.
    """
    scratch = tempfile.mkdtemp(prefix="ftd-tune-")
    try:
        return tune.Tuner(
            tune.with_resources(
                SweepTrial, tune.PlacementGroupFactory([{"CPU": 0, "memory": LIGHT_BYTES}])
            ),
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(study, order, listener, over),
                scheduler=StudyScheduler(study, listener),
                num_samples=trials,
                max_concurrent_trials=concurrency,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                callbacks=[Ticker(tick)],
                stop=Halt(over),
            ),
        ).fit()
    except TuneError as error:
        raise _own_error(error) or error from None
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
    order: TrialOrder = trial.config["order"]
    return order.number


def _last_line(trial: TuneTrial) -> str:
    """The end of what Tune wrote down about an error that was not ours."""
    if trial.error_file and os.path.exists(trial.error_file):
        with open(trial.error_file) as f:
            lines = [line.strip() for line in f if line.strip()]
        if lines:
            return lines[-1]
    return "its process was lost"
