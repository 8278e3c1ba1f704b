"""The trajectory store when S3 fails, the disk is full, or permissions are missing."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from disk_helpers import PAGE, fill
from pyarrow import fs as pafs
from ray_helpers import files_below, parse_tiny
from s3_helpers import FaultProxy, S3Server, s3_environment

from ftd.data import describe
from ftd.errors import UserError
from ftd.expert import Snapshot
from ftd.trajectory import ExpertSet, put
from ftd_ray import storage
from ftd_ray.storage import join, open_uri, place_error, probe, read_bytes, write_bytes
from ftd_ray.store import TrajectoryStore

SMALL = 37
"""Parameters of a snapshot that is written in one part of an upload."""

LARGE = 1_500_000
"""Parameters of a snapshot that, with its momentum, takes two: they have 10 MB."""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture
def proxy(server, monkeypatch) -> Iterator[FaultProxy]:
    """A way to the server that can fail; the environment names it as the endpoint."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    with FaultProxy(server.address) as proxy:
        for name, value in s3_environment(proxy.address).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def place(proxy) -> str:
    """A fresh folder on S3, by the way that can fail."""
    return f"s3://buffers/{time.time_ns()}"


@pytest.fixture
def sound_place(place, server) -> str:
    """The same folder, by a way that works."""
    return f"{place}?endpoint_override={server.address.removeprefix('http://')}&scheme=http"


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Few attempts, where a failure for ever would take a minute."""
    monkeypatch.setattr(storage, "S3_RETRIES", 3)
    monkeypatch.setattr(storage, "S3_SILENCE", 3.0)


@pytest.fixture
def identity() -> dict:
    config = parse_tiny()
    return config.identity(config.experts, describe(config.dataset))


def snapshots(first: int, last: int, parameters: int = SMALL) -> list[Snapshot]:
    gen = torch.Generator().manual_seed(0)
    every = []
    for epoch in range(last + 1):
        params, momentum = (torch.randn(parameters, generator=gen) for _ in range(2))
        every.append(Snapshot(epoch, params, momentum, 1.0 / (epoch + 1), epoch / 9))
    return every[first:]


def created(place: str, identity: dict) -> ExpertSet:
    experts = TrajectoryStore(place).expert_set(identity)
    experts.create()
    return experts


def assert_holds(place: str, identity: dict, ours: list[Snapshot]) -> None:
    """A new reader finds exactly these snapshots of expert 0, bit by bit, and no broken file."""
    reader = TrajectoryStore(place).expert_set(identity)
    manifest = reader.manifest(0)
    assert (-1 if manifest is None else manifest.epochs) == ours[-1].epoch
    reader.verify(0)
    for s in ours:
        np.testing.assert_array_equal(reader.params(0, s.epoch), s.params_P.numpy())
    for name, data in every_file(place).items():
        assert is_whole(name, data), f"{name} has {len(data)} bytes"


def is_whole(name: str, data: bytes) -> bool:
    """Whether a store's file is what its writer meant: names of parts carry their checksum."""
    if name.endswith(".json"):
        return isinstance(json.loads(data), dict)
    assert name.endswith(".parquet"), f"{name} is nothing that a store holds"
    return hashlib.sha256(data).hexdigest()[:12] in name


def every_file(place: str) -> dict[str, bytes]:
    filesystem, path = open_uri(place)
    found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    out = {}
    for f in found:
        if f.is_file:
            with filesystem.open_input_stream(f.path) as stream:
                out[f.path.removeprefix(f"{path}/")] = stream.read()
    return out


def assert_one_clear_line(error: Exception, place: str) -> None:
    line = str(place_error(place, "store.uri", error))
    assert line.startswith(f"store.uri={place} cannot be used (")
    assert "\n" not in line and len(line) < 400
    assert "AWS Error" not in line and "curlCode" not in line


# --- the proxy ------------------------------------------------------------------------------


def test_proxy_passes_everything_on_and_counts_it(proxy, place, sound_place):
    data = np.random.default_rng(0).bytes(25_000_000)
    write_bytes(join(place, "a"), data)
    assert proxy.requests["PUT"] == 3 and proxy.received["PUT"] >= len(data)
    assert read_bytes(join(sound_place, "a")) == data
    assert proxy.requests["GET"] == 0
    filesystem, path = open_uri(join(place, "a"))
    with filesystem.open_input_file(path) as file:
        assert file.read_at(1000, 12_345_678) == data[12_345_678:][:1000]
    assert (proxy.requests["GET"], proxy.sent["GET"]) == (1, 1000)


# --- S3 that fails for a while --------------------------------------------------------------

PASSING = {
    "503": {"kind": "answer", "status": 503},
    "500": {"kind": "answer", "status": 500},
    "cut request": {"kind": "cut_request", "after": 100},
    "lost answer": {"kind": "lose_answer"},
}


def fail_at_first(proxy: FaultProxy, fault: str, times: int = 3) -> list:
    """The first requests of each kind fail."""
    return [
        proxy.inject(**PASSING[fault], methods={method}, times=times)
        for method in ("HEAD", "GET", "PUT", "POST")
    ]


@pytest.mark.parametrize("fault", PASSING)
def test_small_experts_are_published_while_s3_fails_now_and_then(
    proxy, place, sound_place, identity, fault
):
    faults = fail_at_first(proxy, fault)
    experts = created(place, identity)
    experts.append(0, snapshots(0, 2))
    fail_at_first(proxy, fault)
    experts.append(0, snapshots(3, 5))
    assert all(f.hits == 3 for f in faults if "PUT" in f.methods or "GET" in f.methods)
    assert_holds(sound_place, identity, snapshots(0, 5))


@pytest.mark.parametrize("fault", PASSING)
def test_large_experts_are_published_while_s3_fails_now_and_then(
    proxy, place, sound_place, identity, fault
):
    ours = snapshots(0, 0, LARGE)
    experts = created(place, identity)
    second_part = proxy.inject(**PASSING[fault], path="partNumber=2", times=2)
    last_step = proxy.inject(**PASSING[fault], path="uploadId", methods={"POST"}, times=2)
    experts.append(0, ours)
    assert (second_part.hits, last_step.hits) == (2, 2)
    assert_holds(sound_place, identity, ours)


@pytest.mark.parametrize("fault", PASSING)
def test_reader_gets_the_right_bytes_while_s3_fails_now_and_then(
    proxy, place, sound_place, identity, fault
):
    created(sound_place, identity).append(0, snapshots(0, 5))
    fail_at_first(proxy, fault)
    assert_holds(place, identity, snapshots(0, 5))


@pytest.mark.parametrize("after", [0, 1, 1000])
def test_answer_cut_in_the_middle_is_read_again(proxy, place, sound_place, identity, after):
    ours = snapshots(0, 1, 5000)
    created(sound_place, identity).append(0, ours)
    cut = proxy.inject("cut_answer", after=after, methods={"GET"}, path=".parquet", times=3)
    assert_holds(place, identity, ours)
    assert cut.hits == 3


@pytest.mark.parametrize("after", [0, 1, 1000])
def test_answer_cut_for_ever_is_an_error_and_never_wrong_bytes(
    proxy, place, sound_place, identity, after, hasty
):
    created(sound_place, identity).append(0, snapshots(0, 1, 5000))
    reader = TrajectoryStore(place).expert_set(identity)
    proxy.inject("cut_answer", after=after, methods={"GET"}, path=".parquet")
    with pytest.raises(OSError, match="AWS Error"):
        reader.params(0, 1)
    with pytest.raises(OSError, match="AWS Error"):
        reader.verify(0)
    proxy.heal()
    np.testing.assert_array_equal(reader.params(0, 1), snapshots(0, 1, 5000)[1].params_P.numpy())


def test_request_that_is_never_answered_is_made_again(proxy, place, hasty):
    puts = proxy.inject("hang", methods={"PUT"}, times=1)
    gets = proxy.inject("hang", methods={"GET"}, times=1)
    write_bytes(join(place, "a"), b"1")
    assert read_bytes(join(place, "a")) == b"1"
    assert (puts.hits, gets.hits) == (1, 1)


@pytest.mark.heavy
def test_server_that_is_away_for_20_s_is_waited_for(proxy, place, sound_place, identity):
    experts = created(place, identity)
    proxy.go_away(seconds=20)
    begin = time.monotonic()
    experts.append(0, snapshots(0, 2))
    assert 20 < time.monotonic() - begin < 40
    proxy.go_away(seconds=20)
    assert_holds(place, identity, snapshots(0, 2))
    assert_holds(sound_place, identity, snapshots(0, 2))


@pytest.mark.heavy
def test_server_that_answers_503_for_40_s_is_waited_for(proxy, place, sound_place, identity):
    experts = created(place, identity)
    proxy.inject("answer", status=503, seconds=40)
    begin = time.monotonic()
    experts.append(0, snapshots(0, 2))
    assert 40 < time.monotonic() - begin < 80
    assert_holds(sound_place, identity, snapshots(0, 2))


# --- S3 that fails for good -----------------------------------------------------------------

FOR_GOOD = {
    "listing": {"kind": "answer", "methods": {"GET"}},
    "part refused": {"kind": "answer", "methods": {"PUT"}, "path": ".parquet"},
    "part cut": {"kind": "cut_request", "after": 1000, "methods": {"PUT"}, "path": ".parquet"},
    "part not begun": {"kind": "answer", "methods": {"POST"}, "path": ".parquet?uploads"},
    "part not completed": {"kind": "answer", "methods": {"POST"}, "path": ".parquet?uploadId"},
    "manifest refused": {"kind": "answer", "methods": {"PUT"}, "path": "manifest"},
    "manifest cut": {"kind": "cut_request", "after": 9, "methods": {"PUT"}, "path": "manifest"},
    "half of the part": {"kind": "answer", "methods": {"PUT"}, "path": "partNumber=2"},
}
OF_MANY = ("part not begun", "half of the part", "part not completed")
"""Faults in what a large file takes more than one request for."""


@pytest.mark.parametrize(
    ("fault", "parameters"),
    [
        *((fault, SMALL) for fault in FOR_GOOD if fault not in OF_MANY),
        *((fault, LARGE) for fault in OF_MANY),
    ],
)
def test_failure_for_good_is_one_error_and_leaves_what_was_published(
    proxy, place, sound_place, identity, hasty, fault, parameters
):
    before, after = snapshots(0, 0, parameters), snapshots(0, 1, parameters)
    experts = created(place, identity)
    experts.append(0, before)
    injected = proxy.inject(**FOR_GOOD[fault])
    begin = time.monotonic()
    with pytest.raises(OSError, match="AWS Error") as error:
        experts.append(0, after[1:])
    assert injected.hits > 1, "it tried again"
    assert time.monotonic() - begin < 60
    assert_one_clear_line(error.value, place)
    assert_holds(sound_place, identity, before)
    proxy.heal()
    assert_holds(sound_place, identity, before)
    experts.append(0, after[1:])
    assert_holds(sound_place, identity, after)


def test_answer_lost_for_good_publishes_all_or_nothing(proxy, place, sound_place, identity, hasty):
    before, after = snapshots(0, 2), snapshots(0, 5)
    experts = created(place, identity)
    experts.append(0, before)
    proxy.inject("lose_answer", methods={"PUT"}, path="manifest")
    with pytest.raises(OSError, match="AWS Error"):
        experts.append(0, after[3:])
    assert_holds(sound_place, identity, after)
    proxy.heal()
    experts.append(0, after[3:])
    assert_holds(sound_place, identity, after)


def test_file_that_cannot_be_replaced_stays_as_it_was(proxy, place, sound_place, hasty):
    write_bytes(join(place, "journal"), b"of before")
    for method, size in (("PUT", 1_000), ("PUT", 25_000_000), ("POST", 25_000_000)):
        proxy.inject("answer", status=500, methods={method})
        with pytest.raises(OSError, match="AWS Error"):
            write_bytes(join(place, "journal"), b"x" * size)
        proxy.heal()
        assert read_bytes(join(sound_place, "journal")) == b"of before"


@pytest.mark.heavy
def test_server_that_is_gone_is_reported_within_about_a_minute(proxy, place, identity):
    experts = created(place, identity)
    proxy.go_away()
    begin = time.monotonic()
    with pytest.raises(OSError, match="AWS Error") as error:
        experts.append(0, snapshots(0, 2))
    assert 40 < time.monotonic() - begin < 80
    assert "Could not connect" in str(place_error(place, "store.uri", error.value))


@pytest.mark.heavy
def test_server_that_never_answers_is_reported_within_about_three_minutes(proxy, place, identity):
    experts = created(place, identity)
    proxy.inject("hang")
    begin = time.monotonic()
    with pytest.raises(OSError, match="AWS Error") as error:
        experts.append(0, snapshots(0, 2))
    assert time.monotonic() - begin < 300
    assert "Timeout was reached" in str(place_error(place, "store.uri", error.value))


# --- the start of a command, and what it says -----------------------------------------------


def test_probe_of_a_server_that_is_gone_is_quick(proxy, place):
    proxy.go_away()
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"Could not connect to server.*address is right") as error:
        probe(place, "store.uri")
    assert time.monotonic() - begin < 5
    assert str(error.value).startswith(f"store.uri={place} cannot be written (")


@pytest.mark.parametrize(
    ("status", "words"),
    [(503, "Try again when the server is well"), (403, "See that the credentials")],
)
def test_probe_says_what_the_server_answered_and_what_to_do(proxy, place, status, words):
    proxy.inject("answer", status=status)
    with pytest.raises(UserError, match=words) as error:
        probe(place, "store.uri")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(28, "Cannot write '/s/a'. Detail: [errno 28] No space left on device"),
            "store.uri=/s cannot be used (No space left on device). Make room there, then try "
            "again.",
        ),
        (
            PermissionError(13, "[Errno 13] Failed to create '/s/a'"),
            "store.uri=/s cannot be used (Permission denied). Choose another place, or mend its "
            "permissions.",
        ),
        (
            OSError(
                "When completing multiple part upload for key 'a' in bucket 'b': AWS Error "
                "UNKNOWN (HTTP status 503) during CompleteMultipartUpload operation: No response "
                "body."
            ),
            "store.uri=/s cannot be used (HTTP status 503). Try again when the server is well.",
        ),
        (
            OSError(
                "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message "
                "of PerformWork() - CURL error [7]=Could not connect to server error_info={a=b})"
            ),
            "store.uri=/s cannot be used (CURL error [7]=Could not connect to server). See that "
            "the endpoint's address is right and that it is up, then try again.",
        ),
        (
            pa.ArrowInvalid("two\nlines"),
            "store.uri=/s cannot be used (two lines). Choose another place, or mend its "
            "permissions.",
        ),
    ],
)
def test_error_of_a_place_is_one_line_with_its_reason_and_a_remedy(error, line):
    assert str(place_error("/s", "store.uri", error)) == line


def test_error_of_a_place_keeps_its_secrets():
    error = place_error("s3://me:secret@b/x", "store.uri", OSError("s3://me:secret@b/x is odd"))
    assert "secret" not in str(error) and "s3://b/x" in str(error)


# --- addresses ------------------------------------------------------------------------------


def test_endpoint_of_s3_alone_goes_before_that_of_all_services(server, proxy, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.address)
    write_bytes("s3://buffers/addresses/a", b"1")
    assert proxy.requests["PUT"] == 1


def test_endpoint_and_region_of_the_uri_go_before_the_environment(server, proxy, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    host = proxy.address.removeprefix("http://")
    uri = f"s3://buffers/x?endpoint_override={host}&scheme=http&region=eu-west-3"
    write_bytes(join(uri, "a b%"), b"1")
    assert read_bytes(join(uri, "a b%")) == b"1"
    filesystem, path = open_uri(uri)
    assert (filesystem.region, path) == ("eu-west-3", "buffers/x")


def test_region_comes_from_the_environment(proxy, place, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert open_uri(place)[0].region == "eu-north-1"


def test_bucket_is_asked_for_its_region_where_nobody_names_one(proxy, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pafs, "resolve_s3_region", {"b": "ap-south-1"}.get)
    assert open_uri("s3://b/x")[0].region == "ap-south-1"
    assert open_uri("s3://b/x?region=eu-west-3")[0].region == "eu-west-3"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://b/x?regio=eu-west-1", "unknown option regio"),
        ("s3:///x", "it names no bucket"),
        ("gs://b/x?nope=1", "'nope'"),
    ],
)
def test_address_with_an_unknown_option_or_no_bucket_is_a_user_error(uri, words):
    with pytest.raises(UserError, match=f"is not a place that can be opened.*{words}"):
        open_uri(uri)


# --- a disk that is full --------------------------------------------------------------------

MEDIUM = 20_000
"""Parameters of a snapshot that takes some pages of the small disk."""


@pytest.mark.parametrize("room", ["none", "half a part", "a part", "a part and a page"])
def test_full_disk_is_one_error_and_leaves_what_was_published(small_disk, identity, room):
    ours = snapshots(0, 3, MEDIUM)
    place = str(small_disk / "store")
    experts = created(place, identity)
    part = experts.append(0, ours[:2]).parts[0]
    pages = -(-part.bytes // PAGE)
    left = {"none": 0, "half a part": pages // 2, "a part": pages, "a part and a page": pages + 1}
    ballast = fill(small_disk, left[room])
    if room == "a part and a page":  # enough
        experts.append(0, ours[2:])
    else:
        with pytest.raises(OSError, match="No space left") as error:
            experts.append(0, ours[2:])
        assert "Make room there" in str(place_error(place, "store.uri", error.value))
        assert_holds(place, identity, ours[:2])
        ballast.unlink()
        experts.append(0, ours[2:])
    assert_holds(place, identity, ours)


@pytest.mark.parametrize("once", [False, True])
def test_full_disk_leaves_the_file_of_before_and_no_other(small_disk, once):
    place = str(small_disk / "store")
    write_bytes(join(place, "journal"), b"of before")
    ballast = fill(small_disk, 1)
    name = "new" if once else "journal"
    filesystem, path = open_uri(join(place, name))
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            put(filesystem, path, b"x" * 3 * PAGE, once=once)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(join(place, "journal"), b"x" * 3 * PAGE)
    assert files_below(Path(place)) == {"journal": b"of before"}
    ballast.unlink()
    put(filesystem, path, b"x" * 3 * PAGE, once=once)
    assert read_bytes(join(place, name)) == b"x" * 3 * PAGE
    assert set(files_below(Path(place))) == {"journal", name}


def test_probe_of_a_full_disk_says_so_and_leaves_nothing(small_disk):
    ballast = fill(small_disk, 0)
    with pytest.raises(UserError, match=r"cannot be written \(No space left.*Make room there"):
        probe(str(small_disk / "deep" / "store"), "store.uri")
    assert list(small_disk.iterdir()) == [ballast]


# --- permissions ----------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users reach, which they do not in ``tmp_path``."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write there; this process is somebody for whom that counts."""
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in folders}
    for p in folders:
        p.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)
        for p, mode in modes.items():
            p.chmod(mode)


def test_missing_permission_is_one_error_and_leaves_what_was_published(open_folder, identity):
    ours = snapshots(0, 5)
    place = str(open_folder / "store")
    experts = created(place, identity)
    experts.append(0, ours[:3])
    with read_only(open_folder):
        with pytest.raises(PermissionError) as error:
            experts.append(0, ours[3:])
        with pytest.raises(PermissionError):
            experts.append(1, ours)
        assert_holds(place, identity, ours[:3])
    assert "(Permission denied)" in str(place_error(place, "store.uri", error.value))
    assert_holds(place, identity, ours[:3])
    experts.append(0, ours[3:])
    assert_holds(place, identity, ours)


def test_missing_permission_leaves_the_file_of_before_and_no_other(open_folder):
    place = str(open_folder / "store")
    write_bytes(join(place, "journal"), b"of before")
    with read_only(open_folder):
        for name in ("journal", "new", "folder/new"):
            with pytest.raises(PermissionError):
                write_bytes(join(place, name), b"new")
        with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
            probe(place, "store.uri")
    assert files_below(Path(place)) == {"journal": b"of before"}
    write_bytes(join(place, "journal"), b"new")
    assert files_below(Path(place)) == {"journal": b"new"}
