"""The search: what a trial costs the driver.

Trials of no cost go through the real study, bridge, tracker, pool and Tune.
"""

import io
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from PIL import Image

from benchmarks.report import ROOT, own_memory
from ftd.distill import StepRecord
from ftd_ray.bridge import run_search
from ftd_ray.cluster import start_ray
from ftd_ray.config import SweepConfig, load_config
from ftd_ray.experts.orders import ExpertOrder
from ftd_ray.journal import STUDY_FILE
from ftd_ray.pictures import short_names
from ftd_ray.search import Ended, Suggestion, SweepStudy
from ftd_ray.tracking.tracker import Tracker
from ftd_ray.trial import Report
from ftd_ray.workers import OnNode, TrialOrder, start_pool

TRIALS = 1000
CURVE = 30
"""Outer steps that a report of the tracker's own measurement carries."""
REPORTS = 200


def run() -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="ftd-bench-"))
    try:
        found = {
            "tracker": tracker_cost(folder / "tracker"),
            "alone": {s: trials_alone(folder / f"alone-{s}", s) for s in ("random", "tpe")},
            "tune": trials_by_tune(folder / "tune"),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


# --- trials of no cost ----------------------------------------------------------------------


def zero_report(step: int, *, curve: int = 1, done: bool = True, seed: int = 0) -> Report:
    """A report as a trial makes it, about nothing."""
    value = 0.5 + (seed * 7919 % 101) / 1000
    records = tuple(
        StepRecord(step - i, 0.5, 0.01, 1.0, expert=0, start_epoch=0) for i in range(curve)
    )
    return Report(
        step=step,
        val_accuracy=value,
        val_std=0.0,
        networks={0: value},
        curve=records,
        seconds=0.01,
        picture=PICTURE,
        done=done,
    )


def _picture() -> bytes:
    """Ten classes of 8 x 8 pixels, enlarged, as the digits sweep shows them."""
    buffer = io.BytesIO()
    small = Image.effect_noise((80, 8), 64).convert("RGB")
    small.resize((640, 64), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = _picture()


class ZeroWorker(OnNode):
    """A trial worker whose one report is there at once."""

    def begin(self, spec: bytes) -> None:
        self._number = pickle.loads(spec)

    def report(self) -> tuple[bytes, bool]:
        return pickle.dumps(zero_report(90, seed=self._number)), True


class ZeroBroker:
    """Has every expert set."""

    def ensure(self, order: Any) -> list[int]:
        return [0]


class ToTracker:
    """What the driver does with the search's news, as far as MLflow goes."""

    def __init__(self, study: SweepStudy, tracker: Tracker, pool: Any = None):
        self.study, self.tracker, self.pool = study, tracker, pool

    def trial_started(self, suggestion: Suggestion) -> None:
        self.tracker.trial_started(suggestion, "0" * 20, "store")

    def trial_reported(self, number: int, report: Report) -> None:
        self.tracker.trial_reported(number, report)

    def trial_ended(self, ended: Ended) -> None:
        if self.pool is not None:
            self.pool.give_back.remote(ended.number, clean=True)
        self.tracker.trial_ended(ended)

    def halted(self, number: int, reason: str) -> None:
        raise AssertionError(reason)


@contextmanager
def driver(folder: Path, sampler: str) -> Iterator[tuple[SweepConfig, SweepStudy, Tracker]]:
    """A study and a tracker as a sweep of the digits has them."""
    folder.mkdir(parents=True)
    config = load_config(
        ROOT / "sweeps" / "digits.yaml", [f"search.trials={TRIALS}", f"search.sampler={sampler}"]
    )
    study = SweepStudy(
        str(folder),
        name="bench",
        space=config.space,
        search=config.search,
        seed=0,
        every=config.evaluate.every,
        steps=config.distill.iterations,
    )
    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}", "bench", str(folder / "artifacts"))
    tracker.start("bench", config.resolved(), short_names(config.space), None)
    yield config, study, tracker


def grown(folder: Path, before: float) -> dict[str, float]:
    """What is left of the trials: the study's file, and the driver's memory."""
    return {
        "journal_mb": (folder / STUDY_FILE).stat().st_size / 1e6,
        "memory_mib": own_memory("VmRSS") - before,
    }


def trials_alone(folder: Path, sampler: str) -> dict[str, float]:
    """Trials a second through study and tracker, until MLflow has everything."""
    with driver(folder, sampler) as (_, study, tracker):
        listener, before = ToTracker(study, tracker), own_memory("VmRSS")
        began = time.perf_counter()
        while (suggestion := study.next()) is not None:
            listener.trial_started(suggestion)
            report = zero_report(90, seed=suggestion.number)
            study.report(suggestion.number, 90, report.val_accuracy, seconds=report.seconds)
            listener.trial_reported(suggestion.number, report)
            listener.trial_ended(study.complete(suggestion.number))
        tracker.finish("FINISHED")
        found = {"rate": TRIALS / (time.perf_counter() - began), **grown(folder, before)}
    print(sampler, found, flush=True)
    return found


def trials_by_tune(folder: Path) -> dict[str, float]:
    """Trials a second through Tune too, until MLflow has everything."""
    start_ray(None)
    try:
        broker = ray.remote(ZeroBroker).options(num_cpus=0).remote()
        pool = start_pool(1, 0, worker=ZeroWorker)
        with driver(folder, "tpe") as (config, study, tracker):

            def order(suggestion: Suggestion) -> TrialOrder:
                return TrialOrder(
                    number=suggestion.number,
                    spec=pickle.dumps(suggestion.number),
                    experts=ExpertOrder(
                        asker="bench", key="0" * 20, identity={}, count=1, epochs=1, work=b"",
                        cpus=1, gpus=0.0,
                    ),
                    broker=broker,
                    pool=pool,
                )  # fmt: skip

            before, began = own_memory("VmRSS"), time.perf_counter()
            run_search(
                study,
                ToTracker(study, tracker, pool),
                order=order,
                tick=lambda: None,
                over=lambda: False,
                concurrency=config.search.concurrency,
            )
            tracker.finish("FINISHED")
            found = {"rate": TRIALS / (time.perf_counter() - began), **grown(folder, before)}
            assert len(study.ended()) == TRIALS
    finally:
        ray.shutdown()
    print("tune", found, flush=True)
    return found


def tracker_cost(folder: Path) -> dict[str, float]:
    """Milliseconds that a report of 30 steps with a picture costs, in the loop and in all."""
    with driver(folder, "random") as (_, study, tracker):
        suggestion = study.next()
        assert suggestion is not None
        tracker.trial_started(suggestion, "0" * 20, "store")
        process = psutil.Process()
        cpu = sum(process.cpu_times()[:2])
        began = time.perf_counter()
        for i in range(1, REPORTS + 1):
            tracker.trial_reported(suggestion.number, zero_report(i * CURVE, curve=CURVE))
        loop = time.perf_counter() - began
        tracker.finish("FINISHED")
        sent = time.perf_counter() - began
        used = sum(process.cpu_times()[:2]) - cpu
    found = {k: 1000 * v / REPORTS for k, v in (("loop", loop), ("sent", sent), ("cpu", used))}
    print("a report", found, flush=True)
    return found


# --- the page -------------------------------------------------------------------------------


def render(results: dict[str, Any]) -> list[str]:
    tune, tracker = results["tune"], results["tracker"]
    alone = results["alone"]
    return [
        f"{TRIALS:,} trials of no cost, one report each with a picture, until MLflow (SQLite) has "
        "everything:",
        "",
        "| path | trials a second | study's file | driver's memory grew by |",
        "|---|---|---|---|",
        *(
            f"| study ({name}) and tracker | {f['rate']:.1f} | {f['journal_mb']:.1f} MB "
            f"| {f['memory_mib']:.0f} MiB |"
            for name, f in alone.items()
        ),
        f"| and bridge, pool and Tune (tpe) | {tune['rate']:.1f} | {tune['journal_mb']:.1f} MB "
        f"| {tune['memory_mib']:.0f} MiB |",
        "",
        f"A report of {CURVE} steps with its picture costs the driver's loop "
        f"{tracker['loop']:.2f} ms; {tracker['cpu']:.1f} ms of processor time in all, most of it "
        f"beside the loop ({tracker['sent']:.1f} ms until it is in MLflow).",
    ]
