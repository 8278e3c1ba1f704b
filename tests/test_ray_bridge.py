"""The study under Tune itself: what a trial was for the one, it was for the other."""

import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.tune.experiment import Trial as TuneTrial

from ftd.distill import StepRecord
from ftd.errors import Diverged
from ftd_ray.bridge import Course, StudyScheduler, run_search
from ftd_ray.cluster import start_ray
from ftd_ray.config import SearchConfig
from ftd_ray.experts.orders import ExpertOrder
from ftd_ray.imputation import DIVERGED
from ftd_ray.search import Ended, Suggestion, SweepStudy
from ftd_ray.space import parse_dimension
from ftd_ray.trial import Report
from ftd_ray.workers import OnNode, TrialOrder, start_pool

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests

CURVES = [[0.9, 0.9, 0.9], [0.1, 0.1, 0.1], [0.2, 0.2, 0.2], [0.95, 0.95, 0.95], []]
"""Validation accuracy at steps 30, 60, 90 of each trial; the last one diverges at once."""
STATES = ["complete", "pruned", "pruned", "complete", "failed"]
EVERY = 30


class ScriptedWorker(OnNode):
    """Reports what the script says, and writes down which process it was."""

    def begin(self, spec: bytes) -> None:
        number, folder = pickle.loads(spec)
        Path(folder, f"worker-{number}").write_text(str(os.getpid()))
        self._values = [*enumerate(CURVES[number], 1)]

    def report(self) -> tuple[bytes, bool]:
        if not self._values:
            raise Diverged("step 1: the loss is not finite")
        i, value = self._values.pop(0)
        report = Report(
            step=i * EVERY,
            val_accuracy=value,
            val_std=0.0,
            networks={0: value},
            curve=(StepRecord(i * EVERY, 0.5, 0.01, 1.0, expert=0, start_epoch=0),),
            seconds=0.01,
            picture=b"",
            done=not self._values,
        )
        return pickle.dumps(report), report.done


class FullStore:
    """A broker that has every expert set."""

    def ensure(self, order: Any) -> list[int]:
        return [0]


class Told:
    """Writes down what the bridge tells, and gives workers back as the driver does."""

    def __init__(self, pool: Any):
        self.pool = pool
        self.reports: list[tuple[int, int]] = []
        self.ended: list[tuple[int, str]] = []

    def trial_started(self, suggestion: Suggestion) -> None: ...

    def trial_reported(self, number: int, report: Report) -> None:
        self.reports.append((number, report.step))

    def trial_ended(self, ended: Ended) -> None:
        self.ended.append((ended.number, ended.state))
        self.pool.give_back.remote(ended.number, clean=ended.state != "failed")

    def halted(self, number: int, reason: str) -> None:
        raise AssertionError(reason)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    start_ray(None)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def searched(_ray, tmp_path_factory) -> tuple[SweepStudy, Told, Any, Path]:
    """A search of the scripted trials, one after the other, with Tune's table of them."""
    folder = tmp_path_factory.mktemp("search")
    broker = ray.remote(FullStore).options(num_cpus=0).remote()
    pool = start_pool(1, 0, worker=ScriptedWorker)
    study = SweepStudy(
        str(folder),
        name="study",
        space=(parse_dimension("experts.rho", {"float": [0.0, 0.1]}),),
        search=SearchConfig(trials=len(CURVES), sampler="random", pruner="asha", concurrency=1),
        seed=0,
        every=EVERY,
        steps=90,
    )

    def order(suggestion: Suggestion) -> TrialOrder:
        experts = ExpertOrder(
            asker="test", key="0" * 20, identity={}, count=1, epochs=1, work=b"", cpus=1, gpus=0.0
        )
        spec = pickle.dumps((suggestion.number, str(folder)))
        return TrialOrder(
            number=suggestion.number, spec=spec, experts=experts, broker=broker, pool=pool
        )

    told = Told(pool)
    table = run_search(
        study,
        told,
        order=order,
        tick=lambda: None,
        over=lambda: False,
        concurrency=1,
    )
    return study, told, table, folder


def test_trials_end_in_the_study_and_for_the_listener_as_they_ended(searched):
    study, told, _, _ = searched
    assert [e.state for e in study.ended()] == STATES
    assert told.ended == list(enumerate(STATES))


def test_pruned_trial_is_no_error_for_tune_and_a_failed_one_is(searched):
    table = searched[2]
    states = Counter("failed" if result.error else "ended" for result in table)
    assert states == {"failed": STATES.count("failed"), "ended": len(STATES) - 1}


def test_tune_keeps_no_order_and_no_report_of_a_trial_that_is_over(searched):
    study, told, table, _ = searched
    for result in table:
        assert result.config == {}
        assert len(pickle.dumps(result.metrics)) < 2000 and "report" not in result.metrics
    over = {"number": 0, "order": b"x" * 10_000}
    scheduler = StudyScheduler(study, told, Course())
    for end in (partial(scheduler.on_trial_complete, result={}), scheduler.on_trial_error):
        trial = TuneTrial("trial", stub=True, config=dict(over), evaluated_params=dict(over))
        end(None, trial)
        assert trial.config == trial.evaluated_params == {"number": 0}


def test_failed_trial_is_known_to_have_diverged(searched):
    study = searched[0]
    attrs = study.frozen(STATES.index("failed")).user_attrs
    assert attrs["reason"] == "step 1: the loss is not finite"
    assert attrs[DIVERGED] is True


def test_every_report_is_told_once(searched):
    told = searched[1]
    pruned = [(n, EVERY) for n, state in enumerate(STATES) if state == "pruned"]
    whole = [(n, s) for n, state in enumerate(STATES) if state == "complete" for s in (30, 60, 90)]
    assert sorted(told.reports) == sorted([*pruned, *whole])


def test_trial_after_a_pruned_one_goes_on_in_its_process(searched):
    folder = searched[3]
    assert len({(folder / f"worker-{n}").read_text() for n in range(len(CURVES))}) == 1
