"""Processes and nodes that are lost in the middle of a search: no trial fails or changes for it."""

import itertools
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from fleet_helpers import processes
from ray.cluster_utils import Cluster

from ftd.distill import StepRecord
from ftd.errors import Diverged
from ftd_ray import bridge
from ftd_ray.bridge import run_search
from ftd_ray.cluster import start_ray
from ftd_ray.config import SearchConfig
from ftd_ray.experts.orders import ExpertOrder
from ftd_ray.search import Ended, Suggestion, SweepStudy
from ftd_ray.space import parse_dimension
from ftd_ray.trial import Report
from ftd_ray.workers import OnNode, TrialOrder, start_pool

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests

TRIALS, EVERY, STEPS = 9, 30, 90
DIVERGES = 4
"""The one trial that fails, and by itself."""
TRAINABLE, WORKER, POOL = "ray::SweepTrial", "ray::SlowWorker", "ray::WorkerPool"


class SlowWorker(OnNode):
    """Reports what depends on the trial alone, a third of a second each; keeps no checkpoint."""

    def begin(self, spec: bytes) -> None:
        self._number, self._step = pickle.loads(spec), 0

    def report(self) -> tuple[bytes, bool]:
        time.sleep(0.3)
        self._step += EVERY
        if self._number == DIVERGES and self._step > EVERY:
            raise Diverged("step 31: the loss is not finite")
        report = Report(
            step=self._step,
            val_accuracy=self._number / 10 + self._step / 1000,
            val_std=0.0,
            networks={},
            curve=(StepRecord(self._step, 0.5, 0.01, 1.0, expert=0, start_epoch=0),),
            seconds=0.3,
            picture=b"",
            done=self._step == STEPS,
        )
        return pickle.dumps(report), report.done


class DoomedWorker(SlowWorker):
    """Ends its process in every trial."""

    def report(self) -> tuple[bytes, bool]:
        os._exit(1)


class FullStore:
    """A broker that has every expert set."""

    def ensure(self, order: Any) -> list[int]:
        return [0]


class Told:
    """Writes down what it is told, gives workers back as the driver does, and has a plan."""

    def __init__(self, pool: Any, plan: Callable[[int], None]):
        self.pool, self.plan, self.count = pool, plan, itertools.count(1)
        self.started: list[int] = []
        self.reports: dict[int, list[int]] = {}
        self.ended: dict[int, Ended] = {}
        self.halts: list[str] = []

    def trial_started(self, suggestion: Suggestion) -> None:
        self.started.append(suggestion.number)

    def trial_reported(self, number: int, report: Report) -> None:
        self.reports.setdefault(number, []).append(report.step)
        self.plan(next(self.count))

    def trial_ended(self, ended: Ended) -> None:
        assert ended.number not in self.ended
        self.ended[ended.number] = ended
        self.pool.give_back.remote(ended.number, clean=ended.state != "failed")

    def halted(self, number: int, reason: str) -> None:
        self.halts.append(reason)


def kill(title: str, most: int | None = None) -> int:
    """Kills processes of that title, all of them or the first few; says how many."""
    killed = 0
    for process in itertools.islice(processes(title), most):
        try:
            process.kill()
            killed += 1
        except psutil.Error:
            continue
    return killed


def search(
    folder: Path,
    plan: Callable[[int], None] = lambda count: None,
    *,
    tick: Callable[[], None] = lambda: None,
    worker: type = SlowWorker,
    trials: int = TRIALS,
    concurrency: int = 3,
) -> tuple[list[Ended], Told]:
    """A search of scripted trials in this driver, under ``plan``, which counts reports."""
    study = SweepStudy(
        str(folder),
        name="study",
        space=(parse_dimension("experts.rho", {"float": [0.0, 0.1]}),),
        search=SearchConfig(trials=trials, sampler="random", concurrency=concurrency),
        seed=0,
        every=EVERY,
        steps=STEPS,
    )
    broker = ray.remote(FullStore).options(num_cpus=0).remote()
    told = Told(start_pool(0.1, 0, worker=worker), plan)

    def order(suggestion: Suggestion) -> TrialOrder:
        experts = ExpertOrder(
            asker="test", key="0" * 20, identity={}, count=1, epochs=1, work=b"", cpus=1, gpus=0.0
        )
        return TrialOrder(
            number=suggestion.number,
            spec=pickle.dumps(suggestion.number),
            experts=experts,
            broker=broker,
            pool=told.pool,
        )

    try:
        run_search(
            study,
            told,
            order=order,
            tick=tick,
            over=lambda: bool(told.halts),
            concurrency=concurrency,
        )
        return study.ended(), told
    finally:
        ray.kill(told.pool)
        study.close()


def facts(ended: list[Ended]) -> list[Any]:
    return [(t.number, t.state, t.params, t.value, t.reason, t.reports) for t in ended]


def assert_as_planned(ended: list[Ended], told: Told) -> None:
    """Each trial is there once, and none has failed but the one that does so by itself."""
    assert [t.number for t in ended] == list(range(TRIALS))
    assert [t.number for t in ended if t.state != "complete"] == [DIVERGES]
    assert ended[DIVERGES].reason == "step 31: the loss is not finite"
    assert sorted(told.started) == list(range(TRIALS))
    assert sorted(told.ended) == list(range(TRIALS)) and told.halts == []
    whole = list(range(EVERY, STEPS + 1, EVERY))
    assert told.reports == {n: [EVERY] if n == DIVERGES else whole for n in range(TRIALS)}


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        start_ray(None)
        yield
        ray.shutdown()


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_killed_trainables_workers_and_pools_change_no_trial(local_ray, tmp_path):
    undisturbed, quiet = search(tmp_path / "whole")
    assert_as_planned(undisturbed, quiet)
    victims = {
        1: (TRAINABLE, 1), 3: (TRAINABLE, None), 5: (WORKER, 1), 8: (POOL, None),
        11: (TRAINABLE, None), 12: (POOL, None), 15: (WORKER, None), 18: (TRAINABLE, 2),
        20: (TRAINABLE, None), 24: (TRAINABLE, None),
    }  # fmt: skip
    killed = []

    def plan(count: int) -> None:
        if count in victims:
            killed.append(kill(*victims[count]))

    ended, told = search(tmp_path / "killed", plan)
    assert_as_planned(ended, told)
    assert facts(ended) == facts(undisturbed)
    assert len(killed) == len(victims) and all(killed)


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_trainables_killed_while_they_start_or_change_hands_are_taken_up(local_ray, tmp_path):
    looks = itertools.count()

    def tick() -> None:  # whatever they are at: setting up, waiting, being handed on
        if next(looks) % 37 == 36:
            kill(TRAINABLE, 1)

    ended, told = search(tmp_path, tick=tick)
    assert_as_planned(ended, told)


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_trainables_that_cannot_live_end_the_search_and_no_trial(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(bridge, "LOST_IN_A_ROW", 4)
    ended, told = search(tmp_path, tick=lambda: kill(TRAINABLE) and None, trials=2, concurrency=1)
    assert ended == []
    assert "were lost on this machine" in told.halts[0]


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_trial_that_ends_every_process_that_it_is_given_fails_by_itself(local_ray, tmp_path):
    (ended,), _ = search(tmp_path, worker=DoomedWorker, trials=1, concurrency=1)
    assert ended.state == "failed" and "memory" in (ended.reason or "")


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_trainables_lie_beside_the_driver_and_a_node_that_is_removed_fails_no_trial(
    tmp_path, monkeypatch
):
    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        start_ray(cluster.address)
        here = ray.get_runtime_context().get_node_id()
        places = []

        def plan(count: int) -> None:
            if count == 5:
                places.extend(actors_by_node("SweepTrial"))
                cluster.remove_node(nodes[0], allow_graceful=False)
                cluster.add_node(num_cpus=1)

        ended, told = search(tmp_path, plan)
        assert_as_planned(ended, told)
        assert set(places) == {here}
    finally:
        ray.shutdown()
        cluster.shutdown()


def actors_by_node(name: str) -> list[str]:
    """The node of each process of that actor class, by what its raylet is called."""
    found = []
    for process in processes(f"ray::{name}"):
        raylet = " ".join(process.parent().cmdline())
        found += [n["NodeID"] for n in ray.nodes() if n["RayletSocketName"] in raylet]
    return found
