"""One run of a sweep: search, final evaluation, summary. What it is told, it tells on."""

import contextlib
import io
import json
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import yaml
from ray import tune
from rich.console import Console

from ftd.errors import UserError
from ftd.evaluate import Score
from ftd.expert import set_key
from ftd.synthetic import SyntheticSet
from ftd_ray.bridge import StudyScheduler, StudySearcher, Ticker
from ftd_ray.cluster import check_cluster, start_ray
from ftd_ray.config import SweepConfig
from ftd_ray.experts.client import BrokerClient
from ftd_ray.pictures import short_names, study_pictures
from ftd_ray.plan import Plan
from ftd_ray.progress import Progress
from ftd_ray.results import result_text
from ftd_ray.search import Ended, Suggestion, SweepStudy
from ftd_ray.signals import Interrupted, Signals
from ftd_ray.storage import PlaceError, join, read_bytes, write_bytes
from ftd_ray.store import TrajectoryStore
from ftd_ray.store.usage import Usage
from ftd_ray.tracking import Tracker, tolerant
from ftd_ray.trial import FinalSpec, Report, TrialSpec, forget_checkpoint
from ftd_ray.workers import LIGHT_BYTES, SweepTrial, TrialOrder, evaluate_finally

BASELINE_LR = 0.01


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
        self._warned = False
        self._halted = ""
        self._remembered = (0, 0)
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
        try:
            check_cluster(self.config)
            if address is not None:  # nodes may come that have not got the data set
                self._experts.ship()
            try:
                self._open()
                with self._progress:
                    self._search()
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
                with contextlib.suppress(Exception):
                    self.tracker.finish("FAILED")
                raise
            finally:
                self._experts.end()
                self._usage.end()
                if hasattr(self, "study"):
                    self.study.close()
        finally:
            ray.shutdown()
        print()
        self.console.print(result_text(summary, self.config.space), soft_wrap=True, markup=False)
        return 0 if summary["state"] == "done" else 1

    def _open(self) -> None:
        config = self.config
        text = yaml.safe_dump(config.resolved(), sort_keys=False)
        write_bytes(join(config.output_dir, "sweep.yaml"), text.encode())
        self.study = SweepStudy(
            config.output_dir,
            name=config.name,
            space=config.space,
            search=config.search,
            seed=config.seed,
            every=config.evaluate.every,
            iterations=max(config.values_of("distill.iterations")),
        )
        data = self.study.recall("data")
        if data not in (None, self.plan.data.fingerprint):
            raise UserError(
                f"{config.output_dir} was started on other images (fingerprint {data[:8]}; now "
                f"{self.plan.data.fingerprint[:8]}). Restore them, or give another output.dir."
            )
        self.study.remember("data", self.plan.data.fingerprint)
        self._usage.renew()
        self._seconds_before = float(self.study.recall("seconds") or 0.0)
        self._experts_before = self.study.recall("experts") or {}
        ended = self.study.ended()
        if ended:
            self._say(f"resumed    {len(ended)} of {config.search.trials} trials are done")
        self._progress.already_ended(ended)
        with self._tracking():
            self.tracker.start(
                config.name, config.resolved(), self._names, self.study.recall("mlflow_run")
            )
            self.study.remember("mlflow_run", self.tracker.parent_id)
            self.tracker.log_text(text, "sweep.yaml")

    def _search(self) -> None:
        config = self.config
        left = config.search.trials - len(self.study.ended())
        if left <= 0:
            return
        scratch = tempfile.mkdtemp(prefix="ftd-tune-")
        try:
            tune.Tuner(
                tune.with_resources(
                    SweepTrial, tune.PlacementGroupFactory([{"CPU": 0, "memory": LIGHT_BYTES}])
                ),
                tune_config=tune.TuneConfig(
                    search_alg=StudySearcher(self.study, self._order, self),
                    scheduler=StudyScheduler(self.study, self),
                    num_samples=left,
                    max_concurrent_trials=config.search.concurrency,
                    reuse_actors=False,
                ),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[Ticker(self._tick)],
                ),
            ).fit()
            self._experts.look()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _conclude(self) -> dict[str, Any]:
        """Evaluates the winner and the baseline, writes the results, closes MLflow's runs."""
        best = self.study.best()
        if best is None:
            summary = self._summary("failed")
        else:
            summary = self._summary("done") | self._evaluate(best)
            summary["seconds"] = self._seconds()
        self._publish(summary)
        with self._tracking():
            self.tracker.finish("FINISHED" if best is not None else "FAILED")
        self._write_summary(summary)  # last: with it the sweep is over
        return summary

    def _evaluate(self, best: Ended) -> dict[str, Any]:
        config, n = self.config, self.config.evaluate.networks
        data = read_bytes(join(self._trial_folder(best.number), "synthetic.npz"))
        if data is None:
            raise UserError(
                f"the set of trial {best.number} is gone from {self._trial_folder(best.number)}. "
                "Restore the sweep's folder."
            )
        synthetic = SyntheticSet.load(io.BytesIO(data))
        self._say(
            f"final      trial {best.number} and random real images, {n} fresh networks each, "
            f"{config.evaluate.epochs} epochs"
        )
        spec = partial(
            FinalSpec,
            dataset=config.dataset,
            sender=self._experts.shipment,
            numerics=config.resources.trial_numerics,
            seed=config.seed,
            synthetic=data,
        )
        rates = sorted({BASELINE_LR, synthetic.syn_lr})
        r = config.resources
        results = evaluate_finally(
            [spec(), *(spec(baseline_lr=lr) for lr in rates)],
            n,
            cpus=r.cpus_per_trial,
            gpus=r.gpus_per_trial,
            at_once=config.search.concurrency,
            tick=self._signals.check,
        )
        scores = [tuple(Score(tuple(s[i] for s in one)) for i in (0, 1)) for one in results]
        (val, test), *baselines = scores
        chosen = max(range(len(rates)), key=lambda i: baselines[i][0].mean)
        synthetic.provenance["scores"] = {
            "validation": val.to_json(),
            "test": test.to_json(),
            "random_real_test": baselines[chosen][1].to_json(),
        }
        files = self._best_files(synthetic)
        for name, content in files.items():
            write_bytes(join(config.output_dir, "best", name), content)
        return {
            "best": {
                "trial": best.number,
                "params": best.params,
                "val_accuracy": best.value,
                "val_accuracy_full": val.to_json(),
                "test_accuracy": test.to_json(),
                "artifact": join(config.output_dir, "best", "synthetic.npz"),
            },
            "baseline": {
                "random_real": baselines[chosen][1].to_json() | {"lr": rates[chosen]},
            },
        }

    # --- what the search tells (ftd_ray.bridge.Listener) ------------------------------------

    def trial_started(self, suggestion: Suggestion) -> None:
        self._progress.trial_started(suggestion)
        experts = self.config.at(suggestion.params).experts
        identity = self.config.identity(experts, self.plan.data)
        key = set_key(identity)
        source = TrajectoryStore(self.config.store.uri).location(key)
        with self._tracking():
            self.tracker.expert_set(key, identity, source, dict(self._sets[key].params))
            self.tracker.trial_started(suggestion, key, source)

    def trial_reported(self, number: int, report: Report) -> None:
        self._progress.trial_reported(number, report)
        with self._tracking():
            self.tracker.trial_reported(number, report)

    def trial_ended(self, ended: Ended) -> None:
        self._progress.trial_ended(ended)
        forget_checkpoint(self._trial_folder(ended.number))
        self.study.remember("experts", self._expert_account())
        self.study.remember("seconds", self._seconds())
        with self._tracking():
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
            dataset=config.dataset,
            sender=self._experts.shipment,
            network=point.experts.network,
            identity=identity,
            experts=point.experts.count,
            distill=point.distill,
            evaluate=config.evaluate,
            numerics=r.trial_numerics,
            store_uri=config.store.uri,
            cache_bytes=config.store.cache_mb * 2**20,
            folder=self._trial_folder(suggestion.number),
        )
        return TrialOrder(
            number=suggestion.number,
            spec=pickle.dumps(spec),
            experts=self._experts.order(point.experts, urgent=True),
            broker=self._experts.broker,
            cpus=r.cpus_per_trial,
            gpus=r.gpus_per_trial,
        )

    def _tick(self) -> None:
        """At every turn of the loop: signals, and about once a second word of the experts."""
        self._signals.check()
        if self._halted:
            raise PlaceError(self._halted)
        if self._experts.poll():
            self._usage.renew()
            self._progress.experts(self._experts.status)
            if self._progress.expert_counts != self._remembered:  # a killed driver built them too
                self._remembered = self._progress.expert_counts
                self.study.remember("experts", self._expert_account())
            for note in self._experts.new_notes():
                self._say(f"warning    {note}")
            with self._tracking():
                self.tracker.fleet(self._experts.status)

    def _expert_account(self) -> dict[str, Any]:
        """What this sweep built and what it found, over all its sessions."""
        sets, before = self._experts.status.sets, self._experts_before
        built = {f"{key}/{i}" for key, s in sets.items() for i in s.built}
        built |= set(before.get("built", []))
        there = {f"{key}/{i}" for key, s in sets.items() for i in s.present}
        reused = (there | set(before.get("reused", []))) - built
        seconds = sum(sum(s.built.values()) for s in sets.values()) + before.get("seconds", 0.0)
        return {"built": sorted(built), "reused": sorted(reused), "seconds": seconds}

    def _summary(self, state: str) -> dict[str, Any]:
        config = self.config
        ended = self.study.ended()
        experts = self._expert_account()
        self.study.remember("experts", experts)
        self.study.remember("seconds", self._seconds())
        return {
            "name": config.name,
            "state": state,
            "seconds": self._seconds(),
            "best": None,
            "baseline": None,
            "trials": {
                s: sum(e.state == s for e in ended) for s in ("complete", "pruned", "failed")
            },
            "experts": {
                "built": len(experts["built"]),
                "reused": len(experts["reused"]),
                "seconds": experts["seconds"],
                "bytes": self._bytes_of(experts["built"]),
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
            },
        }

    def _bytes_of(self, experts: Iterable[str]) -> int:
        """Bytes on disk of experts written KEY/NUMBER; 0 where the store does not answer."""
        store = TrajectoryStore(self.config.store.uri)
        total = 0
        with contextlib.suppress(OSError, UserError):
            for expert in experts:
                key, _, index = expert.partition("/")
                manifest = store.at(key).manifest(int(index))
                total += sum(part.bytes for part in manifest.parts) if manifest else 0
        return total

    def _publish(self, summary: dict[str, Any]) -> None:
        """Pictures, expert sets and the best set to MLflow, pictures to the folder too."""

        pictures = study_pictures(self.study.ended(), self.config.space)
        for name, figure in pictures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, dpi=110)
            write_bytes(join(self.config.output_dir, f"{name}.png"), buffer.getvalue())
        with self._tracking():
            self.tracker.fleet(self._experts.status, last=True)
            for name, figure in pictures.items():
                self.tracker.log_figure(figure, f"{name}.png")
            if summary["best"]:
                best = join(self.config.output_dir, "best")
                names = ("synthetic.npz", "synthetic.png")
                found = {n: read_bytes(join(best, n)) for n in names}
                self.tracker.log_files({n: c for n, c in found.items() if c is not None}, "best")
            self.tracker.log_summary(summary)

    def _best_files(self, synthetic: SyntheticSet) -> dict[str, bytes]:
        return {"synthetic.npz": synthetic.to_bytes(), "synthetic.png": synthetic.png()}

    def _interrupted(self) -> None:
        with contextlib.suppress(Exception):
            self._write_summary(self._summary("interrupted"))
        with contextlib.suppress(Exception):
            self.tracker.finish("KILLED")
        done = len(self.study.ended()) if hasattr(self, "study") else 0
        self._say(f"interrupted with {done} of {self.config.search.trials} trials done. Go on by:")
        self._say(f"  {self._command}")

    def _write_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(summary, indent=2) + "\n"
        write_bytes(join(self.config.output_dir, "summary.json"), text.encode())

    @contextlib.contextmanager
    def _tracking(self) -> Iterator[None]:
        def warn(text: str) -> None:
            if not self._warned:
                self._warned = True
                self._say(f"warning    {text}")

        with tolerant(warn):
            yield

    def _trial_folder(self, number: int) -> str:
        return join(self.config.output_dir, "trials", f"{number:04d}")

    def _seconds(self) -> float:
        return round(self._seconds_before + time.monotonic() - self._began, 1)
