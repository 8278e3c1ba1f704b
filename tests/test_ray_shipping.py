"""A node that has not got the data set gets it from the one that has, once, and bit for bit."""

import contextlib
import hashlib
import os
import pickle
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import ray
import torch
from PIL import Image
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_helpers import (
    SWEEP_TIMEOUT,
    environment,
    finished,
    running_sweep,
    summary_of,
    tiny,
    wait_until,
    write_sweep,
)

from ftd.data import DatasetConfig, describe, load
from ftd.errors import UserError
from ftd_ray import shipping
from ftd_ray.shipping import Shipment, ship

BOUND = 120
"""Seconds after which an answer of Ray is taken for lost."""
MB = 2**20
FAR_OBJECT_STORE = 80 * MB
WORKERS = 2
LOADS_AT_ONCE = 5
"""Of each worker."""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What FTD_CACHE is on either node."""
    folder = tmp_path_factory.mktemp("caches")
    return {"here": folder / "here", "far": folder / "far"}


@pytest.fixture(scope="module")
def cluster(caches) -> Iterator[Any]:
    """This process is on a head without CPUs; the other node has a cache of its own."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("FTD_CACHE", str(caches["here"]))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        try:
            cluster.add_node(
                num_cpus=2,
                object_store_memory=FAR_OBJECT_STORE,
                env_vars={"FTD_CACHE": str(caches["far"])},
            )
            cluster.wait_for_nodes()
            ray.init(cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@ray.remote(num_cpus=0, max_concurrency=LOADS_AT_ONCE)
class Far:
    """A worker on the other node."""

    def digest(self, config: DatasetConfig, sender: Shipment | None) -> str:
        return digest(config, sender)

    def cache(self) -> str:
        return os.environ["FTD_CACHE"]


@pytest.fixture(scope="module")
def far(cluster, caches) -> list[Any]:
    (node,) = cluster.worker_nodes
    workers = [on(node.node_id, Far).remote() for _ in range(WORKERS)]
    assert ray.get(workers[0].cache.remote(), timeout=BOUND) == str(caches["far"])
    return workers


@pytest.fixture(autouse=True)
def _servers_end(cluster) -> Iterator[None]:
    yield
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith("ftd-data-"):
            ray.kill(ray.get_actor(**actor))


def on(node: str, actor: Any) -> Any:
    return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def digest(config: DatasetConfig, sender: Shipment | None = None) -> str:
    """Of all tensors of a data set, and of what it says of itself."""
    torch.set_num_threads(1)
    data = load(config, "cpu", sender)
    h = hashlib.sha256(repr(data.description).encode())
    for split in (data.train, data.val, data.test):
        for images in (split.pixels, split.batch):
            h.update(images(torch.arange(len(split))).numpy().tobytes())
        h.update(split.labels.numpy().tobytes())
    return h.hexdigest()


def make_images(root: Path, per_class: int = 20, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (9, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{seed}-{i:03d}.png")


@pytest.fixture
def images(tmp_path, request) -> DatasetConfig:
    """Some images of this test's own."""
    seed = int(hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:8], 16)
    make_images(tmp_path / "images", seed=seed)
    return DatasetConfig(name="imagefolder", root=str(tmp_path / "images"), resolution=8)


def gone(config: DatasetConfig) -> None:
    assert config.root is not None
    shutil.rmtree(config.root)


@dataclass(frozen=True)
class Counted(Shipment):
    """Notes every array that is sent for, and the bytes of its largest chunk."""

    log: str = ""

    @classmethod
    def of(cls, shipment: Shipment, log: Path) -> "Counted":
        return cls(**vars(shipment), log=str(log))

    def fill(self, what: str, out: np.ndarray) -> None:
        sizes, real = [0], shipping._ahead

        def ahead(*args: Any) -> Any:
            for start, chunk in real(*args):
                sizes.append(chunk.nbytes)
                yield start, chunk

        with mock.patch.object(shipping, "_ahead", ahead):
            super().fill(what, out)
        with open(self.log, "a") as f:
            f.write(f"{what} {max(sizes)}\n")


def sent(log: Path) -> list[str]:
    return sorted(line.split()[0] for line in log.read_text().splitlines())


@pytest.mark.parametrize("zca", [False, True], ids=["standard", "zca"])
def test_node_without_the_files_gets_equal_tensors(far, images, zca):
    config = DatasetConfig(**{**vars(images), "zca": zca})
    expected, shipment = digest(config), ship(config)
    gone(config)
    answers = [w.digest.remote(config, shipment) for w in far]
    assert ray.get(answers, timeout=BOUND) == [expected] * WORKERS
    with pytest.raises(UserError, match=r"dataset\.root"):
        ray.get(far[0].digest.remote(config, None), timeout=BOUND)


def test_many_workers_that_start_at_once_cause_one_transfer(far, images, tmp_path):
    config = DatasetConfig(**{**vars(images), "zca": True})
    shipment = Counted.of(ship(config), tmp_path / "log")
    gone(config)
    asked = [w.digest.remote(config, shipment) for _ in range(LOADS_AT_ONCE) for w in far]
    assert len(set(ray.get(asked, timeout=BOUND))) == 1
    assert sent(tmp_path / "log") == ["pixels", "zca"]
    ray.get(far[0].digest.remote(config, shipment), timeout=BOUND)  # it is there now
    assert sent(tmp_path / "log") == ["pixels", "zca"]


@pytest.mark.heavy
def test_array_larger_than_the_object_store_arrives_in_chunks(cluster, tmp_path, caches):
    make_images(tmp_path / "large", per_class=100, seed=4)
    config = DatasetConfig(name="imagefolder", root=str(tmp_path / "large"), resolution=512)
    shipment = Counted.of(ship(config), tmp_path / "log")
    gone(config)
    (node,) = cluster.worker_nodes
    load_there = on(node.node_id, ray.remote(num_cpus=0)(own_memory_of_loading))
    assert ray.get(load_there.remote(config, shipment), timeout=BOUND) < FAR_OBJECT_STORE / 2
    found = {d: large_arrays(caches[d]) for d in caches}
    assert found["far"] == found["here"] and len(found["far"]) == 1
    assert next(iter(found["far"].values())) > 1.8 * FAR_OBJECT_STORE
    ((_, largest),) = (line.split() for line in (tmp_path / "log").read_text().splitlines())
    assert int(largest) <= 16 * MB


def own_memory_of_loading(config: DatasetConfig, shipment: Shipment) -> int:
    """Bytes, mapped files and the object store apart, that this process grew by."""

    def own() -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    before = own()
    load(config, "cpu", shipment)
    return own() - before


def large_arrays(cache: Path) -> dict[str, int]:
    """Digest -> size, of arrays above 100 MB."""
    files = [p for p in cache.rglob("*.npy") if p.stat().st_size > 100 * MB]
    return {hashlib.sha256(p.read_bytes()).hexdigest(): p.stat().st_size for p in files}


# --- what is wrong with the data ------------------------------------------------------------


def test_data_that_are_missing_are_the_users_matter_before_anything_is_sent(cluster, images):
    gone(images)
    with pytest.raises(UserError, match=r"dataset\.root"):
        ship(images)


@pytest.mark.heavy
def test_what_was_put_right_is_sent_by_the_same_cluster(far, images, caches):
    broken = sorted(Path(images.root or "").glob("cat/*.png"))[0]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    with pytest.raises(UserError, match=broken.name):
        ship(images)
    broken.write_bytes(whole)
    pixels = caches["here"] / "pixels"
    aside = pixels.rename(pixels.with_name("aside")) if pixels.exists() else None
    pixels.write_text("a file where a folder should be")
    try:
        with pytest.raises(UserError, match="Set FTD_CACHE"):
            ship(images)
    finally:
        pixels.unlink()
        if aside is not None:
            aside.rename(pixels)
    shipment = ship(images)
    assert ray.get(far[0].digest.remote(images, shipment), timeout=BOUND) == digest(images)


@pytest.mark.heavy
def test_data_that_changed_are_sent_as_they_are_now(far, images):
    first = ship(images)
    assert ray.get(far[0].digest.remote(images, first), timeout=BOUND) == digest(images)
    make_images(Path(images.root or ""), per_class=3, seed=77)
    second = ship(images)
    assert second.fingerprint == describe(images).fingerprint != first.fingerprint
    assert ray.get(far[0].digest.remote(images, second), timeout=BOUND) == digest(images)


@pytest.mark.heavy
def test_data_that_changed_in_between_are_not_sent_for_those_that_were_shipped(far, images):
    shipment = ship(images)
    ray.kill(shipment.server())
    make_images(Path(images.root or ""), per_class=3, seed=78)
    shipment.keep()
    with pytest.raises(UserError, match="changed while they were in use"):
        ray.get(far[0].digest.remote(images, shipment), timeout=BOUND)


def test_shipment_does_not_grow_with_the_data_set_and_each_process_asks_for_labels_once(
    far, images, tmp_path
):
    few = ship(images)
    make_images(Path(images.root or ""), per_class=60, seed=79)
    many = ship(images)
    assert len(pickle.dumps(many)) == len(pickle.dumps(few)) < 2000
    assert len(many.facts["labels"]) > len(few.facts["labels"])
    ray.get(far[0].digest.remote(images, many), timeout=BOUND)
    ray.kill(many.server())
    assert many.facts is many.facts
    assert ray.get(far[0].digest.remote(images, many), timeout=BOUND) == digest(images)


# --- who dies -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dying(Shipment):
    """Its server ends after a chunk."""

    def fill(self, what: str, out: np.ndarray) -> None:
        real = shipping._ahead

        def ahead(server: Any, *args: Any) -> Any:
            for chunk in real(server, *args):
                yield chunk
                ray.kill(server)

        with mock.patch.multiple(shipping, _ahead=ahead, CHUNK_BYTES=500):
            super().fill(what, out)


@pytest.mark.parametrize("when", ["before", "half way"])
def test_server_that_is_gone_is_said_and_leaves_nothing_half_written(far, images, caches, when):
    shipment = ship(images)
    gone(images)
    if when == "before":
        ray.kill(shipment.server())
    else:
        shipment = Dying(**vars(shipment))
    before = {p.name for p in (caches["far"] / "pixels").glob("*")}
    with pytest.raises(UserError, match="the data set did not arrive on this node") as caught:
        ray.get(far[0].digest.remote(images, shipment), timeout=BOUND)
    assert "\n" not in str(caught.value.cause)
    assert {p.name for p in (caches["far"] / "pixels").glob("*")} == before


@pytest.mark.heavy
def test_killed_server_opens_the_data_set_again(far, images):
    shipment = ship(images)
    (process,) = servers()
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    assert ray.get(far[0].digest.remote(images, shipment), timeout=BOUND) == digest(images)


def servers() -> list[psutil.Process]:
    """Data servers of this test's own Ray."""

    def serves(process: psutil.Process) -> bool:
        try:
            return "DataServer" in " ".join(process.cmdline())
        except psutil.Error:
            return False

    return [p for p in psutil.Process().children(recursive=True) if serves(p)]


@pytest.mark.heavy
def test_node_that_has_the_data_and_leaves_is_said(cluster, far, images, caches):
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    shipment = ray.get(on(node.node_id, ray.remote(ship)).remote(images), timeout=BOUND)
    (process,) = servers()
    cluster.remove_node(node, allow_graceful=False)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()  # it would see by itself that its node is gone, in a while
    process.wait(timeout=20)
    before = {p.name for p in (caches["far"] / "pixels").glob("*")}
    with pytest.raises(UserError, match="the data set did not arrive on this node"):
        ray.get(far[0].digest.remote(images, shipment), timeout=BOUND)
    assert {p.name for p in (caches["far"] / "pixels").glob("*")} == before


# --- a sweep --------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.timeout(3 * SWEEP_TIMEOUT)
def test_sweep_runs_on_a_node_without_the_data(cluster, caches, tmp_path):
    root, output = tmp_path / "only-here", tmp_path / "stdout.txt"
    make_images(root, per_class=30, seed=5)
    dataset = {"name": "imagefolder", "root": str(root), "resolution": 8, "zca": True}
    tree = tiny(dataset=dataset, experts__rho=0.01, distill__lr_lr=1e-9, search__trials=2)
    write_sweep(tmp_path, tree)
    config = DatasetConfig(**dataset)
    before = set(files(caches["far"]))
    env = environment(FTD_CACHE=str(caches["here"]))
    args = ("sweep.yaml", "--address", cluster.address)
    with running_sweep(tmp_path, *args, env=env) as process:

        def begun() -> bool:
            assert process.poll() is None, finished(tmp_path, 0)
            return "trial   0" in output.read_text()

        wait_until("the first trial", begun, seconds=120)
        gone(config)  # from now on nobody can open it
        code = process.wait(timeout=SWEEP_TIMEOUT)
    ran = finished(tmp_path, code)
    assert code == 0, ran.out + ran.err
    assert summary_of(tmp_path)["trials"] == {"complete": 2, "pruned": 0, "failed": 0}
    made = set(files(caches["far"])) - before
    # No index: it never saw the files.
    assert {p.parts[0] for p in made} == {"pixels", "locks", "native"}
    assert len([p for p in made if p.name == "images.npy"]) == 2  # pixels and ZCA


def files(folder: Path) -> list[Path]:
    return [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
