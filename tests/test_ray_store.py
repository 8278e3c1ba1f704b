"""The trajectory store and the study's journal on a folder and on S3 over HTTP."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ray_helpers import parse_tiny
from s3_helpers import S3Server, s3_environment

from ftd.data import describe
from ftd.errors import UserError
from ftd.expert import Snapshot
from ftd.trajectory import DamagedError
from ftd_ray.config import SearchConfig
from ftd_ray.journal import STUDY_FILE
from ftd_ray.search import SweepStudy
from ftd_ray.space import parse_dimension
from ftd_ray.storage import (
    is_local,
    join,
    open_uri,
    probe,
    read_bytes,
    remove_tree,
    write_bytes,
)
from ftd_ray.store import TrajectoryStore

BUCKET = "buffers"


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """A real S3 server on this machine, where the environment says it is."""
    with S3Server(BUCKET) as server, pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        for name, value in s3_environment(server.address).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(params=["path", "file", "s3"])
def place(request, tmp_path) -> str:
    """A fresh folder: a path, a file:// URI, or one on S3."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://{BUCKET}/{tmp_path.name}-{time.time_ns()}"
    return str(tmp_path) if request.param == "path" else f"file://{tmp_path}"


@pytest.fixture
def identity() -> dict:
    config = parse_tiny()
    return config.identity(config.experts, describe(config.dataset))


def snapshots(first: int, last: int, seed: int = 0) -> list[Snapshot]:
    gen = torch.Generator().manual_seed(seed)
    every = []
    for epoch in range(last + 1):
        params, momentum = (torch.randn(37, generator=gen) for _ in range(2))
        every.append(Snapshot(epoch, params, momentum, 1.0 / (epoch + 1), epoch / 9))
    return every[first:]


# --- files ----------------------------------------------------------------------------------


def test_what_is_written_is_read_back(place):
    write_bytes(join(place, "a", "b.bin"), b"\x00one")
    assert read_bytes(join(place, "a", "b.bin")) == b"\x00one"


def test_file_that_is_not_there_is_none(place):
    assert read_bytes(join(place, "nowhere", "b.bin")) is None


def test_file_is_replaced_whole(place):
    write_bytes(join(place, "b"), b"long content")
    write_bytes(join(place, "b"), b"short")
    assert read_bytes(join(place, "b")) == b"short"


def test_removed_folder_takes_its_files_and_no_others(place):
    write_bytes(join(place, "gone", "deep", "b"), b"1")
    write_bytes(join(place, "stays"), b"2")
    remove_tree(join(place, "gone"))
    remove_tree(join(place, "never"))
    assert read_bytes(join(place, "gone", "deep", "b")) is None
    assert read_bytes(join(place, "stays")) == b"2"


def test_probe_leaves_no_file(place):
    probe(place, "store.uri")
    filesystem, path = open_uri(place)
    from pyarrow.fs import FileSelector

    found = filesystem.get_file_info(FileSelector(path, allow_not_found=True, recursive=True))
    assert found == []


def test_probe_of_a_bucket_that_is_not_there_is_a_user_error(s3):
    with pytest.raises(UserError, match=r"store\.uri=s3://no-such-bucket/x cannot be written") as e:
        probe("s3://no-such-bucket/x", "store.uri")
    assert "\n" not in str(e.value)


def test_probe_of_a_server_that_does_not_answer_is_a_user_error(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"store\.uri=s3://b/x cannot be written"):
        probe("s3://b/x", "store.uri")


@pytest.mark.parametrize("uri", ["nfs://host/x", "s4://b/x"])
def test_unknown_kind_of_place_is_a_user_error(uri):
    with pytest.raises(UserError, match="is not a place"):
        open_uri(uri)


def test_local_places_are_paths_and_file_uris():
    assert is_local("./store") and is_local("/a/b") and is_local("file:///a")
    assert not is_local("s3://b/x") and not is_local("gs://b/x")


def test_path_with_spaces_and_odd_characters_is_taken(tmp_path):
    folder = tmp_path / "a folder, 100% odd #1?"
    write_bytes(join(str(folder), "b"), b"1")
    assert (folder / "b").read_bytes() == b"1"


def test_relative_path_is_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bytes("here/b", b"1")
    assert (tmp_path / "here" / "b").read_bytes() == b"1"


# --- expert sets ----------------------------------------------------------------------------


def test_expert_set_round_trips(place, identity):
    ours = snapshots(0, 4)
    writer = TrajectoryStore(place).expert_set(identity)
    writer.create()
    writer.append(3, ours)
    reader = TrajectoryStore(place).expert_set(identity)
    assert reader.complete(4) == [3]
    assert reader.complete(5) == []
    for s in ours:
        np.testing.assert_array_equal(reader.params(3, s.epoch), s.params_P.numpy())
    start, end = reader.segment(3, 1, 4)
    np.testing.assert_array_equal(start, ours[1].params_P.numpy())
    np.testing.assert_array_equal(end, ours[4].params_P.numpy())
    reader.verify(3)


def test_top_up_adds_a_part_and_overwrites_nothing(place, identity):
    store = TrajectoryStore(place)
    experts = store.expert_set(identity)
    experts.create()
    experts.append(0, snapshots(0, 2))
    before = every_file(place)
    store.expert_set(identity).append(0, snapshots(3, 5))
    after = every_file(place)
    assert {k: v for k, v in after.items() if k in before} == before
    reader = store.expert_set(identity)
    assert reader.complete(5) == [0]
    resume = reader.resume_point(0)
    assert resume is not None and resume.epoch == 5
    torch.testing.assert_close(resume.momentum_P, snapshots(0, 5)[5].momentum_P, rtol=0, atol=0)


def test_part_without_its_manifest_is_not_there(place, identity):
    experts = TrajectoryStore(place).expert_set(identity)
    experts.create()
    experts.append(0, snapshots(0, 2))
    for name in every_file(place):
        if "manifest" in name:
            filesystem, path = open_uri(place)
            filesystem.delete_file(f"{path}/{name}")
    reader = TrajectoryStore(place).expert_set(identity)
    assert reader.complete(0) == []
    assert reader.resume_point(0) is None


def test_first_published_wins(place, identity):
    store = TrajectoryStore(place)
    store.expert_set(identity).create()
    late = store.expert_set(identity)
    store.expert_set(identity).append(0, snapshots(0, 2))
    late.append(0, snapshots(0, 2, seed=1))
    np.testing.assert_array_equal(
        store.expert_set(identity).params(0, 2), snapshots(0, 2)[2].params_P.numpy()
    )


def test_damaged_part_is_named(place, identity):
    experts = TrajectoryStore(place).expert_set(identity)
    experts.create()
    experts.append(0, snapshots(0, 2))
    (part,) = (n for n in every_file(place) if n.endswith(".parquet"))
    data = bytearray(every_file(place)[part])
    data[len(data) // 2] ^= 1
    write_bytes(join(place, part), bytes(data))
    with pytest.raises(DamagedError, match=part.rpartition("/")[2]):
        TrajectoryStore(place).expert_set(identity).verify(0)


def test_sets_of_other_identities_lie_apart(place, identity):
    store = TrajectoryStore(place)
    other = identity | {"augment": "none"}
    a, b = store.expert_set(identity), store.expert_set(other)
    assert a.key != b.key
    a.create()
    a.append(0, snapshots(0, 1))
    assert store.expert_set(other).complete(0) == []
    assert store.location(a.key) == join(place, a.key)


def every_file(place: str) -> dict[str, bytes]:
    from pyarrow.fs import FileSelector

    filesystem, path = open_uri(place)
    found = filesystem.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
    out = {}
    for f in found:
        if f.is_file:
            with filesystem.open_input_stream(f.path) as stream:
                out[f.path.removeprefix(f"{path}/")] = stream.read()
    return out


# --- the study's journal --------------------------------------------------------------------


@pytest.fixture
def open_study(place) -> Callable[[], SweepStudy]:
    def open_() -> SweepStudy:
        return SweepStudy(
            place,
            name="study",
            space=[parse_dimension("experts.rho", {"choice": [0.0, 0.01]})],
            search=SearchConfig(trials=4, sampler="random", pruner="none"),
            seed=0,
            every=2,
            steps=4,
        )

    return open_


def test_study_is_found_again_in_its_place(open_study, place):
    study = open_study()
    a, b = study.next(), study.next()
    assert a is not None and b is not None
    study.report(a.number, 4, 0.5)
    study.complete(a.number)
    study.report(b.number, 2, 0.25)
    study.remember("mlflow_run", "abc")
    study.sync(force=True)
    assert read_bytes(join(place, STUDY_FILE))
    again = open_study()
    assert [e.number for e in again.ended()] == [0]
    assert again.recall("mlflow_run") == "abc"
    assert again.next() == b
    again.report(b.number, 4, 0.5)
    assert again.complete(b.number).reports == {2: 0.25, 4: 0.5}


def test_trial_that_was_told_is_never_lost_with_its_driver(open_study):
    study = open_study()
    for _ in range(3):
        suggestion = study.next()
        assert suggestion is not None
        study.report(suggestion.number, 4, 0.5)
        study.complete(suggestion.number)
    assert len(open_study().ended()) == 3  # without close()


def test_study_leaves_no_file_of_its_own_beside_the_journal(tmp_path):
    folder = Path(tmp_path)
    study = SweepStudy(
        str(folder),
        name="s",
        space=[],
        search=SearchConfig(trials=1, pruner="none"),
        seed=0,
        every=1,
        steps=1,
    )
    suggestion = study.next()
    assert suggestion is not None
    study.report(suggestion.number, 1, 0.5)
    study.complete(suggestion.number)
    study.close()
    assert {p.name for p in folder.iterdir()} == {STUDY_FILE}
