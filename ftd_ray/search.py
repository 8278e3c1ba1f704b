"""The search: one Optuna study, the single source of truth about trials.

Trials are asked for, reported to and told here; whatever runs them (``ftd_ray.bridge``) only
executes. The study lives in a journal file in the sweep's folder, so that it survives any crash:
on reopening, trials that were running are handed out again under their own numbers, with their
reports. Samplers are seeded at every ask from (seed, trial number), since a sampler's own random
state is not stored and would repeat its first points.
"""

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from ftd.errors import UserError
from ftd.seeds import derive_seed
from ftd_ray.imputation import DIVERGED, ImputingStorage
from ftd_ray.journal import STUDY_FILE, Journal, read_journal
from ftd_ray.presets import StartPoint
from ftd_ray.samplers import DIVERGED_PER_LIVED, DistinctSampler, pruner_of, sampler_of
from ftd_ray.sections import SearchConfig
from ftd_ray.space import Dimension
from ftd_ray.storage import join

EARLIER = "earlier_trial"
"""User attribute of trials that came from an earlier study: their number there."""

REPORT = "report:"
"""Begins the user attributes that hold reports which Optuna has no use for."""

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Suggestion:
    """A trial to run: its number, its point, and how many trials had the same point before."""

    number: int
    params: dict[str, Any]
    repeat: int
    start_from: str | None = None
    """The label of the point in ``search.start_from`` that it is."""


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
    start_from: str | None = None
    """The label of the point in ``search.start_from`` that it was."""


class SweepStudy:
    """The study of one sweep in ``folder`` (a path or a URI; one writer).

    Trials of an earlier study that it learns from stand before its own in Optuna's numbering;
    here, and for whoever asks, the sweep's own trials count from 0.
    """

    def __init__(
        self,
        folder: str,
        *,
        name: str,
        space: Sequence[Dimension],
        search: SearchConfig,
        seed: int,
        every: int,
        steps: int,
        start: Sequence[StartPoint] = (),
        earlier: Sequence[Ended] = (),
        shares: Mapping[str, float] | None = None,
    ):
        """``every`` outer steps a trial reports, ``steps`` at most over all its repeats.

        ``start`` and ``earlier`` go into a study that is made, not into one that is there.
        ``shares`` are what objectives in seconds multiply the seconds of a trial by.
        """
        self._space, self._search, self._seed = tuple(space), search, seed
        self._shares = dict(shares or {})
        self._journal = Journal(folder)
        per_lived = DIVERGED_PER_LIVED.get(search.sampler)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            self._storage = ImputingStorage(_WholeLines(self._journal.path), per_lived=per_lived)
            self.study = optuna.create_study(
                study_name=name,
                storage=self._storage,
                directions=[
                    "maximize" if o == "accuracy" else "minimize" for o in self._objectives
                ],
                load_if_exists=True,
                pruner=pruner_of(search, every=every, steps=steps),
            )
            self._id = self._storage.get_study_id_from_name(name)
            if "begun" not in self.study.user_attrs:
                self._begin(start, earlier)
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise UserError(
                f"{join(folder, STUDY_FILE)} is damaged ({type(error).__name__}). Restore it from "
                "a copy, or give another output.dir."
            ) from error
        self._live: dict[int, Trial] = {}
        self._over: dict[int, Ended] = {}
        self._earlier = sum(EARLIER in t.user_attrs for t in self._all())
        self._orphans = [t for t in self._own() if t.state is TrialState.RUNNING]
        self._exhausted = False
        """Whether all trials have been handed out once; then only lost ones come again."""

    def _begin(self, start: Sequence[StartPoint], earlier: Sequence[Ended]) -> None:
        """Fills an empty study; a crash in between leaves one that is filled up at the next try."""
        there = len(self._all())
        first = [partial(self._learn, t) for t in earlier]
        first += [partial(self._enqueue, p) for p in start]
        for add in first[there:]:
            add()
        self.study.set_user_attr("objectives", list(self._objectives))
        self.study.set_user_attr("begun", True)

    def _learn(self, trial: Ended) -> None:
        self.study.add_trial(
            create_trial(
                values=[trial.values[o] for o in self._objectives],
                params={
                    d.key: d.encode(trial.params[d.key])
                    for d in self._space
                    if d.key in trial.params
                },
                distributions={
                    d.key: d.distribution() for d in self._space if d.key in trial.params
                },
                user_attrs={EARLIER: trial.number, "params": trial.params},
            )
        )

    def _enqueue(self, point: StartPoint) -> None:
        known = {d.key: d for d in self._space}
        self.study.enqueue_trial(
            {k: known[k].encode(v) for k, v in point.params.items()},
            user_attrs={"start_from": point.label},
        )

    @property
    def _objectives(self) -> tuple[str, ...]:
        return self._search.objectives

    @property
    def _prunes_by_step(self) -> bool:
        """Whether Optuna's reports are accuracies by outer step; if not, they are kept apart."""
        return len(self._objectives) == 1 and self._search.pruner != "wilcoxon"

    # --- handing out ------------------------------------------------------------------------

    def next(self) -> Suggestion | None:
        """The next trial: first those that an interruption left, then new ones; None at the end."""
        if self._orphans:
            orphan = self._orphans.pop(0)
            written = "params" in orphan.user_attrs
            if not written:  # asked for, but not yet written down
                self._seed_sampler(orphan.number - self._earlier)
            else:  # its point is known: the sampler of the sweep has no part in it
                self.study.sampler = RandomSampler()
            trial = Trial(self.study, orphan._trial_id)
            if not written:
                return self._describe(trial)
            return self._hand_out(trial, orphan.user_attrs)
        if self._exhausted:
            return None
        own = self._own()
        waiting = sum(t.state is TrialState.WAITING for t in own)
        if not waiting and len(own) >= self._search.trials:
            self._exhausted = True
            return None
        self._seed_sampler(len(own) - waiting)
        return self._describe(self.study.ask())

    def _seed_sampler(self, number: int) -> None:
        sampler = sampler_of(self._search, self._space, self._seed, number)
        if self._search.duplicates == "skip" and self._search.sampler != "grid":
            tried = [t.user_attrs.get("params") for t in self._own()]
            seed = derive_seed(self._seed, "distinct", number)
            sampler = DistinctSampler(sampler, self._space, tried, seed)
        self.study.sampler = sampler

    def _describe(self, trial: Trial) -> Suggestion:
        params: dict[str, Any] = {}
        for d in self._space:
            if d.active(params):
                params[d.key] = d.suggest(trial)
        earlier = [t.user_attrs.get("params") for t in self._own()]
        number = trial.number - self._earlier
        trial.set_user_attr("repeat", earlier[:number].count(params))
        trial.set_user_attr("params", params)
        self._journal.sync()
        return self._hand_out(trial, trial.user_attrs)

    def _hand_out(self, trial: Trial, attrs: Mapping[str, Any]) -> Suggestion:
        number = trial.number - self._earlier
        self._live[number] = trial
        return Suggestion(number, attrs["params"], attrs["repeat"], attrs.get("start_from"))

    def take_up(self, number: int) -> None:
        """A trial was lost on its way, by no fault of its own: it is the next to be handed out."""
        del self._live[number]
        self._orphans = sorted([*self._orphans, self.frozen(number)], key=lambda t: t.number)

    # --- hearing back -----------------------------------------------------------------------

    def report(
        self,
        number: int,
        step: int,
        value: float,
        *,
        seconds: float = 0.0,
        networks: Mapping[int, float] | None = None,
    ) -> bool:
        """Records a report; says whether the pruner wants the trial to stop.

        ``seconds`` of work went into it since the report before. ``networks`` are accuracies of
        single fresh networks by their number over all repeats, which Wilcoxon's test pairs.
        """
        trial, known = self._live[number], self.frozen(number)
        if step not in _reports(known):
            if seconds:
                before = known.user_attrs.get("seconds", 0.0)
                trial.set_user_attr("seconds", round(before + seconds, 3))
            if self._prunes_by_step:
                trial.report(value, step)
            else:
                trial.set_user_attr(f"{REPORT}{step}", value)
        if self._search.pruner == "wilcoxon":
            for index, accuracy in (networks or {}).items():
                if index not in known.intermediate_values:
                    trial.report(accuracy, index)
        self._journal.sync()
        return len(self._objectives) == 1 and trial.should_prune()

    def complete(self, number: int) -> Ended:
        """The trial reached its end; its value is its last report."""
        return self._tell(number, TrialState.COMPLETE)

    def prune(self, number: int) -> Ended:
        """The pruner stopped the trial; it keeps its last report, apart from complete ones."""
        return self._tell(number, TrialState.PRUNED)

    def fail(self, number: int, reason: str, *, diverged: bool = False) -> Ended:
        """The trial could not go on. It counts, and is not replaced.

        Samplers and pruners learn from it if it ``diverged``; any other failure says nothing about
        its point.
        """
        self._live[number].set_user_attr("reason", reason)
        self._live[number].set_user_attr(DIVERGED, diverged)
        return self._tell(number, TrialState.FAIL)

    def _tell(self, number: int, state: TrialState) -> Ended:
        trial = self._live.pop(number)
        values = None
        if state is TrialState.COMPLETE:
            values = [self._measure(o, self.frozen(number)) for o in self._objectives]
        self.study.tell(trial, values, state=state)
        self._journal.sync(force=True)
        return self._ended(self.frozen(number))

    def _measure(self, objective: str, trial: FrozenTrial) -> float:
        if objective == "accuracy":
            reports = _reports(trial)
            return reports[max(reports)]
        if objective == "ipc":
            return float(trial.user_attrs["params"].get("distill.ipc", 1))
        return float(trial.user_attrs.get("seconds", 0.0) * self._shares.get(objective, 1.0))

    # --- looking ----------------------------------------------------------------------------

    def frozen(self, number: int) -> FrozenTrial:
        return self._all()[number + self._earlier]

    def is_live(self, number: int) -> bool:
        """Whether the trial has been handed out and not been told yet."""
        return number in self._live

    def live(self) -> list[int]:
        """Trials that have been handed out and not been told yet."""
        return list(self._live)

    def ended(self) -> list[Ended]:
        """All trials that are over, by number."""
        return [self._ended(t) for t in self._own() if t.state in ENDED]

    def interrupted(self) -> int:
        """Trials that have begun and are not over."""
        return sum(t.state is TrialState.RUNNING for t in self._own())

    def trial_seconds(self) -> float:
        """Seconds that trials have worked, those that are not over included."""
        return sum(t.user_attrs.get("seconds", 0.0) for t in self._own())

    def best(self, count: int = 1) -> list[Ended]:
        """The complete trials of the highest validation accuracy; of equals the earliest first.

        With several objectives those of the front, which no other is better than in all of them.
        """
        done = self.front() if len(self._objectives) > 1 else self._complete()
        return sorted(done, key=lambda t: (-(t.value or 0.0), t.number))[:count]

    def front(self) -> list[Ended]:
        """The complete trials that no other one beats, by number; with one objective the best."""
        done = self._complete()
        signs = [1 if o == "accuracy" else -1 for o in self._objectives]

        def beats(a: Ended, b: Ended) -> bool:
            gains = [
                s * (a.values[o] - b.values[o])
                for s, o in zip(signs, self._objectives, strict=True)
            ]
            return min(gains) >= 0 and max(gains) > 0

        return [t for t in done if not any(beats(other, t) for other in done)]

    def _complete(self) -> list[Ended]:
        return [t for t in self.ended() if t.state == "complete"]

    def _all(self) -> list[FrozenTrial]:
        """As they are recorded: ``self.study`` shows diverged ones imputed."""
        return self._storage.recorded(self._id)

    def _own(self) -> list[FrozenTrial]:
        return [t for t in self._all() if EARLIER not in t.user_attrs]

    def _ended(self, trial: FrozenTrial) -> Ended:
        """Nothing changes any more in a trial that is over, and many ask for all of them."""
        if trial.number not in self._over:
            self._over[trial.number] = _ended(trial, self._earlier, self._objectives)
        return self._over[trial.number]

    def remember(self, key: str, value: Any) -> None:
        """Keeps a JSON value with the study."""
        self.study.set_user_attr(key, value)
        self._journal.sync()

    def recall(self, key: str) -> Any:
        return self._remembered().get(key)

    def recall_all(self, prefix: str) -> dict[str, Any]:
        """What was remembered under keys that begin so, by the rest of the key."""
        kept = self._remembered().items()
        return {k.removeprefix(prefix): v for k, v in kept if k.startswith(prefix)}

    def _remembered(self) -> dict[str, Any]:
        """Without the copy of all of it that ``study.user_attrs`` makes."""
        return self._storage.get_study_user_attrs(self._id)

    def sync(self, *, force: bool = False) -> None:
        """Puts the journal where it belongs, at once or if that was not done lately.

        Any thread may call it.
        """
        self._journal.sync(force=force)

    def close(self) -> None:
        """Puts the journal where it belongs; there is no study any more. Raises PlaceError."""
        self._journal.close()


def has_begun(folder: str) -> bool:
    """Whether the folder's study is past its beginning, in which it takes in earlier trials."""
    kept = read_journal(folder)
    return kept is not None and b'"begun"' in kept


@dataclass(frozen=True)
class Begun:
    """A study as its journal says."""

    ended: list[Ended]
    interrupted: int
    """Trials that have begun and are not over."""
    remembered: dict[str, Any]


def read_study(folder: str) -> tuple[list[Ended], Any] | None:
    """The trials of a sweep and the fingerprint of its images, from a copy; None without a study.

    The sweep may be under way.
    """
    begun = read_begun(folder)
    return None if begun is None else (begun.ended, begun.remembered.get("data"))


def read_begun(folder: str) -> Begun | None:
    """The study of a sweep, from a copy; None without one."""
    kept = read_journal(folder)
    if kept is None:
        return None
    with tempfile.TemporaryDirectory(prefix="ftd-study-") as copy:
        path = os.path.join(copy, STUDY_FILE)
        with open(path, "wb") as f:
            f.write(kept)
        try:
            storage = JournalStorage(JournalFileBackend(path))
            name = storage.get_all_studies()[0].study_name
            study = optuna.load_study(study_name=name, storage=storage)
            trials, attrs = study.get_trials(deepcopy=False), study.user_attrs
        except (ValueError, TypeError, KeyError, AssertionError, IndexError) as error:
            raise UserError(
                f"{join(folder, STUDY_FILE)} is damaged ({type(error).__name__}). Restore it from "
                "a copy."
            ) from error
    own = [t for t in trials if EARLIER not in t.user_attrs]
    offset = len(trials) - len(own)
    names = attrs.get("objectives", ["accuracy"])
    return Begun(
        ended=[_ended(t, offset, names) for t in own if t.state in ENDED],
        interrupted=sum(t.state is TrialState.RUNNING for t in own),
        remembered=dict(attrs),
    )


class _WholeLines(JournalFileBackend):
    """An append that fails leaves nothing: onto half a line the next one would be written."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        size = os.path.getsize(self._file_path)
        try:
            super().append_logs(logs)
        except OSError:
            os.truncate(self._file_path, size)
            raise


def _ended(trial: FrozenTrial, offset: int, objectives: Sequence[str]) -> Ended:
    names = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
    }
    reports = _reports(trial)
    complete = trial.state is TrialState.COMPLETE
    return Ended(
        number=trial.number - offset,
        state=names[trial.state],
        params=trial.user_attrs.get("params", {}),
        value=reports[max(reports)] if reports else None,
        reason=trial.user_attrs.get("reason"),
        reports=reports,
        repeat=trial.user_attrs.get("repeat", 0),
        values=dict(zip(objectives, trial.values, strict=True)) if complete else {},
        seconds=trial.user_attrs.get("seconds", 0.0),
        start_from=trial.user_attrs.get("start_from"),
    )


def _reports(trial: FrozenTrial) -> dict[int, float]:
    """Outer step -> validation accuracy."""
    kept = {
        int(k.removeprefix(REPORT)): v for k, v in trial.user_attrs.items() if k.startswith(REPORT)
    }
    return kept or dict(trial.intermediate_values)
