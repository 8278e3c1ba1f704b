"""How often the store is asked: by a look at it, a trial's question, a reader, a write."""

import asyncio
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from s3_helpers import FaultProxy, s3_of_the_environment

from ftd.expert import Snapshot
from ftd.s3 import SMALL
from ftd.trajectory import DamagedError, ExpertSet, NotPublished
from ftd_ray.experts.broker import Broker
from ftd_ray.experts.orders import ExpertOrder, Urgency
from ftd_ray.storage import files_below, join, open_uri, write_bytes
from ftd_ray.store import TrajectoryStore, published
from ftd_ray.store.published import PublishedExperts
from ftd_ray.trial import forget_checkpoint

EPOCHS = 7  # two parts, two manifests


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultProxy]:
    with s3_of_the_environment() as proxy:
        yield proxy


def fill(uri: str, count: int, epochs: int = EPOCHS, name: str = "toy") -> ExpertSet:
    """A set of tiny experts."""
    experts = TrajectoryStore(uri).expert_set({"name": name})
    experts.create()
    for index in range(count):
        train(experts, index, epochs)
    return experts


def train(experts: ExpertSet, index: int, epochs: int = EPOCHS) -> None:
    every = [Snapshot(e, torch.full((3,), float(e)), None, 0.0, 0.0) for e in range(epochs + 1)]
    for _ in experts.record(index, every, last=epochs):
        pass


@pytest.fixture(scope="module")
def sets(s3) -> dict[int, ExpertSet]:
    """Count of experts -> a set with so many."""
    return {count: fill(f"s3://buffers/{count}", count) for count in (10, 100)}


def counted(s3: FaultProxy, act: Callable[[], Any]) -> Counter[str]:
    s3.reset_counts()
    act()
    return s3.requests


def order_of(experts: ExpertSet, count: int, **changes: Any) -> ExpertOrder:
    order = ExpertOrder(
        asker="somebody",
        key=experts.key,
        identity=experts.identity,
        count=count,
        epochs=EPOCHS,
        work=b"",
        cpus=1,
        gpus=0,
    )
    return replace(order, **changes)


# --- a look ---------------------------------------------------------------------------------


def test_look_at_a_set_is_one_request_however_many_experts_it_has(s3, sets):
    for count, experts in sets.items():
        assert counted(s3, lambda e=experts: e.published()) == {"GET": 1}
        assert experts.published() == dict.fromkeys(range(count), EPOCHS)
        assert counted(s3, lambda e=experts: e.complete(EPOCHS)) == {"GET": 1}
        assert counted(s3, lambda e=experts: e.sizes()) == {"GET": 1}


def test_look_sees_the_furthest_manifest_and_nothing_but_experts(tmp_path):
    experts = fill(str(tmp_path), 3)
    train(experts, 1, 12)
    experts.quarantine(2)
    (tmp_path / experts.key / "users").mkdir()
    (tmp_path / experts.key / "users" / "manifest-00099.json").write_text("{}")
    (tmp_path / experts.key / "expert-0007").mkdir()
    (tmp_path / experts.key / "expert-0007" / "part-0000-0005-0123456789ab.parquet").touch()
    old = tmp_path / experts.key / "expert-0000"
    (newest,) = old.glob("manifest-00007-*.json")
    newest.rename(old / "manifest-00007.json")  # as stores had it once
    assert experts.published() == {0: 7, 1: 12}
    assert experts.segment(0, 6, 7)[1][0] == 7.0


def test_sizes_are_the_bytes_of_parts(tmp_path):
    experts = fill(str(tmp_path), 2)
    assert sum(experts.sizes().values()) == experts.size() > 0
    assert set(experts.sizes()) == {0, 1}


def test_manifests_that_cannot_be_used_are_told_by_expert(tmp_path):
    experts = fill(str(tmp_path), 3)
    path = max((tmp_path / experts.key / "expert-0001").glob("manifest-*"))
    path.write_bytes(path.read_bytes()[:-9])
    assert experts.published() == dict.fromkeys(range(3), EPOCHS)
    assert list(experts.damaged_manifests()) == [1]
    with pytest.raises(DamagedError, match=path.name):
        experts.segment(1, 0, 1)


# --- a trial --------------------------------------------------------------------------------


def test_requests_of_a_trial_do_not_grow_with_the_experts_of_its_set(s3, sets):
    async def trial(experts: ExpertSet, count: int) -> list[Counter[str]]:
        """What the driver, the trial itself and a second trial ask, and a reader of 3 experts."""
        uri = f"s3://buffers/{count}"
        broker = Broker(uri, 1, "test")
        seen = []
        for _ in range(3):
            s3.reset_counts()
            assert await broker.ensure(order_of(experts, count)) == list(range(count))
            seen.append(s3.requests)
        s3.reset_counts()
        reader = TrajectoryStore(uri).at(experts.key)
        reader.published()
        for expert in range(3):
            reader.segment(expert, 1, 3)
        return [*seen, s3.requests]

    few, many = (asyncio.run(trial(experts, count)) for count, experts in sets.items())
    assert few == many
    first, *again, _ = many
    assert sum(first.values()) <= 3  # set.json and a listing
    assert again == [{}, {}]


def test_reader_that_has_looked_asks_for_no_experts_folder(s3, sets):
    direct, looked = (TrajectoryStore("s3://buffers/10").at(sets[10].key) for _ in range(2))
    looked.published()
    asked = [counted(s3, lambda r=r: r.segment(0, 1, 3)) for r in (direct, looked)]
    assert asked[0] - asked[1] == {"GET": 1}


def test_who_fills_a_store_has_every_manifest_read(s3, sets):
    broker = Broker("s3://buffers/10", 1, "test")
    fills = order_of(sets[10], 10, urgency=Urgency.FILL)
    assert counted(s3, lambda: asyncio.run(broker.ensure(fills)))["GET"] == 12


# --- what is remembered ---------------------------------------------------------------------


class Looks(PublishedExperts):
    """That counts its looks."""

    def __init__(self, uri: str) -> None:
        super().__init__(TrajectoryStore(uri))
        self.looks = 0

    def _published(self, *args: Any) -> dict[int, int]:
        self.looks += 1
        return super()._published(*args)


IDENTITY = {"name": "toy"}


def test_what_is_there_is_asked_once_by_many_and_what_is_missing_each_time(tmp_path):
    experts = fill(str(tmp_path), 2)

    async def asks() -> None:
        known = Looks(str(tmp_path))
        answers = await asyncio.gather(*(known.epochs(IDENTITY, 2, EPOCHS) for _ in range(20)))
        assert answers == [{0: 7, 1: 7}] * 20 and known.looks == 1
        assert await known.epochs(IDENTITY, 3, EPOCHS) == {0: 7, 1: 7}
        train(experts, 2)  # another cluster
        assert await known.epochs(IDENTITY, 3, EPOCHS) == {0: 7, 1: 7, 2: 7}
        train(experts, 2, 10)
        assert (await known.epochs(IDENTITY, 3, 7))[2] == 7  # all that was asked for
        assert (await known.epochs(IDENTITY, 3, 10))[2] == 10
        assert known.looks == 4

    asyncio.run(asks())


def test_own_builds_are_known_at_once_also_while_a_look_is_under_way(tmp_path):
    fill(str(tmp_path), 1)

    async def asks() -> None:
        known = Looks(str(tmp_path))
        look = asyncio.create_task(known.epochs(IDENTITY, 2, EPOCHS))
        await asyncio.sleep(0)
        known.built(TrajectoryStore(str(tmp_path)).expert_set(IDENTITY).key, 1, EPOCHS)
        assert await look == {0: 7, 1: 7}
        assert await known.epochs(IDENTITY, 2, EPOCHS) == {0: 7, 1: 7}
        assert known.looks == 1

    asyncio.run(asks())


def test_what_another_cluster_took_away_is_noticed_in_time_or_when_it_is_missed(
    tmp_path, monkeypatch
):
    experts = fill(str(tmp_path), 2)

    async def asks() -> None:
        known = Looks(str(tmp_path))
        await known.epochs(IDENTITY, 2, EPOCHS)
        TrajectoryStore(str(tmp_path)).at(experts.key).quarantine(1)
        assert await known.epochs(IDENTITY, 2, EPOCHS) == {0: 7, 1: 7}
        with pytest.raises(NotPublished, match="has none of the 7 epochs"):
            experts.segment(1, 0, 7)
        known.forget(experts.key)
        assert await known.epochs(IDENTITY, 2, EPOCHS) == {0: 7}
        train(experts, 1)
        await known.epochs(IDENTITY, 2, EPOCHS)
        TrajectoryStore(str(tmp_path)).at(experts.key).quarantine(0)
        monkeypatch.setattr(published, "REMEMBER_SECONDS", -1)
        assert await known.epochs(IDENTITY, 2, EPOCHS) == {1: 7}

    asyncio.run(asks())


def test_what_a_trial_misses_the_broker_looks_for_again(tmp_path):
    experts = fill(str(tmp_path), 2)
    order = order_of(experts, 2)

    async def asks() -> None:
        broker = Broker(str(tmp_path), 1, "test")
        await broker.ensure(order)
        TrajectoryStore(str(tmp_path)).at(experts.key).quarantine(1)
        assert await broker._published(order) == {0: 7, 1: 7}
        assert await broker.mend(order) == []
        assert await broker._published(order) == {0: 7}

    asyncio.run(asks())


def test_look_that_fails_is_made_again(tmp_path):
    experts = fill(str(tmp_path), 1)
    text = (tmp_path / experts.key / "set.json").read_text()

    async def asks() -> None:
        known = Looks(str(tmp_path))
        (tmp_path / experts.key / "set.json").write_text("{")
        for _ in range(2):
            with pytest.raises(DamagedError):
                await known.epochs(IDENTITY, 1, EPOCHS)
        (tmp_path / experts.key / "set.json").write_text(text)
        assert await known.epochs(IDENTITY, 1, EPOCHS) == {0: 7}

    asyncio.run(asks())


# --- writes ---------------------------------------------------------------------------------


def test_small_file_is_one_request_and_a_large_one_is_put_in_parts(s3):
    write = partial(write_bytes, "s3://buffers/files/one")
    assert counted(s3, lambda: write(b"x" * SMALL)) == {"PUT": 1}
    assert counted(s3, lambda: write(b"x" * 25_000_000)) == {"POST": 2, "PUT": 3}


def test_part_of_an_expert_takes_five_requests_however_many_are_there(s3):
    experts = fill("s3://buffers/parts", 1, 5)
    every = [Snapshot(e, torch.full((3,), float(e)), None, 0.0, 0.0) for e in range(51)]
    asked = [
        counted(s3, lambda first=first: experts.append(0, every[first : first + 5]))
        for first in range(6, 50, 5)
    ]
    # a listing of its folder, the part, and for the manifest a look whether it is there
    assert asked == [{"GET": 2, "HEAD": 1, "PUT": 2}] * 9


def test_checkpoint_of_a_trial_that_is_over_takes_three_requests_and_leaves_no_file(s3):
    folder = "s3://buffers/trials/0001"
    write_bytes(join(folder, "checkpoint", "state.npz"), b"x")
    write_bytes(join(folder, "synthetic.npz"), b"x")
    assert counted(s3, lambda: forget_checkpoint(folder)) == {"HEAD": 1, "DELETE": 1, "PUT": 1}
    assert files_below(folder) == ["synthetic.npz"]
    assert counted(s3, lambda: forget_checkpoint(folder)) == {"HEAD": 1}


# --- clients --------------------------------------------------------------------------------


def test_process_keeps_one_client_of_a_bucket_for_all_its_threads(s3, monkeypatch):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_bytes(f"s3://buffers/many/{i}", b"x"), range(40)))
    place = "s3://buffers/somewhere/deep"
    one, path = open_uri(place)
    assert path == "buffers/somewhere/deep"
    assert open_uri(join(place, "x"))[0] is one
    hasty, _ = open_uri(place, patient=False)
    assert hasty is not one and open_uri(place, patient=False)[0] is hasty
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    assert open_uri(place)[0] is not one


def test_client_is_not_taken_over_a_fork(s3):
    here, _ = open_uri("s3://buffers/x")
    ours, theirs = multiprocessing.Pipe()

    def look() -> None:
        theirs.send(open_uri("s3://buffers/x")[0] is here)

    child = multiprocessing.get_context("fork").Process(target=look)
    child.start()
    child.join(60)
    assert ours.poll(10) and ours.recv() is False
