"""One run of a sweep: search, final evaluation, summary. What it is told, it tells on."""

import contextlib
import json
import pickle
import signal
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
import yaml
from ray.exceptions import RayError
from rich.console import Console

from ftd.errors import UserError
from ftd_ray.account import ExpertAccount
from ftd_ray.bridge import run_search
from ftd_ray.cluster import check_cluster, start_ray
from ftd_ray.config import SweepConfig
from ftd_ray.experts.client import BrokerClient
from ftd_ray.experts.orders import Urgency
from ftd_ray.failures import diagnose, most_failed
from ftd_ray.final import FinalEvaluation
from ftd_ray.mended import other_images
from ftd_ray.pictures import short_names
from ftd_ray.plan import Plan
from ftd_ray.presets import start_points
from ftd_ray.progress import Progress
from ftd_ray.publish import publish
from ftd_ray.results import result_text
from ftd_ray.search import Ended, Suggestion, SweepStudy
from ftd_ray.signals import Interrupted, Signals
from ftd_ray.storage import PlaceError, join, read_bytes, write_bytes
from ftd_ray.store import TrajectoryStore
from ftd_ray.store.usage import Usage
from ftd_ray.tracking.tracker import Tracker
from ftd_ray.trial import (
    Report,
    TrialSpec,
    forget_checkpoint,
    forget_checkpoints,
)
from ftd_ray.waiting import NodeWatch
from ftd_ray.worked import Worked
from ftd_ray.workers import TrialOrder, start_pool

REMEMBER_SECONDS = 60
"""How much of its time a killed driver forgets at most."""

TRIALS_OF_A_SET = 3
"""With so many for each expert set, all sets are likely to be asked for."""

STOPPED_BY = {"hours": "wall time", "gpu_hours": "GPU hours"}
"""Budgets, as a summary calls what ended a search before its last trial."""


class Sweep:
    """One run of a sweep, from the start of Ray to the summary."""

    def __init__(
        self,
        config: SweepConfig,
        plan: Plan,
        tracker: Tracker,
        console: Console,
        command: str,
        signals: Signals,
    ):
        self.config, self.plan, self.tracker, self.console = config, plan, tracker, console
        self._command, self._signals = command, signals
        self._began = time.monotonic()
        self._names = short_names(config.space)
        self._text = yaml.safe_dump(config.resolved(), sort_keys=False)
        self._halted = ""
        self._stopped_by: str | None = None
        self._remembered = time.monotonic()
        self._search_over: float | None = None
        self._best: dict[str, bytes] = {}
        """Files of the best set, by name."""
        self._housekeeping = ThreadPoolExecutor(1, "housekeeping")
        """What an object store may take its time for, and a resume does where it was not done."""
        self._pool: Any = None
        self._asked_pool: Any = None
        self._phases: dict[str, float] = {}
        self._phase_began = time.monotonic()
        self._final_worked = self._evaluating = 0.0
        self._first_report: float | None = None
        self._worked = Worked()
        self._sets = {s.key: s for s in plan.sets}
        self._experts = BrokerClient(config, plan.data)
        self._usage = Usage(
            TrajectoryStore(config.store.uri), self._sets, config.name, config.output_dir
        )
        self._progress = Progress(
            console, config.search.trials, config.search.concurrency, self._names
        )
        self._say = self._progress.say

    # --- the whole --------------------------------------------------------------------------

    def run(self, address: str | None) -> int:
        """Runs to the end; returns the exit code. Raises UserError or Interrupted."""
        start_ray(address)
        self._signals.arm()  # Ray has taken SIGTERM for itself
        self._signals.at_once(self._keep_state)
        self._phase("start of Ray")
        try:
            self._nodes = NodeWatch(self.config, check_cluster(self.config), self._say)
            self._nodes.announce()
            if address is not None:  # nodes may come that have not got the data set
                self._experts.ship()
            try:
                self._open()
                with self._progress:
                    self._search()
                self._phase("search")
                summary = self._conclude()
            except (Interrupted, KeyboardInterrupt) as interrupt:
                self._interrupted()
                if isinstance(interrupt, KeyboardInterrupt):
                    raise Interrupted(signal.SIGINT) from None
                raise
            except (PlaceError, OSError, pa.ArrowException) as error:
                self._interrupted()
                raise UserError(
                    f"the sweep stopped, and can go on when it is mended: {error}"
                ) from error
            except BaseException:
                with contextlib.suppress(Exception):
                    self._write_summary(self._summary("failed"))
                self.tracker.finish("FAILED")
                raise
            finally:
                self._housekeeping.shutdown(wait=False, cancel_futures=True)
                if hasattr(self, "study"):
                    self._close_study()
                self._experts.end()
                self._usage.end()
        finally:
            ray.shutdown()
        print()
        self.console.print(result_text(summary, self.config.space), soft_wrap=True, markup=False)
        return 0 if summary["state"] == "done" else 1

    def _open(self) -> None:
        config = self.config
        anew = other_images(config.output_dir, self.plan.data.fingerprint)
        if anew is not None:
            anew.check()
            anew.set_aside()
        write_bytes(join(config.output_dir, "sweep.yaml"), self._text.encode())
        self.study = SweepStudy(
            config.output_dir,
            name=config.name,
            space=config.space,
            search=config.search,
            seed=config.seed,
            every=config.evaluate.every,
            steps=max(config.values_of("distill.iterations")) * config.search.repeats,
            start=start_points(config),
            earlier=self.plan.earlier.trials if self.plan.earlier else (),
            shares={
                "gpu_seconds": config.resources.gpus_per_trial,
                "cpu_seconds": config.resources.cpus_per_trial,
            },
        )
        for key, value in (anew.remembered if anew is not None else {}).items():
            self.study.remember(key, value)
        self.study.remember("data", self.plan.data.fingerprint)
        self._usage.renew()
        self._seconds_before = float(self.study.recall("seconds") or 0.0)
        self._search_before = float(self.study.recall("search_seconds") or 0.0)
        self._search_began = time.monotonic()
        self._account = ExpertAccount(self.study, config.resources.expert_gpus or 0.0)
        ended = self.study.ended()
        if ended:
            with contextlib.suppress(UserError, OSError, pa.ArrowException):  # only housekeeping
                forget_checkpoints(join(config.output_dir, "trials"), {t.number for t in ended})
            self._say(f"resumed    {len(ended)} of {config.search.trials} trials are done")
        self._progress.already_ended(ended)
        if self.study.recall("mark") is None:
            self.study.remember("mark", uuid.uuid4().hex)
            self.study.sync(force=True)
        self.tracker.start(
            config.name,
            config.resolved(),
            self._names,
            self.study.recall("mlflow_run"),
            mark=self.study.recall("mark"),
        )
        self.study.remember("mlflow_run", self.tracker.parent_id)
        self.study.sync(force=True)
        if anew is not None:
            self.tracker.drop_trials()
        self.tracker.reconcile(ended, lambda t: self.plan.expert_set(t.params))
        self.tracker.log_text(self._text, "sweep.yaml")

    def _search(self) -> None:
        config = self.config
        left = config.search.trials - len(self.study.ended())
        if left <= 0:
            return
        self._watch_budget()
        if self._stopped_by:
            return
        self._open_pool()
        sizes = {"experts.count", "experts.epochs"} & {d.key for d in config.space}
        if left >= TRIALS_OF_A_SET * len(self.plan.sets) and not sizes:  # else which, is open
            self._experts.expect(s.experts for s in self.plan.sets)
        run_search(
            self.study,
            self,
            order=self._order,
            tick=self._tick,
            over=lambda: self._stopped_by is not None,
            concurrency=config.search.concurrency,
        )
        self._housekeeping.shutdown()
        if self.study.interrupted() == 0 and len(self.study.ended()) >= config.search.trials:
            self._stopped_by = None  # the last trial spent it
        self._experts.look()
        if self._stopped_by:
            self._experts.end()
            self._say(
                f"budget     {self._budget_text()} is spent; the sweep ends with what is done"
            )

    def _conclude(self) -> dict[str, Any]:
        """Evaluates the winner and the baselines, writes the results, closes MLflow's runs."""
        self._search_over = self._search_seconds()
        config = self.config
        finalists = self.study.best(config.search.finalists)
        if not finalists:
            summary = self._summary("failed")
        else:
            final = FinalEvaluation(
                config,
                self.plan.data,
                self._experts.shipment,
                self._open_pool(),
                self._say,
                self._final_tick,
                self._worked.just_now,
            )
            results, self._best = final.run([(t, self._set_of(t)) for t in finalists])
            self._phase("final")
            self._final_worked = final.worked
            for name, content in self._best.items():
                write_bytes(join(config.output_dir, "best", name), content)
            summary = self._summary("done") | results
            summary["seconds"] = self._seconds()
        self.tracker.fleet(self._experts.status, last=True)
        publish(config, self.study, summary, self._best, self._text, self.tracker)
        self.tracker.finish("FINISHED" if finalists else "FAILED")
        self._tell_notes()
        summary["mlflow"]["waiting"] = self.tracker.waiting
        summary["report"] = join(config.output_dir, "report.html")
        self._phase("results")
        self._write_summary(summary)  # last: with it the sweep is over
        return summary

    def _final_tick(self) -> None:
        self._signals.check()
        self._nodes.look(None, self._pool)

    def _close_study(self) -> None:
        """What stopped a sweep may still be in the way, and is said already."""
        try:
            self.study.close()
        except (UserError, OSError, pa.ArrowException) as error:
            self._say(
                f"warning    the end of the study is not in {self.config.output_dir}: {error}"
            )

    def _open_pool(self) -> Any:
        r = self.config.resources
        if self._pool is None:
            worked = any(t.state in ("complete", "pruned") for t in self.study.ended())
            self._pool = start_pool(
                r.cpus_per_trial, r.gpus_per_trial, r.trial_memory, worked=worked
            )
        return self._pool

    def _set_of(self, trial: Ended) -> bytes:
        data = read_bytes(join(self._trial_folder(trial.number), "synthetic.npz"))
        if data is None:
            raise UserError(
                f"the set of trial {trial.number} is gone from "
                f"{self._trial_folder(trial.number)}. Restore the sweep's folder."
            )
        return data

    # --- what the search tells (ftd_ray.bridge.Listener) ------------------------------------

    def trial_started(self, suggestion: Suggestion) -> None:
        self._progress.trial_started(suggestion)
        key, place = self.plan.expert_set(suggestion.params)
        identity = self.config.identity(self.config.at(suggestion.params).experts, self.plan.data)
        self.tracker.expert_set(key, identity, place, dict(self._sets[key].params))
        self.tracker.trial_started(suggestion, key, place)

    def trial_reported(self, number: int, report: Report) -> None:
        self._worked.just_now(report.seconds)
        self._evaluating += report.evaluating
        self._first_report = self._first_report or time.monotonic() - self._began
        self._progress.trial_reported(number, report)
        self.tracker.trial_reported(number, report)

    def trial_ended(self, ended: Ended) -> None:
        if self._pool is not None:
            self._pool.give_back.remote(ended.number, clean=ended.state != "failed")
        self._progress.trial_ended(ended)
        self._warn_of_failures()
        self._housekeeping.submit(_tidy, self._trial_folder(ended.number))
        self._remember()
        self.tracker.trial_ended(ended)

    def halted(self, number: int, reason: str) -> None:
        """A trial's files are out of reach, and will be for all others: the loop ends."""
        self._halted = f"trial {number}: {reason}"

    # --- parts ------------------------------------------------------------------------------

    def _order(self, suggestion: Suggestion) -> TrialOrder:
        """The work that a suggestion stands for."""

        config, r = self.config, self.config.resources
        point = config.at(suggestion.params)
        identity = config.identity(point.experts, self.plan.data)
        spec = TrialSpec(
            number=suggestion.number,
            seed=config.seed,
            repeat=suggestion.repeat,
            repeats=config.search.repeats,
            dataset=config.dataset,
            sender=self._experts.shipment,
            network=point.experts.network,
            identity=identity,
            experts=point.experts.count,
            distill=point.distill,
            evaluate=config.evaluate,
            numerics=r.trial_numerics,
            store_uri=config.store.uri,
            cache_bytes=self.plan.cache_bytes,
            folder=self._trial_folder(suggestion.number),
        )
        experts = self._experts.order(point.experts, Urgency.TRIAL)
        self._experts.broker.ensure.remote(experts)  # before the trial's own process asks
        return TrialOrder(
            number=suggestion.number,
            spec=pickle.dumps(spec),
            experts=experts,
            broker=self._experts.broker,
            pool=self._pool,
        )

    def _tick(self) -> None:
        """At every turn of the loop: signals, and about once a second word of the experts."""
        self._signals.check()
        if self._halted:
            raise PlaceError(self._halted)
        if self._experts.poll():
            for seconds in self._account.update(self._experts.status):
                self._worked.just_now(seconds)
            self._usage.renew()
            self._progress.experts(self._experts.status)
            if time.monotonic() - self._remembered > REMEMBER_SECONDS:
                self._remember()
            self.study.sync()
            self._watch_budget()
            self.tracker.fleet(self._experts.status)
            self._nodes.look(self._experts.status, self._pool)
            self._exchange_left_out()
            self._tell_notes()

    def _exchange_left_out(self) -> None:
        """A node that fails trials gets no experts, and the other way round."""
        if self._pool is None:
            return
        if self._asked_pool is None:
            self._asked_pool = self._pool.left_out.remote(self._experts.status.left_out)
        elif ray.wait([self._asked_pool], timeout=0)[0]:
            asked, self._asked_pool = self._asked_pool, None
            with contextlib.suppress(RayError):
                self._experts.leave_out(ray.get(asked))

    def _remember(self) -> None:
        self._remembered = time.monotonic()
        self.study.remember("seconds", self._seconds())
        self.study.remember("search_seconds", self._search_seconds())

    # --- the budget -------------------------------------------------------------------------

    def _used(self) -> dict[str, float]:
        """Hours and GPU hours of the search so far, over all its sessions."""
        trials = self.study.trial_seconds() * self.config.resources.gpus_per_trial
        gpu_seconds = trials + self._account.gpu_seconds
        return {"hours": self._search_seconds() / 3600, "gpu_hours": gpu_seconds / 3600}

    def _watch_budget(self) -> None:
        """When it is spent, Tune is told to stop, and whatever still works is ended."""
        search, used = self.config.search, self._used()
        limits = {"hours": search.max_hours, "gpu_hours": search.max_gpu_hours}
        spent = next((k for k, v in limits.items() if v is not None and used[k] >= v), None)
        if spent is None or self._stopped_by:
            return
        self._stopped_by = STOPPED_BY[spent]
        self._experts.end()
        if self._pool is not None:
            self._pool.close.remote()
            self._pool = None

    def _budget_text(self) -> str:
        search = self.config.search
        if self._stopped_by == STOPPED_BY["hours"]:
            return f"search.max_hours={search.max_hours:g}"
        return f"search.max_gpu_hours={search.max_gpu_hours:g}"

    def _search_seconds(self) -> float:
        """Wall time of the search over all sessions, without final evaluations."""
        if self._search_over is not None:
            return self._search_over
        return round(self._search_before + time.monotonic() - self._search_began, 1)

    # --- results ----------------------------------------------------------------------------

    def _summary(self, state: str) -> dict[str, Any]:
        config = self.config
        ended = self.study.ended()
        experts = self._account
        experts.update(self._experts.status)
        self._remember()
        several = len(config.search.objectives) > 1
        front = [
            {"trial": t.number, "params": t.params, "values": t.values} for t in self.study.front()
        ]
        return {
            "name": config.name,
            "state": state,
            "stopped_by": self._stopped_by or "trials",
            "seconds": self._seconds(),
            "best": None,
            "baseline": None,
            "trials": {
                s: sum(e.state == s for e in ended) for s in ("complete", "pruned", "failed")
            },
            "experts": {
                "built": len(experts.built),
                "reused": experts.reused,
                "seconds": experts.seconds,
                "bytes": self._bytes_of(experts.built),
            },
            "left_out": list(self._experts.left_out.values()),
            "interrupted": self.study.interrupted(),
            "failures": [asdict(f) for f in diagnose(ended, config.space)],
            "objectives": list(config.search.objectives),
            **({"front": front} if several else {}),
            "budget": self._used(),
            "command": self._command,
            "phases": self._phases,
            "first_report": self._first_report and round(self._first_report, 2),
            "worked": {
                "experts": experts.seconds,
                "trials": self.study.trial_seconds(),
                "evaluation": round(self._evaluating, 2),
                "final": self._final_worked,
                "wall": round(self._worked.covered(), 2),
            },
            "mlflow": {
                "tracking_uri": config.tracking.uri,
                "experiment": config.experiment,
                "parent_run_id": self.tracker.parent_id,
                "trials_path": self.tracker.trials_path(),
            },
            "protocol": {
                "selected_on": "validation images held out of train",
                "test": "the best configuration only, once, at the end",
                "networks": config.evaluate.networks,
                "epochs": config.evaluate.epochs,
                "finalists": config.search.finalists,
            },
        }

    def _bytes_of(self, experts: Iterable[tuple[str, int]]) -> int:
        """Bytes on disk of (set, expert)s; 0 where the store does not answer."""
        store = TrajectoryStore(self.config.store.uri)
        sizes: dict[str, dict[int, int]] = {}
        total = 0
        with contextlib.suppress(OSError, UserError):
            for key, index in experts:
                sizes[key] = sizes.get(key) or store.at(key).sizes()
                total += sizes[key].get(index, 0)
        return total

    def _keep_state(self) -> None:
        """What has to be done first: whoever stops a job, such as Ray, kills it 3 s later.

        Called where a signal comes too, beside whatever this process waits for.
        """
        self.tracker.interrupt()
        if hasattr(self, "study"):
            with contextlib.suppress(UserError, OSError, pa.ArrowException):  # told when it closes
                self.study.sync(force=True)

    def _interrupted(self) -> None:
        self._keep_state()
        done = len(self.study.ended()) if hasattr(self, "study") else 0
        self._say(f"interrupted with {done} of {self.config.search.trials} trials done. Go on by:")
        self._say(f"  {self._command}")
        with contextlib.suppress(Exception):
            self._write_summary(self._summary("interrupted"))
        self.tracker.finish("KILLED")
        self._tell_notes()

    def _write_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(summary, indent=2) + "\n"
        write_bytes(join(self.config.output_dir, "summary.json"), text.encode())

    def _warn_of_failures(self) -> None:
        """Says once, over all sessions, that most trials fail for one reason."""
        if self.study.recall("warned_of_failures"):
            return
        trials = self.config.search.trials
        warning = most_failed(self.study.ended(), self.config.space, trials)
        if warning is not None:
            self._say(f"warning    {warning}")
            self.study.remember("warned_of_failures", True)

    def _tell_notes(self) -> None:
        for note in [*self._experts.new_notes(), *self.tracker.new_notes()]:
            self._say(f"warning    {note}")

    def _trial_folder(self, number: int) -> str:
        return join(self.config.output_dir, "trials", f"{number:04d}")

    def _phase(self, name: str) -> None:
        """A part of this session is over; a summary says how long each took."""
        now = time.monotonic()
        self._phases[name] = round(now - self._phase_began, 2)
        self._phase_began = now

    def _seconds(self) -> float:
        return round(self._seconds_before + time.monotonic() - self._began, 1)


def _tidy(folder: str) -> None:
    """Removes what a trial that has ended needs no more."""
    with contextlib.suppress(UserError, OSError, pa.ArrowException):
        forget_checkpoint(folder)
