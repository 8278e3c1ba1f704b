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
import torch
from fleet_helpers import processes
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_helpers import (
    QUICK_TO_NOTICE,
    run_sweep,
    summary_of,
    tiny,
    write_sweep,
)

from ftd.distill import StepRecord
from ftd.errors import Diverged
from ftd_ray import bridge
from ftd_ray.bridge import run_search
from ftd_ray.cluster import start_ray
from ftd_ray.config import SearchConfig
from ftd_ray.experts.orders import ExpertOrder
from ftd_ray.node_faults import faults_of_the_node
from ftd_ray.search import Ended, Suggestion, SweepStudy
from ftd_ray.space import parse_dimension
from ftd_ray.trial import Report
from ftd_ray.workers import OnNode, TrialOrder, start_pool

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests


TRIALS, EVERY, STEPS = 9, 30, 90
DIVERGES = 4
"""The one trial that fails, and by itself."""
TRAINABLE, WORKER, POOL = "ray::ResourceTrainable", "ray::SlowWorker", "ray::WorkerPool"
"""As their processes are called; the first is what Tune makes of SweepTrial."""


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


class SickWorker(SlowWorker):
    """Has CUDA fail where the environment of its node says so, as torch raises it."""

    def report(self) -> tuple[bytes, bool]:
        with faults_of_the_node():
            if os.environ.get("FTD_TEST_SICK"):
                raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
            return super().report()


class LargeWorker(SlowWorker):
    """Outgrows every GPU in one trial."""

    too_large: tuple[int, ...] = (DIVERGES,)

    def report(self) -> tuple[bytes, bool]:
        with faults_of_the_node(0.25):
            if self._number in self.too_large:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                    "23.69 GiB of which 1.00 GiB is free. Including non-PyTorch memory, this "
                    "process has 5.00 GiB memory in use."
                )
            return super().report()


class AllTooLarge(LargeWorker):
    """A share of a GPU on which no trial fits."""

    too_large = tuple(range(100))


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
    cpus: float = 0.1,
    pools: list[Any] | None = None,
) -> tuple[list[Ended], Told]:
    """A search of scripted trials in this driver, under ``plan``, which counts reports."""
    folder.mkdir(exist_ok=True)
    study = SweepStudy(
        str(folder),
        name="study",
        space=(parse_dimension("experts.rho", {"float": [0.0, 0.1]}),),
        search=SearchConfig(
            trials=trials, sampler="random", pruner="none", concurrency=concurrency
        ),
        seed=0,
        every=EVERY,
        steps=STEPS,
    )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    broker = ray.remote(FullStore).options(num_cpus=0, scheduling_strategy=here).remote()
    told = Told(start_pool(cpus, 0, worker=worker), plan)
    if pools is not None:
        pools.append(told.pool)

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
    assert len(killed) == len(victims) and sum(map(bool, killed)) > 6  # some are between two


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_trainables_killed_while_they_start_or_change_hands_are_taken_up(local_ray, tmp_path):
    looks, killed = itertools.count(), 0

    def tick() -> None:  # whatever they are at: setting up, waiting, being handed on
        nonlocal killed
        if next(looks) % 37 == 36 and killed < bridge.LOST_IN_A_ROW - 1:
            killed += kill(TRAINABLE, 1)

    ended, told = search(tmp_path, tick=tick)
    assert_as_planned(ended, told)
    assert killed > 3


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
@pytest.mark.timeout(300)
def test_trial_that_outgrows_every_gpu_fails_with_what_it_needed_and_takes_no_node_along(
    local_ray, tmp_path
):
    # No GPU was at hand: the words of torch for one of 23.69 GiB.
    ended, _ = search(tmp_path, worker=LargeWorker)
    assert [t.number for t in ended if t.state == "failed"] == [DIVERGES]
    reason = ended[DIVERGES].reason or ""
    assert "it needs 5.0 GiB and 2.00 GiB more of a GPU of 23.7 GiB, on a share of 0.25" in reason
    assert "resources.gpus_per_trial" in reason


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_share_of_a_gpu_on_which_no_trial_fits_ends_the_search_and_no_trial(local_ray, tmp_path):
    ended, told = search(tmp_path, worker=AllTooLarge, concurrency=2)
    assert ended == [] and told.ended == {}
    assert "on a share of 0.25. Raise resources.gpus_per_trial" in told.halts[0]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster whose head has no CPU; the driver joins it there."""
    if ray.is_initialized():
        ray.shutdown()
    for key, value in QUICK_TO_NOTICE.items():
        monkeypatch.setenv(key, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_trainables_lie_beside_the_driver_and_a_node_that_is_removed_fails_no_trial(
    cluster, tmp_path
):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    start_ray(cluster.address)
    here = ray.get_runtime_context().get_node_id()
    places = []

    def plan(count: int) -> None:
        if count == 5:
            places.extend(nodes_of(TRAINABLE))
            cluster.remove_node(nodes[0], allow_graceful=False)
            cluster.add_node(num_cpus=1)

    ended, told = search(tmp_path, plan)
    assert_as_planned(ended, told)
    assert set(places) == {here}


def nodes_of(title: str) -> list[str]:
    """The node of each process of that title, by the address of its raylet."""
    known = {n["RayletSocketName"]: n["NodeID"] for n in ray.nodes()}
    lines = [" ".join(p.parent().cmdline()) for p in processes(title)]
    return [node for line in lines for socket, node in known.items() if socket in line]


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_node_whose_gpu_fails_every_trial_is_left_out_and_no_trial_fails_for_it(cluster, tmp_path):
    # No GPU was at hand: what torch raises for a broken one, on a node's CPU.
    cluster.add_node(num_cpus=1)
    sick = cluster.add_node(num_cpus=2, env_vars={"FTD_TEST_SICK": "1"})
    start_ray(cluster.address)
    found: dict[str, str] = {}

    def plan(count: int) -> None:
        if count > 20:
            found.update(ray.get(told_pool[0].left_out.remote({})))

    told_pool: list[Any] = []
    ended, told = search(
        tmp_path, plan, worker=SickWorker, cpus=0.4, pools=told_pool, concurrency=6
    )
    assert_as_planned(ended, told)
    assert list(found) == [sick.node_id]
    assert "uncorrectable ECC error" in found[sick.node_id]


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_search_stops_with_its_state_saved_when_no_node_is_left(cluster, tmp_path):
    sick = cluster.add_node(num_cpus=2, env_vars={"FTD_TEST_SICK": "1"})
    start_ray(cluster.address)
    ended, told = search(tmp_path, worker=SickWorker, concurrency=2)
    assert ended == [] and told.ended == {}
    assert "no node is left that could go on" in told.halts[0]
    assert sick.node_id[:8] in told.halts[0] and "ECC" in told.halts[0]


# --- the whole sweep ------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_sweep_leaves_out_a_node_that_cannot_have_the_data_and_names_it(cluster, tmp_path):
    cluster.add_node(num_cpus=1)
    sick = cluster.add_node(num_cpus=4, env_vars={"FTD_CACHE": "/proc/no-such-folder"})
    write_sweep(tmp_path, tiny(search__trials=6, search__concurrency=6, experts__count=6))
    ran = run_sweep(tmp_path, "sweep.yaml", "--address", cluster.address, timeout=400)
    assert ran.code == 0, ran.out + ran.err
    summary = summary_of(tmp_path)
    assert summary["trials"] == {"complete": 6, "pruned": 0, "failed": 0}
    assert ran.out.count("It is left out.") == 1
    assert len(summary["left_out"]) == 1 and sick.node_id[:8] in summary["left_out"][0]
    assert "FTD_CACHE" in summary["left_out"][0]


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_sweep_of_which_no_node_has_the_data_stops_with_one_line_and_goes_on_elsewhere(
    cluster, tmp_path
):
    sick = cluster.add_node(num_cpus=2, env_vars={"FTD_CACHE": "/proc/no-such-folder"})
    write_sweep(tmp_path, tiny(search__trials=3))
    arguments = ("sweep.yaml", "--address", cluster.address)
    ran = run_sweep(tmp_path, *arguments, timeout=400)
    assert ran.code == 2, ran.out + ran.err
    (line,) = ran.err.strip().splitlines()
    assert "no node is left that could go on" in line and sick.node_id[:8] in line
    assert summary_of(tmp_path)["state"] == "interrupted"
    assert summary_of(tmp_path)["trials"]["failed"] == 0
    cluster.remove_node(sick)
    cluster.add_node(num_cpus=2)
    ran = run_sweep(tmp_path, *arguments, "--resume", timeout=400)
    assert ran.code == 0, ran.out + ran.err
    assert summary_of(tmp_path)["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
