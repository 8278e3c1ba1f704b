"""The search: what a sweep spends beside its work, what a trial costs the driver, what ASHA saves.

A sweep's overhead is the share of the cores' time, from the moment that Ray runs to the summary,
in which no expert, no trial and no fresh network of the final evaluation is worked on: starting
processes, asking, reporting, MLflow, pictures, and cores that wait for the last trial. Trials of
no cost go through the real study, bridge, tracker, pool and Tune.
"""

import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks.report import ROOT, own_memory, spread
from ftd.distill import StepRecord
from ftd_ray.bridge import run_search
from ftd_ray.cluster import start_ray
from ftd_ray.config import SweepConfig, load_config
from ftd_ray.experts.orders import ExpertOrder
from ftd_ray.pictures import short_names
from ftd_ray.search import STUDY_FILE, Ended, Suggestion, SweepStudy
from ftd_ray.tracking import Tracker
from ftd_ray.trial import Report
from ftd_ray.workers import TrialOrder, start_pool

SWEEPS = 2
TRIALS = 1000
CURVE = 30
"""Outer steps that a report of the tracker's own measurement carries."""
REPORTS = 200
SEEDS = (0, 1)
"""Of the searches with and without ASHA."""


def run() -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="ftd-bench-"))
    try:
        found = {
            "cores": len(os.sched_getaffinity(0)),
            "sweeps": [overhead(folder / f"sweep{i}") for i in range(SWEEPS)],
            "tracker": tracker_cost(folder / "tracker"),
            "alone": {s: trials_alone(folder / f"alone-{s}", s) for s in ("random", "tpe")},
            "tune": trials_by_tune(folder / "tune"),
            "asha": asha(folder / "asha"),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


# --- a whole sweep --------------------------------------------------------------------------


def sweep(folder: Path, *overrides: str) -> dict[str, Any]:
    """The summary of the digits sweep, run by its command in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ftd_ray.sweep", str(ROOT / "sweeps" / "digits.yaml")]
    subprocess.run(
        [*command, "output.dir=run", *overrides],
        cwd=folder,
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return dict(json.loads((folder / "run" / "summary.json").read_text()))


def overhead(folder: Path) -> dict[str, Any]:
    """Phases and work of ``make sweep`` with an empty store."""
    summary = sweep(folder)
    found = {"phases": summary["phases"], "worked": summary["worked"]}
    print(found, flush=True)
    return found


def overhead_share(found: dict[str, Any], cores: int) -> float:
    """The share of the cores' time after Ray's start that went into no work."""
    wall = sum(v for k, v in found["phases"].items() if k != "start of Ray")
    return 1 - sum(found["worked"].values()) / (cores * wall)


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
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((668, 68), 64).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = _picture()


class ZeroWorker:
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
        pool = start_pool(1, 0, ZeroWorker)
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
                trials=TRIALS,
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


# --- pruning --------------------------------------------------------------------------------


def asha(folder: Path) -> list[dict[str, Any]]:
    """The same search with and without pruning: outer steps done, and what came out."""
    rows = []
    for seed in SEEDS:
        row: dict[str, Any] = {"seed": seed}
        for pruner in ("asha", "none"):
            summary = sweep(
                folder / f"{seed}-{pruner}",
                f"seed={seed}",
                f"search.pruner={pruner}",
                "search.concurrency=1",
                "search.trials=16",
                "search.sampler=random",
                f"store.uri={folder / 'store'}",
            )
            row[pruner] = {
                "trial_seconds": summary["worked"]["trials"],
                "pruned": summary["trials"]["pruned"],
                "val": summary["best"]["val_accuracy_full"]["mean"],
                "test": summary["best"]["test_accuracy"]["mean"],
            }
        print(row, flush=True)
        rows.append(row)
    return rows


# --- the page -------------------------------------------------------------------------------


def render(results: dict[str, Any]) -> list[str]:
    cores, tune, tracker = results["cores"], results["tune"], results["tracker"]
    sweeps = results["sweeps"]
    shares = [100 * overhead_share(s, cores) for s in sweeps]
    phases = {k: [s["phases"][k] for s in sweeps] for k in sweeps[0]["phases"]}
    worked = {k: [s["worked"][k] for s in sweeps] for k in sweeps[0]["worked"]}
    lines = [
        f"`make sweep` on {cores} cores with an empty store: the share of the cores' time, once "
        "Ray runs, that is no work",
        f"on experts, trials or the final networks: **{spread(shares, '{:.1f} %')}**.",
        "",
        "| phase | wall time | | work | core time |",
        "|---|---|---|---|---|",
    ]
    for (phase, wall), (work, seconds) in zip(
        phases.items(), [*worked.items(), *[("", [])] * len(phases)], strict=False
    ):
        done = spread(seconds, "{:.1f} s") if seconds else ""
        lines.append(f"| {phase} | {spread(wall, '{:.1f} s')} | | {work} | {done} |")
    alone = results["alone"]
    lines += [
        "",
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
        "",
        *asha_lines(results["asha"]),
    ]
    return lines


def asha_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    saved = [r["none"]["trial_seconds"] / r["asha"]["trial_seconds"] for r in rows]
    gain = [100 * (r["asha"]["val"] - r["none"]["val"]) for r in rows]
    lines = [
        "ASHA against no pruning: the same 16 random trials of the digits sweep, one at a time, "
        "from the same",
        f"experts. Time in trials without ÷ with: {spread(saved, 'x {:.2f}')}; difference of the "
        "winner's validation",
        f"accuracy by the full protocol {statistics.mean(gain):+.1f} points in the mean.",
        "",
        "| seed | asha | none |",
        "|---|---|---|",
    ]
    for r in rows:
        cells = (
            f"{r[p]['trial_seconds']:.0f} s, {r[p]['pruned']} pruned, validation "
            f"{100 * r[p]['val']:.1f} %, test {100 * r[p]['test']:.1f} %"
            for p in ("asha", "none")
        )
        lines.append(f"| {r['seed']} | {' | '.join(cells)} |")
    return lines
