"""Trajectory matching and its exact gradient (FTD eq. 5; MTT Alg. 1).

theta*_t -> start_P, theta*_{t+M} -> target_P, eta -> syn_lr, theta_k -> params_P after k of the
N inner steps, x_k -> the augmented batch of step k, l -> the mean cross-entropy of ``gradients``.

    theta_{k+1} = theta_k - eta grad_theta l(theta_k; x_k)
    L = ||theta_N - theta*_{t+M}||^2 / ||theta*_t - theta*_{t+M}||^2

``match_direct`` is the definition: one graph through all N steps, memory grows with N.
``match_rematerialised`` is the same gradient with one step's graph alive at a time: it keeps the
theta_k without a graph and walks back with lambda_k = dL/dtheta_k,

    s_k = <grad_theta l(theta_k; x_k), lambda_{k+1}>
    dL/deta -= s_k;  dL/dx_k -= eta ds_k/dx_k;  lambda_k = lambda_{k+1} - eta ds_k/dtheta_k
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftd import augment
from ftd.gradients import Gradients


@dataclass(frozen=True)
class InnerStep:
    """One student step: which synthetic images (None for all) under which augmentation."""

    index: Tensor | None
    draw: augment.Draw | None

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(x_k, targets): floating labels are soft logits, whose softmax is the target."""
        if self.index is not None:
            images, labels = images[self.index], labels[self.index]
        targets = labels.softmax(1) if labels.is_floating_point() else labels
        return augment.apply(self.draw, images), targets


@dataclass(frozen=True)
class Match:
    """The matching loss and its gradients; ``grad_labels`` is None for hard labels."""

    loss: Tensor
    grad_images: Tensor
    grad_labels: Tensor | None
    grad_lr: Tensor


def matching_loss(end_P: Tensor, start_P: Tensor, target_P: Tensor) -> Tensor:
    """||end - target||^2 / ||start - target||^2."""
    return (end_P - target_P).square().sum() / (start_P - target_P).square().sum()


def unroll(
    gradients: Gradients,
    start_P: Tensor,
    images: Tensor,
    labels: Tensor,
    syn_lr: Tensor,
    steps: Sequence[InnerStep],
) -> list[Tensor]:
    """theta_0 ... theta_N, without a graph."""
    thetas = [start_P]
    for step in steps:
        _, grad_P = gradients.gradient(thetas[-1], *step.batch(images, labels))
        thetas.append(thetas[-1] - syn_lr * grad_P)
    return thetas


def match_direct(
    gradients: Gradients,
    start_P: Tensor,
    target_P: Tensor,
    images: Tensor,
    labels: Tensor,
    syn_lr: Tensor,
    steps: Sequence[InnerStep],
) -> Match:
    """The specification: unrolls every step in one graph and differentiates it by autograd."""
    with torch.enable_grad():
        x, y, eta = _leaf(images), _leaf(labels), _leaf(syn_lr)
        params_P = _leaf(start_P)
        for step in steps:
            loss = gradients.loss(params_P, *step.batch(x, y))
            (grad_P,) = torch.autograd.grad(loss, params_P, create_graph=True)
            params_P = params_P - eta * grad_P
        loss = matching_loss(params_P, start_P, target_P)
        wanted = [x, eta, y] if y.requires_grad else [x, eta]
        grads = torch.autograd.grad(loss, wanted)
    return Match(loss.detach(), grads[0], grads[2] if y.requires_grad else None, grads[1])


def match_rematerialised(
    gradients: Gradients,
    start_P: Tensor,
    target_P: Tensor,
    images: Tensor,
    labels: Tensor,
    syn_lr: Tensor,
    steps: Sequence[InnerStep],
) -> Match:
    """The same gradient at constant memory: N vectors of P, and one step's graph."""
    thetas = unroll(gradients, start_P, images, labels, syn_lr, steps)
    end_P = thetas.pop()
    loss = matching_loss(end_P, start_P, target_P)
    lambda_P = 2 * (end_P - target_P) / (start_P - target_P).square().sum()
    grad_images = torch.zeros_like(images)
    grad_labels = torch.zeros_like(labels) if labels.is_floating_point() else None
    grad_lr = torch.zeros_like(syn_lr)
    for step in reversed(steps):
        x, y = _leaf(images), _leaf(labels)
        with torch.enable_grad():
            batch, targets = step.batch(x, y)
        ds = gradients.second_order(thetas.pop(), batch.detach(), targets.detach(), lambda_P)
        grad_lr -= ds.s
        (by_x,) = torch.autograd.grad(batch, x, ds.grad_images)
        grad_images.sub_(syn_lr * by_x)
        if grad_labels is not None:
            (by_y,) = torch.autograd.grad(targets, y, ds.grad_targets)
            grad_labels.sub_(syn_lr * by_y)
        lambda_P = lambda_P - syn_lr * ds.grad_P
    return Match(loss, grad_images, grad_labels, grad_lr)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


GRADIENTS: dict[str, Callable[..., Match]] = {
    "rematerialised": match_rematerialised,
    "direct": match_direct,
}
