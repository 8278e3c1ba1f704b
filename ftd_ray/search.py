"""The search: one Optuna study, the single source of truth about trials.

Trials are asked for, reported to and told here; whatever runs them (``ftd_ray.bridge``) only
executes. The study lives in a journal file in the sweep's folder, so that it survives any crash:
on reopening, trials that were running are handed out again under their own numbers, with their
reports. Samplers are seeded at every ask from (seed, trial number), since a sampler's own random
state is not stored and would repeat its first points.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import BaseSampler, GridSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from ftd.errors import UserError
from ftd.seeds import derive_seed
from ftd_ray.config import SearchConfig
from ftd_ray.space import Dimension
from ftd_ray.storage import is_local, join, read_bytes, write_bytes

STUDY_FILE = "study.journal"
SYNC_SECONDS = 10
"""On an object store the journal is put there at most this often."""

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Suggestion:
    """A trial to run: its number, its point, and how many trials had the same point before."""

    number: int
    params: dict[str, Any]
    repeat: int


@dataclass(frozen=True)
class Ended:
    """A trial that is over."""

    number: int
    state: str
    """complete, pruned or failed."""
    params: dict[str, Any]
    value: float | None
    """Validation accuracy of its last report."""
    reason: str | None
    """Why it failed."""
    reports: dict[int, float]
    """Outer steps (over all repeats) -> validation accuracy."""
    repeat: int = 0
    """How many trials had the same point before."""
    values: dict[str, float] = field(default_factory=dict)
    """Objective -> value, of a complete trial: accuracy, gpu_seconds, cpu_seconds, ipc."""
    seconds: float = 0.0
    """That its worker worked."""


class SweepStudy:
    """The study of one sweep in ``folder`` (a path or a URI; one writer)."""

    def __init__(
        self,
        folder: str,
        *,
        name: str,
        space: Sequence[Dimension],
        search: SearchConfig,
        seed: int,
        every: int,
        iterations: int,
    ):
        self._space = {d.key: d for d in space}
        self._search, self._seed = search, seed
        self._journal = _Journal(join(folder, STUDY_FILE))
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self.study = optuna.create_study(
                study_name=name,
                storage=JournalStorage(JournalFileBackend(self._journal.path)),
                direction="maximize",
                load_if_exists=True,
                pruner=_pruner(search, every=every, iterations=iterations),
            )
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise UserError(
                f"{join(folder, STUDY_FILE)} is damaged ({type(error).__name__}). Restore it from "
                "a copy, or give another output.dir."
            ) from error
        self._live: dict[int, Trial] = {}
        self._orphans = [
            t for t in self.study.get_trials(deepcopy=False) if t.state is TrialState.RUNNING
        ]

    # --- handing out ------------------------------------------------------------------------

    def next(self) -> Suggestion | None:
        """The next trial: first those that an interruption left, then new ones; None at the end."""
        if self._orphans:
            orphan = self._orphans.pop(0)
            trial = Trial(self.study, orphan._trial_id)
            if "params" not in orphan.user_attrs:  # asked for, but not yet written down
                return self._describe(trial)
            self._live[orphan.number] = trial
            repeat = orphan.user_attrs["repeat"]
            return Suggestion(orphan.number, orphan.user_attrs["params"], repeat)
        number = len(self.study.get_trials(deepcopy=False))
        if number >= self._search.trials:
            return None
        self.study.sampler = _sampler(
            self._search.sampler, list(self._space.values()), self._seed, number
        )
        return self._describe(self.study.ask())

    def _describe(self, trial: Trial) -> Suggestion:
        if trial.number not in self._live:
            self.study.sampler = _sampler(
                self._search.sampler, list(self._space.values()), self._seed, trial.number
            )
        params = {key: d.suggest(trial) for key, d in self._space.items()}
        earlier = [t.user_attrs.get("params") for t in self.study.get_trials(deepcopy=False)]
        repeat = earlier[: trial.number].count(params)
        trial.set_user_attr("repeat", repeat)
        trial.set_user_attr("params", params)
        self._live[trial.number] = trial
        self._journal.sync()
        return Suggestion(trial.number, params, repeat)

    # --- hearing back -----------------------------------------------------------------------

    def report(self, number: int, step: int, value: float) -> bool:
        """Records a report; says whether the pruner wants the trial to stop."""
        trial = self._live[number]
        if step not in self.frozen(number).intermediate_values:
            trial.report(value, step)
        self._journal.sync()
        return trial.should_prune()

    def complete(self, number: int) -> Ended:
        """The trial reached its end; its value is its last report."""
        return self._tell(number, TrialState.COMPLETE)

    def prune(self, number: int) -> Ended:
        """The pruner stopped the trial; it keeps its last report, apart from complete ones."""
        return self._tell(number, TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> Ended:
        """The trial could not go on. It counts, and is not replaced."""
        self._live[number].set_user_attr("reason", reason)
        return self._tell(number, TrialState.FAIL)

    def _tell(self, number: int, state: TrialState) -> Ended:
        trial = self._live.pop(number)
        reports = self.frozen(number).intermediate_values
        value = reports[max(reports)] if reports else None
        self.study.tell(trial, value if state is TrialState.COMPLETE else None, state=state)
        self._journal.sync(force=True)
        return _ended(self.frozen(number))

    # --- looking ----------------------------------------------------------------------------

    def frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def is_live(self, number: int) -> bool:
        """Whether the trial has been handed out and not been told yet."""
        return number in self._live

    def ended(self) -> list[Ended]:
        """All trials that are over, by number."""
        return [_ended(t) for t in self.study.get_trials(deepcopy=False) if t.state in ENDED]

    def best(self) -> Ended | None:
        """The complete trial of the highest validation accuracy; of equals the earliest."""
        done = [t for t in self.ended() if t.state == "complete"]
        return max(done, key=lambda t: (t.value or 0.0, -t.number), default=None)

    def remember(self, key: str, value: Any) -> None:
        """Keeps a JSON value with the study."""
        self.study.set_user_attr(key, value)
        self._journal.sync(force=True)

    def recall(self, key: str) -> Any:
        return self.study.user_attrs.get(key)

    def close(self) -> None:
        """Puts the journal where it belongs."""
        self._journal.sync(force=True)


class _Journal:
    """Optuna's journal needs a local file with append; for other places it is kept here and put
    there whole, by this one writer."""

    def __init__(self, uri: str):
        self._uri = None if is_local(uri) else uri
        self._synced = 0.0
        if self._uri is None:
            self.path = uri.removeprefix("file://")
            _drop_torn_line(self.path)
        else:
            self.path = os.path.join(tempfile.mkdtemp(prefix="ftd-study-"), STUDY_FILE)
            if (kept := read_bytes(uri)) is not None:
                with open(self.path, "wb") as f:
                    f.write(kept)

    def sync(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._uri is None or not (force or now - self._synced > SYNC_SECONDS):
            return
        with open(self.path, "rb") as f:
            write_bytes(self._uri, f.read())
        self._synced = now


def _drop_torn_line(path: str) -> None:
    """A full disk or a power cut leaves half a line, onto which the next one would be written."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as f:
        content = f.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            f.truncate(whole)


def _sampler(name: str, space: list[Dimension], seed: int, number: int) -> BaseSampler:
    here = derive_seed(seed, "sampler", number) % 2**32
    if name == "tpe":
        return TPESampler(seed=here, multivariate=True, group=True, constant_liar=True)
    if name == "random":
        return RandomSampler(seed=here)
    if name == "qmc":  # stores its place in the study; one seed for the whole sequence
        return QMCSampler(seed=seed % 2**32, scramble=True, warn_independent_sampling=False)
    return _Grid({d.key: [d.encode(v) for v in d.values] for d in space}, seed=seed % 2**32)


class _Grid(GridSampler):
    """Without stopping the study at the last point, which only works inside ``optimize``."""

    def after_trial(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the number of trials is the sweep's."""


def _pruner(search: SearchConfig, *, every: int, iterations: int) -> BasePruner:
    grace = search.grace or every
    if search.pruner == "asha":
        return SuccessiveHalvingPruner(
            min_resource=grace, reduction_factor=search.reduction_factor or 3
        )
    if search.pruner == "hyperband":
        return HyperbandPruner(
            min_resource=grace,
            max_resource=iterations,
            reduction_factor=search.reduction_factor or 3,
        )
    if search.pruner == "median":
        return MedianPruner(n_startup_trials=4, n_warmup_steps=grace)
    return NopPruner()


def _ended(trial: FrozenTrial) -> Ended:
    names = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
    }
    reports = trial.intermediate_values
    return Ended(
        number=trial.number,
        state=names[trial.state],
        params=trial.user_attrs.get("params", {}),
        value=reports[max(reports)] if reports else None,
        reason=trial.user_attrs.get("reason"),
        reports=dict(reports),
    )
