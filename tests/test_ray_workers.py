"""The pool of trial workers: who gets which, and when a CPU is free again."""

import os
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray_helpers import wait_until

from ftd.errors import UserError
from ftd.expert import Numerics
from ftd.memory import OVERHEAD
from ftd_ray.node_faults import assigned
from ftd_ray.storage import PlaceError
from ftd_ray.workers import IDLE_SECONDS, WORKER_ATTEMPTS, OnNode, run_calls, start_pool

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests


class Worker(OnNode):
    """Says which process it is."""

    def pid(self) -> int:
        return os.getpid()

    def call(self, function: Any, spec: Any) -> tuple[Any, float]:
        return function(spec), 0.0


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def pool() -> Iterator[Any]:
    pool = start_pool(1, 0, worker=Worker)
    yield pool
    ray.kill(pool)
    wait_until("two free CPUs", lambda: free() == 2)


def free() -> float:
    return ray.available_resources().get("CPU", 0)


def taken(pool: Any, number: int) -> Any:
    return ray.get(pool.take.remote(number))


def pid(worker: Any) -> int:
    return ray.get(worker.pid.remote(), timeout=60)


def test_next_trial_takes_over_the_process_of_the_one_before(pool):
    first = pid(taken(pool, 0))
    pool.give_back.remote(0, clean=True)
    assert pid(taken(pool, 1)) == first


def test_worker_that_is_given_back_again_is_waited_for_anew(pool):
    first = pid(taken(pool, 0))
    ray.get(pool.give_back.remote(0, clean=True))
    assert pid(taken(pool, 1)) == first
    time.sleep(IDLE_SECONDS / 2)
    ray.get(pool.give_back.remote(1, clean=True))
    time.sleep(IDLE_SECONDS * 2 / 3)
    assert pid(taken(pool, 2)) == first


def test_trials_at_the_same_time_have_workers_of_their_own(pool):
    assert pid(taken(pool, 0)) != pid(taken(pool, 1))


def test_trial_that_asks_again_gets_its_own_worker(pool):
    assert pid(taken(pool, 0)) == pid(taken(pool, 0))


def test_cpu_of_a_trial_that_nobody_follows_is_free_within_seconds(pool):
    pid(taken(pool, 0))
    wait_until("a CPU in use", lambda: free() == 1)
    pool.give_back.remote(0, clean=True)
    wait_until("two free CPUs", lambda: free() == 2, seconds=20)


def test_worker_of_a_failed_trial_is_not_handed_on(pool):
    first = pid(taken(pool, 0))
    ray.get(pool.give_back.remote(0, clean=False))
    assert pid(taken(pool, 1)) != first


def test_worker_that_was_given_back_twice_is_there_once(pool):
    pid(taken(pool, 0))
    pool.give_back.remote(0, clean=True)
    pool.give_back.remote(0, clean=True)
    assert pid(taken(pool, 1)) != pid(taken(pool, 2))


def test_closed_pool_frees_everything_and_gives_no_more(pool):
    for number in (0, 1):
        pid(taken(pool, number))
    ray.get(pool.close.remote())
    wait_until("two free CPUs", lambda: free() == 2, seconds=20)
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        taken(pool, 2)
    assert isinstance(caught.value.cause, UserError)


def test_worker_books_the_memory_that_it_is_said_to_take():
    def free_memory() -> float:
        return ray.available_resources()["memory"]

    before = free_memory()
    pool = start_pool(1, 0, 10**9, worker=Worker)
    pid(taken(pool, 0))
    wait_until("a booking", lambda: free_memory() == before - 10**9, seconds=20)
    ray.kill(pool)
    wait_until("its end", lambda: free_memory() == before, seconds=20)


def room(spec: Any) -> int | None:
    from ftd import memory

    return memory._room(0)


def test_worker_keeps_its_batches_to_the_memory_that_is_booked_for_it():
    for booked, expected in ((0, None), (2 * 10**9, (2 * 10**9 - OVERHEAD["cpu"]) // 2)):
        pool = start_pool(1, 0, booked)
        spec = SimpleNamespace(numerics=Numerics())
        found, _ = ray.get(taken(pool, 0).call.remote(room, spec), timeout=120)
        ray.kill(pool)
        assert found == expected


def given(spec: Any) -> tuple[float, float]:
    return assigned("GPU"), assigned("memory")


def test_worker_knows_its_share_of_a_gpu_and_the_memory_that_is_booked_for_it():
    for gpus, booked in ((0.25, 10**9), (1 / 3, 0)):
        pool = start_pool(1, gpus, booked)
        spec = SimpleNamespace(numerics=Numerics())
        found, _ = ray.get(taken(pool, 0).call.remote(given, spec), timeout=120)
        ray.kill(pool)
        assert found == (pytest.approx(gpus, abs=1e-4), booked)
    assert given(None) == (0, 0)  # here is no worker


# --- calls ----------------------------------------------------------------------------------


def twice(x: int) -> int:
    return 2 * x


def die_once(marker: str) -> str:
    if not os.path.exists(marker):
        open(marker, "w").close()
        os._exit(1)
    return marker


def die(marker: str) -> None:
    with open(marker, "a") as f:
        f.write("x")
    os._exit(1)


def test_calls_have_their_results_in_order_whoever_works(pool):
    ticks: list[float] = []
    results = run_calls(
        pool,
        [(twice, i) for i in range(7)],
        at_once=2,
        tick=lambda: ticks.append(time.monotonic()),
    )
    assert [value for value, _ in results] == [2 * i for i in range(7)]
    assert ticks


def test_more_workers_than_there_is_room_for_take_turns(pool):
    calls = [(twice, i) for i in range(9)]
    results = run_calls(pool, calls, at_once=5, tick=lambda: None)
    assert [value for value, _ in results] == [2 * i for i in range(9)]
    wait_until("two free CPUs", lambda: free() == 2, seconds=20)


def test_call_whose_worker_died_is_made_again(pool, tmp_path):
    marker = str(tmp_path / "died")
    calls = [(die_once, marker), (twice, 3)]
    results = run_calls(pool, calls, at_once=1, tick=lambda: None)
    assert [value for value, _ in results] == [marker, 6]


def test_call_that_kills_its_worker_every_time_is_given_up(pool, tmp_path):
    marker = tmp_path / "deaths"
    with pytest.raises(PlaceError, match=r"resources\.memory_per_trial"):
        run_calls(pool, [(die, str(marker))], at_once=1, tick=lambda: None)
    assert len(marker.read_text()) == WORKER_ATTEMPTS
