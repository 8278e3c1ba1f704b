"""One sharpness-aware epoch of an expert: the textbook's loop against ours."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
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
    curve,
    double,
    draw_curves,
    relative,
    side_by_side,
    table,
)
from benchmarks.noise import as_tensors, noise
from ftd import augment
from ftd.backends import resolve
from ftd.data import Dataset
from ftd.expert import ExpertConfig, Numerics, network_for, train_expert
from ftd.networks import ConvNetSpec
from ftd.seeds import derive_seed, generator

CONFIG = ExpertConfig()
"""The field's: ConvNetD3, batch 256, learning rate 0.01, SAM with rho 0.01."""


@dataclass(frozen=True)
class Case:
    """An epoch of some experts, one after another, on noise images of CIFAR's shape."""

    images: int
    experts: int = 1
    network: str = "ConvNetD3"
    batch_size: int = 256

    @property
    def config(self) -> ExpertConfig:
        return replace(CONFIG, network=self.network, batch_size=self.batch_size)


CASES = {"2,560 images": Case(2560)}
TARGETS = {"2,560 images": Target(seconds=1 / 1.5, mib=1)}
CURVES = {"experts": {k: f"curve: {k} experts, 512 images" for k in (1, 2, 4)}}
POINTS = {name: Case(512, k) for k, name in CURVES["experts"].items()}
WARM_UP = Case(8, network="ConvNetD3W8")


def ours(case: Case, data: Dataset, device: torch.device) -> list[Tensor]:
    """Our experts after an epoch; the accuracy on 10 validation images comes with it."""
    found = []
    for i in range(case.experts):
        backend = resolve("auto", device.type)
        *_, last = train_expert(case.config, data, i, epochs=1, device=device, backend=backend)
        found.append(last.params_P)
    return found


def theirs(
    case: Case, images: Tensor, labels: Tensor, device: torch.device, start: list[Tensor]
) -> list[Tensor]:
    """The textbook's: the same weights to start from, order and draws."""
    config, spec = case.config, ConvNetSpec.parse(case.network)
    found = []
    for i in range(case.experts):
        net = textbook.ConvNet(depth=spec.depth, width=spec.width).to(device)
        vector_to_parameters(start[i].to(device, copy=True), net.parameters())
        epoch = epoch_draws(case, i, len(images), device)
        textbook.expert_epoch(
            net, images, labels, epoch,
            lr=config.lr, rho=config.radius, batch_size=config.batch_size,
        )  # fmt: skip
        found.append(parameters_to_vector(net.parameters()).detach().cpu())
    return found


def starts(case: Case, data: Dataset) -> list[Tensor]:
    """The experts' parameters at epoch 0."""
    network = network_for(case.network, data.description)
    seeds = (derive_seed(CONFIG.seed, "expert", i) for i in range(case.experts))
    return [network.init(generator(seed, "init")) for seed in seeds]


def epoch_draws(case: Case, index: int, n: int, device: torch.device) -> textbook.Epoch:
    """What our expert ``index`` draws in its first epoch."""
    gen = generator(derive_seed(CONFIG.seed, "expert", index), "epoch", 1)
    order = torch.randperm(n, generator=gen)
    draws = [augment.draw(augment.FULL, len(i), gen) for i in order.split(case.batch_size)]
    return order, [draw and draw.to(device) for draw in draws]


def work(case: Case, variant: str, device: torch.device) -> Callable[[], object]:
    data = noise(case.images, 10, device)
    if variant == "ours":
        return lambda: ours(case, data, device)
    images, labels = as_tensors(data.train)
    start = starts(case, data)
    return lambda: theirs(case, images, labels, device, start)


def difference(case: Case, device: str = "cpu") -> float:
    """Largest relative difference between the ways that both have gone from the start."""
    place = torch.device(device)
    data = noise(case.images, 10, place)
    start = starts(case, data)
    a, b = ours(case, data, place), theirs(case, *as_tensors(data.train), place, start)
    return max(relative(x - s, y - s) for x, y, s in zip(a, b, start, strict=True))


def run(device: str = "cpu", *, repeats: int = 3) -> dict[str, Any]:
    numerics = Numerics.on(device, THREADS)
    numerics.apply()
    found = {"float32": difference(Case(512), device)}
    with double():
        found["float64"] = difference(Case(64, 2, "ConvNetD3W16", batch_size=32), device)
    check(found)
    return {
        "threads": THREADS,
        "backend": numerics.backend,
        "differences": found,
        "rows": [side_by_side("experts", name, device, repeats=repeats) for name in CASES],
        "curves": {key: curve("experts", points, device) for key, points in CURVES.items()},
    }


def render(record: Record) -> list[str]:
    results = record["results"]
    return [
        f"One epoch of SAM on 2,560 images, ConvNet D3, 32 x 32 x 3, 10 classes, batches of "
        f"{CONFIG.batch_size}, float32,",
        f"DSA on, {results['threads']} threads. Memory is the peak above the idle process that "
        "holds the images (on a GPU: of",
        "its allocated memory). Both go the same way from the same start: they differ by "
        f"{results['differences']['float64']:.0e}",
        "of it in float64 (64 images, width 16) and by "
        f"{results['differences']['float32']:.0e} in float32 (512 images, width 128), where "
        "rounding",
        "decides at the kinks of ReLU.",
        "",
        *table(record, TARGETS),
        "",
        "![Time and memory against the number of experts](experts.png)",
        "",
        "One process trains one or more experts for an epoch of 512 images. Points are single "
        "runs.",
    ]


def draw(record: Record, folder: Path) -> None:
    draw_curves(record, folder / "experts.png", {"experts": "experts (an epoch of 512 images)"})


if __name__ == "__main__":
    child(work, CASES | POINTS, WARM_UP)
