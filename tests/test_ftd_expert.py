"""Experts: SGD and its sharpness-aware steps, snapshots, resuming, and what a set's key holds."""

from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftd import augment
from ftd.data import Dataset
from ftd.errors import Diverged, UserError
from ftd.expert import (
    ExpertConfig,
    Numerics,
    Snapshot,
    accuracy,
    identity,
    network_for,
    set_key,
    sgd_step,
    train_expert,
)
from ftd.gradients import Gradients
from ftd.seeds import derive_seed, generator

SMALL = ExpertConfig(network="ConvNetD1W8", lr=0.1, batch_size=200, rho=0.05)


def train(data: Dataset, config: ExpertConfig = SMALL, index: int = 0, epochs: int = 2, **how: Any):
    return list(train_expert(config, data, index, epochs=epochs, **how))


def assert_same(a: Snapshot, b: Snapshot) -> None:
    assert a.epoch == b.epoch
    assert torch.equal(a.params_P, b.params_P)
    assert (a.momentum_P is None) == (b.momentum_P is None)
    if a.momentum_P is not None and b.momentum_P is not None:
        assert torch.equal(a.momentum_P, b.momentum_P)
    assert a.val_accuracy == b.val_accuracy
    assert a.train_loss == b.train_loss or a.epoch == 0


# --- the step -------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_sgd_step_is_torchs_sgd_over_several_steps(momentum: float, weight_decay: float) -> None:
    gen = torch.Generator().manual_seed(0)
    start = torch.randn(20, generator=gen, dtype=torch.float64)
    w, velocity = start.clone(), None
    theirs = start.clone().requires_grad_()
    optimiser = torch.optim.SGD([theirs], lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for _ in range(6):
        g = torch.randn(20, generator=gen, dtype=torch.float64)
        w, velocity = sgd_step(w, g, velocity, lr=0.1, momentum=momentum, weight_decay=weight_decay)
        theirs.grad = g.clone()
        optimiser.step()
        assert torch.allclose(w, theirs.detach(), rtol=1e-13, atol=1e-13)
    assert (velocity is None) == (momentum == 0)


def test_sgd_step_leaves_what_it_is_given_alone() -> None:
    w, g, v = torch.randn(3, 5).unbind()
    before = [t.clone() for t in (w, g, v)]
    sgd_step(w, g, v, lr=0.1, momentum=0.9, weight_decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip((w, g, v), before, strict=True))


# --- training -------------------------------------------------------------------------------


def naive_expert(data: Dataset, config: ExpertConfig, index: int, epochs: int) -> list[Tensor]:
    """Written with torch.optim and a SAM that moves the weights there and back."""
    network = network_for(config.network, data.description)
    seed = derive_seed(config.seed, "expert", index)
    w = network.init(generator(seed, "init")).requires_grad_()
    optimiser = torch.optim.SGD(
        [w], lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    out = [w.detach().clone()]
    for epoch in range(1, epochs + 1):
        gen = generator(seed, "epoch", epoch)
        order = torch.randperm(len(data.train), generator=gen)
        for first in range(0, len(order), config.batch_size):
            i = order[first : first + config.batch_size]
            draw = augment.draw(data.strategy, len(i), gen)  # one draw for both passes
            x, y = augment.apply(draw, data.train.batch(i)), data.train.labels[i]
            optimiser.zero_grad()
            F.cross_entropy(network(w, x), y).backward()
            assert w.grad is not None
            if config.radius:
                with torch.no_grad():
                    e = config.radius * w.grad / w.grad.norm()
                    w += e
                optimiser.zero_grad()
                F.cross_entropy(network(w, x), y).backward()
                with torch.no_grad():
                    w -= e
            optimiser.step()
        out.append(w.detach().clone())
    return out


@pytest.mark.parametrize(
    "config",
    [SMALL, replace(SMALL, momentum=0.5, weight_decay=1e-3), replace(SMALL, rho=0.0)],
    ids=["sam", "sam with momentum and decay", "plain"],
)
def test_an_expert_is_sam_on_torchs_sgd(digits: Dataset, config: ExpertConfig) -> None:
    ours = train(digits, config, index=3)
    theirs = naive_expert(digits, config, index=3, epochs=2)
    for snapshot, expected in zip(ours, theirs, strict=True):
        moved = (expected - theirs[0]).norm() + 1e-9
        assert (snapshot.params_P - expected).norm() < 1e-4 * moved


def test_sam_step_with_zero_radius_is_plain_sgd(digits: Dataset) -> None:
    plain = train(digits, ExpertConfig(network="ConvNetD1W8", sharpness="none", lr=0.1))
    for sharpness in ("sam", "asam", "gsam", "gsam_adaptive"):
        config = ExpertConfig(network="ConvNetD1W8", sharpness=sharpness, rho=0.0, lr=0.1)
        for a, b in zip(train(digits, config), plain, strict=True):
            assert_same(a, b)


def test_every_sharpness_gives_another_trajectory(digits: Dataset) -> None:
    configs = [
        replace(SMALL, sharpness="none", rho=None),
        SMALL,
        replace(SMALL, sharpness="asam"),
        replace(SMALL, sharpness="gsam", gsam_alpha=0.3),
        replace(SMALL, sharpness="gsam_adaptive", gsam_alpha=0.3),
        replace(SMALL, sharpness_weight=0.3),
    ]
    ends = [train(digits, c, epochs=1)[-1].params_P for c in configs]
    assert len({end.numpy().tobytes() for end in ends}) == len(configs)


def test_experts_that_differ_in_radius_start_from_the_same_weights(digits: Dataset) -> None:
    a, b = (train(digits, replace(SMALL, rho=rho), epochs=1) for rho in (0.01, 0.1))
    assert_same(a[0], b[0])
    assert not torch.equal(a[1].params_P, b[1].params_P)


def test_experts_of_another_number_or_seed_start_elsewhere(digits: Dataset) -> None:
    starts = [
        train(digits, replace(SMALL, seed=seed), index=i, epochs=0)[0].params_P.numpy().tobytes()
        for seed in (0, 1)
        for i in (0, 1, 2)
    ]
    assert len(set(starts)) == 6


def test_an_expert_learns(digits: Dataset) -> None:
    snapshots = train(digits, epochs=8)
    assert snapshots[-1].train_loss < snapshots[1].train_loss
    assert snapshots[0].val_accuracy < 0.3 < 0.5 < snapshots[-1].val_accuracy
    network = network_for(SMALL.network, digits.description)
    assert (
        accuracy(Gradients(network), snapshots[-1].params_P, digits.val)
        == snapshots[-1].val_accuracy
    )


def test_accuracy_counts_right_answers_whatever_the_batch_size(digits: Dataset) -> None:
    network = network_for(SMALL.network, digits.description)
    w = network.init(torch.Generator().manual_seed(0))
    images = digits.test.batch(torch.arange(len(digits.test)))
    guesses = [int(z.argmax()) for z in network(w, images)]
    right = sum(g == y for g, y in zip(guesses, digits.test.labels.tolist(), strict=True))
    for batch_size in (1000, 7):
        assert accuracy(Gradients(network), w, digits.test, batch_size) == right / len(digits.test)


def test_snapshots_are_one_an_epoch_from_zero_and_share_no_memory(digits: Dataset) -> None:
    config = replace(SMALL, momentum=0.9)
    kept, copies = [], []
    for snapshot in train_expert(config, digits, 0, epochs=3):
        kept.append(snapshot)
        copies.append(replace(snapshot, params_P=snapshot.params_P.clone()))
    assert [s.epoch for s in kept] == [0, 1, 2, 3]
    for s, copy in zip(kept, copies, strict=True):
        assert torch.equal(s.params_P, copy.params_P)
    for a, b in pairwise(kept):
        assert not torch.equal(a.params_P, b.params_P)
    tensors = [t for s in kept for t in (s.params_P, s.momentum_P) if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 7


def test_overwriting_a_snapshot_does_not_reach_the_training(digits: Dataset) -> None:
    clean = train(digits, replace(SMALL, momentum=0.9))
    for snapshot, expected in zip(
        train_expert(replace(SMALL, momentum=0.9), digits, 0, epochs=2), clean, strict=True
    ):
        assert_same(snapshot, expected)
        snapshot.params_P.zero_()
        if snapshot.momentum_P is not None:
            snapshot.momentum_P.zero_()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resuming_gives_the_bits_of_an_uninterrupted_run(digits: Dataset, momentum: float) -> None:
    config = replace(SMALL, momentum=momentum, weight_decay=1e-3)
    whole = train(digits, config, epochs=4)
    for stop in (0, 2):
        before = replace(whole[stop], params_P=whole[stop].params_P.clone())
        rest = train(digits, config, epochs=4, resume=whole[stop])
        assert [s.epoch for s in rest] == list(range(stop + 1, 5))
        for a, b in zip(rest, whole[stop + 1 :], strict=True):
            assert_same(a, b)
        assert_same(whole[stop], before)


def test_the_same_seed_twice_gives_the_same_bits(digits: Dataset) -> None:
    torch.manual_seed(1)
    first = train(digits, index=5)
    torch.manual_seed(2)
    train(digits, index=4, epochs=1)  # work in between must not matter
    for a, b in zip(first, train(digits, index=5), strict=True):
        assert_same(a, b)


def test_training_leaves_the_global_generator_alone(digits: Dataset) -> None:
    before = torch.get_rng_state()
    train(digits, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_expert_that_explodes_stops_with_the_reason(digits: Dataset) -> None:
    with pytest.raises(Diverged, match=r"expert 0 diverged in epoch 1.*experts\.lr=1e\+30"):
        train(digits, replace(SMALL, lr=1e30), epochs=3)


# --- configuration --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": "ResNet"}, "network='ResNet' is not known"),
        ({"sharpness": "flat"}, "sharpness='flat' is not known"),
        ({"sharpness": "none", "rho": 0.1}, "rho=0.1 has no effect"),
        ({"gsam_alpha": 0.1}, "gsam_alpha=0.1 has no effect"),
        ({"sharpness": "gsam", "sharpness_weight": 0.3}, "sharpness_weight=0.3 has no effect"),
        ({"rho": -0.1}, "rho=-0.1 must be 0 or more"),
        ({"rho": float("nan")}, "rho=nan must be 0 or more, and finite"),
        ({"rho": float("inf")}, "rho=inf must be 0 or more, and finite"),
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
        ({"momentum": 1.0}, "momentum=1.0 must be below 1"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"count": 0}, "count=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExpertConfig(**given)


def test_the_radius_defaults_to_the_papers() -> None:
    assert ExpertConfig().radius == 0.01
    assert ExpertConfig(sharpness="none").radius == 0
    assert ExpertConfig(sharpness="asam").radius == 0.01


# --- identity -------------------------------------------------------------------------------


def key(data: Dataset, config: ExpertConfig = SMALL, strategy: str = "color", **numerics: Any):
    return set_key(identity(config, data.description, strategy, Numerics(**numerics)))


@pytest.mark.parametrize("change", [{"count": 7}, {"epochs": 7}, {"count": 1, "epochs": 1}])
def test_how_many_experts_or_epochs_are_wanted_is_no_part_of_the_key(
    digits: Dataset, change: dict[str, Any]
) -> None:
    assert key(digits, replace(SMALL, **change)) == key(digits)


CHANGES: dict[str, Any] = {
    "network": "ConvNetD2W8",
    "lr": 0.2,
    "batch_size": 100,
    "momentum": 0.1,
    "weight_decay": 0.1,
    "sharpness": "asam",
    "rho": 0.2,
    "sharpness_weight": 0.5,
    "seed": 1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_all_that_shapes_the_weights_is_part_of_the_key(digits: Dataset, name: str) -> None:
    assert key(digits, replace(SMALL, **{name: CHANGES[name]})) != key(digits)


def test_every_field_is_either_in_the_key_or_known_to_be_left_out() -> None:
    assert set(asdict(SMALL)) == {*CHANGES, "gsam_alpha", "count", "epochs"}


def test_gsam_alpha_is_part_of_the_key(digits: Dataset) -> None:
    gsam = replace(SMALL, sharpness="gsam")
    assert key(digits, replace(gsam, gsam_alpha=0.1)) != key(digits, gsam)


def test_data_augmentation_and_numerics_are_part_of_the_key(digits: Dataset) -> None:
    other = replace(digits, description=replace(digits.description, fingerprint="other"))
    keys = {
        key(digits),
        key(other),
        key(digits, strategy="flip"),
        key(digits, threads=2),
        key(digits, device="cuda"),
    }
    assert len(keys) == 5


def test_threads_matter_on_a_cpu_only() -> None:
    assert Numerics.on("cpu", 2) != Numerics.on("cpu", 1)
    assert Numerics.on("cuda", 2) == Numerics.on("cuda", 1)


def test_zero_radius_has_one_key_by_whatever_name(digits: Dataset) -> None:
    plain = replace(SMALL, sharpness="none", rho=None)
    for sharpness in ("sam", "asam", "gsam", "gsam_adaptive"):
        assert key(digits, replace(SMALL, sharpness=sharpness, rho=0.0)) == key(digits, plain)


def test_a_whole_number_is_the_same_setting_as_its_float(digits: Dataset) -> None:
    whole = replace(SMALL, lr=1, momentum=0, weight_decay=0, sharpness_weight=1, gsam_alpha=0)
    floats = replace(
        SMALL, lr=1.0, momentum=0.0, weight_decay=0.0, sharpness_weight=1.0, gsam_alpha=0.0
    )
    assert whole == floats
    assert key(digits, whole) == key(digits, floats)


def test_a_key_does_not_depend_on_the_order_of_its_identity() -> None:
    assert set_key({"a": 1, "b": {"c": 2, "d": 3}}) == set_key({"b": {"d": 3, "c": 2}, "a": 1})
