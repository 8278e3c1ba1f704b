"""The textbook version: FTD as its definitions read, in plain PyTorch.

What a researcher would write from the paper. One graph through all N steps, GroupNorm modules
called through ``functional_call``, a DataLoader over tensors, SAM as two passes over a module,
fresh networks trained one after another. The draws come from outside, so that our code can be
given the same ones: its numbers are the reference, its time and memory are what ours is held to.

theta*_t -> start_P, theta*_{t+M} -> target_P, eta -> syn_lr, theta_k -> theta_P.
"""

from collections.abc import Iterable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from ftd import augment

Step = tuple[Tensor | None, augment.Draw | None]
"""A student step: which images (None for all), augmented how."""

Epoch = tuple[Tensor, Sequence[augment.Draw | None]]
"""An epoch: the order of the images, and every batch's augmentation."""


class ConvNet(nn.Module):
    """depth x [conv 3x3 -> GroupNorm, a group a channel -> ReLU -> average pool 2] -> linear."""

    def __init__(
        self,
        *,
        channels: int = 3,
        resolution: int = 32,
        classes: int = 10,
        depth: int = 3,
        width: int = 128,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers.append(nn.Conv2d(channels if i == 0 else width, width, 3, padding=1))
            layers.append(nn.GroupNorm(width, width))
            layers.append(nn.ReLU())
            layers.append(nn.AvgPool2d(2))
        layers.append(nn.Flatten())
        side = resolution // 2**depth
        layers.append(nn.Linear(width * side * side, classes))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def call(net: nn.Module, theta_P: Tensor, x: Tensor) -> Tensor:
    """The module's output with its parameters taken from one flat vector."""
    shapes = {name: p.shape for name, p in net.named_parameters()}
    pieces = theta_P.split([prod(shape) for shape in shapes.values()])
    params = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
    return functional_call(net, params, (x,))


def matching_step(
    net: nn.Module,
    start_P: Tensor,
    target_P: Tensor,
    images: Tensor,
    labels: Tensor,
    syn_lr: Tensor,
    steps: Sequence[Step],
) -> tuple[Tensor, Tensor, Tensor]:
    """The matching loss and its gradients by images and by eta (MTT Alg. 1)."""
    images = images.clone().requires_grad_()
    syn_lr = syn_lr.clone().requires_grad_()
    theta_P = start_P.clone().requires_grad_()
    for index, draw in steps:
        x = images if index is None else images[index]
        y = labels if index is None else labels[index]
        x = augment.apply(draw, x)
        loss = F.cross_entropy(call(net, theta_P, x), y)
        grad_P = torch.autograd.grad(loss, theta_P, create_graph=True)[0]
        theta_P = theta_P - syn_lr * grad_P
    distance = (theta_P - target_P).square().sum()
    matching_loss = distance / (start_P - target_P).square().sum()
    matching_loss.backward()
    assert images.grad is not None and syn_lr.grad is not None
    return matching_loss.detach(), images.grad, syn_lr.grad


def expert_epoch(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    epoch: Epoch,
    *,
    lr: float,
    rho: float,
    batch_size: int = 256,
) -> float:
    """Trains ``net`` for an epoch of SGD with SAM; the mean loss of its batches."""
    device = next(net.parameters()).device
    optimiser = torch.optim.SGD(net.parameters(), lr=lr)
    losses = []
    for x, y, draw in batches(images, labels, epoch, batch_size):
        x, y = augment.apply(draw, x.to(device)), y.to(device)
        loss = F.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        losses.append(loss.item())
        before = [p.detach().clone() for p in net.parameters()]
        norm = torch.stack([gradient(p).norm() for p in net.parameters()]).norm()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(rho * gradient(p) / (norm + 1e-12))
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for p, old in zip(net.parameters(), before, strict=True):
                p.copy_(old)
        optimiser.step()
    return sum(losses) / len(losses)


def train(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: Sequence[Epoch],
    *,
    lr: float,
    batch_size: int = 256,
) -> None:
    """Trains ``net`` on the synthetic set by the protocol of field and paper."""
    device = next(net.parameters()).device
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    for i, epoch in enumerate(epochs):
        if i == len(epochs) // 2:
            lr = lr * 0.1
            optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        for x, y, draw in batches(images, labels, epoch, batch_size):
            x, y = augment.apply(draw, x.to(device)), y.to(device)
            loss = F.cross_entropy(net(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def evaluate(
    net: nn.Module,
    starts: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    epochs: Sequence[Sequence[Epoch]],
    test_images: Tensor,
    test_labels: Tensor,
    *,
    lr: float,
) -> list[float]:
    """Test accuracy of a fresh network for each of ``starts``, trained one after another."""
    device = next(net.parameters()).device
    accuracies = []
    for start_P, network_epochs in zip(starts, epochs, strict=True):
        vector_to_parameters(start_P.clone(), net.parameters())
        train(net, images, labels, network_epochs, lr=lr)
        right = 0
        with torch.no_grad():
            for x, y in DataLoader(TensorDataset(test_images, test_labels), batch_size=256):
                right += int((net(x.to(device)).argmax(1) == y.to(device)).sum())
        accuracies.append(right / len(test_labels))
    return accuracies


def batches(
    images: Tensor, labels: Tensor, epoch: Epoch, batch_size: int
) -> Iterable[tuple[Tensor, Tensor, augment.Draw | None]]:
    """The batches of an epoch, each with its augmentation."""
    order, draws = epoch
    data = TensorDataset(images, labels)
    loader = DataLoader(data, batch_size=batch_size, sampler=order.tolist())
    for (x, y), draw in zip(loader, draws, strict=True):
        yield x, y, draw


def gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad
