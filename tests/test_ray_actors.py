"""Shared actors are named after the code that they run."""

import shutil
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from fleet_helpers import build, files_of, request_for
from ray.cluster_utils import Cluster
from ray_helpers import (
    REPOSITORY,
    environment,
    finished,
    running_sweep,
    tiny,
    wait_until,
    write_sweep,
)

import ftd
import ftd_ray
from ftd_ray import actors
from ftd_ray.actors import CODE, NAMESPACE, actor_name, digest

LONG = {"epochs": 80, "batch_size": 8, "count": 2}
"""Experts that two brokers are at at the same time."""


@pytest.fixture
def code(tmp_path) -> Path:
    """The sources of this project, in another place."""
    for package in ("ftd", "ftd_ray"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / package, tmp_path / "code" / package, ignore=skipped)
    return tmp_path / "code"


def packages(code: Path) -> Iterator[types.ModuleType]:
    for name in ("ftd", "ftd_ray"):
        package = types.ModuleType(name)
        package.__file__ = str(code / name / "__init__.py")
        yield package


def test_code_is_the_same_wherever_it_is_installed(code):
    assert digest(*packages(code)) == digest(ftd, ftd_ray) == CODE


@pytest.mark.parametrize("change", ["a line", "a module", "a name", "a module less"])
def test_any_change_of_the_sources_is_other_code(code, change):
    known = digest(*packages(code))
    module = code / "ftd_ray" / "cache.py"
    if change == "a line":
        module.write_text(module.read_text() + "# another version\n")
    elif change == "a module":
        (code / "ftd" / "data" / "other.py").touch()
    elif change == "a name":
        module.rename(module.with_name("hoard.py"))
    else:
        module.unlink()
    assert digest(*packages(code)) != known


def test_what_is_no_source_is_no_matter(code):
    known = digest(*packages(code))
    (code / "ftd" / "__pycache__").mkdir()
    (code / "ftd" / "__pycache__" / "other.pyc").touch()
    assert digest(*packages(code)) == known


def test_name_of_a_shared_actor_is_that_of_its_code_and_arguments(monkeypatch):
    ours = actor_name("cache", "store", node="a")
    assert ours == actor_name("cache", "store", node="a") != actor_name("cache", "store", node="b")
    monkeypatch.setattr(actors, "CODE", "other")
    assert actor_name("cache", "store", node="a") != ours


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_code_that_changes_gets_a_broker_of_its_own_and_both_keep_the_store_right(
    code, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(code))  # of the cluster's nodes, and of the commands
    store, module = tmp_path / "store", code / "ftd_ray" / "experts" / "broker.py"
    long = {f"experts__{k}": v for k, v in LONG.items()}
    tree = tiny(experts__rho=0.01, store__uri=str(store), **long)
    folders = [tmp_path / "before", tmp_path / "after"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    try:
        for folder in folders:
            write_sweep(folder, tree)
        words = ("sweep.yaml", "--address", cluster.address)
        how = {"env": environment(), "module": "ftd_ray.experts"}
        with running_sweep(folders[0], *words, **how) as before:
            wait_until("a part of an expert", lambda: any(store.rglob("*.parquet")), seconds=200)
            module.write_text(module.read_text() + "\n# another version\n")
            with running_sweep(folders[1], *words, **how) as after:
                codes = [process.wait(timeout=300) for process in (before, after)]
        for folder, exit_code in zip(folders, codes, strict=True):
            ran = finished(folder, exit_code)
            assert ran.code == 0, ran.out + ran.err
        ray.init(cluster.address, log_to_driver=False, namespace=NAMESPACE)
        names = ray.util.list_named_actors()
        assert sum(name.startswith("ftd-broker-") for name in names) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()
    request = request_for(tmp_path / "undisturbed", **LONG)
    for index in range(LONG["count"]):
        build(request, index)
    assert files_of(store) == files_of(tmp_path / "undisturbed")
