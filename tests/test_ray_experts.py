"""Expert sets are built once, whoever asks and whatever dies."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from fleet_helpers import (
    BOUND,
    ask,
    assert_all_there,
    build,
    expert_processes,
    files_of,
    order_for,
    request_for,
    running_epochs,
    set_of,
    status,
    watched_broker,
)
from ray_helpers import files_below, parse_tiny, wait_until

from ftd.data import Dataset, load
from ftd.errors import Diverged, UserError
from ftd.expert import train_expert
from ftd.trajectory import PART_EPOCHS
from ftd_ray.experts.broker import broker
from ftd_ray.experts.build import build_expert
from ftd_ray.experts.fleet import LOSSES
from ftd_ray.experts.orders import ExpertDiverged

# --- without Ray ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load(parse_tiny().dataset)


def test_built_expert_is_the_trajectory_that_training_gives(tmp_path, data):
    request = request_for(tmp_path)
    assert build(request, 1) == [0, 1, 2, 3]
    experts = set_of(request, tmp_path)
    backend = request.numerics.backend
    for snapshot in train_expert(request.experts, data, 1, epochs=3, backend=backend):
        np.testing.assert_array_equal(experts.params(1, snapshot.epoch), snapshot.params_P.numpy())


def test_expert_that_died_goes_on_from_its_last_part_to_the_same_files(tmp_path):
    epochs = PART_EPOCHS + 4
    for momentum in (0.0, 0.9):
        request = request_for(tmp_path / "a", epochs=epochs, momentum=momentum)
        build(request, 0)
        request = request_for(tmp_path / "b", epochs=epochs, momentum=momentum)
        build(request, 0, stop_after=PART_EPOCHS + 2)
        assert build(request, 0) == list(range(PART_EPOCHS + 1, epochs + 1))
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


def test_expert_that_died_before_its_first_part_starts_again(tmp_path):
    request = request_for(tmp_path, epochs=PART_EPOCHS)
    build(request, 0, stop_after=2)
    assert set_of(request, tmp_path).complete(0) == []
    assert build(request, 0)[0] == 0


def test_topped_up_expert_has_the_bits_of_one_built_at_once(tmp_path):
    short = request_for(tmp_path / "a", epochs=3)
    build(short, 0)
    longer = request_for(tmp_path / "a", epochs=7)
    assert longer.identity == short.identity
    assert build(longer, 0) == [4, 5, 6, 7]
    whole = request_for(tmp_path / "b", epochs=7)
    build(whole, 0)
    a, b = set_of(longer, tmp_path / "a"), set_of(whole, tmp_path / "b")
    for epoch in range(8):
        np.testing.assert_array_equal(a.params(0, epoch), b.params(0, epoch))


def test_expert_that_is_there_is_not_built_again(tmp_path):
    request = request_for(tmp_path)
    build(request, 0)
    before = files_below(tmp_path)
    assert build(request, 0) == []
    assert files_below(tmp_path) == before


def test_experts_of_other_radii_start_from_the_same_weights(tmp_path):
    flat, plain = request_for(tmp_path, rho=0.05), request_for(tmp_path, rho=0.0)
    build(flat, 0)
    build(plain, 0)
    a, b = set_of(flat, tmp_path), set_of(plain, tmp_path)
    np.testing.assert_array_equal(a.params(0, 0), b.params(0, 0))
    assert not np.array_equal(a.params(0, 3), b.params(0, 3))


def test_expert_that_diverges_publishes_no_epoch_of_it(tmp_path):
    request = request_for(tmp_path, lr=1e30)
    with pytest.raises(Diverged, match="expert 0 diverged"):
        build_expert(request, 0, lambda snapshot: None)
    assert set_of(request, tmp_path).complete(1) == []


# --- with Ray -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture
def broker_for(cluster) -> Iterator[Callable[[Path], Any]]:
    """A broker to look into, which goes when the test is over."""
    started = []

    def start(store: Path) -> Any:
        started.append(watched_broker(store))
        return started[-1]

    yield start
    for handle in started:
        ray.kill(handle)


def trained_epochs(handle: Any, count: int) -> None:
    """Waits for word of so many epochs that expert actors trained; there must be no more."""
    wait_until("word of every epoch", lambda: len(ask(handle.trained.remote())) >= count)
    assert len(ask(handle.trained.remote())) == count


def test_many_askers_of_one_expert_set_cause_one_build(broker_for, tmp_path):
    order = order_for(tmp_path)
    handle = broker_for(tmp_path)
    answers = ray.get([handle.ensure.remote(order) for _ in range(20)], timeout=BOUND)
    assert answers == [[0, 1]] * 20
    known = status(handle, order)
    assert (known.present, set(known.built), known.running) == ({0, 1}, {0, 1}, {})
    trained_epochs(handle, 6)
    assert set_of(order, tmp_path).complete(3) == [0, 1]


def test_brokers_of_one_store_are_one(cluster, tmp_path):
    handles = [broker(str(tmp_path / name)) for name in ("one", "one", "other")]
    try:
        assert handles[0]._actor_id == handles[1]._actor_id != handles[2]._actor_id
    finally:
        for handle in handles[1:]:
            ray.kill(handle)


def test_set_that_is_in_the_store_starts_no_actor(broker_for, tmp_path):
    for i in range(2):
        build(request_for(tmp_path), i)
    before = files_below(tmp_path)
    order, handle = order_for(tmp_path), broker_for(tmp_path)
    assert ray.get(handle.ensure.remote(order), timeout=BOUND) == [0, 1]
    known = status(handle, order)
    assert (known.built, known.present, known.epochs_left) == ({}, {0, 1}, 0)
    assert files_below(tmp_path) == before


def test_asking_for_more_builds_only_what_is_missing(broker_for, tmp_path):
    handle = broker_for(tmp_path)
    few, more = order_for(tmp_path), order_for(tmp_path, count=3, epochs=5)
    assert few.key == more.key
    ray.get(handle.ensure.remote(few), timeout=BOUND)
    assert ray.get(handle.ensure.remote(more), timeout=BOUND) == [0, 1, 2]
    # 3 epochs of two experts, 2 more of each, and 5 of the third
    trained_epochs(handle, 15)
    for i in range(3):
        build(request_for(tmp_path / "alone", epochs=5), i)
    ours, alone = set_of(more, tmp_path), set_of(more, tmp_path / "alone")
    for i in range(3):
        for epoch in range(6):
            np.testing.assert_array_equal(ours.params(i, epoch), alone.params(i, epoch))


def test_askers_of_short_and_long_trajectories_at_once_train_no_epoch_twice(broker_for, tmp_path):
    handle = broker_for(tmp_path)
    orders = [order_for(tmp_path, epochs=e) for e in (2, 6, 4, 6)]
    ray.get([handle.ensure.remote(o) for o in orders], timeout=BOUND)
    trained_epochs(handle, 12)
    assert set_of(orders[0], tmp_path).complete(6) == [0, 1]


def test_killed_expert_actor_is_replaced_and_the_bits_are_those_of_an_undisturbed_build(
    broker_for, tmp_path
):
    long = {"epochs": 16, "batch_size": 8}
    order, handle = order_for(tmp_path / "killed", **long), broker_for(tmp_path / "killed")
    answer = handle.ensure.remote(order)

    def in_the_middle() -> bool:
        return any(e > PART_EPOCHS for e in running_epochs(handle, order))

    wait_until("an expert beyond its first part", in_the_middle, seconds=BOUND)
    victims = expert_processes()
    assert victims
    victims[0].send_signal(signal.SIGKILL)
    assert ray.get(answer, timeout=BOUND) == [0, 1]
    assert_all_there(handle, order)
    for i in range(2):
        build(request_for(tmp_path / "undisturbed", **long), i)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "undisturbed")


def test_expert_that_diverges_is_an_error_for_every_asker_and_others_go_on(broker_for, tmp_path):
    handle = broker_for(tmp_path)
    wild, tame = order_for(tmp_path, lr=1e30), order_for(tmp_path, count=1)
    asked = [handle.ensure.remote(wild) for _ in range(2)]
    for answer in asked:
        with pytest.raises(ExpertDiverged, match="diverged"):
            ray.get(answer, timeout=BOUND)
    assert ray.get(handle.ensure.remote(tame), timeout=BOUND) == [0]


def test_broker_that_dies_comes_back_and_its_askers_are_answered(broker_for, tmp_path):
    order = order_for(tmp_path, epochs=9, batch_size=32)
    handle = broker_for(tmp_path)
    answer = handle.ensure.remote(order)
    wait_until("a build", lambda: any(running_epochs(handle, order)), seconds=BOUND)
    ray.kill(handle, no_restart=False)
    assert ray.get(answer, timeout=BOUND) == [0, 1]
    assert set_of(order, tmp_path).complete(9) == [0, 1]


def test_expert_actors_leave_when_nothing_is_left_to_build(broker_for, tmp_path):
    handle = broker_for(tmp_path)
    ray.get(handle.ensure.remote(order_for(tmp_path)), timeout=BOUND)
    wait_until(
        "the CPUs of the expert actors",
        lambda: ray.available_resources().get("CPU") == 2,
        seconds=60,
        every=0.2,
    )


def test_expert_that_is_killed_again_and_again_is_given_up_with_a_reason(broker_for, tmp_path):
    order = order_for(tmp_path, count=1, epochs=100_000, batch_size=16, network="ConvNetD2W64")
    handle = broker_for(tmp_path)
    answer = handle.ensure.remote(order)
    killed: set[int] = set()

    def over() -> bool:
        for process in expert_processes():
            if process.pid not in killed:
                killed.add(process.pid)
                process.send_signal(signal.SIGKILL)
        return bool(ray.wait([answer], timeout=0)[0])

    wait_until("an end of the build", over, seconds=BOUND, every=0.2)
    with pytest.raises(UserError, match=f"was lost {LOSSES} times"):
        ray.get(answer)
    assert len(killed) == LOSSES
