"""One matching step: the textbook's graph through all steps against ours."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import textbook
from benchmarks.compare import (
    THREADS,
    VARIANTS,
    Record,
    Target,
    check,
    child,
    curve,
    draw_curves,
    relative,
    side_by_side,
    table,
)
from ftd import augment
from ftd.backends import gradients_for, resolve
from ftd.distill import DistillConfig, draw_inner_steps
from ftd.expert import Numerics
from ftd.matching import GRADIENTS, InnerStep
from ftd.networks import ConvNetSpec, Network, build_network
from ftd.seeds import generator


@dataclass(frozen=True)
class Case:
    """A matching step on noise images of CIFAR's shape, 10 classes."""

    ipc: int
    syn_steps: int
    network: str = "ConvNetD3"


CASES = {
    "IPC 1, N = 50": Case(1, 50),
    "IPC 10, N = 30": Case(10, 30),
    "1,000 images a step, N = 80": Case(100, 80),
}
TARGETS = {
    "IPC 1, N = 50": Target(seconds=1 / 1.5, mib=1 / 6),
    "IPC 10, N = 30": Target(seconds=1 / 3, mib=1 / 10),
    "1,000 images a step, N = 80": Target(mib_itself=2048),
}
ALONE = {"1,000 images a step, N = 80"}
"""Measured once, and without the textbook version, which would need more than 200 GiB."""

CURVES = {
    "N": {n: f"curve: IPC 1, N = {n}" for n in (5, 10, 20, 50, 100)},
    "IPC": {ipc: f"curve: IPC {ipc}, N = 3" for ipc in (1, 2, 5, 10, 20, 50)},
}
POINTS = {name: Case(1, n) for n, name in CURVES["N"].items()} | {
    name: Case(ipc, 3) for ipc, name in CURVES["IPC"].items()
}
WARM_UP = Case(1, 2, "ConvNetD3W8")


@dataclass(frozen=True)
class Problem:
    """All that a matching step is given."""

    network: Network
    start: Tensor
    target: Tensor
    images: Tensor
    labels: Tensor
    eta: Tensor
    steps: list[InnerStep]


Found = tuple[Tensor, Tensor, Tensor]
"""The matching loss, and its gradients by images and by eta."""


def ours(p: Problem) -> Found:
    """Our matching step."""
    gradients = gradients_for(p.network, resolve("auto", p.images.device.type))
    found = GRADIENTS["rematerialised"](
        gradients, p.start, p.target, p.images, p.labels, p.eta, p.steps
    )
    return found.loss, found.grad_images, found.grad_lr


def theirs(p: Problem) -> Found:
    """The textbook's."""
    spec = ConvNetSpec.parse(p.network.name)
    net = textbook.ConvNet(depth=spec.depth, width=spec.width).to(p.start)
    steps = [(step.index, step.draw) for step in p.steps]
    return textbook.matching_step(net, p.start, p.target, p.images, p.labels, p.eta, steps)


def problem(
    case: Case, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Problem:
    """The same for every call and every variant."""
    network = build_network(case.network, channels=3, resolution=32, classes=10)
    gen = generator(0, "bench", case.ipc, case.syn_steps)
    n = 10 * case.ipc
    images = torch.randn(n, 3, 32, 32, generator=gen)
    labels = torch.arange(10).repeat_interleave(case.ipc)
    start = network.init(gen)
    target = start + 0.01 * torch.randn(network.size, generator=gen)
    config = DistillConfig(ipc=case.ipc, syn_steps=case.syn_steps)
    steps = draw_inner_steps(config, n, augment.FULL, gen, torch.device(device))
    eta = torch.tensor(0.01)
    start, target, images, eta = (t.to(device, dtype) for t in (start, target, images, eta))
    return Problem(network, start, target, images, labels.to(device), eta, steps)


def work(case: Case, variant: str, device: torch.device) -> Callable[[], object]:
    p = problem(case, device)
    return lambda: ours(p) if variant == "ours" else theirs(p)


def difference(case: Case, dtype: torch.dtype, device: str = "cpu") -> float:
    """Largest relative difference of loss and gradients between the two."""
    p = problem(case, device, dtype)
    return max(relative(a, b) for a, b in zip(ours(p), theirs(p), strict=True))


def differences(device: str = "cpu") -> dict[str, float]:
    """How far both are apart: many steps in float64, a few in float32, which is measured."""
    found = {
        "float64": difference(Case(2, 20, "ConvNetD3W16"), torch.float64, device),
        "float32": difference(Case(1, 3), torch.float32, device),
    }
    check(found)
    return found


def run(device: str = "cpu", *, repeats: int = 3) -> dict[str, Any]:
    """Both variants of every case, taking turns; then the curves."""
    numerics = Numerics.on(device, THREADS)
    numerics.apply()
    found: dict[str, Any] = {"threads": THREADS, "backend": numerics.backend}
    found["differences"] = differences(device)
    found["rows"] = [
        side_by_side("matching", name, device, repeats=1, variants=("ours",))
        if name in ALONE
        else side_by_side("matching", name, device, repeats=repeats, variants=VARIANTS)
        for name in CASES
    ]
    found["curves"] = {key: curve("matching", points, device) for key, points in CURVES.items()}
    return found


def render(record: Record) -> list[str]:
    results = record["results"]
    return [
        f"ConvNet D3, 32 x 32 x 3, 10 classes, float32, DSA on, {results['threads']} threads. "
        "Memory is the peak",
        "above the idle process (on a GPU: of its allocated memory). Both give the same loss and",
        f"gradients: they differ by {results['differences']['float64']:.0e} relative in float64 "
        "(IPC 2, N = 20, width 16) and by",
        f"{results['differences']['float32']:.0e} in float32 (IPC 1, N = 3, width 128), where "
        "rounding decides at the kinks of ReLU.",
        "1,000 images a step are 10 classes at IPC 100; the textbook version would need more than "
        "200 GiB.",
        "",
        *table(record, TARGETS),
        "",
        "![Time and memory against N and IPC](matching.png)",
        "",
        "Points are single runs; the textbook version goes as far as 6 GiB (on a GPU: 0.8 of its "
        "memory).",
    ]


def draw(record: Record, folder: Path) -> None:
    labels = {"N": "student steps N (IPC 1)", "IPC": "images per class (N = 3)"}
    draw_curves(record, folder / "matching.png", labels)


if __name__ == "__main__":
    child(work, CASES | POINTS, WARM_UP)
