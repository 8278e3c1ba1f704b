"""What a driver hears and writes again and again does not grow with what is done: in bytes."""

import asyncio
import json
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_helpers import (
    SWEEP_TIMEOUT,
    environment,
    parse_tiny,
    running_sweep,
    tiny,
    wait_until,
    write_sweep,
)
from s3_helpers import S3Server, s3_environment

from ftd.data import describe
from ftd.expert import Snapshot, network_for
from ftd_ray.account import ExpertAccount, SetAccount
from ftd_ray.config import load_config
from ftd_ray.experts.broker import Broker
from ftd_ray.experts.client import BrokerClient
from ftd_ray.experts.fleet import Build
from ftd_ray.experts.orders import ExpertOrder, FleetStatus, SetStatus
from ftd_ray.journal import STUDY_FILE
from ftd_ray.search import SweepStudy
from ftd_ray.sections import SearchConfig
from ftd_ray.store import TrajectoryStore
from ftd_ray.worked import Worked

EPOCHS = 3
ME = "me"


class AtOnce:
    """A fleet that builds what it is told to when it is told to."""

    size = (1.0, 0.5, 0)

    def __init__(self, broker: "HandFed") -> None:
        self.broker = broker
        self.waiting: dict[tuple[str, int], tuple[Build, asyncio.Future[float]]] = {}

    async def run(self, build: Build) -> float:
        done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.waiting[build.key, build.index] = build, done
        return await done

    def hasten(self, build: Build, rank: Any) -> None:
        build.rank = rank

    def drop(self, build: Build) -> None:
        self.waiting.pop((build.key, build.index))[1].cancel()

    async def finish(self, key: str, index: int, seconds: float = 2.0) -> None:
        for epoch in range(EPOCHS + 1):
            await self.broker.epoch_done(key, index, epoch, epoch / 10 + index / 1000)
        self.waiting.pop((key, index))[1].set_result(seconds)
        for _ in range(5):  # until the broker has heard of it
            await asyncio.sleep(0)


class HandFed(Broker):
    """A broker whose builds end when a test says so; the store stays empty."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), 1, "test")
        self.fleet = AtOnce(self)

    async def _fleet(self, order: ExpertOrder) -> Any:
        return self.fleet


def order_for(name: str, count: int, asker: str = ME) -> ExpertOrder:
    identity = {"name": name, "data": {}, "experts": {"network": "toy"}}
    return ExpertOrder(
        asker=asker,
        key=name,
        identity=identity,
        count=count,
        epochs=EPOCHS,
        work=b"",
        cpus=1,
        gpus=0.5,
    )


async def ordered(broker: HandFed, *orders: ExpertOrder) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(broker.ensure(order)) for order in orders]
    wanted = sum(order.count for order in orders)
    while len(broker.fleet.waiting) < wanted:
        await asyncio.sleep(0.01)
    return tasks


def client_of(broker: Broker) -> BrokerClient:
    config = parse_tiny()
    return BrokerClient(config, describe(config.dataset))


async def heard(client: BrokerClient, broker: Broker) -> FleetStatus:
    """One word of the broker to the client; what was sent."""
    sent = await broker.status(ME, client.status.mark)
    client._take(pickle.loads(pickle.dumps(sent)))
    return sent


# --- status ---------------------------------------------------------------------------------


def test_word_of_an_expert_does_not_grow_with_the_experts_that_are_done(tmp_path):
    async def sizes() -> list[int]:
        broker, count = HandFed(tmp_path), 60
        client = client_of(broker)
        (task,) = await ordered(broker, order_for("a", count))
        await heard(client, broker)
        sizes = []
        for index in range(count):
            await broker.fleet.finish("a", index)
            sizes.append(len(pickle.dumps(await heard(client, broker))))
        assert client.status.sets["a"].present == set(range(count))
        assert len(client.status.sets["a"].curves) == count
        assert await task == list(range(count))
        quiet = await heard(client, broker)
        assert quiet.sets == {} and len(pickle.dumps(quiet)) < 500
        return sizes

    found = asyncio.run(sizes())
    assert max(found[1:]) <= found[0]  # what is left to do shrinks
    assert found[-1] < 1000


def test_words_put_together_are_the_whole_also_where_some_are_lost_or_the_asker_starts_anew(
    tmp_path,
):
    async def talk(seed: int) -> None:
        rng = random.Random(seed)
        broker = HandFed(tmp_path / str(seed))
        client = client_of(broker)
        tasks = await ordered(broker, order_for("a", 8), order_for("b", 5))
        left = list(broker.fleet.waiting)
        rng.shuffle(left)
        for key, index in left:
            await broker.fleet.finish(key, index, seconds=1.0 + index)
            if rng.random() < 0.3:
                broker._note(order_for(key, 1), index, "a disk")  # found damaged
            what = rng.random()
            if what < 0.3:
                await broker.status(ME, client.status.mark)  # the answer is lost
            elif what < 0.4:
                client.status = FleetStatus()  # another process of this asker
            elif what < 0.9:
                await heard(client, broker)
        await heard(client, broker)
        whole = await broker.status(ME)
        assert whole.whole
        assert client.status.sets == whole.sets
        assert client.status.notes == whole.notes
        await asyncio.gather(*tasks)

    for seed in range(8):
        asyncio.run(talk(seed))


def test_broker_that_came_back_is_asked_for_everything(tmp_path):
    async def talk() -> None:
        first = HandFed(tmp_path)
        client = client_of(first)
        tasks = await ordered(first, order_for("a", 3))
        await first.fleet.finish("a", 0)
        assert (await heard(client, first)).whole
        assert not (await heard(client, first)).whole
        second = HandFed(tmp_path)
        tasks += await ordered(second, order_for("a", 2))
        assert (await heard(client, second)).whole
        await second.fleet.finish("a", 1)
        assert not (await heard(client, second)).whole
        assert client.status.sets["a"].built == {0: 2.0, 1: 2.0}
        for task in tasks:
            task.cancel()

    asyncio.run(talk())


def test_broker_forgets_builds_that_are_over(tmp_path):
    async def build() -> None:
        broker = HandFed(tmp_path)
        (task,) = await ordered(broker, order_for("a", 10))
        assert broker.busy()
        for index in range(10):
            await broker.fleet.finish("a", index)
        await task
        assert not broker._jobs and not broker.busy()

    asyncio.run(build())


# --- the account ----------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path) -> SweepStudy:
    return open_study(tmp_path)


def open_study(folder: Path) -> SweepStudy:
    return SweepStudy(
        str(folder),
        name="s",
        space=[],
        search=SearchConfig(trials=1, pruner="none"),
        seed=0,
        every=1,
        steps=1,
    )


def told(present: int, built: dict[int, float], gpus: float = 0.5) -> FleetStatus:
    """Word of a set of 100 whose first ``present`` experts are there."""
    status = SetStatus(
        needed=100,
        epochs=EPOCHS,
        present=frozenset(range(present)),
        built=built,
        running={},
        ours=frozenset(),
        epochs_left=0,
        curves={},
        broker="one",
        gpus=gpus,
    )
    return FleetStatus(sets={"key": status})


def test_account_of_an_expert_takes_as_many_bytes_however_many_there_were(study, tmp_path):
    account, journal, sizes = ExpertAccount(study, 0.0), tmp_path / STUDY_FILE, []
    for n in range(100):
        before = journal.stat().st_size
        spent = account.update(told(n + 1, dict.fromkeys(range(n + 1), 2.0)))
        assert spent == [2.0]
        sizes.append(journal.stat().st_size - before)
    assert max(sizes) <= sizes[0] + 5  # digits of its number
    again = ExpertAccount(open_study(tmp_path), 0.0)
    assert again.sets == account.sets
    assert (again.seconds, again.gpu_seconds) == (200.0, 100.0)
    assert again.built == [("key", i) for i in range(100)] and again.reused == 0


def test_word_that_says_nothing_new_is_not_written(study, tmp_path):
    account = ExpertAccount(study, 0.0)
    account.update(told(3, {0: 2.0}))
    before = (tmp_path / STUDY_FILE).stat().st_size
    for _ in range(3):
        assert account.update(told(3, {0: 2.0})) == []
    assert (tmp_path / STUDY_FILE).stat().st_size == before


def test_account_adds_up_over_sessions_and_what_is_built_is_not_reused(study, tmp_path):
    ExpertAccount(study, 0.0).update(told(4, {0: 2.0}))
    account = ExpertAccount(open_study(tmp_path), 0.0)
    assert account.update(told(4, {1: 3.0})) == [3.0]  # it was damaged, and built anew
    assert sorted(account.update(told(4, {1: 5.0, 0: 1.0}))) == [1.0, 2.0]
    found = ExpertAccount(open_study(tmp_path), 0.0).sets
    assert found == {"key": SetAccount({0, 1}, {2, 3}, 8.0, 4.0)}


def test_account_of_an_older_sweep_goes_on(study, tmp_path):
    old = {"built": [0, 1], "reused": [2], "seconds": 7.0, "gpu_seconds": 1.5}
    study.remember("experts:key", old)
    account = ExpertAccount(open_study(tmp_path), 0.0)
    assert account.sets == {"key": SetAccount({0, 1}, {2}, 7.0, 1.5)}
    account.update(told(4, {3: 2.0}))
    again = ExpertAccount(open_study(tmp_path), 0.0)
    assert again.sets == {"key": SetAccount({0, 1, 3}, {2}, 9.0, 2.5)}
    for line in (tmp_path / STUDY_FILE).read_text().splitlines():
        json.loads(line)


# --- intervals ------------------------------------------------------------------------------


def test_work_without_a_gap_is_one_interval():
    now = [0.0]
    worked = Worked(clock=lambda: now[0])
    for _ in range(1000):
        now[0] += 1.0
        worked.just_now(1.5)
    assert worked.covered() == 1000.5 and len(worked._spans) == 1
    now[0] += 10.0
    worked.just_now(2.0)
    assert worked.covered() == 1002.5 and len(worked._spans) == 2
    worked.just_now(5000.0)
    assert worked.covered() == 5000.0 and len(worked._spans) == 1


# --- a whole sweep --------------------------------------------------------------------------

STEPS, TRIALS = 4, 4


@pytest.mark.heavy
@pytest.mark.parametrize("experts", [2, 60])
def test_sweep_asks_s3_for_what_its_trials_read_and_not_by_the_number_of_experts(tmp_path, experts):
    tree = tiny(experts__count=experts, experts__rho=0.01, search__trials=TRIALS)
    tree |= {"store": {"uri": "s3://buffers/store"}, "output": {"dir": "s3://buffers/sweep"}}
    write_sweep(tmp_path, tree)
    with S3Server(log=str(tmp_path / "requests")) as server:
        variables = s3_environment(server.address)
        fill = "import sys; sys.path.insert(0, sys.argv[1]); import test_ray_growth as t; t.fill()"
        env = environment(**variables)
        subprocess.run([sys.executable, "-c", fill, HERE], cwd=tmp_path, env=env, check=True)
        before = (tmp_path / "requests").stat().st_size
        with running_sweep(tmp_path, "sweep.yaml", env=env):
            last = f"trials     {TRIALS}/{TRIALS}"
            told = tmp_path / "stdout.txt"
            wait_until("the last trial", lambda: last in told.read_text(), seconds=SWEEP_TIMEOUT)
            asked = (tmp_path / "requests").read_text()[before:]
    found = Counter(REQUEST.findall(asked))
    of_the_store, of_the_sweep = (
        {method: n for (method, place), n in found.items() if place == where}
        for where in ("store", "sweep")
    )
    assert found.total() == sum(of_the_store.values()) + sum(of_the_sweep.values()) > 0
    # a segment is that of an expert in 60: a look at its manifest and its part, and their bytes
    assert sum(of_the_store.values()) <= 4 * STEPS * TRIALS + 30
    assert sum(of_the_sweep.values()) <= 6 * TRIALS + 20


REQUEST = re.compile(r"([A-Z]+) /buffers(?:/|\?\S*prefix=)(store|sweep)\b")
HERE = str(Path(__file__).parent)


def fill() -> None:
    """All experts of the sweep in this folder, of snapshots about nothing."""
    config = load_config("sweep.yaml")
    data = describe(config.dataset)
    experts = TrajectoryStore(config.store.uri).expert_set(config.identity(config.experts, data))
    experts.create()
    parameters = network_for(config.experts.network, data).size
    for index in range(config.experts.count):
        params = 0.1 * torch.randn(parameters, generator=torch.manual_seed(index))
        every = [Snapshot(e, params, None, 0.0, 0.0) for e in range(config.experts.epochs + 1)]
        experts.append(index, every)
