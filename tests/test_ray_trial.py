"""A trial is a function of its configuration and the store; Ray is not needed to run it."""

import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray_helpers import parse_tiny

from ftd.data import DatasetConfig, describe, load
from ftd.errors import Diverged, UserError
from ftd.evaluate import Score
from ftd.expert import network_for
from ftd.seeds import derive_seed
from ftd.synthetic import SyntheticSet
from ftd.trajectory import ExpertSet
from ftd_ray import workers
from ftd_ray.experts.build import ExpertRequest, build_expert
from ftd_ray.store import TrajectoryStore
from ftd_ray.trial import (
    FinalSpec,
    FirstExperts,
    Report,
    TrialSpec,
    WholeDataSpec,
    final_scores,
    forget_checkpoint,
    forget_checkpoints,
    run_trial,
    whole_data_scores,
)
from ftd_ray.workers import TrialWorker

FIELDS = ("number", "seed", "repeat", "repeats", "experts")
"""Of a specification; what else a test changes is of the configuration."""


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
        fields = {k: changes.pop(k) for k in FIELDS if k in changes}
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


class DirectExperts(FirstExperts):
    """Experts of a store, read without the cache of a node, which takes Ray."""

    def __init__(self, store_uri: str, key: str, experts: int, limit: int):
        super().__init__(TrajectoryStore(store_uri).at(key), experts)


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


WITHOUT_UNITS = {
    "distill__optimiser": "rmsprop",
    "distill__lr_img": 0.05,
    "distill__lr_lr": 0.05,
    "distill__lr_init": None,
    "distill__ema_decay": None,
    "distill__ema_share": 0.4,
}


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("optimiser", [{}, WITHOUT_UNITS], ids=["sgd", "rmsprop"])
@pytest.mark.parametrize("after", [1, 2])
def test_interrupted_trial_goes_on_to_the_bits_of_an_undisturbed_one(
    spec_for, labels, optimiser, after
):
    changes = {"distill__iterations": 6, "distill__labels": labels, **optimiser}
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


def test_checkpoints_that_trials_left_at_their_end_are_forgotten_and_no_others(tmp_path):
    kept = [
        *(tmp_path / f"{n:04d}" / "checkpoint" / "state.npz" for n in (0, 1, 12)),
        tmp_path / "0001" / "synthetic.npz",
        tmp_path / "notes" / "checkpoint" / "state.npz",
    ]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    forget_checkpoints(str(tmp_path), {1, 2, 12})
    assert [p.exists() for p in kept] == [True, False, False, True, True]
    forget_checkpoints(str(tmp_path / "nothing"), {0})


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


# --- repeats --------------------------------------------------------------------------------

LEARNING = {
    "evaluate__search_networks": 2,
    "evaluate__search_epochs": 30,
    "distill__lr_img": 1000,
    "distill__lr_init": 0.05,
}
THRICE = {"seed": 1, "repeats": 3, **LEARNING}
"""By this seed the second of the three is the best, so neither the first nor the last is kept."""


@pytest.fixture(scope="module")
def thrice(store, tmp_path_factory):
    """A trial of three distillations, undisturbed, and the three by themselves."""
    config = parse_tiny(experts__rho=0.01, **LEARNING)

    def run(name: str, **fields: int) -> tuple[list[Report], bytes]:
        spec = TrialSpec(
            number=0,
            seed=THRICE["seed"],
            dataset=config.dataset,
            network=config.experts.network,
            identity=config.identity(config.experts, describe(config.dataset)),
            experts=config.experts.count,
            distill=config.distill,
            evaluate=config.evaluate,
            numerics=config.resources.trial_numerics,
            store_uri=str(store),
            cache_bytes=2**20,
            folder=str(tmp_path_factory.mktemp(name)),
            **fields,
        )
        return [essence(r) for r in run_trial(spec)], Path(spec.result).read_bytes()

    alone = [run(f"alone{i}", repeat=i, repeats=1) for i in range(3)]
    return run("together", repeat=0, repeats=3), alone


def test_steps_of_a_trial_count_on_over_its_repeats_and_its_last_report_is_done(thrice):
    (reports, _), _ = thrice
    assert [r.step for r in reports] == [2, 4, 6, 8, 10, 12]
    assert [r.done for r in reports] == [False] * 5 + [True]
    assert [record.step for r in reports for record in r.curve] == list(range(1, 13))


def test_repeats_are_the_distillations_from_three_seeds_one_after_the_other(thrice):
    (reports, _), alone = thrice
    for repeat, (single, _) in enumerate(alone):
        part = reports[2 * repeat : 2 * repeat + 2]
        for mine, theirs in zip(part, single, strict=True):
            offset = 4 * repeat
            assert mine.step == theirs.step + offset
            assert [replace(r, step=r.step - offset) for r in mine.curve] == list(theirs.curve)
            assert (mine.val_std, mine.picture) == (theirs.val_std, theirs.picture)
    assert len({single[-1].picture for single, _ in alone}) == 3


def test_accuracy_of_a_report_is_the_mean_over_the_finished_repeats_and_this_one(thrice):
    (reports, _), alone = thrice
    finals = [single[-1].val_accuracy for single, _ in alone]
    assert len(set(finals)) > 1
    for i, report in enumerate(reports):
        repeat, place = divmod(i, 2)
        values = [*finals[:repeat], alone[repeat][0][place].val_accuracy]
        assert report.val_accuracy == pytest.approx(sum(values) / len(values))


def test_fresh_networks_are_told_at_the_end_of_a_distillation_and_numbered_over_all(thrice):
    (reports, _), alone = thrice
    assert [list(r.networks) for r in reports] == [[], [0, 1], [], [2, 3], [], [4, 5]]
    for repeat, (single, _) in enumerate(alone):
        told = reports[2 * repeat + 1].networks
        assert list(told.values()) == list(single[-1].networks.values())
        assert list(single[-1].networks) == [0, 1]


def test_set_of_a_trial_is_that_of_its_best_repeat(thrice):
    (_, kept), alone = thrice
    first, second, third = (single[-1].val_accuracy for single, _ in alone)
    assert second > max(first, third)
    assert SyntheticSet.load(io.BytesIO(kept)).provenance["seed"] == derive_seed(
        THRICE["seed"], "distill", 1
    )
    assert kept == alone[1][1]


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_trial_of_repeats_interrupted_after_any_report_goes_on_to_the_same_bits(
    spec_for, thrice, after
):
    (undisturbed, kept), _ = thrice
    spec = spec_for(**THRICE)
    first = run_trial(spec)
    seen = [essence(next(first)) for _ in range(after)]
    first.close()
    again = [essence(r) for r in run_trial(spec)]
    assert seen == undisturbed[:after]
    assert again == undisturbed[after - 1 :]
    assert Path(spec.result).read_bytes() == kept


def test_trial_of_repeats_that_dies_again_and_again_goes_on_to_the_same_bits(spec_for, thrice):
    (undisturbed, kept), _ = thrice
    spec, place = spec_for(**THRICE), 0
    while place < len(undisturbed) - 1:
        going = run_trial(spec)
        for report in undisturbed[place : place + 2]:  # the one that was lost, and the next
            assert essence(next(going)) == report
        going.close()
        place += 1
    assert [essence(r) for r in run_trial(spec)] == undisturbed[-1:]
    assert Path(spec.result).read_bytes() == kept


def test_seeds_are_common_to_all_trials_and_other_for_a_repetition_of_a_point(spec_for):
    a = spec_for("a", repeats=3)
    b = spec_for("b", repeats=3, number=7, distill__lr_img=100, experts__rho=0.0)
    again = spec_for("c", repeats=3, number=8, repeat=1)
    seeds = [[s.distill_seed(r) for r in range(3)] for s in (a, b, again)]
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 6


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


@pytest.mark.parametrize("epochs", [0, 2, 3])
def test_baseline_of_all_data_is_the_test_accuracy_of_the_experts_themselves(store, epochs):
    config = parse_tiny(experts__rho=0.01)
    data = load(config.dataset, torch.device("cpu"))
    identity = config.identity(config.experts, data.description)
    network = network_for(config.experts.network, data.description)
    everything = torch.arange(len(data.test))
    naive = []
    for expert in range(2):
        w = TrajectoryStore(str(store)).expert_set(identity).params(expert, epochs)
        guesses = network(torch.tensor(w), data.test.batch(everything)).argmax(1)
        naive.append((guesses == data.test.labels).double().mean().item())
    scores = whole_data_scores(
        WholeDataSpec(
            dataset=config.dataset,
            numerics=config.resources.trial_numerics,
            network=config.experts.network,
            identity=identity,
            experts=2,
            epochs=epochs,
            store_uri=str(store),
        )
    )
    assert scores == pytest.approx(naive)
    assert (min(scores) > 0.2) is (epochs > 0)


def test_finalists_see_no_test_image(final):
    with_test, without = final_scores(final), final_scores(replace(final, test=False))
    assert [val for val, _ in without] == [val for val, _ in with_test]
    assert all(np.isnan(test) for _, test in without)


# --- the shell of a trial -------------------------------------------------------------------


def told(worker: TrialWorker) -> tuple[int, bool]:
    report, done = worker.report()
    return pickle.loads(report).step, done


def test_trial_that_is_begun_again_where_it_runs_goes_on_and_repeats_its_last_report(
    spec_for, monkeypatch
):
    monkeypatch.setattr(workers, "CachedExperts", DirectExperts)
    spec, worker = pickle.dumps(spec_for(distill__iterations=6)), TrialWorker()
    worker.begin(spec)
    worker.begin(spec)
    assert told(worker) == (2, False)
    worker.begin(spec)
    assert [told(worker), told(worker)] == [(2, False), (4, False)]
    worker.begin(spec)
    worker.begin(spec)
    assert [told(worker), told(worker)] == [(4, False), (6, True)]
    worker.begin(spec)
    assert told(worker) == (6, True)


def test_other_trial_and_one_that_failed_are_begun_at_their_checkpoints(spec_for, monkeypatch):
    monkeypatch.setattr(workers, "CachedExperts", DirectExperts)
    one, other = (pickle.dumps(spec_for(name)) for name in "ab")
    worker = TrialWorker()
    worker.begin(one)
    assert told(worker) == (2, False)
    worker.begin(other)
    assert told(worker) == (2, False)
    bad = pickle.dumps(spec_for("c", distill__lr_lr=1e30, distill__lr_img=100))
    for _ in range(2):
        worker.begin(bad)
        with pytest.raises(Diverged):
            worker.report()
