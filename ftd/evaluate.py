"""Evaluation: fresh networks trained on a synthetic set alone, tested on real images.

The field's protocol (MTT, FTD): SGD at the learned eta with momentum and weight decay, DSA on,
the learning rate times 0.1 and the momentum reset after half of the epochs, accuracy of the
final epoch. Which split is given decides what the number means: validation to select, test once.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from ftd import augment
from ftd.data import Dataset, Split
from ftd.errors import UserError
from ftd.expert import accuracy, sgd_step
from ftd.gradients import Gradients
from ftd.parallel import each
from ftd.seeds import generator


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How fresh networks are trained, at the end and (shorter) while searching."""

    networks: int = 5
    """Fresh networks of the final evaluation."""
    epochs: int = 1000
    """Their epochs."""
    search_networks: int = 3
    """Fresh networks of each evaluation on validation images during a search."""
    search_epochs: int = 300
    """Their epochs."""
    every: int = 100
    """Outer steps between two such evaluations."""
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        for key in (
            "networks", "epochs", "search_networks", "search_epochs", "every", "batch_size",
        ):  # fmt: skip
            if getattr(self, key) < 1:
                raise UserError(f"evaluate.{key}={getattr(self, key)} must be at least 1.")
        if not 0 <= self.momentum < 1:
            raise UserError(f"evaluate.momentum={self.momentum} must lie in [0, 1).")
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"evaluate.weight_decay={self.weight_decay} must be 0 or more.")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything, beside the images, labels and eta, that an evaluation's number depends on."""

    network: str
    epochs: int
    batch_size: int
    momentum: float
    weight_decay: float
    augment: str
    lr_drop: float = 0.1
    """Factor on the learning rate after epochs // 2; the momentum starts anew there."""

    @classmethod
    def of(
        cls, config: EvaluateConfig, *, network: str, augment: str, epochs: int | None = None
    ) -> "Protocol":
        return cls(
            network=network,
            epochs=epochs or config.epochs,
            batch_size=config.batch_size,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            augment=augment,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Score:
    """Accuracies (fractions) of n fresh networks."""

    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Population standard deviation, as numpy's and the field's tables."""
        return pstdev(self.accuracies)

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std, "n": len(self.accuracies)}

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f} %"


def train_fresh(
    gradients: Gradients,
    images: Tensor,
    labels: Tensor,
    lr: float,
    protocol: Protocol,
    *,
    seed: int,
    index: int,
) -> Tensor:
    """Parameters (P,) of fresh network ``index`` trained on images (N, C, H, W) and labels.

    Labels are (N,) int64 or (N, K) probabilities. Network ``index`` draws from (seed, index)
    alone, so networks can be trained in any order, anywhere.
    """
    gen = generator(seed, "evaluate", index)
    w = gradients.network.init(gen).to(images.device)
    velocity = None
    n = len(images)
    for epoch in range(protocol.epochs):
        if epoch == protocol.epochs // 2:
            lr, velocity = lr * protocol.lr_drop, None
        order = torch.randperm(n, generator=gen)
        for i in order.split(protocol.batch_size):
            draw = augment.draw(protocol.augment, len(i), gen)
            i = i.to(images.device)
            x = augment.apply(draw and draw.to(images.device), images[i])
            _, g = gradients.gradient(w, x, labels[i])
            w, velocity = sgd_step(
                w, g, velocity,
                lr=lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay,
            )  # fmt: skip
    return w


def evaluate(
    gradients: Gradients,
    images: Tensor,
    labels: Tensor,
    lr: float,
    protocol: Protocol,
    split: Split,
    *,
    networks: Sequence[int],
    seed: int,
) -> Score:
    """Trains fresh networks of the given indices on a synthetic set and tests them on ``split``."""

    def one(index: int) -> float:
        w = train_fresh(gradients, images, labels, lr, protocol, seed=seed, index=index)
        return accuracy(gradients, w, split)

    return Score(tuple(_each(one, networks, images.device)))


def evaluate_random_real(
    gradients: Gradients,
    data: Dataset,
    ipc: int,
    lr: float,
    protocol: Protocol,
    split: Split,
    *,
    networks: Sequence[int],
    seed: int,
) -> Score:
    """The baseline: each network gets its own draw of ``ipc`` real training images a class."""

    def one(index: int) -> float:
        images, labels = random_real(data, ipc, seed=seed, index=index)
        w = train_fresh(gradients, images, labels, lr, protocol, seed=seed, index=index)
        return accuracy(gradients, w, split)

    return Score(tuple(_each(one, networks, split.labels.device)))


def _each(
    one: Callable[[int], float], networks: Sequence[int], device: torch.device
) -> list[float]:
    """On CPU each of several networks has a thread for itself; one alone has all threads."""
    return each(one, networks) if device.type == "cpu" else [one(i) for i in networks]


def random_real(data: Dataset, ipc: int, *, seed: int, index: int) -> tuple[Tensor, Tensor]:
    """The real images (K * ipc, C, H, W) and labels that fresh network ``index`` trains on."""
    picks = draw_real(data.train, ipc, generator(seed, "random_real", index))
    return data.train.batch(picks), data.train.labels[picks]


def draw_real(split: Split, ipc: int, gen: torch.Generator) -> Tensor:
    """Positions of ``ipc`` distinct images of every class, class by class, (K * ipc,)."""
    picks = []
    for members in split.by_class:
        chosen = torch.randperm(len(members), generator=gen)[:ipc]
        picks.append(members[chosen])
    return torch.cat(picks).to(split.labels.device)
