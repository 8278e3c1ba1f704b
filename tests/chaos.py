"""A sweep whose processes are killed at random, which must leave what it leaves undisturbed.

    python tests/chaos.py [--seed N] [--seeds N] [--kills N]

A small sweep runs once in peace, one trial at a time on this machine alone. Then, for each seed, it
runs on a cluster of a head and two further nodes, while every few seconds some process of it is
killed (kill -9) by a schedule that the seed gives: the driver, which is started again with
``--resume``; the raylet of a node, in whose place another node comes; the broker, a worker, or any
other; now and then the head with all that is on it. After the last kill it runs to its end, and
what it has left by then must be the same to the bit.

Sweeps of even seeds draw at random and run two trials at a time; those of odd ones are searched by
TPE, which learns from what came before, one at a time. The same seed gives the same kinds of
victims at the same times, but not the same moments in them: processes take their time.
"""

import argparse
import contextlib
import hashlib
import itertools
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_helpers import (
    QUICK_TO_NOTICE,
    environment,
    mlflow_runs,
    run_sweep,
    summary_of,
    tiny,
    write_sweep,
)

from ftd.data.cache import cache_root
from ftd_ray.local import ask_for_token

KILLS = 12
"""Of one seed."""
PAUSE = (1.0, 4.0)
"""Seconds between two kills."""
PATIENCE = 15.0
"""Seconds for which a process of the kind that was drawn is waited for, then any other"""
END_SECONDS = 600
"""After the last kill, until a sweep is taken for hung."""
NODES = 2
"""Beside the head, on which there is no room for work."""

KILLS_FILE = "kills.txt"

KINDS = {
    "driver": 1.0,
    "raylet": 1.0,
    "head": 0.2,
    "broker": 1.0,
    "expert": 1.5,
    "worker": 2.0,
    "trainable": 1.5,
    "pool": 1.0,
    "cache": 1.0,
    "data server": 0.5,
    "idle": 0.3,
}
"""How often each kind comes, beside the others."""

STAND_INS = ("expert", "worker", "trainable", "pool", "cache")
"""Kinds that die in the place of one that does not come. What stands from the start is not among
them: else it would be all that dies while a sweep begins."""

TITLES = {
    "broker": "ray::Broker",
    "expert": "ray::ExpertActor",
    "worker": "ray::TrialWorker",
    "trainable": "ray::ResourceTrainable",
    "pool": "ray::WorkerPool",
    "cache": "ray::SegmentCache",
    "data server": "ray::DataServer",
    "idle": "ray::IDLE",
}
"""As Ray calls their processes; a trainable is what Tune makes of SweepTrial."""

PATIENT = QUICK_TO_NOTICE | {"RAY_health_check_timeout_ms": "2000"}
"""With nodes that much else keeps busy."""

# --- what runs ------------------------------------------------------------------------------

TRIALS = 6
SEARCHES: dict[str, dict[str, Any]] = {
    "random": {"sampler": "random", "pruner": "none", "concurrency": 2},
    "tpe": {
        "sampler": "tpe", "startup_trials": 3, "pruner": "asha", "reduction_factor": 2,
        "concurrency": 1,
    },
}  # fmt: skip


def search_of(seed: int) -> str:
    """Which of the sweeps a seed disturbs."""
    return list(SEARCHES)[seed % len(SEARCHES)]


def sweep(search: str, **changes: Any) -> dict[str, Any]:
    """Trials of some seconds each over two sets of experts; by themselves some of them diverge."""
    return tiny(
        experts__lr=0.1,
        experts__epochs=24,
        experts__batch_size=32,
        distill__max_start_epoch=20,
        distill__iterations=80,
        distill__syn_steps=4,
        distill__lr_lr={"choice": [1e-5, 1e-6, 2e-6, 1e30]},
        evaluate={
            "every": 10, "search_networks": 1, "search_epochs": 60, "networks": 2, "epochs": 60,
        },
        search={"trials": TRIALS, **SEARCHES[search], **changes},
    )  # fmt: skip


def undisturbed(folder: Path, search: str) -> dict[str, Any]:
    """What the sweep leaves in peace, one trial at a time."""
    write_sweep(folder, sweep(search, concurrency=1))
    ran = run_sweep(folder, "sweep.yaml", timeout=END_SECONDS)
    assert ran.code == 0, ran.out + ran.err
    return left_in(folder)


# --- what it leaves -------------------------------------------------------------------------


def left_in(folder: Path) -> dict[str, Any]:
    """All that a sweep left in its folder and that no kill may change, by name."""
    from fleet_helpers import files_of  # brings Ray

    from ftd_ray.search import read_begun

    runs, study = folder / "runs" / "tiny", read_begun(str(folder / "runs" / "tiny"))
    left: dict[str, Any] = {"trials": len(study.ended), "trials open": study.interrupted}
    for t in study.ended:
        left[f"trial {t.number}"] = [t.state, t.params, t.value, t.repeat, t.reason, t.reports]
    for name, content in files_of(folder / "store").items():
        left[f"store: {name}"] = digest(content)
    for path in runs.rglob("*"):
        if path.is_file():
            whole = path.suffix == ".npz"
            left[f"folder: {path.relative_to(runs)}"] = digest(path.read_bytes()) if whole else ""
    return left | left_in_mlflow(folder) | summary_left(folder)


def left_in_mlflow(folder: Path) -> dict[str, Any]:
    """The runs of each trial and expert set, with what was varied and the accuracy by step."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    left: dict[str, Any] = {}
    for run in mlflow_runs(folder):
        tags = run.data.tags
        who = tags.get("ftd.trial", tags.get("ftd.expert_set", ""))
        curve = client.get_metric_history(run.info.run_id, "val_accuracy") if who else []
        left.setdefault(f"mlflow: {tags['ftd.kind']} {who}", []).append(
            [
                run.info.status,
                tags.get("ftd.state"),
                run.data.params if who else None,
                sorted({(m.step, m.value) for m in curve}),
            ]
        )
    return left


def summary_left(folder: Path) -> dict[str, Any]:
    """The summary without times, places, and who of several sessions had an expert built."""
    known = summary_of(folder)
    kept = (
        "name", "state", "stopped_by", "best", "baseline", "trials", "left_out", "interrupted",
        "failures", "objectives", "protocol",
    )  # fmt: skip
    experts = known["experts"]["built"] + known["experts"]["reused"]
    best = {k: v for k, v in known["best"].items() if k != "artifact"}
    left = {k: known[k] for k in kept} | {"best": best, "experts": experts}
    return {f"summary: {k}": v for k, v in left.items()}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What is otherwise than where nothing was killed, a line each."""
    return [
        f"{name}: {ours.get(name, 'missing')!r}, undisturbed {theirs.get(name, 'not there')!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


# --- who is killed --------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """A line of the schedule."""

    pause: float
    """Seconds before it."""
    kinds: tuple[str, ...]
    """The one that was drawn, then others, should none of that kind come."""
    which: float
    """From 0 to 1, of the processes of that kind."""


def schedule(seed: int) -> Iterator[Kill]:
    """Kills without end."""
    drawn = random.Random(seed)
    while True:
        pause = drawn.uniform(*PAUSE)
        order = {kind: drawn.random() ** (1 / weight) for kind, weight in KINDS.items()}
        first, *others = sorted(order, key=lambda k: -order[k])
        kinds = (first, *(k for k in others if k in STAND_INS))
        yield Kill(pause, kinds, drawn.random())


class GaveUp(Exception):
    """The sweep ended before it was done, or did not end."""


class Disturbed:
    """The sweep in ``folder``, on a cluster of its own; both end with it."""

    def __init__(self, folder: Path):
        self._folder, self._began = folder, time.monotonic()
        self._nodes = itertools.count()
        self._lost: list[Any] = []
        """Nodes whose raylet was killed."""
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> "Disturbed":
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for key, value in PATIENT.items():
                patch.setenv(key, value)
            stack.callback(self._end_all)
            self._start_cluster()
            stack.callback(lambda: self._cluster.shutdown())
            self._start_driver()
            stack.callback(lambda: end(self._driver))
            stack.callback(self._look)
            self._whole = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._whole.close()

    def follow(self, kills: Iterable[Kill]) -> None:
        """Kills by a schedule, then waits for the sweep's end. Raises GaveUp."""
        for kill in kills:
            if self._is_over(kill.pause):
                return
            self._replace_lost()
            came = time.monotonic()
            while not self._strike(kill, patient=time.monotonic() < came + PATIENCE):
                if self._is_over(0.1):
                    return
                if time.monotonic() > came + END_SECONDS:
                    raise GaveUp(f"nobody could be killed for {END_SECONDS} s")
        self._replace_lost()
        if not self._is_over(END_SECONDS):
            raise GaveUp(f"it has not ended {END_SECONDS} s after the last kill")

    # --- the cluster and the driver ---------------------------------------------------------

    def _start_cluster(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster, self._lost = Cluster(True, head_node_args={"num_cpus": 0}), []
        for _ in range(NODES):
            self._add_node()

    def _add_node(self) -> None:
        """A node that has no data yet, only the kernels: to compile them takes half a sweep."""
        cache = self._folder / "caches" / str(next(self._nodes))
        cache.mkdir(parents=True)
        kernels = cache_root() / "native"
        kernels.mkdir(parents=True, exist_ok=True)
        (cache / "native").symlink_to(kernels)
        self._cluster.add_node(num_cpus=2, env_vars={"FTD_CACHE": str(cache)})

    def _replace_lost(self) -> None:
        for node in self._lost:
            self._cluster.remove_node(node, allow_graceful=False)
            self._add_node()
        self._lost = []

    def _start_driver(self) -> None:
        command = ["-m", "ftd_ray.sweep", "sweep.yaml", "--resume"]
        with (
            open(self._folder / "stdout.txt", "a") as out,
            open(self._folder / "stderr.txt", "a") as err,
        ):
            self._driver = subprocess.Popen(
                [sys.executable, *command, "--address", self._cluster.address],
                cwd=self._folder,
                env=environment(),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def _is_over(self, seconds: float) -> bool:
        """Waits so long, unless the sweep ends before."""
        try:
            code = self._driver.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if code != 0:
            raise GaveUp(f"it ended with code {code}, and nobody had killed its driver")
        return True

    # --- kills ------------------------------------------------------------------------------

    def _strike(self, kill: Kill, *, patient: bool) -> bool:
        """Kills a process of the kind that was drawn, or of another one; says whether it did."""
        for kind in kill.kinds[: 1 if patient else None]:
            if kind == "head":
                self._note(kind, "the head, and all other nodes with it")
                self._power_off()
                return True
            if found := self._of_kind(kind):
                victim = found[int(kill.which * len(found))]
                with contextlib.suppress(psutil.Error):  # it has just ended
                    self._note(kind, f"{victim.pid} {' '.join(victim.cmdline())[:60].strip()}")
                    self._kill(kind, victim)
                    return True
        return False

    def _kill(self, kind: str, victim: psutil.Process) -> None:
        if kind == "raylet":
            sockets = " ".join(victim.cmdline())
            self._lost += [n for n in self._cluster.worker_nodes if n.raylet_socket_name in sockets]
        victim.kill()
        if kind == "driver":
            self._driver.wait()
            self._start_driver()

    def _power_off(self) -> None:
        """All machines lose their power; when it is back, the sweep is taken up again."""
        self._look()
        end(self._driver)
        self._cluster.shutdown()
        self._end_all()
        self._start_cluster()
        self._start_driver()

    def _of_kind(self, kind: str) -> list[psutil.Process]:
        """Processes of that kind, in the order of their numbers."""
        if kind == "driver":
            return [psutil.Process(self._driver.pid)]
        sockets = [n.raylet_socket_name for n in self._cluster.worker_nodes]
        found = []
        for process in self._look():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if kind == "raylet":
                    its = process.name() == "raylet" and any(s in line for s in sockets)
                else:
                    its = line.startswith(TITLES[kind])
                found += [process] if its else []
        return sorted(found, key=lambda p: p.pid)

    def _look(self) -> list[psutil.Process]:
        """All processes of the cluster and the driver."""
        found = psutil.Process().children(recursive=True)
        self._seen.update(found)
        return found

    def _end_all(self) -> None:
        """Ends what was ever seen: of a raylet that was killed, processes stay a while."""
        for process in self._seen:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._seen = set()

    def _note(self, kind: str, what: str) -> None:
        seconds = time.monotonic() - self._began
        with open(self._folder / KILLS_FILE, "a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {seconds:7.1f} s  {kind:12} {what}\n")


def end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def disturb(folder: Path, seed: int, kills: int, expected: dict[str, Any]) -> list[str]:
    """Runs the sweep of a seed under its kills; says what is wrong with it, if anything is."""
    write_sweep(folder, sweep(search_of(seed)))
    try:
        with Disturbed(folder) as disturbed:
            disturbed.follow(itertools.islice(schedule(seed), kills))
        return differences(left_in(folder), expected)
    except GaveUp as gave_up:
        return [str(gave_up), *(folder / "stderr.txt").read_text().splitlines()[-10:]]


def story(folder: Path, seed: int, kills: int, wrong: list[str]) -> str:
    """What to say of a seed under which something went wrong."""
    return "\n".join(
        [
            f"seed {seed}: again by  python tests/chaos.py --seed {seed} --kills {kills}",
            *wrong,
            f"killed until then ({folder / KILLS_FILE}):",
            killed_in(folder),
        ]
    )


def killed_in(folder: Path) -> str:
    """The kills of a sweep, a line each."""
    log = folder / KILLS_FILE
    return log.read_text() if log.exists() else ""


# --- the command ----------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="the first one; else it is drawn")
    parser.add_argument("--seeds", type=int, help="so many, one after the other; else until Ctrl-C")
    parser.add_argument("--kills", type=int, default=KILLS, help="of each seed (%(default)s)")
    args = parser.parse_args()
    ask_for_token()  # before Ray is imported
    first = secrets.randbelow(10**6) if args.seed is None else args.seed
    seeds = itertools.count(first) if args.seeds is None else range(first, first + args.seeds)
    folder = Path(tempfile.mkdtemp(prefix="ftd-chaos-"))
    os.environ.setdefault("FTD_CACHE", str(folder / "cache"))
    expected: dict[str, dict[str, Any]] = {}
    failed, passed = [], 0
    with contextlib.suppress(KeyboardInterrupt):
        for seed in seeds:
            search, place, began = search_of(seed), folder / str(seed), time.monotonic()
            if search not in expected:
                expected[search] = undisturbed(folder / search, search)
            wrong = disturb(place, seed, args.kills, expected[search])
            killed = len(killed_in(place).splitlines())
            says = f"seed {seed}  {search}  {killed} kills  {time.monotonic() - began:.0f} s"
            print(f"{says}  {'FAILED' if wrong else 'passed'}", flush=True)
            if wrong:
                failed.append(seed)
                print(story(place, seed, args.kills, wrong), flush=True)
            else:
                passed += 1
                shutil.rmtree(place)
    print(f"{passed} seeds passed, {len(failed)} failed {failed or ''}".rstrip())
    if not failed:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
