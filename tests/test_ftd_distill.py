"""The outer loop: descent, moving average, resuming, and stopping when it cannot go on."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ftd import distill as distill_module
from ftd.augment import FAMILIES, FULL
from ftd.data import Dataset
from ftd.distill import (
    DistillConfig,
    DistillState,
    StepRecord,
    distill,
    draw_inner_steps,
    ema,
    initial_state,
)
from ftd.errors import Diverged, UserError
from ftd.expert import ExpertConfig, network_for, train_expert
from ftd.gradients import Gradients
from ftd.matching import match_direct
from ftd.seeds import generator

NETWORK = "ConvNetD1W8"
EPOCHS = 4
SMALL = DistillConfig(
    ipc=1,
    syn_steps=4,
    expert_epochs=2,
    max_start_epoch=2,
    iterations=6,
    lr_img=5.0,
    lr_lr=1e-4,
    lr_init=0.05,
    ema_decay=0.9,
)


class InMemory:
    """The toy instance of ``Trajectories``; remembers what it was asked for."""

    def __init__(self, trajectories: list[list[np.ndarray]]) -> None:
        self.trajectories = trajectories
        self.asked: list[tuple[int, int, int]] = []

    @property
    def experts(self) -> int:
        return len(self.trajectories)

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((expert, start, end))
        return self.trajectories[expert][start], self.trajectories[expert][end]


@pytest.fixture(scope="module")
def trajectories(digits: Dataset) -> InMemory:
    torch.set_num_threads(1)
    config = ExpertConfig(network=NETWORK, lr=0.1, batch_size=200)
    return InMemory(
        [
            [s.params_P.numpy() for s in train_expert(config, digits, i, epochs=EPOCHS)]
            for i in range(3)
        ]
    )


Steps = list[tuple[DistillState, StepRecord]]


def run(
    data: Dataset,
    trajectories: InMemory,
    config: DistillConfig = SMALL,
    *,
    seed: int = 0,
    state: DistillState | None = None,
) -> Steps:
    return list(distill(config, data, trajectories, NETWORK, epochs=EPOCHS, seed=seed, state=state))


def assert_same(a: DistillState, b: DistillState) -> None:
    mine, theirs = a.arrays(), b.arrays()
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


# --- the step -------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_outer_loop_is_torchs_sgd_on_the_direct_gradient(
    digits: Dataset, trajectories: InMemory, labels: str
) -> None:
    lr_label = 2.0 if labels == "soft" else None
    config = replace(SMALL, labels=labels, lr_label=lr_label, momentum=0.5, iterations=4)
    steps = run(digits, trajectories, config)
    network = network_for(NETWORK, digits.description)
    start = initial_state(config, digits, trajectories, Gradients(network), epochs=EPOCHS, seed=0)
    images, eta = start.images.clone().requires_grad_(), start.syn_lr.clone().requires_grad_()
    y = start.labels.clone().requires_grad_(labels == "soft")
    groups = [{"params": [images], "lr": config.lr_img}, {"params": [eta], "lr": config.lr_lr}]
    if labels == "soft":
        groups.append({"params": [y], "lr": lr_label})
    optimiser = torch.optim.SGD(groups, lr=0.0, momentum=0.5)
    average, average_y = start.images.clone(), start.labels.clone()
    for state, record in steps:
        gen = generator(0, "step", record.step)
        assert int(torch.randint(3, (), generator=gen)) == record.expert
        assert int(torch.randint(2, (), generator=gen)) == record.start_epoch
        t = record.start_epoch
        first, last = (torch.tensor(v) for v in trajectories.segment(record.expert, t, t + 2))
        inner = draw_inner_steps(config, 10, digits.strategy, gen, torch.device("cpu"))
        result = match_direct(
            Gradients(network), first, last, images.detach(), y.detach(), eta.detach(), inner
        )
        assert record.loss == pytest.approx(result.loss.item(), rel=1e-4)
        assert record.grad_norm == pytest.approx(result.grad_images.norm().item(), rel=1e-3)
        images.grad, eta.grad, y.grad = result.grad_images, result.grad_lr, result.grad_labels
        optimiser.step()
        average = 0.9 * average + 0.1 * images.detach()
        torch.testing.assert_close(state.images, images.detach(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(state.syn_lr, eta.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(state.ema_images, average, rtol=1e-3, atol=1e-3)
        assert record.syn_lr == state.syn_lr.item()
        if labels == "soft":
            average_y = 0.9 * average_y + 0.1 * y.detach()
            torch.testing.assert_close(state.labels, y.detach(), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(state.ema_labels, average_y, rtol=1e-3, atol=1e-3)
    assert not torch.equal(steps[-1][0].images, start.images)


def test_ema_is_the_recursion_without_bias_correction() -> None:
    beta, values = 0.8, torch.randn(6, 5, dtype=torch.float64)
    average = values[0]
    for value in values[1:]:
        average = ema(average, value, beta)
    n = len(values) - 1
    expected = beta**n * values[0]
    for i in range(1, n + 1):
        expected = expected + (1 - beta) * beta ** (n - i) * values[i]
    assert torch.allclose(average, expected)


def test_the_average_starts_at_the_initial_images(digits: Dataset, trajectories: InMemory) -> None:
    network = network_for(NETWORK, digits.description)
    start = initial_state(SMALL, digits, trajectories, Gradients(network), epochs=EPOCHS, seed=0)
    assert torch.equal(start.ema_images, start.images)
    first, _ = run(digits, trajectories)[0]
    torch.testing.assert_close(first.ema_images, 0.9 * start.images + 0.1 * first.images)


def test_no_averaging_is_the_images_themselves(digits: Dataset, trajectories: InMemory) -> None:
    for state, _ in run(digits, trajectories, replace(SMALL, ema_decay=0.0)):
        assert torch.equal(state.ema_images, state.images)


def test_segments_start_below_the_limit_and_span_the_epochs_asked_for(
    digits: Dataset, trajectories: InMemory
) -> None:
    trajectories.asked.clear()
    config = replace(SMALL, iterations=40, syn_steps=1, max_start_epoch=3, expert_epochs=2)
    records = [r for _, r in run(digits, trajectories, config)]
    assert trajectories.asked == [(r.expert, r.start_epoch, r.start_epoch + 2) for r in records]
    assert {r.start_epoch for r in records} == {0, 1, 2}
    assert {r.expert for r in records} == {0, 1, 2}
    assert [r.step for r in records] == list(range(1, 41))


def test_a_learning_rate_of_zero_keeps_eta(digits: Dataset, trajectories: InMemory) -> None:
    for state, _ in run(digits, trajectories, replace(SMALL, lr_lr=0.0)):
        assert state.syn_lr.item() == pytest.approx(0.05)


def test_the_loss_falls_on_digits(digits: Dataset, trajectories: InMemory) -> None:
    config = replace(
        SMALL, iterations=60, syn_steps=10, max_start_epoch=1, lr_img=20.0, lr_init=0.1
    )
    losses = [r.loss for _, r in run(digits, trajectories, config)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_both_gradients_distil_the_same_set(
    digits: Dataset, trajectories: InMemory, labels: str
) -> None:
    ends = [
        run(digits, trajectories, replace(SMALL, gradient=g, labels=labels))[-1][0]
        for g in ("rematerialised", "direct")
    ]
    torch.testing.assert_close(ends[0].images, ends[1].images, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ends[0].syn_lr, ends[1].syn_lr)


# --- the same bits --------------------------------------------------------------------------


VARIANTS = {
    "plain": SMALL,
    "soft labels": replace(SMALL, labels="soft"),
    "batches": replace(SMALL, ipc=2, batch_syn=7),
    "no momentum": replace(SMALL, momentum=0.0),
    "noise": replace(SMALL, init="noise"),
    "rmsprop": DistillConfig(syn_steps=4, iterations=6, optimiser="rmsprop"),
    "rmsprop, soft labels, batches": DistillConfig(
        ipc=2, batch_syn=7, syn_steps=4, iterations=6, optimiser="rmsprop", labels="soft"
    ),
    "an average of a share": replace(SMALL, ema_decay=None, ema_share=0.5),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


@variants
def test_the_same_seed_twice_gives_the_same_set_bit_for_bit(
    digits: Dataset, trajectories: InMemory, config: DistillConfig
) -> None:
    torch.manual_seed(1)
    first = run(digits, trajectories, config)
    torch.manual_seed(2)
    second = run(digits, trajectories, config)
    assert [r for _, r in first] == [r for _, r in second]
    assert_same(first[-1][0], second[-1][0])


@variants
def test_going_on_from_stored_arrays_gives_the_bits_of_an_uninterrupted_run(
    digits: Dataset, trajectories: InMemory, config: DistillConfig
) -> None:
    whole = run(digits, trajectories, config)
    stored = {k: v.copy() for k, v in whole[2][0].arrays().items()}
    rest = run(digits, trajectories, config, state=DistillState.from_arrays(stored))
    assert [r for _, r in rest] == [r for _, r in whole[3:]]
    assert_same(rest[-1][0], whole[-1][0])


def test_going_on_from_a_finished_state_does_nothing(
    digits: Dataset, trajectories: InMemory
) -> None:
    last = run(digits, trajectories)[-1][0]
    assert run(digits, trajectories, state=last) == []


def test_a_longer_run_passes_through_the_shorter_one(
    digits: Dataset, trajectories: InMemory
) -> None:
    short = run(digits, trajectories, replace(SMALL, iterations=3))
    whole = run(digits, trajectories)
    assert_same(short[-1][0], whole[2][0])


def test_states_survive_the_steps_that_follow(digits: Dataset, trajectories: InMemory) -> None:
    kept, copies = [], []
    for state, _ in distill(SMALL, digits, trajectories, NETWORK, epochs=EPOCHS, seed=0):
        kept.append(state)
        copies.append({k: v.copy() for k, v in state.arrays().items()})
    for state, copy in zip(kept, copies, strict=True):
        for name, value in state.arrays().items():
            np.testing.assert_array_equal(value, copy[name])


def test_another_seed_gives_another_set(digits: Dataset, trajectories: InMemory) -> None:
    a, b = (run(digits, trajectories, seed=s)[-1][0].images for s in (0, 1))
    assert not torch.equal(a, b)


def test_arrays_go_there_and_back(digits: Dataset, trajectories: InMemory) -> None:
    state = run(digits, trajectories, replace(SMALL, labels="soft"))[-1][0]
    arrays = state.arrays()
    assert {v.dtype.kind for v in arrays.values()} <= {"f", "i"}
    back = DistillState.from_arrays(arrays)
    assert back.step == 6 and back.syn_lr.shape == ()
    assert_same(back, state)
    back.images.zero_()
    assert state.images.any()


# --- reading ahead --------------------------------------------------------------------------


class Slow(InMemory):
    """Takes its time for every segment; may fail at one."""

    def __init__(self, there: InMemory, seconds: float = 0.0, fails_at: int | None = None) -> None:
        super().__init__(there.trajectories)
        self.seconds, self.fails_at = seconds, fails_at
        self.threads: set[str] = set()

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        segment = super().segment(expert, start, end)
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if len(self.asked) == self.fails_at:
            raise OSError("the disk is gone")
        return segment


@pytest.fixture
def while_computing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something done while a step computes its gradient."""
    real = distill_module.GRADIENTS["rematerialised"]

    def arrange(act: Callable[[], None]) -> None:
        def computing(*args: Any) -> Any:
            act()
            return real(*args)

        monkeypatch.setitem(distill_module.GRADIENTS, "rematerialised", computing)

    return arrange


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def comes(look: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not look() and time.monotonic() < end:
        time.sleep(0.001)
    return look()


def test_the_next_segments_are_asked_for_while_a_step_computes_and_none_beyond_the_last(
    digits: Dataset,
    trajectories: InMemory,
    while_computing: Callable[[Callable[[], None]], None],
) -> None:
    slow, computed = Slow(trajectories), []

    def compute() -> None:
        computed.append(1)
        ahead = min(len(computed) + distill_module.SEGMENTS_AHEAD, SMALL.iterations)
        assert comes(lambda: len(slow.asked) >= ahead)
        time.sleep(0.02)
        assert len(slow.asked) == ahead

    while_computing(compute)
    records = [r for _, r in run(digits, slow)]
    assert len(computed) == SMALL.iterations
    assert slow.asked == [(r.expert, r.start_epoch, r.start_epoch + 2) for r in records]
    assert threading.current_thread().name not in slow.threads
    assert readers() == []


def test_going_on_reads_only_what_is_left(digits: Dataset, trajectories: InMemory) -> None:
    whole = run(digits, trajectories)
    slow = Slow(trajectories)
    assert len(run(digits, slow, state=whole[3][0])) == len(slow.asked) == 2
    run(digits, slow, state=whole[-1][0])
    assert len(slow.asked) == 2


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, ipc=2, batch_syn=7, labels="soft")])
def test_reading_ahead_gives_the_bits_of_reading_in_order(
    digits: Dataset, trajectories: InMemory, config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = run(digits, Slow(trajectories, 0.002), config)

    def in_order(
        config: DistillConfig, trajectories: InMemory, seed: int, first: int
    ) -> Iterator[distill_module._Pick]:
        for step in range(first, config.iterations + 1):
            gen = generator(seed, "step", step)
            expert = int(torch.randint(trajectories.experts, (), generator=gen))
            t = int(torch.randint(config.max_start_epoch, (), generator=gen))
            start, target = trajectories.segment(expert, t, t + config.expert_epochs)
            yield distill_module._Pick(step, gen, expert, t, start, target, 0.0)

    monkeypatch.setattr(distill_module, "_picks", in_order)
    naive = run(digits, trajectories, config)
    assert [r for _, r in ahead] == [r for _, r in naive]
    for (mine, _), (theirs, _) in zip(ahead, naive, strict=True):
        assert_same(mine, theirs)


def test_a_segment_that_cannot_be_read_stops_the_step_that_needs_it(
    digits: Dataset, trajectories: InMemory
) -> None:
    slow = Slow(trajectories, fails_at=3)
    steps = distill(SMALL, digits, slow, NETWORK, epochs=EPOCHS, seed=0)
    assert [next(steps)[1].step for _ in range(2)] == [1, 2]
    assert comes(lambda: len(slow.asked) >= 3)
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)
    assert readers() == []


def test_a_run_that_is_left_in_the_middle_leaves_no_thread(
    digits: Dataset, trajectories: InMemory
) -> None:
    for seconds in (0.0, 0.3):
        steps = distill(SMALL, digits, Slow(trajectories, seconds), NETWORK, epochs=EPOCHS, seed=0)
        next(steps)
        assert len(readers()) == 1
        began = time.monotonic()
        steps.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began < 5
        assert readers() == []
    with pytest.raises(Diverged):
        run(digits, Slow(trajectories, 0.05), replace(SMALL, lr_init=1e30))
    assert comes(lambda: not readers())


def test_a_step_records_what_it_waited_and_records_are_equal_whatever_that_was(
    digits: Dataset, trajectories: InMemory
) -> None:
    slow, quick = (
        [r for _, r in run(digits, Slow(trajectories, seconds))] for seconds in (0.2, 0.0)
    )
    assert 0.1 <= max(r.waited for r in slow) < 10
    assert all(r.waited > 0 for r in slow)
    assert slow == quick
    assert sum(r.waited for r in quick) < sum(r.waited for r in slow)


def test_a_store_that_is_quicker_than_a_step_costs_no_waiting(
    digits: Dataset,
    trajectories: InMemory,
    while_computing: Callable[[Callable[[], None]], None],
) -> None:
    while_computing(lambda: time.sleep(0.12))
    config = replace(SMALL, iterations=12)
    waited = [r.waited for _, r in run(digits, Slow(trajectories, 0.06), config)]
    assert waited[0] > 0
    assert sorted(waited[1:])[len(waited) // 2] < 0.01


def test_places_that_take_several_askers_are_asked_for_several_segments_at_a_time(
    digits: Dataset, trajectories: InMemory
) -> None:
    class Wide(Slow):
        at_once = 3
        now = most = 0

        def segment(self, *segment: int) -> tuple[np.ndarray, np.ndarray]:
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                return super().segment(*segment)
            finally:
                self.now -= 1

    wide = Wide(trajectories, 0.1)
    config = replace(SMALL, iterations=8)
    assert_same(run(digits, wide, config)[-1][0], run(digits, trajectories, config)[-1][0])
    assert wide.most == 3
    assert sorted(wide.asked) == sorted(trajectories.asked[-8:])


# --- where it starts ------------------------------------------------------------------------


def start(data: Dataset, trajectories: InMemory, config: DistillConfig) -> DistillState:
    network = network_for(NETWORK, data.description)
    return initial_state(config, data, trajectories, Gradients(network), epochs=EPOCHS, seed=0)


def test_it_starts_from_distinct_real_training_images_of_each_class(
    digits: Dataset, trajectories: InMemory
) -> None:
    state = start(digits, trajectories, replace(SMALL, ipc=3))
    assert state.labels.tolist() == [k for k in range(10) for _ in range(3)]
    assert state.syn_lr.item() == pytest.approx(0.05)
    real = {
        digits.train.batch(torch.tensor([i])).numpy().tobytes(): int(digits.train.labels[i])
        for i in range(len(digits.train))
    }
    found = [image[None].numpy().tobytes() for image in state.images]
    assert [real[f] for f in found] == state.labels.tolist()
    assert len(set(found)) == 30


def test_noise_is_standard_normal(digits: Dataset, trajectories: InMemory) -> None:
    state = start(digits, trajectories, replace(SMALL, ipc=20, init="noise"))
    assert state.images.mean().abs() < 0.05
    assert state.images.std().item() == pytest.approx(1, abs=0.03)
    assert state.labels.bincount().tolist() == [20] * 10


def test_soft_labels_start_from_the_experts_mean_and_name_the_true_class(
    digits: Dataset, trajectories: InMemory
) -> None:
    config = replace(SMALL, ipc=4, labels="soft")
    state = start(digits, trajectories, config)
    hard = start(digits, trajectories, replace(config, labels="hard")).labels
    assert state.labels.shape == (40, 10)
    assert torch.equal(state.labels.argmax(1), hard)
    network = network_for(NETWORK, digits.description)
    grown = [torch.tensor(t[EPOCHS]) for t in trajectories.trajectories]
    mean = sum(network(w, state.images) for w in grown) / len(grown)
    right = mean.argmax(1) == hard
    assert 0 < int(right.sum()) < 40  # both branches are seen
    torch.testing.assert_close(state.labels[right], mean[right])
    for row, k in zip(state.labels[~right], hard[~right], strict=True):
        assert row[k] == row.max() > 0 and int((row != 0).sum()) == 1


def test_soft_labels_are_learned_and_hard_ones_stay(
    digits: Dataset, trajectories: InMemory
) -> None:
    soft = replace(SMALL, labels="soft")
    before, after = start(digits, trajectories, soft), run(digits, trajectories, soft)[-1][0]
    assert not torch.equal(before.labels, after.labels)
    targets = after.label_targets
    torch.testing.assert_close(targets, after.ema_labels.softmax(1))
    torch.testing.assert_close(targets.sum(1), torch.ones(10))
    hard = run(digits, trajectories)[-1][0]
    assert hard.label_targets.tolist() == list(range(10))
    assert hard.label_velocity is None


# --- student batches ------------------------------------------------------------------------


def steps_of(batch_syn: int | None, n: int, syn_steps: int, seed: int = 0) -> list[Any]:
    config = replace(SMALL, batch_syn=batch_syn, syn_steps=syn_steps)
    gen = torch.Generator().manual_seed(seed)
    return draw_inner_steps(config, n, FULL, gen, torch.device("cpu"))


@pytest.mark.parametrize(("n", "size"), [(12, 4), (10, 4), (7, 1), (10, 9)])
def test_batches_walk_through_every_image_once_before_repeating(n: int, size: int) -> None:
    per_round = -(-n // size)
    steps = steps_of(size, n, 3 * per_round)
    orders = []
    for r in range(3):
        seen = torch.cat([s.index for s in steps[r * per_round : (r + 1) * per_round]])
        assert sorted(seen.tolist()) == list(range(n))
        orders.append(tuple(seen.tolist()))
    assert len(set(orders)) == 3
    assert all(len(s.draw.values) == len(s.index) <= size for s in steps)


@pytest.mark.parametrize("size", [None, 10, 20])
def test_all_images_are_taken_when_the_batch_is_as_large(size: int | None) -> None:
    steps = steps_of(size, 10, 5)
    assert [s.index for s in steps] == [None] * 5
    assert all(s.draw.values.shape == (10, 3) for s in steps)


def test_each_student_step_has_its_own_augmentation() -> None:
    steps = steps_of(None, 10, 60)
    assert {s.draw.family for s in steps} == set(FAMILIES)
    assert len({s.draw.values.numpy().tobytes() for s in steps}) == 60


# --- stopping -------------------------------------------------------------------------------


def test_a_negative_eta_stops_with_the_reason(digits: Dataset, trajectories: InMemory) -> None:
    backwards = InMemory([t[::-1] for t in trajectories.trajectories])  # every step leads away
    with pytest.raises(Diverged, match=r"step 1: eta became -.*distill\.lr_lr=5\b"):
        run(digits, backwards, replace(SMALL, lr_lr=5.0))


@pytest.mark.parametrize("change", [{"lr_init": 1e30}, {"lr_img": 1e38, "iterations": 20}])
def test_a_loss_that_is_not_finite_stops_with_the_reason(
    digits: Dataset, trajectories: InMemory, change: dict[str, Any]
) -> None:
    with pytest.raises(Diverged, match=r"step \d+: the matching loss is .* Lower distill\.lr_img"):
        run(digits, trajectories, replace(SMALL, **change))


def test_an_expert_of_nan_stops_at_the_first_step(digits: Dataset, trajectories: InMemory) -> None:
    spoiled = InMemory([[np.full_like(v, np.nan) for v in t] for t in trajectories.trajectories])
    with pytest.raises(Diverged, match="step 1: the matching loss is nan"):
        run(digits, spoiled)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ipc": 0}, "ipc=0 must be at least 1"),
        ({"syn_steps": 0}, "syn_steps=0 must be at least 1"),
        ({"lr_img": 0.0}, r"lr_img=0\.0 must be above 0"),
        ({"lr_init": float("nan")}, "lr_init=nan must be above 0"),
        ({"lr_lr": -1.0}, r"lr_lr=-1\.0 must be 0 or more"),
        ({"ema_decay": 1.0}, r"ema_decay=1\.0 must lie in"),
        ({"momentum": 1.0}, r"momentum=1\.0 must lie in"),
        ({"batch_syn": 0}, "batch_syn=0 must be at least 1"),
        ({"labels": "fuzzy"}, "labels='fuzzy' is not known"),
        ({"init": "zero"}, "init='zero' is not known"),
        ({"gradient": "none"}, "gradient='none' is not known"),
    ],
)
def test_impossible_settings_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DistillConfig(**given)


def test_a_window_beyond_the_trajectory_is_refused_before_work() -> None:
    config = replace(SMALL, max_start_epoch=20, expert_epochs=2)
    with pytest.raises(UserError, match="needs 21 epochs; experts have 20"):
        config.check(epochs=20, per_class=(100, 100))
    config.check(epochs=21, per_class=(100, 100))


def test_more_images_than_the_smallest_class_has_are_refused() -> None:
    config = replace(SMALL, ipc=6)
    with pytest.raises(UserError, match="ipc=6 is above the 5 training images"):
        config.check(epochs=EPOCHS, per_class=(100, 5))
    config.check(epochs=EPOCHS, per_class=(100, 6))


def test_a_batch_above_the_synthetic_images_is_refused() -> None:
    config = replace(SMALL, ipc=2, batch_syn=5)
    with pytest.raises(UserError, match="batch_syn=5 is above the 4 synthetic images"):
        config.check(epochs=EPOCHS, per_class=(100, 100))
    replace(config, batch_syn=4).check(epochs=EPOCHS, per_class=(100, 100))


def test_distilling_leaves_the_global_generator_and_gradients_alone(
    digits: Dataset, trajectories: InMemory
) -> None:
    before = torch.get_rng_state()
    state = run(digits, trajectories, replace(SMALL, labels="soft"))[-1][0]
    assert torch.equal(torch.get_rng_state(), before)
    tensors = [v for v in vars(state).values() if isinstance(v, Tensor)]
    assert len(tensors) == 8 and not any(t.requires_grad for t in tensors)
