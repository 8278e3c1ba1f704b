"""Building an expert into the store: what an expert actor does, without Ray.

It publishes in parts, so a process that dies costs a few epochs, and whoever builds that expert
next goes on from there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ftd.data import Dataset, DatasetConfig, load
from ftd.expert import ExpertConfig, Numerics, Snapshot, train_expert
from ftd.trajectory import PART_EPOCHS
from ftd_ray.store import TrajectoryStore


@dataclass(frozen=True, kw_only=True)
class ExpertRequest:
    """All that training an expert set depends on."""

    store_uri: str
    identity: dict[str, Any]
    dataset: DatasetConfig
    experts: ExpertConfig
    numerics: Numerics


OnEpoch = Callable[[Snapshot], None]


def build_expert(request: ExpertRequest, index: int, on_epoch: OnEpoch) -> None:
    """Trains expert ``index`` of a request into the store, on from what is published of it."""
    device = request.numerics.apply()
    data = _dataset(request.dataset, str(device))
    experts = TrajectoryStore(request.store_uri).expert_set(request.identity)
    experts.create()
    waiting: list[Snapshot] = []
    epochs = request.experts.epochs
    for snapshot in train_expert(
        request.experts,
        data,
        index,
        epochs=epochs,
        resume=experts.resume_point(index),
        device=device,
    ):
        waiting.append(snapshot)
        if snapshot.epoch == epochs or (snapshot.epoch and snapshot.epoch % PART_EPOCHS == 0):
            experts.append(index, waiting)
            waiting = []
        on_epoch(snapshot)


@lru_cache(maxsize=1)
def _dataset(config: DatasetConfig, device: str) -> Dataset:
    return load(config, device)
