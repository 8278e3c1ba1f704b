"""How fast one worker of a sweep is: the real work of experts and trials, in small pieces.

It is done on noise: how long it takes does not depend on what the images show.
"""

import itertools
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ftd.backends import gradients_for
from ftd.data import Dataset, Normalisation, Split
from ftd.data.dataset import Description
from ftd.distill import DistillConfig, distill
from ftd.evaluate import EvaluateConfig, Protocol, train_fresh
from ftd.expert import ExpertConfig, Numerics, accuracy, network_for, train_expert
from ftd.gradients import Gradients
from ftd.networks import Network
from ftd.seeds import generator

SLICE_SECONDS = 1.2
"""For each kind of work."""

BATCHES = 3
"""Of the epoch that is measured."""

CLASSIFIED = 500
"""Images of a batch of ``ftd.expert.accuracy``."""

STEPS = 10
"""Student steps of a matching step that is measured."""

FRESH_EPOCHS = 10

SYN_LR = 1e-3
"""Small steps: nothing here may diverge."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A size of the work, whose pace is wanted."""

    network: str
    channels: int
    resolution: int
    classes: int
    ipc: int
    batch_size: int
    """Of experts."""
    images: int
    """In the whole data set, which lies on a GPU."""
    augment: str
    numerics: Numerics


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds that a worker takes for a piece of work, and the memory that it takes for all."""

    plain: float
    """A training image in an epoch of an expert, by plain SGD."""
    flat: float
    """The same, sharpness-aware: two gradients."""
    step: float
    """A student step, on to the parameters and back."""
    fresh: float
    """An epoch of a fresh network on the synthetic images."""
    classify: float
    """The class of one image."""
    memory: int
    """Bytes of the process at its peak."""
    gpu_share: float = 0.0
    """Of its GPU's memory."""


def measure(task: Task) -> Pace:
    """The pace of this process at ``task``. Raises torch.OutOfMemoryError."""
    device = task.numerics.apply()
    data = _noise(task, device)
    network = network_for(task.network, data.description)
    gradients = gradients_for(network, task.numerics.backend)
    epoch = BATCHES * task.batch_size
    return Pace(
        plain=_seconds_each(_epochs(task, data, 0.0)) / epoch,
        flat=_seconds_each(_epochs(task, data, 0.01)) / epoch,
        step=_seconds_each(_matching_steps(task, data)) / STEPS,
        fresh=_seconds_each(_fresh_networks(task, data, gradients)) / FRESH_EPOCHS,
        classify=_seconds_each(_classified(data, gradients)) / CLASSIFIED,
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        gpu_share=_gpu_share(task, device),
    )


def _seconds_each(work: Iterator[Any]) -> float:
    """Seconds that a piece of ``work`` takes; the first warms up and is not counted."""
    next(work)
    began = time.perf_counter()
    count, seconds = 0, 0.0
    while seconds < SLICE_SECONDS:
        next(work)
        count, seconds = count + 1, time.perf_counter() - began
    return seconds / count


def _epochs(task: Task, data: Dataset, rho: float) -> Iterator[Any]:
    config = ExpertConfig(
        network=task.network, batch_size=task.batch_size, lr=SYN_LR, sharpness="sam", rho=rho
    )
    few = replace(data, train=data.train.first(BATCHES * task.batch_size), val=data.val.first(1))
    device, backend = data.train.labels.device, task.numerics.backend
    snapshots = train_expert(config, few, 0, epochs=10**9, device=device, backend=backend)
    next(snapshots)  # the initialisation
    return snapshots


def _matching_steps(task: Task, data: Dataset) -> Iterator[Any]:
    config = DistillConfig(
        ipc=task.ipc,
        syn_steps=STEPS,
        expert_epochs=1,
        max_start_epoch=1,
        iterations=10**9,
        optimiser="rmsprop",
        lr_img=SYN_LR,
        lr_lr=0.0,
        lr_init=SYN_LR,
    )
    segments = _Segments(network_for(task.network, data.description))
    backend = task.numerics.backend
    return distill(config, data, segments, task.network, epochs=1, seed=0, backend=backend)


def _fresh_networks(task: Task, data: Dataset, gradients: Gradients) -> Iterator[Any]:
    protocol = Protocol.of(
        EvaluateConfig(epochs=FRESH_EPOCHS), network=task.network, augment=task.augment
    )
    picks = torch.arange(task.ipc * task.classes, device=data.train.labels.device)
    images, labels = data.train.batch(picks), data.train.labels[picks]
    for index in itertools.count():
        w = train_fresh(gradients, images, labels, SYN_LR, protocol, seed=0, index=index)
        yield w[0].item()  # waits for a GPU


def _classified(data: Dataset, gradients: Gradients) -> Iterator[Any]:
    w = gradients.network.init(generator(0, "pace")).to(data.val.labels.device)
    while True:
        yield accuracy(gradients, w, data.val)


class _Segments:
    """A start, and a target close to it (``ftd.distill.Trajectories``)."""

    experts = 1

    def __init__(self, network: Network):
        self._start = network.init(generator(0, "segment")).numpy()

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return self._start, self._start * 0.99


def _noise(task: Task, device: torch.device) -> Dataset:
    """Images of noise, the classes in turn: enough for a set, some batches, and to classify."""
    size = max(BATCHES * task.batch_size, CLASSIFIED, task.ipc * task.classes)
    shape = (size, task.channels, task.resolution, task.resolution)
    pixels = torch.randint(256, shape, generator=generator(0, "noise"), dtype=torch.uint8)
    labels = torch.arange(size) % task.classes
    mean, std = torch.full((task.channels,), 0.5), torch.full((task.channels,), 0.25)
    normalisation = Normalisation("standard", mean, std).to(device)

    def part(count: int) -> Split:
        index = torch.arange(count).to(device)
        return Split(pixels.to(device), labels.to(device), index, normalisation)

    train, val = part(size), part(CLASSIFIED)
    each = (-(-size // task.classes),) * task.classes
    description = Description(
        name="noise",
        class_names=tuple(map(str, range(task.classes))),
        channels=task.channels,
        resolution=task.resolution,
        counts=(each, each, each),
        fingerprint="noise",
    )
    return Dataset(description, task.augment, normalisation, train, val, val)


def _gpu_share(task: Task, device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    context = 600 * 2**20  # of CUDA itself, which PyTorch does not count
    pixels = task.images * task.channels * task.resolution**2
    _, total = torch.cuda.mem_get_info(device)
    return float(torch.cuda.max_memory_reserved(device) + context + pixels) / total
