"""The outer optimiser without units: its formulas, its limits, and that no scale changes it."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from test_ftd_distill import EPOCHS, NETWORK, SMALL, InMemory, run, trajectories
from torch import Tensor

from ftd.data import Dataset, DatasetConfig, load
from ftd.distill import (
    SEARCH_LOSS,
    SEARCH_SEGMENTS,
    SEARCHED_LR,
    DistillConfig,
    distill,
    draw_inner_steps,
    initial_state,
)
from ftd.errors import Diverged, UserError
from ftd.expert import ExpertConfig, network_for, train_expert
from ftd.gradients import Gradients
from ftd.matching import GRADIENTS, Match, match_direct, matching_loss, unroll
from ftd.outer import Descent, log_lr_step, rmsprop_step
from ftd.seeds import generator

__all__ = ["trajectories"]  # a fixture

RMSPROP = DistillConfig(
    ipc=1,
    syn_steps=4,
    expert_epochs=2,
    max_start_epoch=2,
    iterations=6,
    optimiser="rmsprop",
    ema_share=0.5,
)


def descend(grads: list[Tensor], **changes: Any) -> list[Tensor]:
    """The values (n, ...) after each step over given gradients, from 0."""
    values, memory, path = torch.zeros_like(grads[0]), Descent(), []
    for k, grad in enumerate(grads, 1):
        values, memory = rmsprop_step(
            values, grad, memory, step=k, **{"lr": 0.1, "momentum": 0.5} | changes
        )
        path.append(values)
    return path


def gradients_of(count: int = 7, shape: tuple[int, ...] = (3, 2, 4, 4)) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 3, count, dtype=torch.float64)
    return [s * torch.randn(shape, generator=gen, dtype=torch.float64) for s in sizes]


# --- the step -------------------------------------------------------------------------------


def test_a_step_is_the_formula_image_by_image() -> None:
    grads = gradients_of()
    path = descend(grads, lr=0.1, momentum=0.5)
    for i in range(3):
        x = torch.zeros(2, 4, 4, dtype=torch.float64)
        v, s = torch.zeros_like(x), 0.0
        for k, grad in enumerate(grads, 1):
            rms = math.sqrt(float((grad[i] ** 2).sum()) / 32)
            s = 0.9 * s + 0.1 * rms**2
            r = max(math.sqrt(s / (1 - 0.9**k)), rms)
            v = 0.5 * v + grad[i] / r
            x = x - 0.1 * v
            torch.testing.assert_close(path[k - 1][i], x)


@pytest.mark.parametrize("factor", [1e-20, 1e-3, 1e3, 1e20])
def test_the_scale_of_the_loss_changes_nothing(factor: float) -> None:
    grads = gradients_of()
    plain, scaled = descend(grads), descend([factor * g for g in grads])
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b)


def test_no_step_of_an_image_is_larger_than_its_rate_over_one_minus_momentum() -> None:
    grads = [*gradients_of(20), *(1e6 * g for g in gradients_of(3))]  # a sudden leap at the end
    path = [torch.zeros_like(grads[0]), *descend(grads, lr=0.1, momentum=0.5)]
    for before, after in pairwise(path):
        moved = (after - before).square().flatten(1).mean(1).sqrt()
        assert (moved <= 0.1 / (1 - 0.5) + 1e-12).all()
    assert path[1].square().flatten(1).mean(1).sqrt() == pytest.approx(0.1)


def test_an_image_does_not_feel_how_large_the_gradient_of_another_is() -> None:
    grads = gradients_of()
    louder = [g * torch.tensor([1.0, 1e4, 1.0]).view(3, 1, 1, 1) for g in grads]
    torch.testing.assert_close(descend(grads)[-1], descend(louder)[-1])


def test_an_image_without_a_gradient_stays_where_it_is() -> None:
    grads = [g * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1) for g in gradients_of()]
    last = descend(grads)[-1]
    assert torch.equal(last[1], torch.zeros_like(last[1])) and last.isfinite().all()
    late = [grads[0] * 0, *grads]
    assert descend(late)[-1].isfinite().all()


@pytest.mark.parametrize("grad", [1e18, -1e18, 3.0, -1e-16, 0.0])
def test_eta_stays_above_zero_and_moves_by_a_bounded_factor(grad: float) -> None:
    syn_lr, memory = torch.tensor(0.01), Descent()
    for k in range(1, 51):
        before = syn_lr
        syn_lr, memory = log_lr_step(
            syn_lr, torch.tensor(grad), memory, step=k, lr=0.05, momentum=0.5
        )
        assert 0 < syn_lr < float("inf")
        assert abs(math.log(syn_lr / before)) <= 0.05 / (1 - 0.5) + 1e-5
    assert (syn_lr < 0.01) == (grad > 0) and (syn_lr > 0.01) == (grad < 0)


def test_eta_descends_the_logarithm_as_images_do() -> None:
    """Of L = (log eta - 1)^2: d log L / d log eta, by autograd."""
    u, velocity, s = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), 0.0, 0.0
    eta, memory = u.detach().exp(), Descent()
    for k in range(1, 6):
        (slope,) = torch.autograd.grad(((u - 2) ** 2).log(), u)
        s = 0.9 * s + 0.1 * float(slope) ** 2
        r = max(math.sqrt(s / (1 - 0.9**k)), abs(float(slope)))
        velocity = 0.5 * velocity + float(slope) / r
        u = (u - 0.05 * velocity).detach().requires_grad_()
        leaf = eta.clone().requires_grad_()
        (grad,) = torch.autograd.grad(((leaf.log() - 2) ** 2).log(), leaf)
        eta, memory = log_lr_step(eta, grad, memory, step=k, lr=0.05, momentum=0.5)
        torch.testing.assert_close(eta, u.detach().exp())


def test_eta_moves_as_fast_where_the_loss_hardly_depends_on_it() -> None:
    def moved(flatness: float) -> Tensor:
        eta, memory = torch.tensor(1e-3, dtype=torch.float64), Descent()
        for k in range(1, 31):
            leaf = eta.clone().requires_grad_()
            (grad,) = torch.autograd.grad(flatness * (leaf.log() - math.log(0.02)) ** 2, leaf)
            eta, memory = log_lr_step(eta, grad, memory, step=k, lr=0.05, momentum=0.5)
        return eta

    torch.testing.assert_close(moved(1e-4), moved(1.0))
    assert moved(1e-4) > 0.008


# --- in the outer loop ----------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_outer_loop_is_a_naive_descent_of_log_l(
    digits: Dataset, trajectories: InMemory, labels: str
) -> None:
    rates = {"lr_init": 0.05, "lr_img": 0.04, "lr_lr": 0.1}
    config = replace(RMSPROP, labels=labels, gradient="direct", iterations=4, **rates)
    network = network_for(NETWORK, digits.description)
    start = initial_state(config, digits, trajectories, Gradients(network), epochs=EPOCHS, seed=0)
    sigma = start.image_scale
    whole = digits.train.batch(torch.arange(len(digits.train))).std().item()
    assert sigma.item() == pytest.approx(whole, rel=0.01)
    sigma_y = start.labels.float().std()
    v_x, v_u, v_y = torch.zeros_like(start.images), 0.0, torch.zeros_like(start.labels)
    s_x, s_u, s_y = torch.zeros(10), 0.0, torch.zeros(10)
    images, logits = [], []
    before = start
    for state, record in run(digits, trajectories, config):
        gen, k = generator(0, "step", record.step), record.step
        torch.randint(3, (), generator=gen), torch.randint(2, (), generator=gen)
        t = record.start_epoch
        first, last = (torch.tensor(v) for v in trajectories.segment(record.expert, t, t + 2))
        inner = draw_inner_steps(config, 10, digits.strategy, gen, torch.device("cpu"))
        x, y, eta = before.images, before.labels, before.syn_lr
        result = match_direct(Gradients(network), first, last, x, y, eta, inner)
        g = result.grad_images / result.loss
        now = g.square().mean((1, 2, 3))
        s_x = 0.9 * s_x + 0.1 * now
        r = torch.maximum(s_x / (1 - 0.9**k), now).sqrt()
        v_x = 0.5 * v_x + g / r.view(-1, 1, 1, 1)
        torch.testing.assert_close(state.images, x - 0.04 * sigma * v_x)
        slope = (eta * result.grad_lr / result.loss).item()
        s_u = 0.9 * s_u + 0.1 * slope**2
        v_u = 0.5 * v_u + slope / max(math.sqrt(s_u / (1 - 0.9**k)), abs(slope))
        u = math.log(eta) - 0.1 * v_u
        assert state.syn_lr.item() == pytest.approx(math.exp(u), rel=1e-5)
        assert record.loss == pytest.approx(result.loss.item())
        images.append(state.images)
        torch.testing.assert_close(state.ema_images, averaged(images, 2))
        if labels == "soft":
            g = result.grad_labels / result.loss
            now = g.square().mean(1)
            s_y = 0.9 * s_y + 0.1 * now
            v_y = 0.5 * v_y + g / torch.maximum(s_y / (1 - 0.9**k), now).sqrt()[:, None]
            torch.testing.assert_close(state.labels, y - 0.05 * sigma_y * v_y)
            logits.append(state.labels)
            torch.testing.assert_close(state.ema_labels, averaged(logits, 2))
        before = state


def averaged(values: list[Tensor], remembered: float) -> Tensor:
    """The mean of the values, each weighing 1 - 1 / remembered of the one after it."""
    beta = 1 - 1 / remembered
    weights = [beta ** (len(values) - 1 - i) for i in range(len(values))]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def test_it_lives_where_sgd_dies(digits: Dataset, trajectories: InMemory) -> None:
    backwards = InMemory([t[::-1] for t in trajectories.trajectories])  # every step leads away
    with pytest.raises(Diverged, match=r"take distill\.optimiser=rmsprop"):
        run(digits, backwards, replace(SMALL, lr_lr=5.0))
    steps = run(digits, backwards, replace(RMSPROP, lr_init=0.05, lr_lr=1.0, iterations=20))
    assert len(steps) == 20 and all(r.syn_lr > 0 for _, r in steps)


def test_an_eta_that_runs_into_zero_stops_with_that_reason(
    digits: Dataset, trajectories: InMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steep(*args: Any) -> Match:
        slope = 1 / args[5].clamp_min(1e-37)
        return Match(torch.tensor(1.0), torch.zeros(10, 1, 8, 8), None, slope)

    monkeypatch.setitem(GRADIENTS, "rematerialised", steep)
    config = replace(RMSPROP, lr_lr=1.0, momentum=0.9, iterations=40)
    with pytest.raises(Diverged, match=r"step \d+: eta became 0, .* Lower distill\.lr_lr=1\.$"):
        run(digits, trajectories, config)


@pytest.mark.parametrize("lr_init", [1e-6, 1.0])
def test_the_loss_falls_from_any_initial_eta(
    digits: Dataset, trajectories: InMemory, lr_init: float
) -> None:
    config = replace(RMSPROP, syn_steps=10, lr_init=lr_init, iterations=20)
    losses = [r.loss for _, r in run(digits, trajectories, config)]
    assert np.mean(losses[-5:]) < (0.5 * losses[0] if lr_init == 1.0 else losses[0])


def test_the_loss_falls_on_digits_with_nothing_set(digits: Dataset, trajectories: InMemory) -> None:
    config = replace(RMSPROP, syn_steps=10, iterations=20)
    losses = [r.loss for _, r in run(digits, trajectories, config)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_a_step_is_in_standard_deviations_of_the_pixels_under_zca_too() -> None:
    data = load(DatasetConfig(name="digits", zca=True))
    config = ExpertConfig(network=NETWORK, lr=0.1, batch_size=200)
    experts = InMemory([[s.params_P.numpy() for s in train_expert(config, data, 0, epochs=3)]])
    network = network_for(NETWORK, data.description)
    before = initial_state(RMSPROP, data, experts, Gradients(network), epochs=3, seed=0)
    after, _ = next(iter(distill(RMSPROP, data, experts, NETWORK, epochs=3, seed=0, state=before)))
    moved = (after.images - before.images).square().mean((1, 2, 3)).sqrt()
    std = float(data.train.batch(torch.arange(len(data.train))).std())
    assert std < 0.9
    torch.testing.assert_close(moved, torch.full((10,), 0.05 * std), rtol=0.02, atol=0)


def test_the_images_of_a_class_share_its_change(digits: Dataset, trajectories: InMemory) -> None:
    network = network_for(NETWORK, digits.description)
    for ipc in (1, 4):
        config = replace(RMSPROP, ipc=ipc, labels="soft")
        start = initial_state(
            config, digits, trajectories, Gradients(network), epochs=EPOCHS, seed=0
        )
        state, _ = run(digits, trajectories, config)[0]
        moved = (state.images - start.images).square().mean((1, 2, 3)).sqrt()
        each = 0.05 * start.image_scale / ipc
        torch.testing.assert_close(moved, each.expand(10 * ipc), rtol=1e-3, atol=0)
        moved = (state.labels - start.labels).square().mean(1).sqrt()
        each = 0.05 * start.label_scale / ipc
        torch.testing.assert_close(moved, each.expand(10 * ipc), rtol=1e-3, atol=0)


def test_images_that_no_student_step_saw_do_not_move(
    digits: Dataset, trajectories: InMemory
) -> None:
    config = replace(RMSPROP, ipc=2, batch_syn=3, syn_steps=2, iterations=1)
    network = network_for(NETWORK, digits.description)
    start = initial_state(config, digits, trajectories, Gradients(network), epochs=EPOCHS, seed=0)
    state, _ = run(digits, trajectories, config)[0]
    moved = (state.images - start.images).flatten(1).abs().amax(1) > 0
    assert moved.sum() == 6


# --- the initial eta ------------------------------------------------------------------------


def test_the_initial_eta_is_the_largest_at_which_a_student_goes_no_farther_than_the_expert(
    digits: Dataset, trajectories: InMemory
) -> None:
    network = network_for(NETWORK, digits.description)
    state = initial_state(RMSPROP, digits, trajectories, Gradients(network), epochs=EPOCHS, seed=0)

    def mean_log(eta: float) -> float:
        total = 0.0
        for i in range(SEARCH_SEGMENTS):
            gen = generator(0, "lr_init", i)
            expert = int(torch.randint(3, (), generator=gen))
            t = int(torch.randint(2, (), generator=gen))
            start, target = (torch.tensor(w) for w in trajectories.segment(expert, t, t + 2))
            steps = draw_inner_steps(RMSPROP, 10, digits.strategy, gen, torch.device("cpu"))
            end = unroll(
                Gradients(network), start, state.images, state.labels, torch.tensor(eta), steps
            )[-1]
            total += math.log(matching_loss(end, start, target).item())
        return total / SEARCH_SEGMENTS

    best = max(eta for eta in SEARCHED_LR if mean_log(eta) <= math.log(SEARCH_LOSS))
    assert SEARCHED_LR[0] < best < SEARCHED_LR[-1]
    assert state.syn_lr.item() == pytest.approx(best)


def test_a_given_initial_eta_is_not_searched_and_sgds_is_the_papers(
    digits: Dataset, trajectories: InMemory
) -> None:
    network = network_for(NETWORK, digits.description)
    for config, eta in (
        (replace(RMSPROP, lr_init=0.2), 0.2),
        (DistillConfig(syn_steps=4), 0.01),
    ):
        state = initial_state(
            config, digits, trajectories, Gradients(network), epochs=EPOCHS, seed=0
        )
        assert state.syn_lr.item() == pytest.approx(eta)


# --- the average ----------------------------------------------------------------------------


def test_an_average_of_a_share_forgets_the_initial_images_at_once(
    digits: Dataset, trajectories: InMemory
) -> None:
    config = replace(SMALL, ema_decay=None, ema_share=0.9)
    first, _ = run(digits, trajectories, config)[0]
    assert torch.equal(first.ema_images, first.images)


def test_an_average_of_a_share_is_the_corrected_mean_of_the_images(
    digits: Dataset, trajectories: InMemory
) -> None:
    config = replace(SMALL, ema_decay=None, ema_share=0.5, iterations=12)
    seen: list[Tensor] = []
    for state, _ in run(digits, trajectories, config):
        seen.append(state.images)
        torch.testing.assert_close(state.ema_images, averaged(seen, 6.0))


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_share_of_at_most_one_step_is_the_images_themselves(
    digits: Dataset, trajectories: InMemory, share: float
) -> None:
    for state, _ in run(digits, trajectories, replace(SMALL, ema_decay=None, ema_share=share)):
        assert torch.equal(state.ema_images, state.images)


def test_the_paper_keeps_its_average_and_its_rates_where_nothing_is_said() -> None:
    config = DistillConfig()
    assert (config.optimiser, config.ema_decay, config.ema_share) == ("sgd", 0.9999, None)
    assert (config.lr_img, config.lr_lr, config.lr_init) == (100.0, 1e-7, 0.01)
    without_units = DistillConfig(optimiser="rmsprop")
    assert (without_units.lr_img, without_units.lr_lr) == (0.05, 0.05)
    assert without_units.lr_init is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimiser": "adam"}, "optimiser='adam' is not known. Take one of sgd, rmsprop"),
        ({"optimiser": "rmsprop", "lr_img": 100.0}, "lr_img=100 .* change of 100 standard dev"),
        ({"optimiser": "rmsprop", "lr_lr": 2.0}, "lr_lr=2 .* of log eta in one step"),
        ({"optimiser": "rmsprop", "lr_img": 0.0}, "lr_img=0.0 must be above 0"),
        (
            {"optimiser": "rmsprop", "labels": "soft", "lr_label": 5.0},
            "lr_label=5 .* standard deviations of the logits",
        ),
        ({"ema_share": 1.0}, r"ema_share=1\.0 must lie in \[0, 1\)"),
        ({"ema_share": 0.1, "ema_decay": 0.9}, "name two averages. Leave one of them out"),
    ],
)
def test_rates_and_averages_that_cannot_be_meant_are_refused(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        DistillConfig(**given)
