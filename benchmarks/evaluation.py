"""Evaluation: five fresh networks on a synthetic set, the textbook's loop against ours.

The protocol with 6 % (IPC 1) and 0.8 % (IPC 10) of its 1,000 epochs and of CIFAR's test images, so
that training and testing keep their shares of the time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks import textbook
from benchmarks.compare import (
    THREADS,
    Record,
    Target,
    check,
    child,
    double,
    relative,
    side_by_side,
    table,
)
from benchmarks.noise import as_tensors, noise
from ftd import augment
from ftd.backends import gradients_for, resolve
from ftd.data import Dataset
from ftd.evaluate import EvaluateConfig, Protocol, evaluate, train_fresh
from ftd.expert import Numerics
from ftd.gradients import Gradients
from ftd.networks import ConvNetSpec, Network, build_network
from ftd.seeds import generator

LR = 0.01
NETWORKS = 5


@dataclass(frozen=True)
class Case:
    """Fresh networks on ``ipc`` images a class, tested on ``test`` images."""

    ipc: int
    epochs: int
    test: int
    networks: int = NETWORKS
    network: str = "ConvNetD3"

    @property
    def protocol(self) -> Protocol:
        return Protocol.of(
            EvaluateConfig(), network=self.network, augment=augment.FULL, epochs=self.epochs
        )


CASES = {"IPC 1": Case(1, 60, 600), "IPC 10": Case(10, 8, 80)}
TARGETS = {name: Target(seconds=1 / 2, mib=2) for name in CASES}
WARM_UP = Case(1, 2, 10, 1, "ConvNetD3W8")


@dataclass(frozen=True)
class Problem:
    """All that an evaluation is given."""

    case: Case
    network: Network
    images: Tensor
    labels: Tensor
    data: Dataset


def backend(p: Problem) -> Gradients:
    return gradients_for(p.network, resolve("auto", p.images.device.type))


def ours(p: Problem) -> list[float]:
    """Our accuracies."""
    score = evaluate(
        backend(p), p.images, p.labels, LR, p.case.protocol, p.data.test,
        networks=range(p.case.networks), seed=0,
    )  # fmt: skip
    return list(score.accuracies)


def our_weights(p: Problem) -> Tensor:
    """Our network 0 after its training."""
    return train_fresh(backend(p), p.images, p.labels, LR, p.case.protocol, seed=0, index=0)


def problem(case: Case, device: torch.device | str = "cpu") -> Problem:
    """The same for every call and every variant."""
    device = torch.device(device)
    data = noise(10 * case.ipc, case.test, device)
    everything = torch.arange(len(data.train), device=device)
    network = build_network(case.network, channels=3, resolution=32, classes=10)
    return Problem(case, network, data.train.batch(everything), data.train.labels, data)


def draws(p: Problem, index: int) -> tuple[Tensor, list[textbook.Epoch]]:
    """What our network ``index`` draws: the weights that it starts from, and its epochs."""
    gen = generator(0, "evaluate", index)
    start = p.network.init(gen).to(p.images)
    epochs: list[textbook.Epoch] = []
    for _ in range(p.case.epochs):
        order = torch.randperm(len(p.images), generator=gen)
        batches = order.split(p.case.protocol.batch_size)
        drawn = [augment.draw(p.case.protocol.augment, len(i), gen) for i in batches]
        epochs.append((order, [draw and draw.to(p.images.device) for draw in drawn]))
    return start, epochs


def module(p: Problem) -> textbook.ConvNet:
    spec = ConvNetSpec.parse(p.case.network)
    return textbook.ConvNet(depth=spec.depth, width=spec.width).to(p.images)


def theirs(p: Problem) -> Callable[[], list[float]]:
    """The textbook's accuracies, from the same weights, orders and draws."""
    net = module(p)
    images, labels = p.images.cpu(), p.labels.cpu()
    test_images, test_labels = as_tensors(p.data.test)
    starts, epochs = zip(*(draws(p, i) for i in range(p.case.networks)), strict=True)
    return lambda: textbook.evaluate(
        net, starts, images, labels, epochs, test_images, test_labels, lr=LR
    )


def their_weights(p: Problem) -> tuple[Tensor, Tensor]:
    """The textbook's network 0 before and after its training."""
    net, (start, epochs) = module(p), draws(p, 0)
    vector_to_parameters(start.clone(), net.parameters())
    textbook.train(net, p.images.cpu(), p.labels.cpu(), epochs, lr=LR)
    return start, parameters_to_vector(net.parameters()).detach()


def work(case: Case, variant: str, device: torch.device) -> Callable[[], object]:
    p = problem(case, device)
    return (lambda: ours(p)) if variant == "ours" else theirs(p)


def difference(case: Case, device: str = "cpu") -> tuple[float, float]:
    """Relative difference of the ways from the start, and the largest one of the accuracies."""
    p = problem(case, device)
    start, end = their_weights(p)
    accuracies = zip(ours(p), theirs(p)(), strict=True)
    return relative(our_weights(p) - start, end - start), max(abs(a - b) for a, b in accuracies)


def run(device: str = "cpu", *, repeats: int = 3) -> dict[str, Any]:
    numerics = Numerics.on(device, THREADS)
    numerics.apply()
    weights, accuracy = difference(Case(2, 6, 200, 2), device)
    found = {"float32": weights, "accuracy": accuracy}
    with double():
        found["float64"] = difference(Case(2, 6, 20, 2, "ConvNetD3W16"), device)[0]
    check(found)
    return {
        "threads": THREADS,
        "backend": numerics.backend,
        "differences": found,
        "rows": [side_by_side("evaluation", name, device, repeats=repeats) for name in CASES],
        "curves": {},
    }


def render(record: Record) -> list[str]:
    results = record["results"]
    size = "; ".join(
        f"{name}: {c.epochs} epochs, {c.test} test images" for name, c in CASES.items()
    )
    return [
        f"{NETWORKS} fresh networks, ConvNet D3, 32 x 32 x 3, 10 classes, float32, DSA on, "
        f"{results['threads']} threads. The protocol's",
        "1,000 epochs and 10,000 test images shortened alike, so that each keeps its share of the",
        f"time ({size}). Memory is the peak",
        "above the idle process (on a GPU: of its allocated memory). Both train the same networks: "
        "after 6 epochs",
        "at IPC 2 their ways from the start differ by "
        f"{results['differences']['float64']:.0e} in float64 (width 16) and by "
        f"{results['differences']['float32']:.0e} in float32 (width 128), where rounding",
        "decides at the kinks of ReLU; their accuracies differ by "
        f"{100 * results['differences']['accuracy']:.1f} points.",
        "",
        *table(record, TARGETS),
    ]


if __name__ == "__main__":
    child(work, CASES, WARM_UP)
