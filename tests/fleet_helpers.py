"""What the tests of the fleet share: orders for tiny experts, builds without Ray, a broker to
look into, and the processes of Ray's actors.
"""

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray_helpers import parse_tiny

from ftd import __version__
from ftd.data import describe
from ftd.expert import Snapshot, set_key
from ftd.trajectory import SCHEMA_VERSION, ExpertSet
from ftd_ray.actors import shared_actor
from ftd_ray.experts.broker import Broker
from ftd_ray.experts.build import ExpertRequest, build_expert
from ftd_ray.experts.orders import ExpertOrder, FleetStatus, SetStatus, Urgency
from ftd_ray.store import TrajectoryStore

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests

BOUND = 120
"""Seconds after which an answer of Ray is taken for lost."""


def request_for(store: Path, **experts: Any) -> ExpertRequest:
    changes = {f"experts__{k}": v for k, v in experts.items()}
    config = parse_tiny(**({"experts__rho": 0.01, "distill__max_start_epoch": 1} | changes))
    return ExpertRequest(
        store_uri=str(store),
        identity=config.identity(config.experts, describe(config.dataset)),
        dataset=config.dataset,
        experts=config.experts,
        numerics=config.resources.expert_numerics,
    )


def order_for(
    store: Path,
    *,
    asker: str = "somebody",
    urgency: Urgency = Urgency.TRIAL,
    cpus: float = 1,
    gpus: float | None = 0,
    **experts: Any,
) -> ExpertOrder:
    request = request_for(store, **experts)
    return ExpertOrder(
        asker=asker,
        key=set_key(request.identity),
        identity=request.identity,
        count=request.experts.count,
        epochs=request.experts.epochs,
        work=pickle.dumps(request),
        cpus=cpus,
        gpus=gpus,
        urgency=urgency,
    )


def set_of(request: ExpertRequest | ExpertOrder, store: Path) -> ExpertSet:
    return TrajectoryStore(str(store)).expert_set(request.identity)


def build(request: ExpertRequest, index: int, stop_after: int | None = None) -> list[int]:
    """Builds an expert here; dies in the middle if told so. Returns the epochs it went through."""
    epochs = []

    def on_epoch(snapshot: Snapshot) -> None:
        epochs.append(snapshot.epoch)
        if snapshot.epoch == stop_after:
            raise KeyboardInterrupt

    if stop_after is None:
        build_expert(request, index, on_epoch)
    else:
        with pytest.raises(KeyboardInterrupt):
            build_expert(request, index, on_epoch)
    return epochs


def files_of(folder: Path) -> dict[str, bytes]:
    """What a store holds, but for records of who used it, and files of who was killed writing."""
    found = ((str(p.relative_to(folder)), p) for p in folder.rglob("*") if p.is_file())
    return {
        name: path.read_bytes()
        for name, path in found
        if "/users/" not in name and not name.endswith(".part")
    }


# --- with Ray -------------------------------------------------------------------------------


class WatchedBroker(Broker):
    """A broker that also says what it heard and what it has to do."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._heard_of: list[tuple[str, int, int]] = []

    async def epoch_done(self, key: str, index: int, epoch: int, val_accuracy: float) -> None:
        if epoch:
            self._heard_of.append((key, index, epoch))
        await super().epoch_done(key, index, epoch, val_accuracy)

    async def trained(self) -> list[tuple[str, int, int]]:
        """(set, expert, epoch) in the order in which actors finished them."""
        return self._heard_of

    async def waiting(self) -> list[tuple[str, int]]:
        """(set, expert) of all builds that no actor has taken yet."""
        fleets = self._fleets.values()
        return [(b.key, b.index) for f in fleets for b in sorted(f._queue)]

    async def actors(self) -> int:
        """Expert actors, those that wait for room as well."""
        return sum(len(f.workers) for f in self._fleets.values())


def watched_broker(store: Path, cls: type = WatchedBroker) -> Any:
    """A store's broker to look into, started as the real one is, but always on this node."""
    here = ray.get_runtime_context().get_node_id()
    return shared_actor(cls, cls.__name__, str(store), SCHEMA_VERSION, __version__, node=here)


def ask(ref: Any) -> Any:
    """An answer of Ray, in bounded time."""
    return ray.get(ref, timeout=BOUND)


def fleet_status(handle: Any, asker: str = "somebody") -> FleetStatus:
    return ask(handle.status.remote(asker))


def status(handle: Any, order: ExpertOrder) -> SetStatus:
    return fleet_status(handle, order.asker).sets[order.key]


def assert_all_there(handle: Any, order: ExpertOrder, *, killed: int = 1) -> None:
    """Every expert of an order is there, and each was built for it.

    But for as many as were in training where somebody was killed: a process that ends, or whose
    node has ended, may publish its expert and not be heard any more. Then that expert is found.
    """
    known, everything = status(handle, order), set(range(order.count))
    assert (known.present, known.running) == (everything, {})
    assert set(known.built) <= everything
    assert len(known.built) >= order.count - killed


def running_epochs(handle: Any, order: ExpertOrder) -> list[int]:
    """The last epoch of every expert in training."""
    known = fleet_status(handle, order.asker).sets
    return list(known[order.key].running.values()) if order.key in known else []


def expert_processes() -> list[psutil.Process]:
    """Expert actors of this machine at work; tests end what they start, so these are theirs."""
    return list(processes("ray::ExpertActor.build"))


def processes(title: str) -> Iterator[psutil.Process]:
    """Processes of Ray's workers with that title, started below this process."""
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                yield process
        except psutil.Error:
            continue
