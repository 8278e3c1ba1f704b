"""Looking after a store: who uses what, ls, verify, gc and show, on a folder and on S3."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import fs as pafs
from s3_helpers import S3Server, s3_environment

from ftd.errors import UserError
from ftd.expert import Snapshot
from ftd.trajectory import ExpertSet
from ftd_ray.storage import join, open_uri, read_bytes, write_bytes
from ftd_ray.store import TrajectoryStore
from ftd_ray.store.__main__ import main
from ftd_ray.store.inventory import look_at, take_inventory
from ftd_ray.store.text import age_text, parse_size, size_text, sparkline
from ftd_ray.store.usage import IN_USE_SECONDS, RENEW_SECONDS, Usage

BUCKET = "buffers"
DAY = 86400


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    with S3Server(BUCKET) as server:
        yield server.address


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_environment(s3_server).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["path", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh store: a folder, or one on S3."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://{BUCKET}/{tmp_path.name}-{time.time_ns()}"
    return str(tmp_path / "store")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(argv))
        return code, *capsys.readouterr()

    return run_


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass."""
    real, passed = time.time, [0.0]
    monkeypatch.setattr("time.time", lambda: real() + passed[0])

    def wait(seconds: float) -> None:
        passed[0] += seconds

    return wait


Run = Callable[..., tuple[int, str, str]]
Later = Callable[[float], None]


def identity(rho: float = 0.01, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "data": {"name": "digits", "fingerprint": "d834120eb88f", "shape": [1, 8, 8], "classes": 2},
        "augment": "color_crop",
        "experts": {
            "network": "ConvNetD1W8",
            "sharpness": "sam" if rho else "none",
            "rho": rho,
            "lr": 0.02,
            "momentum": 0.5,
        },
        "numerics": {"device": "cpu"},
    } | changes


def snapshots(last: int, expert: int = 0) -> list[Snapshot]:
    gen = torch.Generator().manual_seed(expert)
    every = [torch.randn(64, generator=gen) for _ in range(last + 1)]
    nan = float("nan")
    return [
        Snapshot(e, w, None, 1 / e if e else nan, (e + expert) / 100) for e, w in enumerate(every)
    ]


def fill(uri: str, *epochs: int, who: dict[str, Any] | None = None, part: int = 3) -> ExpertSet:
    """A set with an expert for each number of epochs."""
    experts = TrajectoryStore(uri).expert_set(who or identity())
    experts.create()
    for i, last in enumerate(epochs):
        every = snapshots(last, i)
        for first in range(0, last + 1, part):
            experts.append(i, every[first : first + part])
    return experts


def files(uri: str) -> dict[str, bytes]:
    filesystem, path = open_uri(uri)
    found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    out = {}
    for f in found:
        if f.is_file:
            with filesystem.open_input_stream(f.path) as stream:
                out[f.path.removeprefix(f"{path}/")] = stream.read()
    return out


def named(uri: str, pattern: str) -> str:
    """The one file whose name below the store matches."""
    (found,) = [n for n in files(uri) if re.search(pattern, n)]
    return found


def flip(uri: str, name: str) -> None:
    data = bytearray(files(uri)[name])
    data[len(data) // 2] ^= 1
    write_bytes(join(uri, name), bytes(data))


def change_json(uri: str, name: str, **changes: Any) -> None:
    value = json.loads(files(uri)[name])
    write_bytes(join(uri, name), json.dumps(value | changes).encode())


def published(uri: str, who: dict[str, Any] | None = None) -> list[int]:
    return TrajectoryStore(uri).expert_set(who or identity()).complete(0)


# --- usage records --------------------------------------------------------------------------


def users(uri: str, key: str) -> list[Any]:
    (entry,) = look_at(take_inventory(uri), [key])
    return entry.users


def test_a_record_says_who_uses_a_set_and_since_when(place: str, later: Later) -> None:
    experts = fill(place, 2)
    began = time.time()
    usage = Usage(TrajectoryStore(place), [experts.key], "mine", "/runs/mine")
    usage.renew()
    (user,) = users(place, experts.key)
    assert (user.name, user.place, user.ended) == ("mine", "/runs/mine", None)
    assert began <= user.started == user.renewed <= time.time()
    assert user.is_running(time.time())
    first = user.started
    later(RENEW_SECONDS + 1)
    usage.renew()
    (user,) = users(place, experts.key)
    assert user.started == first < began + 60 < user.renewed
    usage.end()
    (user,) = users(place, experts.key)
    assert user.ended is not None and user.ended >= user.renewed > user.started
    assert not user.is_running(time.time())


def test_who_never_began_to_use_a_set_leaves_no_record(tmp_path: Path) -> None:
    Usage(TrajectoryStore(str(tmp_path)), ["a" * 20], "mine", "/runs/mine").end()
    assert files(str(tmp_path)) == {}


def test_a_record_is_written_now_and_then_only(tmp_path: Path, later: Later) -> None:
    usage = Usage(TrajectoryStore(str(tmp_path)), ["a" * 20, "b" * 20], "mine", "/runs/mine")
    usage.renew()
    first = files(str(tmp_path))
    assert len(first) == 2
    later(RENEW_SECONDS - 30)
    usage.renew()
    assert files(str(tmp_path)) == first
    later(31)
    usage.renew()
    assert files(str(tmp_path)).keys() == first.keys() and files(str(tmp_path)) != first


def test_a_resumed_sweep_writes_the_same_record_and_another_one_its_own(tmp_path: Path) -> None:
    store, key = TrajectoryStore(str(tmp_path)), "a" * 20
    for name, folder in (("s", "/a"), ("s", "/a"), ("s", "/b"), ("t", "/a")):
        Usage(store, [key], name, folder).renew()
    assert sorted((u.name, u.place) for u in users(str(tmp_path), key)) == [
        ("s", "/a"), ("s", "/b"), ("t", "/a"),
    ]  # fmt: skip


def test_a_sweep_that_was_killed_counts_as_running_for_an_hour(
    tmp_path: Path, later: Later
) -> None:
    Usage(TrajectoryStore(str(tmp_path)), ["a" * 20], "s", "/a").renew()
    (user,) = users(str(tmp_path), "a" * 20)
    later(IN_USE_SECONDS - 30)
    assert user.is_running(time.time())
    later(31)
    assert not user.is_running(time.time())


def test_an_unreachable_store_stops_a_sweep_at_its_start_only(tmp_path: Path, later: Later) -> None:
    root = tmp_path / "store"
    usage = Usage(TrajectoryStore(str(root)), ["a" * 20], "s", "/a")
    root.write_text("in the way")
    with pytest.raises(OSError, match="store"):
        usage.renew()
    usage.end()  # of what never began
    root.unlink()
    usage.renew()
    for file in root.rglob("*.json"):
        file.unlink()
    (root / ("a" * 20) / "users").rmdir()
    (root / ("a" * 20) / "users").write_text("in the way")
    later(2 * RENEW_SECONDS)
    usage.renew()
    usage.end()


def test_a_record_that_cannot_be_parsed_counts_from_when_it_was_written(tmp_path: Path) -> None:
    uri, key = str(tmp_path), "a" * 20
    Usage(TrajectoryStore(uri), [key], "s", "/a").renew()
    file = next(tmp_path.rglob("*.json"))
    for text in ("", "{}", "[1]", '{"name": 1, "place": 2, "started": "x"}'):
        file.write_text(text)
        (user,) = users(uri, key)
        assert user.name == "?" and user.is_running(time.time())
        assert user.renewed == pytest.approx(file.stat().st_mtime)


def test_a_set_that_is_only_awaited_is_no_damage(place: str, run: Run) -> None:
    Usage(TrajectoryStore(place), ["a" * 20], "mine", "/runs/mine").renew()
    code, out, _ = run("ls", place)
    assert code == 0 and "awaited" in out and "mine (running)" in out
    assert run("verify", place)[0] == 0
    code, _, err = run("show", "aaa", place)
    assert code == 2 and "holds nothing of set" in err
    assert run("gc", place, "--keep-days", "0", "--yes")[0] == 0
    assert len(files(place)) == 1
    experts = TrajectoryStore(place)
    assert experts.expert_set(identity()).complete(0) == []


# --- ls -------------------------------------------------------------------------------------


def test_ls_says_what_there_is(place: str, run: Run, later: Later) -> None:
    a = fill(place, 8, 8, 8)
    b = fill(place, 4, 7, who=identity(0.0))
    Usage(TrajectoryStore(place), [a.key], "old", "/runs/old").renew()
    later(2 * DAY)
    Usage(TrajectoryStore(place), [a.key, b.key], "new", "/runs/new").renew()
    code, out, err = run("ls", place)
    assert code == 0 and err == ""
    row = {line.split()[0]: line for line in out.splitlines()}
    assert re.search(r"digits d834120e +ConvNetD1W8 +sam 0\.01 +3 × 8 ", row[a.key])
    assert re.search(r" 2 d +new \(running\), old$", row[a.key].rstrip())
    assert re.search(r"none +2 × 4…7 ", row[b.key]) and "bits" not in out
    assert out.splitlines()[-1].startswith("2 sets, 5 experts, ")
    sizes = {k: sum(len(v) for n, v in files(place).items() if k in n) for k in (a.key, b.key)}
    for key, size in sizes.items():
        assert size_text(size) in row[key]
    assert size_text(sum(sizes.values())) in out.splitlines()[-1]


def test_ls_names_the_precision_where_it_is_not_float32(place: str, run: Run) -> None:
    fill(place, 2)
    assert "bits" not in run("ls", place)[1]
    fill(place, 2, who=identity(snapshots="bfloat16"))
    out = run("ls", place)[1]
    assert re.search(r"sam 0\.01 +float32", out) and re.search(r"sam 0\.01 +bfloat16", out)


def test_ls_for_scripts_says_the_same(place: str, run: Run) -> None:
    a = fill(place, 8, 5)
    Usage(TrajectoryStore(place), [a.key], "mine", "/runs/mine").renew()
    code, out, _ = run("ls", place, "--json")
    value = json.loads(out)
    assert code == 0 and value["uri"] == place
    (one,) = value["sets"]
    assert value["bytes"] == one["bytes"] == sum(len(v) for v in files(place).values())
    assert (one["key"], one["state"], one["problems"]) == (a.key, "whole", [])
    assert (one["data"], one["fingerprint"]) == ("digits", "d834120eb88f")
    assert (one["network"], one["sharpness"], one["rho"]) == ("ConvNetD1W8", "sam", 0.01)
    assert one["precision"] == "float32" and one["experts"] == {"0": 8, "1": 5}
    (user,) = one["users"]
    assert user["name"] == "mine" and user["running"] is True
    assert abs(one["newest"] - time.time()) < 60 and one["last_used"] >= one["newest"] - 2


@pytest.mark.parametrize("columns", ["80", "120"])
def test_ls_fits_the_terminal(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for rho in (0.0, 0.01, 0.05):
        experts = fill(str(tmp_path), 22, 8, who=identity(rho, snapshots="bfloat16"))
        Usage(TrajectoryStore(str(tmp_path)), [experts.key], "imagenette", "/a").renew()
    code, out, _ = run("ls", str(tmp_path))
    assert code == 0
    assert max(len(line.rstrip()) for line in out.splitlines()[:-1]) <= int(columns)
    assert all(word in out for word in ("ConvNetD1W8", "bfloat16", "2 × 8…22", "imagenette"))
    row = next(line for line in out.splitlines() if line.startswith(experts.key[:8]))
    assert (experts.key in row) == ("imagenette (running)" in row) == (columns == "120")
    if columns == "80":
        assert re.search(r"(?m)^used by imagenette \(running\): (\w{8} ?){3}$", out)


def spoil(uri: str) -> dict[str, str]:
    """A store with one of everything that can be wrong; what -> the set's key."""
    keys = {}
    for n, what in enumerate(("part", "manifest", "set", "newer manifest", "newer set", "whole")):
        keys[what] = fill(uri, 4, 4, who=identity(n / 100, seed=what)).key
    flip(uri, named(uri, f"{keys['part']}/expert-0001/part-0000"))
    flip(uri, named(uri, f"{keys['manifest']}/expert-0000/manifest-00004"))
    write_bytes(join(uri, keys["set"], "set.json"), b"{")
    name = named(uri, f"{keys['newer manifest']}/expert-0000/manifest-00004")
    change_json(uri, name, schema=2)
    change_json(uri, f"{keys['newer set']}/set.json", schema=2)
    keys["misplaced"] = "0" * 20
    for name, data in files(uri).items():
        if name.startswith(keys["whole"]):
            write_bytes(join(uri, name.replace(keys["whole"], keys["misplaced"])), data)
    write_bytes(join(uri, keys["whole"], "notes.txt"), b"mine")
    write_bytes(join(uri, "readme.txt"), b"mine")
    return keys


def test_ls_lists_what_is_wrong_and_goes_on(place: str, run: Run) -> None:
    keys = spoil(place)
    code, out, err = run("ls", place)
    assert code == 0 and err == ""
    for what, words in {
        "manifest": "expert-0000/manifest-00004.* is (damaged|not a manifest)",
        "set": "set.json is damaged",
        "newer manifest": "expert-0000/manifest-00004.* has schema version 2",
        "newer set": "set.json has schema version 2",
        "misplaced": f"holds the set {keys['whole']}",
        "whole": "foreign: .*notes.txt",
    }.items():
        assert re.search(rf"(?m)^{keys[what]}: .*{words}", out), what
    assert re.search(rf"(?m)^{keys['whole']} +digits .* 2 × 4 ", out)
    assert re.search(rf"(?m)^{keys['manifest']} +digits .* 1 × 4 ", out)
    for what, word in (("set", "damaged"), ("newer set", "newer"), ("misplaced", "misplaced")):
        assert re.search(rf"(?m)^{keys[what]} +{word} ", out)
    assert re.search("(?m)^foreign: readme.txt$", out)
    states = {s["key"]: s["state"] for s in json.loads(run("ls", place, "--json")[1])["sets"]}
    assert states[keys["newer set"]] == "newer" and states[keys["whole"]] == "whole"


# --- verify ---------------------------------------------------------------------------------


def test_verify_is_content_with_a_whole_store(place: str, run: Run) -> None:
    fill(place, 8, 8)
    fill(place, 4, who=identity(0.0, snapshots="float16"))
    before = files(place)
    code, out, err = run("verify", place, "--repair")
    assert code == 0 and err == ""
    (line,) = out.splitlines()
    assert re.fullmatch(r"2 sets, 3 experts, .*: no damage", line)
    assert files(place) == before


def test_verify_names_everything_that_is_wrong_and_touches_nothing(place: str, run: Run) -> None:
    keys = spoil(place)
    before = files(place)
    code, out, _ = run("verify", place)
    assert code == 1 and files(place) == before
    for kind, what, words in (
        ("damaged", "part", "/expert-0001: .*part-0000-0002.* is damaged"),
        ("damaged", "manifest", "/expert-0000: .*manifest-00004"),
        ("damaged", "set", ": .*set.json is damaged"),
        ("newer", "newer manifest", "/expert-0000: .*schema version 2"),
        ("newer", "newer set", ": .*set.json has schema version 2"),
        ("misplaced", "misplaced", f": .*holds the set {keys['whole']}"),
        ("foreign", "whole", "/notes.txt: "),
    ):
        assert re.search(rf"(?m)^{kind} +{keys[what]}{words}", out), (what, out)
    assert re.search("(?m)^foreign +readme.txt: ", out)
    assert "4 damaged, 2 foreign, 2 newer" in out and "verify --repair" in out


def test_repair_moves_damage_away_and_nothing_else(place: str, run: Run) -> None:
    keys = spoil(place)
    before = files(place)
    code, out, _ = run("verify", place, "--repair")
    assert code == 0 and "4 damaged, 4 moved to quarantine" in out
    after = files(place)
    assert sorted(after.values()) == sorted(before.values())  # moved, not changed
    moved = {n: v for n, v in before.items() if n not in after}
    for what, part in (("part", "/expert-0001/"), ("manifest", "/expert-0000/"), ("set", "/")):
        assert any(n.startswith(keys[what] + part) for n in moved)
    gone = [keys["part"] + "/expert-0001/", keys["manifest"] + "/expert-0000/"]
    gone += [keys["set"] + "/", keys["misplaced"] + "/"]
    assert all(n.startswith(tuple(gone)) for n in moved)
    assert {n.split("/")[1][:20] for n in after if n.startswith("quarantine/")} == {
        keys["set"], keys["misplaced"],
    }  # fmt: skip
    code, out, _ = run("verify", place)
    assert code == 0 and "no damage, 2 foreign, 2 newer" in out
    code, out, _ = run("ls", place)
    assert f"{keys['part']}: 1 expert in quarantine" in out and "2 sets in quarantine" in out


def test_an_expert_that_was_repaired_is_trained_again_to_the_same_files(
    place: str, run: Run
) -> None:
    fill(place, 5, 5)
    whole = files(place)
    flip(place, named(place, "expert-0001/part-0003"))
    assert run("verify", place)[0] == 1
    assert run("verify", place, "--repair")[0] == 0
    assert published(place) == [0]
    fill(place, 5, 5)
    assert {n: v for n, v in files(place).items() if "quarantine" not in n} == whole
    assert run("verify", place)[0] == 0


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_truncated_and_a_missing_part_are_damage(tmp_path: Path, run: Run, keep: float) -> None:
    uri = str(tmp_path)
    fill(uri, 5, 5)
    truncated = tmp_path / named(uri, "expert-0000/part-0003")
    truncated.write_bytes(truncated.read_bytes()[: int(keep * truncated.stat().st_size)])
    (tmp_path / named(uri, "expert-0001/part-0000")).unlink()
    code, out, _ = run("verify", uri)
    assert code == 1 and out.count("damaged ") == 3 and truncated.name in out
    assert run("verify", uri, "--repair")[0] == 0
    assert published(uri) == []


def test_a_set_without_its_identity_is_moved_whole(tmp_path: Path, run: Run) -> None:
    key = fill(str(tmp_path), 2).key
    (tmp_path / key / "set.json").unlink()
    code, out, _ = run("verify", str(tmp_path))
    assert code == 1 and re.search(rf"damaged +{key}: .*set.json is missing", out)
    assert run("verify", str(tmp_path), "--repair")[0] == 0
    assert not (tmp_path / key).exists()
    assert published(str(tmp_path)) == []


def test_verify_of_one_key_looks_at_no_other(place: str, run: Run) -> None:
    a, b = fill(place, 4), fill(place, 4, who=identity(0.0))
    flip(place, named(place, f"{a.key}/expert-0000/part-0000"))
    assert run("verify", place, "--key", b.key[:6])[0] == 0
    code, out, _ = run("verify", place, "--key", a.key[:6])
    assert code == 1 and "1 set, 1 expert" in out
    code, _, err = run("verify", place, "--key", "xyz")
    assert code == 2 and "holds no set xyz" in err


def test_leftovers_of_dead_writers_are_named_as_harmless(place: str, run: Run) -> None:
    experts = fill(place, 4)
    leave_parts(place, experts.key)
    code, out, _ = run("verify", place)
    assert code == 0 and "no damage, 3 leftover" in out
    assert len(re.findall(r"(?m)^leftover +\S+: .*no harm", out)) == 3
    assert "3 leftovers of dead writers" in run("ls", place)[1]


def leave_parts(uri: str, key: str) -> list[str]:
    """A part of a known expert, one of an unknown expert, and a file half written."""
    part = files(uri)[named(uri, f"{key}/expert-0000/part-0000")]
    names = [
        f"{key}/expert-0000/part-0005-0009-0123456789ab.parquet",
        f"{key}/expert-0007/part-0000-0005-0123456789ab.parquet",
        f"{key}/expert-0000/manifest-00009-0123456789ab.json.01234567.part",
    ]
    for name in names:
        write_bytes(join(uri, name), part)
    return names


def test_parts_of_the_writer_that_lost_are_no_leftovers(place: str, run: Run) -> None:
    """Its manifest names them, and who knows which of the two a reader holds."""
    experts = fill(place, 2)
    other = f"{place}-other"
    theirs = TrajectoryStore(other).expert_set(identity())
    theirs.create()
    theirs.append(0, [replace(s, params_P=s.params_P + 1) for s in snapshots(2)])
    for name, data in files(other).items():
        if "expert" in name:
            write_bytes(join(place, name), data)
    assert len([n for n in files(place) if "manifest-00002" in n]) == 2
    assert "leftover" not in run("verify", place)[1]
    assert published(place) == [0] and experts.key in run("ls", place)[1]


def test_leftovers_beside_a_manifest_that_cannot_be_read_are_not_known(
    tmp_path: Path, run: Run, later: Later
) -> None:
    uri = str(tmp_path)
    experts = fill(uri, 4)
    leave_parts(uri, experts.key)
    change_json(uri, named(uri, "manifest-00002"), schema=2)
    out = run("verify", uri)[1]
    assert "1 leftover" not in out and "2 leftover" in out  # the unknown expert's, the temporary


def test_a_file_that_may_not_be_read_is_not_quarantined(
    place: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a server it ends the check: there it says nothing about the file."""
    fill(place, 2, 2)

    def denied(_: ExpertSet, expert: int) -> None:
        if expert == 0:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ExpertSet, "verify", denied)
    before = files(place)
    code, out, err = run("verify", place, "--repair")
    if place.startswith("s3"):
        assert code == 2 and "cannot be read (Permission denied)" in err
    else:
        assert code == 1 and re.search("unreadable .*expert-0000: .*Permission denied", out)
        assert "1 damaged, 0 moved" in out
    assert files(place) == before


# --- gc -------------------------------------------------------------------------------------


def test_gc_says_what_would_go_and_deletes_nothing(place: str, run: Run, later: Later) -> None:
    a = fill(place, 4)
    leave_parts(place, a.key)  # they go with their set
    later(10 * DAY)
    before = files(place)
    code, out, _ = run("gc", place, "--keep-days", "5")
    assert code == 0 and files(place) == before
    size = size_text(sum(len(v) for v in before.values()))
    assert re.search(rf"(?m)^set +{a.key} +{size} +10 d ago +not used for 5 days", out)
    assert f"would free {size} of {size}. Dry run: add --yes" in out and "leftover" not in out


def test_gc_deletes_sets_that_nobody_used_for_so_long(place: str, run: Run, later: Later) -> None:
    old, used = fill(place, 4, 4), fill(place, 4, who=identity(0.0))
    ended = Usage(TrajectoryStore(place), [old.key], "then", "/runs/then")
    ended.renew()
    ended.end()
    later(10 * DAY)
    ended = Usage(TrajectoryStore(place), [used.key], "now", "/runs/now")
    ended.renew()
    ended.end()
    rest = {n: v for n, v in files(place).items() if n.startswith(used.key)}
    assert run("gc", place, "--keep-days", "20", "--yes")[0] == 0
    assert published(place) == [0, 1]
    later(2 * DAY)
    code, out, _ = run("gc", place, "--keep-days", "5", "--yes")
    assert code == 0 and "freed" in out and used.key not in out
    assert files(place) == rest
    filesystem, path = open_uri(place)
    assert [f.base_name for f in filesystem.get_file_info(pafs.FileSelector(path))] == [used.key]
    assert run("verify", place)[0] == 0


def test_publishing_is_use(place: str, run: Run, later: Later) -> None:
    fill(place, 4)
    assert "nothing to delete" in run("gc", place, "--keep-days", "1", "--yes")[1]
    assert published(place) == [0]
    later(2 * DAY)
    assert "freed" in run("gc", place, "--keep-days", "1", "--yes")[1]
    assert files(place) == {}


def test_a_set_that_was_published_to_after_its_last_sweep_is_as_old_as_that(
    place: str, run: Run, later: Later
) -> None:
    usage = Usage(TrajectoryStore(place), [fill(place, 4).key], "then", "/runs/then")
    later(-10 * DAY)
    usage.renew()
    usage.end()
    later(10 * DAY)
    assert "nothing to delete" in run("gc", place, "--keep-days", "5", "--yes")[1]
    assert published(place) == [0]


def test_a_set_that_has_only_just_begun_is_not_old(place: str, run: Run, later: Later) -> None:
    """Somebody who leaves no record trains its first epochs."""
    fill(place)
    assert list(files(place))
    assert "nothing to delete" in run("gc", place, "--keep-days", "1", "--yes")[1]
    later(2 * DAY)
    run("gc", place, "--keep-days", "1", "--yes")
    assert files(place) == {}


def test_gc_never_deletes_what_a_running_sweep_uses(place: str, run: Run, later: Later) -> None:
    a = fill(place, 4)
    later(10 * DAY)
    Usage(TrajectoryStore(place), [a.key], "mine", "/runs/mine").renew()
    before = files(place)
    for flags in (["--keep-days", "0"], ["--max-bytes", "0"]):
        code, out, _ = run("gc", place, *flags, "--yes")
        assert code == 0 and files(place) == before
        assert f"{a.key} stays: mine uses it (/runs/mine, " in out
    later(IN_USE_SECONDS)  # it was killed
    run("gc", place, "--keep-days", "0", "--yes")
    assert files(place) == {}


def test_gc_looks_again_right_before_it_deletes(
    place: str, run: Run, later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ftd_ray.store.__main__ as command

    a, b = fill(place, 4), fill(place, 4, who=identity(0.0))
    leave_parts(place, b.key)
    later(10 * DAY)
    clean = command.clean

    def meanwhile(*args: Any) -> Any:
        Usage(TrajectoryStore(place), [a.key, b.key], "mine", "/runs/mine").renew()
        return clean(*args)

    monkeypatch.setattr(command, "clean", meanwhile)
    before = files(place)
    code, out, _ = run("gc", place, "--keep-days", "5", "--yes")
    assert code == 0 and f"{a.key} stays after all: mine uses it" in out and "freed 0 B" in out
    assert before.items() <= files(place).items()


def test_gc_spares_a_set_that_was_published_to_meanwhile(
    place: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ftd_ray.store.__main__ as command

    fill(place, 4)
    clean = command.clean

    def meanwhile(*args: Any) -> Any:
        time.sleep(1.1)  # clocks of object stores tick in seconds
        fill(place, 4, 6)
        return clean(*args)

    monkeypatch.setattr(command, "clean", meanwhile)
    assert "stays after all" in run("gc", place, "--keep-days", "0", "--yes")[1]
    assert published(place) == [0, 1]


def test_gc_by_size_deletes_the_least_recently_used(place: str, run: Run, later: Later) -> None:
    sets = []
    for n in range(4):
        sets.append(fill(place, 4, who=identity(n / 100)))
        usage = Usage(TrajectoryStore(place), [sets[-1].key], "s", "/a")
        usage.renew()
        usage.end()
        later(DAY)
    usage = Usage(TrajectoryStore(place), [sets[0].key], "s", "/a")
    usage.renew()
    usage.end()
    total = sum(len(v) for v in files(place).values())
    assert "nothing to delete" in run("gc", place, "--max-bytes", str(total))[1]
    code, out, _ = run("gc", place, "--max-bytes", f"{0.55 * total / 1000:.3f}kB", "--yes")
    assert code == 0
    left = {n.split("/")[0] for n in files(place)}
    assert left == {sets[0].key, sets[3].key}
    order = [line.split()[1] for line in out.splitlines() if line.startswith("set ")]
    assert order == [sets[1].key, sets[2].key]
    assert sum(len(v) for v in files(place).values()) <= 0.55 * total


def test_gc_says_when_it_cannot_make_that_much_room(tmp_path: Path, run: Run) -> None:
    uri = str(tmp_path)
    a, b = fill(uri, 4), fill(uri, 4, who=identity(0.0))
    Usage(TrajectoryStore(uri), [a.key], "mine", "/runs/mine").renew()
    size = size_text(sum(len(v) for n, v in files(uri).items() if a.key in n))
    out = run("gc", uri, "--max-bytes", "1kB", "--yes")[1]
    assert f"{size} would be left, above 1.0 kB" in out
    assert published(uri) == [0] and not (tmp_path / b.key).exists()


def test_gc_clears_what_dead_writers_left_and_old_quarantines(
    place: str, run: Run, later: Later
) -> None:
    a = fill(place, 4, 4)
    b = fill(place, 4, who=identity(0.0))
    whole = {n: v for n, v in files(place).items() if n.startswith(a.key)}
    whole = {n: v for n, v in whole.items() if "expert-0001" not in n}
    leave_parts(place, a.key)
    write_bytes(join(place, ".probe-123"), b"")
    TrajectoryStore(place).expert_set(identity()).quarantine(1)
    write_bytes(join(place, b.key, "set.json"), b"{")
    run("verify", place, "--repair")
    before = files(place)
    later(DAY / 2)
    assert "nothing to delete" in run("gc", place, "--keep-days", "30", "--yes")[1]
    assert files(place) == before
    later(DAY)
    code, out, _ = run("gc", place, "--keep-days", "30")
    assert code == 0 and files(place) == before
    assert re.search(rf"(?m)^leftovers +{a.key} .*3 files of writers that died", out)
    assert re.search(rf"(?m)^quarantine +{a.key}/quarantine/expert-0001-\S+ ", out)
    assert re.search(rf"(?m)^quarantine +quarantine/{b.key}-\S+ ", out)
    assert re.search(r"(?m)^leftovers +the store itself ", out)
    run("gc", place, "--keep-days", "30", "--yes")
    assert files(place) == whole
    assert run("ls", place)[1].count("\n") == 3
    filesystem, path = open_uri(place)
    found = filesystem.get_file_info(pafs.FileSelector(f"{path}/{a.key}"))
    assert "expert-0007" not in {f.base_name for f in found}


def test_leftovers_of_a_set_that_is_in_use_are_left_alone(
    place: str, run: Run, later: Later
) -> None:
    a = fill(place, 4)
    leave_parts(place, a.key)
    later(3 * DAY)
    Usage(TrajectoryStore(place), [a.key], "mine", "/runs/mine").renew()
    before = files(place)
    assert "nothing to delete" in run("gc", place, "--keep-days", "30", "--yes")[1]
    assert files(place) == before


def test_gc_takes_empty_folders_and_what_goes_by_itself_is_gone(
    tmp_path: Path, run: Run, later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ftd_ray.store.cleaning as cleaning

    root = tmp_path / "store"
    a = fill(str(root), 4)
    (root / ("e" * 20) / "expert-0000").mkdir(parents=True)
    assert "e" * 20 not in run("ls", str(root))[1]
    later(3 * DAY)
    real = cleaning.delete_file

    def twice(filesystem: Any, path: str) -> None:
        real(filesystem, path)
        real(filesystem, path)

    monkeypatch.setattr(cleaning, "delete_file", twice)
    code, out, _ = run("gc", str(root), "--keep-days", "1", "--yes")
    assert code == 0 and a.key in out and "an empty folder" in out
    assert list(root.iterdir()) == []


def test_leftovers_stay_where_a_sweep_begins_meanwhile(
    tmp_path: Path, run: Run, later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ftd_ray.store.__main__ as command

    uri = str(tmp_path)
    a = fill(uri, 4)
    leave_parts(uri, a.key)
    later(3 * DAY)
    clean = command.clean

    def meanwhile(*args: Any) -> Any:
        Usage(TrajectoryStore(uri), [a.key], "mine", "/runs/mine").renew()
        return clean(*args)

    monkeypatch.setattr(command, "clean", meanwhile)
    before = files(uri)
    out = run("gc", uri, "--keep-days", "30", "--yes")[1]
    assert f"{a.key} stays after all: somebody began to use the set" in out and "freed 0 B" in out
    assert before.items() <= files(uri).items()


def test_gc_deletes_no_strangers(place: str, run: Run, later: Later) -> None:
    """Neither foreign files, nor what another version wrote, nor what `verify` should see."""
    keys = spoil(place)
    write_bytes(join(place, keys["whole"], "notes.txt"), bytes(50_000))
    for parts in ((keys["whole"], "quarantine", "mine"), ("quarantine", "mine")):
        write_bytes(join(place, *parts, "a"), b"mine")
    assert "foreign: readme.txt, quarantine/mine/a" in run("ls", place)[1]
    before = files(place)
    later(10 * DAY)
    code, out, _ = run("gc", place, "--keep-days", "5", "--yes")
    assert code == 0
    after = files(place)
    kept = [keys[k] for k in ("set", "newer manifest", "newer set", "misplaced")]
    kept += ["readme.txt", f"{keys['whole']}/notes.txt", f"{keys['whole']}/quarantine/mine"]
    kept += ["quarantine/mine"]
    assert after == {n: v for n, v in before.items() if n.startswith(tuple(kept))}
    freed = sum(len(v) for n, v in before.items() if n not in after)
    assert f"freed {size_text(freed)} of " in out
    assert f"{keys['newer manifest']} stays: of another schema version" in out
    assert f"{keys['set']} stays: damaged; `verify --repair`" in out
    assert published(place, identity(0.05, seed="whole")) == []
    assert "nothing to delete" in run("gc", place, "--keep-days", "5", "--yes")[1]


KILLED = """
import os, signal, sys
import ftd_ray.store.cleaning as cleaning
from ftd_ray.store.__main__ import main

real, left = cleaning.delete_file, [int(sys.argv[1])]

def delete_file(filesystem, path):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(filesystem, path)

cleaning.delete_file, cleaning.DELETERS = delete_file, 1
main(sys.argv[2:])
"""


@pytest.mark.parametrize("deletions", [0, 1, 2, 3, 5, 8, 10])
def test_gc_killed_in_the_middle_leaves_a_whole_store_and_goes_on(
    tmp_path: Path, run: Run, deletions: int
) -> None:
    """Two experts of two parts and two manifests, a record, set.json: ten files."""
    root = tmp_path / "store"
    uri = str(root)
    a = fill(uri, 4, 4)
    spared = fill(uri, 4, who=identity(0.0))
    usage = Usage(TrajectoryStore(uri), [a.key], "mine", "/runs/mine")
    usage.renew()
    usage.end()
    for file in (root / a.key).rglob("*.json"):
        if file.parent.name == "users":
            then = {k: v and v - 10 * DAY for k, v in json.loads(file.read_text()).items()
                    if k in ("started", "renewed", "ended")}  # fmt: skip
            file.write_text(json.dumps(json.loads(file.read_text()) | then))
        os.utime(file, (1e9, 1e9))
    for file in (root / a.key).rglob("*.parquet"):
        os.utime(file, (1e9, 1e9))
    gc = ["gc", uri, "--keep-days", "5", "--yes"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(deletions), *gc], capture_output=True, check=False
    )
    total = 10
    assert done.returncode == (-signal.SIGKILL if deletions < total else 0), done.stderr
    there = [n for n in files(uri) if n.startswith(a.key)]
    assert len(there) == total - deletions
    assert run("verify", uri)[0] == 0
    found = TrajectoryStore(uri).expert_set(identity())
    for expert in found.complete(0):
        manifest = found.manifest(expert)
        assert manifest is not None
        for epoch in range(manifest.epochs + 1):
            np.testing.assert_array_equal(
                found.params(expert, epoch), snapshots(4, expert)[epoch].params_P.numpy()
            )
    assert run(*gc)[0] == 0
    assert [p.name for p in root.iterdir()] == [spared.key]
    assert published(uri, identity(0.0)) == [0]


def test_a_sweep_that_begins_while_a_set_is_deleted_finds_a_set(
    tmp_path: Path, run: Run, later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ftd_ray.store.cleaning as cleaning

    uri = str(tmp_path)
    a = fill(uri, 4)
    later(10 * DAY)
    real = cleaning.delete_file

    def delete_file(filesystem: Any, path: str) -> None:
        real(filesystem, path)
        if path.endswith(".parquet"):
            Usage(TrajectoryStore(uri), [a.key], "mine", "/runs/mine").renew()

    monkeypatch.setattr(cleaning, "delete_file", delete_file)
    run("gc", uri, "--keep-days", "5", "--yes")
    assert {n.split("/")[1] for n in files(uri)} == {"users", "set.json"}
    assert published(uri) == []
    assert run("verify", uri)[0] == 0


@pytest.mark.parametrize(
    "flags", [[], ["--keep-days", "1", "--max-bytes", "2"], ["--keep-days", "-1"],
              ["--keep-days", "nan"]],
)  # fmt: skip
def test_gc_takes_exactly_one_rule(tmp_path: Path, run: Run, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["gc", str(tmp_path), *flags])
    assert error.value.code == 2


# --- show -----------------------------------------------------------------------------------


def test_show_tells_configuration_experts_curves_and_users(place: str, run: Run) -> None:
    a = fill(place, 4, 4, 2)
    Usage(TrajectoryStore(place), [a.key], "mine", "/runs/mine").renew()
    code, out, err = run("show", a.key[:5], place)
    assert code == 0 and err == ""
    for words in (
        rf"set +{a.key}",
        r"data +digits d834120e, 1 x 8 x 8, 2 classes",
        r"snapshots +float32",
        r"network +ConvNetD1W8",
        r"sharpness +sam 0\.01",
        r"training +lr 0\.02, momentum 0\.5",
        r"numerics +device cpu",
        r"augment +color_crop",
        r"experts +3 × 2…4 epochs",
        r" +expert 2 has 2 of 4 epochs",
        r"used by +mine in /runs/mine, is running",
    ):
        assert re.search(rf"(?m)^{words}", out), words
    # accuracies are (epoch + expert) / 100
    assert re.search(r"(?m)^ +0 +1\.0 ± 0\.8 % +0\.0 +2\.0 +– +3", out)
    assert re.search(r"(?m)^ +2 +3\.0 ± 0\.8 % +2\.0 +4\.0 +0\.5000 +3", out)
    assert re.search(r"(?m)^ +4 +4\.5 ± 0\.5 % +4\.0 +5\.0 +0\.2500 +2", out)
    assert re.search("(?m)^validation ▁▃▅▆█ epoch 0 to 4$", out)


def test_show_keeps_long_curves_short(tmp_path: Path, run: Run) -> None:
    a = fill(str(tmp_path), 90, part=50)
    out = run("show", a.key, str(tmp_path))[1]
    rows = re.findall(r"(?m)^ *(\d+) +\d+\.\d ± ", out)
    assert len(rows) == 12 and (rows[0], rows[-1]) == ("0", "90")
    assert len(re.search(r"validation ([▁▂▃▄▅▆▇█]+) epoch 0 to 90", out)[1]) <= 60  # type: ignore[index]


def test_show_names_damaged_experts_and_shows_the_others(place: str, run: Run) -> None:
    a = fill(place, 4, 4)
    write_bytes(join(place, named(place, "expert-0001/part-0003")), b"")
    code, out, _ = run("show", a.key, place)
    assert code == 0 and re.search(r"(?m)^damaged .*expert-0001/part-0003", out)
    assert re.search(r"(?m)^ +4 +4\.0 ± 0\.0 % .* 1$", out.replace(" \n", "\n"))


def test_a_prefix_must_be_unique_and_there(place: str, run: Run) -> None:
    keys = [fill(place, 1, who=identity(n / 100)).key for n in range(20)]
    twice = next(k[0] for k in keys if sum(o[0] == k[0] for o in keys) > 1)
    code, _, err = run("show", twice, place)
    assert code == 2 and f"{twice} begins several keys" in err
    code, _, err = run("show", "fffff0", place)
    assert code == 2 and "holds no set fffff0" in err
    for what in ("newer", "damaged"):
        key = keys.pop()
        value = {"schema": 2} if what == "newer" else {"identity": 1}
        write_bytes(join(place, key, "set.json"), json.dumps(value).encode())
        code, _, err = run("show", key, place)
        assert code == 2 and err.startswith("store: ") and err.count("\n") == 1


# --- the command ----------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["ls"], ["verify"], ["show", "a"], ["gc", "--keep-days", "1"]])
def test_a_place_that_is_no_store_is_one_line_and_code_2(
    tmp_path: Path, run: Run, argv: list[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    one = fill(str(tmp_path / "store"), 1)
    for uri, words in {
        str(tmp_path / "nowhere"): "there is no such folder",
        str(tmp_path / "full" / "thesis.tex"): "there is no such folder",
        str(tmp_path / "full"): "it holds no expert set, but thesis.tex",
        str(tmp_path / "store" / one.key): "is one expert set",
        "ftp://a/b": "is not a place",
    }.items():
        code, out, err = run(*argv, uri)
        assert code == 2 and out == "" and err.count("\n") == 1
        assert err.startswith("store: ") and words in err
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_an_empty_store_is_a_store(tmp_path: Path, run: Run) -> None:
    assert run("ls", str(tmp_path))[:2] == (0, f"0 sets, 0 experts, 0 B in {tmp_path}\n")
    assert run("verify", str(tmp_path))[0] == 0
    assert run("gc", str(tmp_path), "--max-bytes", "0", "--yes")[0] == 0


def test_a_bucket_that_is_not_there_is_one_line_and_code_2(s3: None, run: Run) -> None:
    for uri in ("s3://no-such-bucket/store", f"s3://{BUCKET}/nothing/here"):
        code, _, err = run("ls", uri)
        assert code == 2 and err.startswith("store: ") and err.count("\n") == 1


def test_the_store_is_in_the_working_directory_unless_another_is_named(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("ls")[0] == 2
    key = fill(str(tmp_path / "store"), 1).key
    for argv in (["ls"], ["verify"], ["show", key], ["gc", "--keep-days", "9"]):
        assert run(*argv)[0] == 0
    assert run("ls", "store")[0] == 0 and run("ls", f"file://{tmp_path}/store")[0] == 0


def test_the_command_is_one(tmp_path: Path) -> None:
    key = fill(str(tmp_path / "store"), 3).key
    command = [sys.executable, "-m", "ftd_ray.store"]
    done = subprocess.run([*command, "ls"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and key in done.stdout and done.stderr == ""
    flip(str(tmp_path / "store"), named(str(tmp_path / "store"), "part-0000"))
    done = subprocess.run([*command, "verify"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "damaged" in done.stdout and done.stderr == ""
    done = subprocess.run([*command, "nonsense"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_it_starts_neither_ray_nor_torch(tmp_path: Path) -> None:
    key = fill(str(tmp_path), 3).key
    code = (
        "import sys\n"
        "from ftd_ray.store.__main__ import main\n"
        f"for argv in (['ls'], ['verify'], ['show', {key!r}], ['gc', '--keep-days', '0']):\n"
        f"    assert main([*argv, {str(tmp_path)!r}]) == 0\n"
        "sys.exit(bool({'torch', 'ray', 'mlflow', 'optuna'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- few characters -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [("500000000", 500_000_000), ("500MB", 500_000_000), ("20GB", 20_000_000_000), ("0", 0),
     ("1.5 kB", 1500), ("2tb", 2_000_000_000_000), ("7B", 7)],
)  # fmt: skip
def test_sizes_are_bytes_or_have_a_unit(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "20 G", "20GiB", "x"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)


def test_sizes_ages_and_curves_in_few_characters() -> None:
    sizes = (0, 999, 1000, 17_480_000, 999_960_000, 2e12)
    assert [size_text(n) for n in sizes] == [
        "0 B", "999 B", "1.0 kB", "17.5 MB", "1.0 GB", "2.0 TB",
    ]  # fmt: skip
    assert [age_text(s) for s in (-5, 45, 200, 5.2 * 3600, 12.1 * DAY)] == [
        "0 s", "45 s", "3 min", "5 h", "12 d",
    ]  # fmt: skip
    assert sparkline([0, 1, 2]) == "▁▅█" and sparkline([3, 3]) == "▁▁"
    assert read_bytes("/nowhere") is None
