"""The matching loss and its gradient: three ways to the same number.

Direct unroll, rematerialised, and finite differences in float64 on a smooth network.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftd import augment
from ftd.augment import FAMILIES, Draw
from ftd.data import Dataset
from ftd.expert import network_for
from ftd.gradients import Gradients
from ftd.matching import (
    GRADIENTS,
    InnerStep,
    Match,
    match_direct,
    match_rematerialised,
    matching_loss,
)

N, C, H, K, WIDTH = 3, 2, 6, 3, 2
CONV = WIDTH * C * 9
P = CONV + WIDTH + K * WIDTH + K

GradientFn = Callable[..., Match]
both_gradients = pytest.mark.parametrize("match", GRADIENTS.values(), ids=GRADIENTS.keys())


def smooth_network(params_P: Tensor, images: Tensor) -> Tensor:
    """conv -> softplus -> mean -> linear: smooth, so differences converge."""
    conv, bias, linear, offset = params_P.split([CONV, WIDTH, K * WIDTH, K])
    hidden = F.softplus(F.conv2d(images, conv.view(WIDTH, C, 3, 3), bias, padding=1))
    return hidden.mean((2, 3)) @ linear.view(K, WIDTH).T + offset


smooth: Any = Gradients(smooth_network)


def smooth_problem(seed: int = 0) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    start_P = normal(P)
    return {
        "start_P": start_P,
        "target_P": start_P + 0.5 * normal(P),
        "images": normal(N, C, H, H),
        "labels": normal(N, K),
        "syn_lr": torch.tensor(0.3, dtype=torch.float64),
    }


def family_steps(families: tuple[str, ...], index: bool = False) -> list[InnerStep]:
    """One student step for each family, on two of the three images if ``index``."""
    gen = torch.Generator().manual_seed(1)
    steps = []
    for family in families:
        i = torch.randperm(N, generator=gen)[:2] if index else None
        n = N if i is None else len(i)
        steps.append(InnerStep(i, Draw(family, torch.rand(n, 3, generator=gen))))
    return steps


class MatchFunction(torch.autograd.Function):
    """The loss as a function of (images, labels, eta) whose backward is the Match's gradients."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, labels: Tensor, syn_lr: Tensor, call: Callable[..., Match]
    ) -> Tensor:
        result = call(images=images, labels=labels, syn_lr=syn_lr)
        ctx.save_for_backward(result.grad_images, result.grad_labels, result.grad_lr)
        return result.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, labels, syn_lr = ctx.saved_tensors
        return grad * images, grad * labels, grad * syn_lr, None


def check_against_finite_differences(
    match: GradientFn, steps: list[InnerStep], *, every_entry: bool
) -> None:
    """Every entry of the gradient, or (cheaper) its product with random directions."""
    p = smooth_problem()

    def call(**given: Tensor) -> Match:
        given = {k: v.detach() for k, v in given.items()}
        return match(smooth, p["start_P"], p["target_P"], steps=steps, **given)

    inputs = [p[k].clone().requires_grad_() for k in ("images", "labels", "syn_lr")]
    assert torch.autograd.gradcheck(
        lambda *x: MatchFunction.apply(*x, call), inputs, atol=1e-7, fast_mode=not every_entry
    )


@both_gradients
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_with_finite_differences_under_every_family(
    match: GradientFn, family: str
) -> None:
    check_against_finite_differences(match, family_steps((family, family)), every_entry=False)


@both_gradients
def test_gradients_agree_with_finite_differences_through_all_families_and_batches(
    match: GradientFn,
) -> None:
    check_against_finite_differences(match, family_steps(FAMILIES, index=True), every_entry=True)


@both_gradients
def test_gradients_agree_with_finite_differences_without_augmentation(match: GradientFn) -> None:
    check_against_finite_differences(match, [InnerStep(None, None)] * 4, every_entry=False)


def real_problem(digits: Dataset, labels: str, n: int = 10) -> tuple[dict[str, Any], Any]:
    """A float32 ConvNet, one digit a class, and a target some real steps away."""
    network = network_for("ConvNetD2W8", digits.description)
    gradients = Gradients(network)
    start_P = network.init(torch.Generator().manual_seed(0))
    target_P = start_P
    for k in range(20):
        w = target_P.detach().requires_grad_()
        i = torch.arange(64 * k % 1024, 64 * k % 1024 + 64)
        loss = gradients.loss(w, digits.train.batch(i), digits.train.labels[i])
        target_P = target_P - 0.1 * torch.autograd.grad(loss, w)[0]
    picks = torch.stack([members[0] for members in digits.train.by_class])[:n]
    hard = digits.train.labels[picks]
    soft = 3 * F.one_hot(hard, 10).float()
    return {
        "start_P": start_P,
        "target_P": target_P,
        "images": digits.train.batch(picks),
        "labels": hard if labels == "hard" else soft,
        "syn_lr": torch.tensor(0.05),
    }, gradients


def dsa_steps(n: int, count: int, batch: int | None = None) -> list[InnerStep]:
    gen = torch.Generator().manual_seed(2)
    steps = []
    for _ in range(count):
        index = None if batch is None else torch.randperm(n, generator=gen)[:batch]
        steps.append(InnerStep(index, augment.draw(augment.FULL, batch or n, gen)))
    return steps


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("batch", [None, 4])
def test_rematerialised_equals_direct_in_float32_over_twenty_steps(
    digits: Dataset, labels: str, batch: int | None
) -> None:
    problem, gradients = real_problem(digits, labels)
    steps = dsa_steps(10, 20, batch)
    assert {s.draw.family for s in steps if s.draw} == set(FAMILIES)
    direct = match_direct(gradients, steps=steps, **problem)
    ours = match_rematerialised(gradients, steps=steps, **problem)
    assert relative_error(ours.loss, direct.loss) < 1e-5
    assert relative_error(ours.grad_images, direct.grad_images) < 1e-4
    assert relative_error(ours.grad_lr, direct.grad_lr) < 1e-4
    if labels == "soft":
        assert ours.grad_labels is not None and direct.grad_labels is not None
        assert relative_error(ours.grad_labels, direct.grad_labels) < 1e-4


@both_gradients
def test_the_unrolled_student_is_plain_sgd(digits: Dataset, match: GradientFn) -> None:
    """The loss is that of torch.optim.SGD after N steps on the same augmented batches."""
    problem, gradients = real_problem(digits, "hard")
    steps = dsa_steps(10, 8)
    w = problem["start_P"].clone().requires_grad_()
    optimiser = torch.optim.SGD([w], lr=problem["syn_lr"].item())
    for step in steps:
        optimiser.zero_grad()
        gradients.loss(w, augment.apply(step.draw, problem["images"]), problem["labels"]).backward()
        optimiser.step()
    end, start, target = (v.detach().double() for v in (w, problem["start_P"], problem["target_P"]))
    expected = sum((end - target) ** 2) / sum((start - target) ** 2)
    result = match(gradients, steps=steps, **problem)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@both_gradients
def test_gradients_of_a_quadratic_are_those_of_its_closed_form(match: GradientFn) -> None:
    """l = |theta - c|^2 / 2 with c the mean image: theta_N = c + (1 - eta)^N (theta_0 - c)."""
    gen = torch.Generator().manual_seed(3)
    start, target = (torch.randn(4, generator=gen, dtype=torch.float64) for _ in range(2))
    images = torch.randn(5, 1, 2, 2, generator=gen, dtype=torch.float64)
    eta, steps = torch.tensor(0.1, dtype=torch.float64), 7

    class Quadratic(Gradients):
        def loss(self, params_P: Tensor, images: Tensor, targets: Tensor) -> Tensor:
            return (params_P - images.flatten(1).mean(0)).square().sum() / 2

    labels = torch.zeros(5, dtype=torch.int64)
    result = match(
        Quadratic(None), start, target, images, labels, eta, [InnerStep(None, None)] * steps
    )
    c = images.flatten(1).mean(0)
    shrink = (1 - eta) ** steps
    end = c + shrink * (start - c)
    scale = (start - target) @ (start - target)
    assert torch.allclose(result.loss, (end - target) @ (end - target) / scale)
    d_end = 2 * (end - target) / scale
    d_image = ((1 - shrink) / 5 * d_end).view(1, 1, 2, 2).expand(5, 1, 2, 2)
    assert torch.allclose(result.grad_images, d_image)
    d_eta = d_end @ (start - c) * -steps * (1 - eta) ** (steps - 1)
    assert torch.allclose(result.grad_lr, d_eta)


def test_matching_loss_is_the_formula_of_the_field() -> None:
    end, start, target = torch.randn(3, 50, dtype=torch.float64).unbind()
    above = sum((e - t) ** 2 for e, t in zip(end.tolist(), target.tolist(), strict=True))
    below = sum((s - t) ** 2 for s, t in zip(start.tolist(), target.tolist(), strict=True))
    assert matching_loss(end, start, target).item() == pytest.approx(above / below)


@both_gradients
def test_a_student_that_does_not_move_has_loss_one_and_no_image_gradient(match: GradientFn) -> None:
    problem = smooth_problem() | {"syn_lr": torch.tensor(0.0, dtype=torch.float64)}
    result = match(smooth, steps=family_steps(FAMILIES), **problem)
    assert result.loss.item() == 1
    assert not result.grad_images.any()
    assert result.grad_lr != 0


@both_gradients
def test_images_outside_every_batch_get_no_gradient(match: GradientFn) -> None:
    steps = [InnerStep(torch.tensor([0, 2]), None)] * 2
    result = match(smooth, steps=steps, **smooth_problem())
    touched = [bool(g.any()) for g in result.grad_images]
    assert touched == [True, False, True]


@both_gradients
def test_hard_labels_have_no_gradient(match: GradientFn) -> None:
    problem = smooth_problem() | {"labels": torch.tensor([0, 1, 2])}
    result = match(smooth, steps=family_steps(FAMILIES), **problem)
    assert result.grad_labels is None
    assert result.grad_images.any()


@both_gradients
def test_matching_leaves_its_inputs_alone_and_returns_no_graph(match: GradientFn) -> None:
    problem = smooth_problem()
    before = {k: v.clone() for k, v in problem.items()}
    result = match(smooth, steps=family_steps(FAMILIES), **problem)
    assert all(torch.equal(problem[k], before[k]) for k in problem)
    for tensor in (result.loss, result.grad_images, result.grad_labels, result.grad_lr):
        assert tensor is not None and not tensor.requires_grad


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_cross_entropy_is_the_mean_negative_log_likelihood(digits: Dataset, labels: str) -> None:
    problem, gradients = real_problem(digits, labels)
    network = network_for("ConvNetD2W8", digits.description)
    logits = network(problem["start_P"], problem["images"]).double()
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    if labels == "hard":
        expected = -torch.stack([log_p[i, k] for i, k in enumerate(problem["labels"])]).mean()
    else:
        y = problem["labels"].double().exp()
        expected = -(y / y.sum(1, keepdim=True) * log_p).sum(1).mean()
    batch = InnerStep(None, None).batch(problem["images"], problem["labels"])
    loss = gradients.loss(problem["start_P"], *batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


class Live:
    """Counts the tensors that autograd keeps for a backward pass, and the most at one time."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> "Held":
        return Held(self, tensor.detach())


class Held:
    def __init__(self, live: Live, tensor: Tensor) -> None:
        self.live, self.tensor = live, tensor
        live.now += 1
        live.peak = max(live.peak, live.now)

    def __del__(self) -> None:
        self.live.now -= 1


def most_saved_tensors(match: GradientFn, steps: int) -> int:
    """What the graphs hold at once; the numbers do not matter here, so the hooks may detach."""
    live = Live()
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: held.tensor):
        match(smooth, steps=[InnerStep(None, None)] * steps, **smooth_problem())
    return live.peak


def test_rematerialised_keeps_one_steps_graph_where_direct_keeps_all() -> None:
    assert most_saved_tensors(match_rematerialised, 12) == most_saved_tensors(
        match_rematerialised, 3
    )
    assert most_saved_tensors(match_direct, 12) > 2 * most_saved_tensors(match_direct, 3)
