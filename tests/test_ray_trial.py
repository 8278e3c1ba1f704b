"""A trial is a function of its configuration and the store; Ray is not needed to run it."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray_helpers import parse_tiny

from ftd.data import DatasetConfig, describe
from ftd.errors import Diverged, UserError
from ftd.evaluate import Score
from ftd.synthetic import SyntheticSet
from ftd.trajectory import ExpertSet
from ftd_ray.experts.build import ExpertRequest, build_expert
from ftd_ray.store import TrajectoryStore
from ftd_ray.trial import (
    FinalSpec,
    FirstExperts,
    Report,
    TrialSpec,
    final_scores,
    forget_checkpoint,
    run_trial,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three experts of three epochs."""
    folder = tmp_path_factory.mktemp("store")
    config = parse_tiny(experts__rho=0.01)
    request = ExpertRequest(
        store_uri=str(folder),
        identity=config.identity(config.experts, describe(config.dataset)),
        dataset=config.dataset,
        experts=config.experts,
        numerics=config.resources.expert_numerics,
    )
    for i in range(3):
        build_expert(request, i, lambda snapshot: None)
    return folder


@pytest.fixture
def spec_for(store, tmp_path):
    """A trial in the folder ``name`` of this test."""

    def make(name: str = "trial", **changes: Any) -> TrialSpec:
        fields = {k: changes.pop(k) for k in ("seed", "repeat", "experts") if k in changes}
        config = parse_tiny(**({"experts__rho": 0.01} | changes))
        spec = TrialSpec(
            number=0,
            seed=0,
            repeat=0,
            dataset=config.dataset,
            network=config.experts.network,
            identity=config.identity(config.experts, describe(config.dataset)),
            experts=config.experts.count,
            distill=config.distill,
            evaluate=config.evaluate,
            numerics=config.resources.trial_numerics,
            store_uri=str(store),
            cache_bytes=2**20,
            folder=str(tmp_path / name),
        )
        return replace(spec, **fields)

    return make


def essence(report: Report) -> Report:
    """A report without its clock."""
    return replace(report, seconds=0.0)


def images(spec: TrialSpec) -> np.ndarray:
    return np.load(spec.result)["images"]


def test_trial_reports_at_every_interval_and_at_its_last_step(spec_for):
    spec = spec_for(distill__iterations=5, evaluate__every=2)
    reports = list(run_trial(spec))
    assert [(r.step, r.done) for r in reports] == [(2, False), (4, False), (5, True)]
    steps = [[record.step for record in r.curve] for r in reports]
    assert steps == [[1, 2], [3, 4], [5]]
    assert all(0 <= r.val_accuracy <= 1 and r.seconds > 0 for r in reports)
    assert all(r.picture.startswith(b"\x89PNG") for r in reports)


def test_trial_leaves_its_set_with_the_protocol_of_the_final_evaluation(spec_for):
    spec = spec_for()
    *_, last = run_trial(spec)
    result = SyntheticSet.load(spec.result)
    assert result.images.shape == (10, 1, 8, 8)
    assert result.protocol.epochs == spec.evaluate.epochs
    assert result.syn_lr == last.curve[-1].syn_lr
    assert result.provenance["step"] == 4


def test_equal_trials_are_equal_bit_for_bit(spec_for):
    a, b = spec_for("a"), spec_for("b")
    assert [essence(r) for r in run_trial(a)] == [essence(r) for r in run_trial(b)]
    assert Path(a.result).read_bytes() == Path(b.result).read_bytes()


@pytest.mark.parametrize("change", [{"seed": 1}, {"repeat": 1}], ids=["seed", "repeat"])
def test_other_seed_or_repeat_distils_another_set(spec_for, change):
    a, b = spec_for("a"), spec_for("b", **change)
    list(run_trial(a))
    list(run_trial(b))
    assert not np.array_equal(images(a), images(b))


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("after", [1, 2])
def test_interrupted_trial_goes_on_to_the_bits_of_an_undisturbed_one(spec_for, labels, after):
    changes = {"distill__iterations": 6, "distill__labels": labels}
    whole = spec_for("whole", **changes)
    undisturbed = [essence(r) for r in run_trial(whole)]
    spec = spec_for("interrupted", **changes)
    first: Iterator[Report] = run_trial(spec)
    seen = {r.step: essence(r) for r in (next(first) for _ in range(after))}
    first.close()
    seen |= {r.step: essence(r) for r in run_trial(spec)}
    assert seen == {r.step: r for r in undisturbed}
    assert Path(spec.result).read_bytes() == Path(whole.result).read_bytes()


def test_trial_goes_on_from_its_checkpoint_instead_of_its_start(spec_for):
    spec = spec_for(distill__iterations=6)
    first = run_trial(spec)
    next(first)
    next(first)
    first.close()
    assert next(run_trial(spec)).step > 2


def test_report_that_was_lost_with_its_worker_is_given_again(spec_for):
    # A worker that dies after a report was made and before it was heard must repeat it: the
    # pruner and the curves need every one.
    spec = spec_for(distill__iterations=6)
    lost = next(run_trial(spec))
    assert lost.step == 2
    assert essence(next(run_trial(spec))) == essence(lost)


def test_checkpoint_of_another_configuration_does_not_count(spec_for):
    first = run_trial(spec_for(distill__iterations=6))
    next(first)
    next(first)
    first.close()
    changed = spec_for(distill__iterations=6, distill__lr_img=20)
    assert [r.step for r in run_trial(changed)] == [2, 4, 6]


def test_forgotten_checkpoint_leaves_the_result(spec_for):
    spec = spec_for()
    list(run_trial(spec))
    forget_checkpoint(spec.folder)
    forget_checkpoint(spec.folder)
    assert [p.name for p in Path(spec.folder).iterdir()] == ["synthetic.npz"]


def test_huge_learning_rate_of_eta_ends_the_trial_with_that_reason(spec_for):
    with pytest.raises(Diverged, match=r"^step \d+: .*eta") as caught:
        list(run_trial(spec_for(distill__lr_lr=1e30)))
    assert "\n" not in str(caught.value)


def test_eta_below_zero_ends_the_trial_at_once_with_that_reason(spec_for):
    # So steep that one step crosses zero, and mild enough to stay finite; which way the first
    # step goes is up to the seed, so some seeds have to do it and none may go on with eta <= 0.
    reasons = []
    for seed in range(6):
        spec = spec_for(f"seed{seed}", seed=seed, distill__lr_lr=1.0)
        try:
            for report in run_trial(spec):
                assert all(record.syn_lr > 0 for record in report.curve)
        except Diverged as error:
            reasons.append(str(error))
    assert any("eta became -" in r and "must stay above 0" in r for r in reasons)


def test_huge_learning_rate_of_images_ends_the_trial_with_that_reason(spec_for):
    with pytest.raises(Diverged, match=r"^step \d+: the matching loss is"):
        list(run_trial(spec_for(distill__lr_img=1e38, distill__ema_decay=0.0)))


def test_trial_whose_experts_are_missing_says_which(spec_for):
    with pytest.raises(UserError, match="has none of the"):
        list(run_trial(spec_for(experts__lr=0.5)))


def test_only_the_first_experts_are_used_whatever_the_store_holds(spec_for, store):
    one, two = spec_for("one", experts=1), spec_for("two", experts=2)
    for spec, known in ((one, {0}), (two, {0, 1})):
        used = {record.expert for r in run_trial(spec) for record in r.curve}
        assert used <= known
    experts = TrajectoryStore(str(store)).expert_set(one.identity)
    assert isinstance(experts, ExpertSet) and experts.complete(3) == [0, 1, 2]
    assert FirstExperts(experts, 2).experts == 2


def test_specifications_and_reports_travel_by_pickle(spec_for):
    spec = spec_for()
    assert pickle.loads(pickle.dumps(spec)) == spec
    report = next(run_trial(spec))
    assert pickle.loads(pickle.dumps(report)) == report


# --- the end of a sweep ---------------------------------------------------------------------


@pytest.fixture
def final(spec_for) -> FinalSpec:
    spec = spec_for()
    list(run_trial(spec))
    return FinalSpec(
        dataset=DatasetConfig(name="digits", val_fraction=0.15),
        numerics=spec.numerics,
        seed=0,
        synthetic=Path(spec.result).read_bytes(),
        networks=range(3),
    )


@pytest.mark.parametrize("baseline_lr", [None, 0.01], ids=["distilled", "random real"])
def test_fresh_networks_do_not_depend_on_who_trains_which(final, baseline_lr):
    spec = replace(final, baseline_lr=baseline_lr)
    together = final_scores(spec)
    alone = [final_scores(replace(spec, networks=range(i, i + 1)))[0] for i in range(3)]
    assert alone == together
    assert all(0 <= value <= 1 for pair in together for value in pair)


def test_baseline_draws_fresh_images_for_every_network(final):
    scores = final_scores(replace(final, baseline_lr=0.05, networks=range(4)))
    assert len(set(scores)) > 1
    assert Score(tuple(test for _, test in scores)).std > 0
