"""Distillation: the outer loop of trajectory matching (FTD Alg. 1 on MTT Alg. 1).

N = syn_steps, M = expert_epochs, t ~ U{0 ... max_start_epoch - 1}, beta = ema_decay.
Each outer step picks an expert and a segment theta*_t -> theta*_{t+M}, takes the gradient of the
matching loss for images, eta and (soft) labels, and descends by SGD with momentum. The set that
is evaluated and saved is the exponential moving average of the images.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any
from typing import Protocol as TypingProtocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftd import augment
from ftd.backends import gradients_for
from ftd.data import Dataset
from ftd.errors import Diverged, UserError
from ftd.evaluate import draw_real
from ftd.expert import network_for, sgd_step
from ftd.gradients import Gradients
from ftd.matching import GRADIENTS, InnerStep, Match
from ftd.seeds import generator

SOFT_LABEL_EXPERTS = 5
"""Experts whose mean logits the soft labels start from."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What is learned and how. The hyperparameters of FTD Table 7 carry its names."""

    ipc: int = 1
    """Images per class."""
    syn_steps: int = 50
    """N: student steps on the synthetic images."""
    expert_epochs: int = 2
    """M: epochs of the expert that the student has to cover."""
    max_start_epoch: int = 2
    """Segments start at an epoch below this."""
    iterations: int = 5000
    """Outer steps."""
    lr_img: float = 100.0
    """Learning rate of the images."""
    lr_lr: float = 1e-7
    """Learning rate of eta."""
    lr_init: float = 0.01
    """Initial eta."""
    ema_decay: float = 0.9999
    """beta of the moving average of the images; 0 takes the images themselves."""
    momentum: float = 0.5
    """Momentum of the outer SGD, on images, labels and eta."""
    batch_syn: int | None = None
    """Images of a student step; None for all of them."""
    labels: str = "hard"
    """hard: class indices. soft: learned, starting from the experts' mean prediction."""
    lr_label: float | None = None
    """Learning rate of soft label logits; None for 1."""
    init: str = "real"
    """real: random training images. noise: standard normal in network space."""
    gradient: str = "rematerialised"
    """rematerialised: exact at constant memory. direct: the same through one graph of N steps."""

    def __post_init__(self) -> None:
        for key in ("ipc", "syn_steps", "expert_epochs", "max_start_epoch", "iterations"):
            if getattr(self, key) < 1:
                raise UserError(f"distill.{key}={getattr(self, key)} must be at least 1.")
        if self.lr_label is not None and self.labels == "hard":
            raise UserError(
                f"distill.lr_label={self.lr_label} has no effect with distill.labels=hard. "
                "Leave it out, or take labels: soft."
            )
        for key in ("lr_img", "lr_init", "lr_label"):
            if getattr(self, key) is None:
                continue
            if not 0 < getattr(self, key) < float("inf"):
                raise UserError(f"distill.{key}={getattr(self, key)} must be above 0, and finite.")
        if not 0 <= self.lr_lr < float("inf"):
            raise UserError(f"distill.lr_lr={self.lr_lr} must be 0 or more (0 keeps eta fixed).")
        for key in ("ema_decay", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"distill.{key}={getattr(self, key)} must lie in [0, 1).")
        if self.batch_syn is not None and self.batch_syn < 1:
            raise UserError(f"distill.batch_syn={self.batch_syn} must be at least 1, or null.")
        tables = {"labels": ("hard", "soft"), "init": ("real", "noise"), "gradient": GRADIENTS}
        for key, allowed in tables.items():
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"distill.{key}={getattr(self, key)!r} is not known. "
                    f"Take one of {', '.join(allowed)}."
                )

    def check(self, *, epochs: int, per_class: tuple[int, ...] | None) -> None:
        """Raises UserError if ``epochs`` of the experts or the training images do not suffice.

        ``per_class`` is None before the data are known, and then there are enough images.
        """
        needed = self.max_start_epoch - 1 + self.expert_epochs
        if needed > epochs:
            raise UserError(
                f"distill.max_start_epoch={self.max_start_epoch} with distill.expert_epochs="
                f"{self.expert_epochs} needs {needed} epochs; experts have {epochs}. "
                "Lower either, or raise experts.epochs."
            )
        if per_class is None:
            return
        if self.ipc > min(per_class):
            raise UserError(
                f"distill.ipc={self.ipc} is above the {min(per_class)} training images that the "
                "smallest class has. Lower distill.ipc."
            )
        images = self.ipc * len(per_class)
        if self.batch_syn is not None and self.batch_syn > images:
            raise UserError(
                f"distill.batch_syn={self.batch_syn} is above the {images} synthetic images "
                f"(ipc {self.ipc} x {len(per_class)} classes). Lower it, or write null for all."
            )


class Trajectories(TypingProtocol):
    """Where segments come from: a store, or a folder on this machine."""

    @property
    def experts(self) -> int:
        """How many experts there are to pick from."""
        ...

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Parameters (P,) of an expert at two epochs."""
        ...


@dataclass(frozen=True, eq=False)
class DistillState:
    """All that the outer loop goes on from; immutable, one for each step."""

    step: int
    images: Tensor
    """(N, C, H, W) in network space."""
    labels: Tensor
    """(N,) int64, or (N, K) float32 logits when they are learned."""
    syn_lr: Tensor
    """eta, a scalar."""
    ema_images: Tensor
    ema_labels: Tensor
    image_velocity: Tensor | None = None
    label_velocity: Tensor | None = None
    lr_velocity: Tensor | None = None

    @property
    def label_targets(self) -> Tensor:
        """Labels as an evaluation takes them: (N,) classes, or (N, K) probabilities."""
        soft = self.ema_labels.is_floating_point()
        return self.ema_labels.softmax(1) if soft else self.ema_labels

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as numpy arrays, to be kept and given to ``from_arrays``."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            k: np.asarray(v.cpu() if isinstance(v, Tensor) else v)
            for k, v in present.items()
            if v is not None
        }

    @classmethod
    def from_arrays(
        cls, arrays: dict[str, np.ndarray], device: torch.device | str = "cpu"
    ) -> "DistillState":
        tensors = {k: torch.from_numpy(np.array(v)).to(device) for k, v in arrays.items()}
        step = int(tensors.pop("step"))
        return cls(step=step, **tensors)


@dataclass(frozen=True)
class StepRecord:
    """What an outer step did."""

    step: int
    """Counts from 1."""
    loss: float
    syn_lr: float
    """eta after the step."""
    grad_norm: float
    """Of the images."""
    expert: int
    start_epoch: int
    waited: float = field(default=0.0, compare=False)
    """Seconds that the step waited for its segment."""


def initial_state(
    config: DistillConfig,
    data: Dataset,
    trajectories: Trajectories,
    gradients: Gradients,
    *,
    epochs: int,
    seed: int,
) -> DistillState:
    """The state before the first step; ``epochs`` is the last epoch that the experts have."""
    picks = draw_real(data.train, config.ipc, generator(seed, "init"))
    labels = data.train.labels[picks]
    images = data.train.batch(picks)
    if config.init == "noise":
        noise = torch.randn(images.shape, generator=generator(seed, "init", "noise"))
        images = noise.to(images.device)
    if config.labels == "soft":
        labels = _expert_logits(trajectories, gradients, images, labels, epochs)
    return DistillState(
        step=0,
        images=images,
        labels=labels,
        syn_lr=torch.tensor(config.lr_init, device=images.device),
        ema_images=images.clone(),
        ema_labels=labels.clone(),
    )


@torch.no_grad()
def _expert_logits(
    trajectories: Trajectories, gradients: Gradients, images: Tensor, labels: Tensor, epochs: int
) -> Tensor:
    """Mean logits of a few grown experts; where they name another class, a plain one-hot logit."""
    experts = range(min(SOFT_LABEL_EXPERTS, trajectories.experts))
    grown = [_tensor(trajectories.segment(e, epochs, epochs)[1], images.device) for e in experts]
    logits = torch.stack([gradients.logits(w, images) for w in grown]).mean(0)
    one_hot = F.one_hot(labels, logits.shape[1]).float() * logits.abs().max()
    return torch.where((logits.argmax(1) == labels)[:, None], logits, one_hot)


def distill(
    config: DistillConfig,
    data: Dataset,
    trajectories: Trajectories,
    network_name: str,
    *,
    epochs: int,
    seed: int,
    state: DistillState | None = None,
    backend: str = "eager",
) -> Iterator[tuple[DistillState, StepRecord]]:
    """Yields the state and a record after every outer step, from ``state`` on if it is given.

    A run that goes on from a state gives the bits of one that was never interrupted. Raises
    Diverged when the loss is not finite or eta leaves (0, inf).
    """
    gradients = gradients_for(network_for(network_name, data.description), backend)
    match = GRADIENTS[config.gradient]
    if state is None:
        state = initial_state(config, data, trajectories, gradients, epochs=epochs, seed=seed)
    device = state.images.device
    n = len(state.images)
    for pick in _picks(config, trajectories, seed, state.step + 1):
        step = pick.step
        result = match(
            gradients,
            _tensor(pick.start, device),
            _tensor(pick.target, device),
            state.images,
            state.labels,
            state.syn_lr,
            draw_inner_steps(config, n, data.strategy, pick.gen, device),
        )
        state = _descend(config, state, step, result)
        record = StepRecord(
            step=step,
            loss=result.loss.item(),
            syn_lr=state.syn_lr.item(),
            grad_norm=result.grad_images.norm().item(),
            expert=pick.expert,
            start_epoch=pick.start_epoch,
            waited=pick.waited,
        )
        if not np.isfinite([record.loss, record.grad_norm, record.syn_lr]).all():
            raise Diverged(
                f"step {step}: the matching loss is {record.loss:g} and eta is "
                f"{record.syn_lr:g}. Lower distill.lr_img, lr_lr, lr_init or syn_steps."
            )
        if record.syn_lr <= 0:
            raise Diverged(
                f"step {step}: eta became {record.syn_lr:g}, and a learning rate must stay above "
                f"0. Lower distill.lr_lr={config.lr_lr:g}, or raise lr_init={config.lr_init:g}."
            )
        yield state, record


@dataclass(frozen=True, eq=False)
class _Pick:
    """The segment of an outer step, and the generator of the step's further draws."""

    step: int
    gen: torch.Generator
    expert: int
    start_epoch: int
    start: np.ndarray
    target: np.ndarray
    waited: float


def _picks(
    config: DistillConfig, trajectories: Trajectories, seed: int, first: int
) -> Iterator[_Pick]:
    """The segments of the outer steps; the next one is read while the current step computes."""
    with ThreadPoolExecutor(1, "prefetch") as reader:

        def order(step: int) -> tuple[Any, ...]:
            gen = generator(seed, "step", step)
            expert = _randint(trajectories.experts, gen)
            t = _randint(config.max_start_epoch, gen)
            reading = reader.submit(trajectories.segment, expert, t, t + config.expert_epochs)
            return step, gen, expert, t, reading

        coming = order(first) if first <= config.iterations else None
        while coming is not None:
            step, gen, expert, t, reading = coming
            began = time.perf_counter()
            start, target = reading.result()
            waited = time.perf_counter() - began
            coming = order(step + 1) if step < config.iterations else None
            yield _Pick(step, gen, expert, t, start, target, waited)


def draw_inner_steps(
    config: DistillConfig, n: int, strategy: str, gen: torch.Generator, device: torch.device
) -> list[InnerStep]:
    """The N student steps: batches walk through shuffled images, each with its own DSA draw."""
    size = config.batch_syn or n
    waiting: list[Tensor] = []
    steps = []
    for _ in range(config.syn_steps):
        index = None
        if size < n:
            if not waiting:
                waiting = list(torch.randperm(n, generator=gen).split(size))
            index = waiting.pop(0)
        draw = augment.draw(strategy, n if index is None else len(index), gen)
        steps.append(
            InnerStep(None if index is None else index.to(device), draw and draw.to(device))
        )
    return steps


def _descend(config: DistillConfig, state: DistillState, step: int, result: Match) -> DistillState:
    images, image_velocity = sgd_step(
        state.images,
        result.grad_images,
        state.image_velocity,
        lr=config.lr_img,
        momentum=config.momentum,
    )
    syn_lr, lr_velocity = sgd_step(
        state.syn_lr, result.grad_lr, state.lr_velocity, lr=config.lr_lr, momentum=config.momentum
    )
    labels, label_velocity, ema_labels = state.labels, None, state.labels
    if result.grad_labels is not None:
        labels, label_velocity = sgd_step(
            state.labels,
            result.grad_labels,
            state.label_velocity,
            lr=config.lr_label or 1.0,
            momentum=config.momentum,
        )
        ema_labels = ema(state.ema_labels, labels, config.ema_decay)
    return replace(
        state,
        step=step,
        images=images,
        labels=labels,
        syn_lr=syn_lr,
        ema_images=ema(state.ema_images, images, config.ema_decay),
        ema_labels=ema_labels,
        image_velocity=image_velocity,
        label_velocity=label_velocity,
        lr_velocity=lr_velocity,
    )


def ema(average: Tensor, value: Tensor, beta: float) -> Tensor:
    """beta * average + (1 - beta) * value, without bias correction."""
    return beta * average + (1 - beta) * value


def _randint(high: int, gen: torch.Generator) -> int:
    return int(torch.randint(high, (), generator=gen))


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.tensor(array, device=device)
