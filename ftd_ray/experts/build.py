"""Building an expert into the store: what an expert actor does, without Ray.

It publishes in parts, so a process that dies costs a few epochs, and whoever builds that expert
next goes on from there.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ftd.data import Dataset, DatasetConfig, Sender, load
from ftd.expert import ExpertConfig, Numerics, Snapshot, train_expert
from ftd.memory import OVERHEAD, expert_need, limit_memory
from ftd.trajectory import Overtaken
from ftd_ray.experts.orders import GpuFull
from ftd_ray.experts.shares import GPU_HEADROOM
from ftd_ray.limits import own_use
from ftd_ray.node_faults import GpuMemory, NodeFault, faults_of_the_node, needs_the_data
from ftd_ray.storage import place_error
from ftd_ray.store import TrajectoryStore

OVERTAKEN_AT_MOST = 4
"""Times that a build goes on from what another writer published."""


@dataclass(frozen=True, kw_only=True)
class ExpertRequest:
    """All that training an expert set depends on."""

    store_uri: str
    identity: dict[str, Any]
    dataset: DatasetConfig
    sender: Sender | None = None
    """Where the data set comes from on nodes that have not got it."""
    experts: ExpertConfig
    numerics: Numerics


OnEpoch = Callable[[Snapshot], None]


def build_expert(
    request: ExpertRequest, index: int, on_epoch: OnEpoch, *, gpus: float = 0.0
) -> None:
    """Trains expert ``index`` of a request into the store, on from what is published of it.

    Raises Diverged, GpuFull where it outgrows its ``gpus`` GPUs, PlaceError for a store that cannot
    be written, or NodeFault for what says something about this node alone.
    """
    for attempt in itertools.count(1):
        try:
            with faults_of_the_node(gpus):
                return _build(request, index, on_epoch)
        except Overtaken:  # by another cluster that shares the store, or by its quarantine
            if attempt == OVERTAKEN_AT_MOST:
                raise
        except GpuMemory as error:
            raise GpuFull(
                f"an expert does not fit: {error}. Raise resources.gpus_per_expert, or write auto."
            ) from error


def _build(request: ExpertRequest, index: int, on_epoch: OnEpoch) -> None:
    device = request.numerics.apply()
    with needs_the_data():
        data = _dataset(request.dataset, str(device), request.sender)
    try:
        experts = TrajectoryStore(request.store_uri).expert_set(request.identity)
        experts.create()
        epochs = request.experts.epochs
        training = train_expert(
            request.experts,
            data,
            index,
            epochs=epochs,
            resume=experts.resume_point(index),
            device=device,
            backend=request.numerics.backend,
        )
        for snapshot in experts.record(index, training, last=epochs):
            on_epoch(snapshot)
    except OSError as error:  # training itself touches no files
        raise place_error(request.store_uri, "store.uri", error, verb="written") from error


def gpu_need(request: ExpertRequest) -> tuple[int, int]:
    """Bytes of this process's GPU that training takes, context included, and that there are.

    Measured by an epoch of a few batches, in a process that has done nothing else on the GPU. What
    others use on it does not count. Accuracy is cut to what a training step takes.
    """
    device = request.numerics.apply()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - OVERHEAD["cuda"]
    data = _dataset(request.dataset, str(device), request.sender)
    zca = request.dataset.zca
    said = expert_need(request.experts, data.description, request.numerics, zca=zca)
    limit_memory(said.total - said.overhead)
    few = replace(data, train=data.train.first(3 * request.experts.batch_size))
    backend = request.numerics.backend
    try:
        for _ in train_expert(request.experts, few, 0, epochs=1, device=device, backend=backend):
            pass
    except torch.OutOfMemoryError as error:
        if others > OVERHEAD["cuda"] and said.total < GPU_HEADROOM * total:
            raise NodeFault(
                "full",
                f"other programs use {others / 1e9:.1f} of its GPU's {total / 1e9:.1f} GB, and an "
                f"expert takes about {said.total / 1e9:.1f} GB. End them, or lower "
                "experts.batch_size",
            ) from error
        return max(said.total, total), total
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.max_memory_reserved(device)
    return own_use(reserved, total - free, torch.cuda.memory_reserved(device)), total


@lru_cache(maxsize=1)
def _dataset(config: DatasetConfig, device: str, sender: Sender | None) -> Dataset:
    return load(config, device, sender)
