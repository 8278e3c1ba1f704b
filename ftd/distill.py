"""Distillation: the outer loop of trajectory matching (FTD Alg. 1 on MTT Alg. 1).

N = syn_steps, M = expert_epochs, t ~ U{0 ... max_start_epoch - 1}, T = iterations, k = outer step.
Each outer step picks an expert and a segment theta*_t -> theta*_{t+M}, takes the gradient of the
matching loss for images, eta and (soft) labels, and descends by ``optimiser`` (ftd.outer). The set
that is evaluated and saved is a moving average of the images, x^:

    ema_decay   x^ <- beta x^ + (1 - beta) x from the initial images, as in FTD
    ema_share   the same with beta = 1 - 1 / (ema_share T), divided by 1 - beta^k: without the
                initial images, which otherwise are most of it for the first 1 / (1 - beta) steps
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from itertools import islice
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
from ftd.matching import GRADIENTS, InnerStep, Match, matching_loss, unroll
from ftd.memory import room_for_trial
from ftd.outer import OPTIMISERS, Descent, log_lr_step, rmsprop_step
from ftd.seeds import generator

SOFT_LABEL_EXPERTS = 5
"""Experts whose mean logits the soft labels start from."""

DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"lr_img": 100.0, "lr_lr": 1e-7, "lr_label": 1.0},
    "rmsprop": {"lr_img": 0.05, "lr_lr": 0.05, "lr_label": 0.05},
}
"""Learning rates of each optimiser where none are given."""

_WITHOUT_UNITS = ", or take distill.optimiser=rmsprop, whose learning rates have no units"

LR_INIT = 0.01
EMA_DECAY = 0.9999

SEARCHED_LR = tuple(10 ** (e / 2) for e in range(-8, 1))
"""Initial learning rates that ``rmsprop`` chooses from, ascending."""

SEARCH_SEGMENTS = 3
"""Segments that it looks at."""

SEARCH_LOSS = 2.0
"""Matching loss of a student that goes as far as the expert does, at right angles to its way."""

SEGMENTS_AHEAD = 4
"""Segments that are on their way while a step computes: one that is late holds nothing up."""

SCALE_IMAGES = 1024
"""Training images whose pixels' standard deviation is the unit of ``lr_img``."""


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
    optimiser: str = "sgd"
    """Of images, labels and eta. sgd: the paper's, its learning rates depend on everything else.
    rmsprop: descends log L and log eta; its learning rates have no units, and eta stays above 0."""
    lr_img: float | None = None
    """Learning rate of the images. sgd: None for 100. rmsprop: the change of a class in a step, in
    standard deviations of the pixels, before momentum (with ipc images, each changes by an ipc-th
    of it); None for 0.05."""
    lr_lr: float | None = None
    """Learning rate of eta. sgd: None for 1e-7. rmsprop: the share by which eta changes in a step,
    before momentum; None for 0.05."""
    lr_init: float | None = None
    """Initial eta. None: 0.01 for sgd; for rmsprop the largest power of sqrt(10) at which a student
    goes no farther than the expert."""
    ema_decay: float | None = None
    """beta of the moving average of the images, which starts at the initial ones; 0 takes the
    images themselves. None for 0.9999, unless there is ema_share."""
    ema_share: float | None = None
    """In place of ema_decay: the moving average remembers this share of the iterations, without
    the initial images; 0 takes the images themselves."""
    momentum: float = 0.5
    """Momentum of the optimiser, on images, labels and eta."""
    batch_syn: int | None = None
    """Images of a student step; None for all of them."""
    labels: str = "hard"
    """hard: class indices. soft: learned, starting from the experts' mean prediction."""
    lr_label: float | None = None
    """Learning rate of soft label logits. sgd: None for 1. rmsprop: as lr_img, in standard
    deviations of the first logits; None for 0.05."""
    init: str = "real"
    """real: random training images. noise: standard normal in network space."""
    gradient: str = "rematerialised"
    """rematerialised: exact at constant memory. direct: the same through one graph of N steps."""

    def __post_init__(self) -> None:
        for key in ("ipc", "syn_steps", "expert_epochs", "max_start_epoch", "iterations"):
            if getattr(self, key) < 1:
                raise UserError(f"distill.{key}={getattr(self, key)} must be at least 1.")
        tables = {
            "optimiser": OPTIMISERS,
            "labels": ("hard", "soft"),
            "init": ("real", "noise"),
            "gradient": GRADIENTS,
        }
        for key, allowed in tables.items():
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"distill.{key}={getattr(self, key)!r} is not known. "
                    f"Take one of {', '.join(allowed)}."
                )
        if self.lr_label is not None and self.labels == "hard":
            raise UserError(
                f"distill.lr_label={self.lr_label} has no effect with distill.labels=hard. "
                "Leave it out, or take labels: soft."
            )
        if self.ema_share is not None and self.ema_decay is not None:
            raise UserError(
                f"distill.ema_share={self.ema_share} and distill.ema_decay={self.ema_decay} name "
                "two averages. Leave one of them out."
            )
        self._settle()
        for key in ("lr_img", "lr_init", "lr_label"):
            if getattr(self, key) is None:
                continue
            if not 0 < getattr(self, key) < float("inf"):
                raise UserError(f"distill.{key}={getattr(self, key)} must be above 0, and finite.")
        if not 0 <= self.rate("lr_lr") < float("inf"):
            raise UserError(f"distill.lr_lr={self.lr_lr} must be 0 or more (0 keeps eta fixed).")
        for key in ("ema_decay", "ema_share", "momentum"):
            if getattr(self, key) is not None and not 0 <= getattr(self, key) < 1:
                raise UserError(f"distill.{key}={getattr(self, key)} must lie in [0, 1).")
        if self.batch_syn is not None and self.batch_syn < 1:
            raise UserError(f"distill.batch_syn={self.batch_syn} must be at least 1, or null.")
        for key, unit in (
            ("lr_img", "standard deviations of the pixels"),
            ("lr_label", "standard deviations of the logits"),
            ("lr_lr", "of log eta"),
        ):
            value = getattr(self, key)
            if self.optimiser == "rmsprop" and value is not None and value > 1:
                raise UserError(
                    f"distill.{key}={value:g} with distill.optimiser=rmsprop is a change of "
                    f"{value:g} {unit} in one step, and 1 is the most. Take 0.03 to 0.3, or mean "
                    "optimiser: sgd."
                )

    def _settle(self) -> None:
        """Puts defaults where they depend on other keys."""
        defaults = {key: DEFAULTS[self.optimiser][key] for key in ("lr_img", "lr_lr")}
        if self.optimiser == "sgd":
            defaults["lr_init"] = LR_INIT
        if self.ema_share is None:
            defaults["ema_decay"] = EMA_DECAY
        for key, value in defaults.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)

    def rate(self, key: str) -> float:
        """``lr_img``, ``lr_lr`` or ``lr_label``, after its default."""
        value = getattr(self, key)
        return float(DEFAULTS[self.optimiser][key] if value is None else value)

    def ema_decay_at(self, step: int) -> float:
        """The weight of what was before in the average after ``step`` (from 1)."""
        if self.ema_decay is not None:
            return self.ema_decay
        assert self.ema_share is not None
        beta = max(0.0, 1 - 1 / max(1.0, self.ema_share * self.iterations))
        return 1 - (1 - beta) / (1 - beta**step)

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
    """Where segments come from: a store, or a folder on this machine.

    One that may be asked for several at the same time, by as many threads, has ``at_once``.
    """

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
    image_square: Tensor | None = None
    """(N,) running mean square of each image's gradient; this and what follows of rmsprop."""
    label_square: Tensor | None = None
    lr_square: Tensor | None = None
    """(1,), of the slope of log eta."""
    image_scale: Tensor | None = None
    """Standard deviation of the pixels in network space, a scalar."""
    label_scale: Tensor | None = None
    """Of the first logits."""

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
    if config.lr_init is None:
        syn_lr = _initial_lr(config, data.strategy, trajectories, gradients, images, labels, seed)
    else:
        syn_lr = torch.tensor(config.lr_init, device=images.device)
    unitless = config.optimiser == "rmsprop"
    return DistillState(
        step=0,
        images=images,
        labels=labels,
        syn_lr=syn_lr,
        ema_images=images.clone(),
        ema_labels=labels.clone(),
        image_scale=_pixel_std(data) if unitless else None,
        label_scale=labels.std() if unitless and config.labels == "soft" else None,
    )


def _pixel_std(data: Dataset) -> Tensor:
    """Standard deviation of the training images in network space, from some all over them."""
    n = len(data.train)
    some = torch.linspace(0, n - 1, min(n, SCALE_IMAGES), device=data.train.labels.device)
    return data.train.batch(some.long()).std()


@torch.no_grad()
def _initial_lr(
    config: DistillConfig,
    strategy: str,
    trajectories: Trajectories,
    gradients: Gradients,
    images: Tensor,
    labels: Tensor,
    seed: int,
) -> Tensor:
    """The largest learning rate in ``SEARCHED_LR`` with a mean loss of at most ``SEARCH_LOSS``.

    It lets the student go about as far as the expert: the images then have only to turn its way.
    Where L is smallest at first says less: real images as they are serve a student so little that
    it would stay where it is. From the smallest up; each costs a few unrolls and no second order.
    """
    device = images.device

    def segment(number: int) -> tuple[Tensor, Tensor, list[InnerStep]]:
        gen = generator(seed, "lr_init", number)
        expert, t = _randint(trajectories.experts, gen), _randint(config.max_start_epoch, gen)
        start, target = trajectories.segment(expert, t, t + config.expert_epochs)
        steps = draw_inner_steps(config, len(images), strategy, gen, device)
        return _tensor(start, device), _tensor(target, device), steps

    segments = [segment(number) for number in range(SEARCH_SEGMENTS)]
    best = torch.tensor(SEARCHED_LR[0], device=device)
    for value in SEARCHED_LR:
        syn_lr = torch.tensor(value, device=device)
        mean = 0.0
        for start, target, steps in segments:
            end = unroll(gradients, start, images, labels, syn_lr, steps)[-1]
            mean += matching_loss(end, start, target).log().item() / len(segments)
        if not mean <= math.log(SEARCH_LOSS):
            break
        best = syn_lr
    return best


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
    network = network_for(network_name, data.description)
    gradients = gradients_for(network, backend, room=room_for_trial(network, config, data))
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
                f"{record.syn_lr:g}. Lower distill.lr_img, lr_lr, lr_init or syn_steps"
                f"{_WITHOUT_UNITS if config.optimiser == 'sgd' else ''}."
            )
        if record.syn_lr <= 0:
            remedy = f"Lower distill.lr_lr={config.lr_lr:g}"
            if config.optimiser == "sgd":
                remedy += f", or raise lr_init={config.lr_init:g}{_WITHOUT_UNITS}"
            raise Diverged(
                f"step {step}: eta became {record.syn_lr:g}, and a learning rate must stay above "
                f"0. {remedy}."
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
    """The segments of the outer steps; the next ones are read while the current step computes."""
    reader = ThreadPoolExecutor(getattr(trajectories, "at_once", 1), "prefetch")

    def order(step: int) -> tuple[Any, ...]:
        gen = generator(seed, "step", step)
        expert = _randint(trajectories.experts, gen)
        t = _randint(config.max_start_epoch, gen)
        reading = reader.submit(trajectories.segment, expert, t, t + config.expert_epochs)
        return step, gen, expert, t, reading

    orders = map(order, range(first, config.iterations + 1))
    try:
        coming = deque(islice(orders, SEGMENTS_AHEAD))
        while coming:
            step, gen, expert, t, reading = coming.popleft()
            began = time.perf_counter()
            start, target = reading.result()
            waited = time.perf_counter() - began
            coming.extend(islice(orders, 1))
            yield _Pick(step, gen, expert, t, start, target, waited)
    finally:
        reader.shutdown(cancel_futures=True)


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
    descent = _rmsprop if config.optimiser == "rmsprop" else _sgd
    new = descent(config, replace(state, step=step), result)
    beta = config.ema_decay_at(step)
    return replace(
        new,
        ema_images=ema(state.ema_images, new.images, beta),
        ema_labels=new.labels
        if result.grad_labels is None
        else ema(state.ema_labels, new.labels, beta),
    )


def _sgd(config: DistillConfig, state: DistillState, result: Match) -> DistillState:
    """``state`` after the paper's descent of L."""

    def step(
        value: Tensor, grad: Tensor, velocity: Tensor | None, rate: str
    ) -> tuple[Tensor, Tensor | None]:
        lr, momentum = config.rate(rate), config.momentum
        return sgd_step(value, grad, velocity, lr=lr, momentum=momentum)

    images, image_velocity = step(state.images, result.grad_images, state.image_velocity, "lr_img")
    syn_lr, lr_velocity = step(state.syn_lr, result.grad_lr, state.lr_velocity, "lr_lr")
    labels, label_velocity = state.labels, None
    if result.grad_labels is not None:
        labels, label_velocity = step(
            state.labels, result.grad_labels, state.label_velocity, "lr_label"
        )
    return replace(
        state,
        images=images,
        image_velocity=image_velocity,
        syn_lr=syn_lr,
        lr_velocity=lr_velocity,
        labels=labels,
        label_velocity=label_velocity,
    )


def _rmsprop(config: DistillConfig, state: DistillState, result: Match) -> DistillState:
    """``state`` after a descent of log L without units."""

    def step(
        value: Tensor, grad: Tensor, memory: Descent, scale: Tensor | None, rate: str
    ) -> tuple[Tensor, Descent]:
        assert scale is not None
        lr, momentum = scale * config.rate(rate) / config.ipc, config.momentum
        return rmsprop_step(
            value, grad / result.loss, memory, step=state.step, lr=lr, momentum=momentum
        )

    images, of_images = step(
        state.images,
        result.grad_images,
        Descent(state.image_velocity, state.image_square),
        state.image_scale,
        "lr_img",
    )
    syn_lr, of_lr = log_lr_step(
        state.syn_lr,
        result.grad_lr / result.loss,
        Descent(state.lr_velocity, state.lr_square),
        step=state.step,
        lr=config.rate("lr_lr"),
        momentum=config.momentum,
    )
    labels, of_labels = state.labels, Descent()
    if result.grad_labels is not None:
        labels, of_labels = step(
            state.labels,
            result.grad_labels,
            Descent(state.label_velocity, state.label_square),
            state.label_scale,
            "lr_label",
        )
    return replace(
        state,
        images=images,
        image_velocity=of_images.velocity,
        image_square=of_images.square,
        syn_lr=syn_lr,
        lr_velocity=of_lr.velocity,
        lr_square=of_lr.square,
        labels=labels,
        label_velocity=of_labels.velocity,
        label_square=of_labels.square,
    )


def ema(average: Tensor, value: Tensor, beta: float) -> Tensor:
    """beta * average + (1 - beta) * value, without bias correction."""
    return beta * average + (1 - beta) * value


def _randint(high: int, gen: torch.Generator) -> int:
    return int(torch.randint(high, (), generator=gen))


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.tensor(array, device=device)
