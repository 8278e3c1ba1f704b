"""Expert sets on disk: round trips, and every way that a file can be wrong."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs as pafs

from ftd.data import Dataset
from ftd.errors import UserError
from ftd.expert import ExpertConfig, Numerics, Snapshot, identity, train_expert
from ftd.trajectory import OPEN_FILES, DamagedError, ExpertSet, Overtaken, put

IDENTITY: dict[str, Any] = {"schema": 1, "experts": {"rho": 0.01}}
P = 12


def snapshots(first: int, last: int, *, expert: int = 0, momentum: bool = False) -> list[Snapshot]:
    def vector(epoch: int, what: int) -> torch.Tensor:
        return torch.randn(P, generator=torch.Generator().manual_seed(1000 * expert + epoch + what))

    return [
        Snapshot(
            epoch=e,
            params_P=vector(e, 0),
            momentum_P=vector(e, 500) if momentum else None,
            train_loss=1 / (e + 1),
            val_accuracy=e / 100,
        )
        for e in range(first, last + 1)
    ]


def new_set(path: Path, identity: dict[str, Any] = IDENTITY) -> ExpertSet:
    store = ExpertSet(pafs.LocalFileSystem(), str(path), identity)
    store.create()
    return store


def open_set(path: Path) -> ExpertSet:
    return ExpertSet(pafs.LocalFileSystem(), str(path))


def part_files(path: Path, expert: int = 0) -> list[Path]:
    return sorted((path / f"expert-{expert:04d}").glob("part-*.parquet"))


def manifest_file(path: Path, expert: int = 0) -> Path:
    (found,) = (path / f"expert-{expert:04d}").glob("manifest-*.json")
    return found


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


# --- round trips ----------------------------------------------------------------------------


def test_published_epochs_come_back_bit_for_bit(tmp_path: Path) -> None:
    written = snapshots(0, 7)
    store = new_set(tmp_path)
    store.append(0, written[:6])
    store.append(0, written[6:])
    reader = open_set(tmp_path)
    assert reader.identity == IDENTITY and reader.key == store.key
    for s in written:
        np.testing.assert_array_equal(reader.params(0, s.epoch), s.params_P.numpy())
    start, end = reader.segment(0, 2, 7)
    np.testing.assert_array_equal(start, written[2].params_P.numpy())
    np.testing.assert_array_equal(end, written[7].params_P.numpy())
    history = reader.history(0)
    assert history == [(s.epoch, s.train_loss, s.val_accuracy) for s in written]


@pytest.mark.parametrize("momentum", [False, True])
def test_the_newest_part_holds_all_that_training_resumes_from(
    tmp_path: Path, momentum: bool
) -> None:
    written = snapshots(0, 6, momentum=momentum)
    store = new_set(tmp_path)
    store.append(0, written[:4])
    store.append(0, written[4:])
    point = open_set(tmp_path).resume_point(0)
    last = written[-1]
    assert point is not None and point.epoch == 6
    assert (point.train_loss, point.val_accuracy) == (last.train_loss, last.val_accuracy)
    assert torch.equal(point.params_P, last.params_P)
    if momentum:
        assert point.momentum_P is not None and last.momentum_P is not None
        assert torch.equal(point.momentum_P, last.momentum_P)
    else:
        assert point.momentum_P is None
    point.params_P.add_(1)  # must be the caller's own memory
    again = open_set(tmp_path).resume_point(0)
    assert again is not None and torch.equal(again.params_P, last.params_P)


def test_nothing_published_is_nothing_to_resume_from(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    assert store.manifest(3) is None and store.resume_point(3) is None
    assert store.history(3) == [] and store.complete(0) == [] and store.size() == 0


def test_one_row_and_one_row_group_an_epoch(tmp_path: Path) -> None:
    new_set(tmp_path).append(0, snapshots(0, 4))
    file = pq.ParquetFile(part_files(tmp_path)[0])
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [1] * 5
    epochs = [file.read_row_group(i, columns=["epoch"]).column(0)[0].as_py() for i in range(5)]
    assert epochs == [0, 1, 2, 3, 4]


def test_parts_say_what_they_are(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    store.append(2, snapshots(0, 1))
    metadata = json.loads(pq.read_schema(part_files(tmp_path, 2)[0]).metadata[b"ftd"])
    assert metadata["schema"] == 1 and metadata["identity"] == IDENTITY
    assert (metadata["set"], metadata["expert"]) == (store.key, 2)


def test_complete_lists_experts_that_are_long_enough_in_order(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    for expert, epochs in ((10, 4), (2, 6), (0, 5)):
        store.append(expert, snapshots(0, epochs, expert=expert))
    assert store.complete(4) == [0, 2, 10]
    assert store.complete(5) == [0, 2]
    assert store.complete(7) == []
    sizes = [f.stat().st_size for e in (0, 2, 10) for f in part_files(tmp_path, e)]
    assert store.size() == sum(sizes)


def test_more_files_than_are_kept_open_can_be_read(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    experts = OPEN_FILES + 3
    for i in range(experts):
        store.append(i, snapshots(0, 0, expert=i))
    reader = open_set(tmp_path)
    for _ in range(2):
        for i in range(experts):
            expected = snapshots(0, 0, expert=i)[0].params_P.numpy()
            np.testing.assert_array_equal(reader.params(i, 0), expected)


def test_a_reader_sees_epochs_that_are_published_after_it_opened(tmp_path: Path) -> None:
    writer = new_set(tmp_path)
    writer.append(0, snapshots(0, 2))
    reader = open_set(tmp_path)
    with pytest.raises(UserError, match=r"expert 0 .* has 2 of the 4 epochs"):
        reader.params(0, 4)
    writer.append(0, snapshots(3, 4))
    np.testing.assert_array_equal(reader.params(0, 4), snapshots(4, 4)[0].params_P.numpy())


def test_a_set_lives_below_any_filesystem(tmp_path: Path) -> None:
    below = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    store = ExpertSet(below, "sets/one/", IDENTITY)
    store.create()
    store.append(0, snapshots(0, 1))
    expected = snapshots(1, 1)[0].params_P.numpy()
    np.testing.assert_array_equal(open_set(tmp_path / "sets/one").params(0, 1), expected)


# --- what is published stays ----------------------------------------------------------------


def test_appending_epochs_that_are_published_changes_nothing(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    first = store.append(0, snapshots(0, 4))
    before = contents(tmp_path)
    others = [replace(s, params_P=s.params_P + 1) for s in snapshots(0, 4)]
    assert store.append(0, others) == first
    assert store.append(0, others[:2]) == first
    assert contents(tmp_path) == before


def test_further_epochs_leave_published_files_as_they_are(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    store.append(0, snapshots(0, 4))
    before = contents(tmp_path)
    store.append(0, snapshots(5, 6))
    after = contents(tmp_path)
    assert before.items() < after.items()
    assert len(after) == len(before) + 2


def test_epochs_with_a_gap_are_not_published(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    store.append(0, snapshots(0, 2))
    before = contents(tmp_path)
    for writer in (store, open_set(tmp_path)):
        with pytest.raises(Overtaken):
            writer.append(0, snapshots(4, 5))
        with pytest.raises(Overtaken):
            writer.append(1, snapshots(1, 2))
    assert contents(tmp_path) == before


def test_a_writer_killed_between_part_and_manifest_has_published_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_set(tmp_path)
    store.append(0, snapshots(0, 2))

    def killed(fs: pafs.FileSystem, path: str, data: bytes, *, once: bool = False) -> None:
        if "manifest" in path:
            raise KeyboardInterrupt
        put(fs, path, data, once=once)

    with monkeypatch.context() as patch:
        patch.setattr("ftd.trajectory.put", killed)
        with pytest.raises(KeyboardInterrupt):
            store.append(0, snapshots(3, 5))
        with pytest.raises(KeyboardInterrupt):
            store.append(1, snapshots(0, 2, expert=1))
    assert len(part_files(tmp_path)) == 2  # the part is there, and nobody sees it
    reader = open_set(tmp_path)
    assert reader.complete(0) == [0] and reader.complete(5) == []
    assert reader.manifest(1) is None
    point = reader.resume_point(0)
    assert point is not None and point.epoch == 2
    with pytest.raises(UserError, match="has 2 of the 4 epochs"):
        reader.params(0, 4)
    reader.append(0, snapshots(3, 5))  # the retry writes the same part over it
    assert len(part_files(tmp_path)) == 2
    np.testing.assert_array_equal(reader.params(0, 4), snapshots(4, 4)[0].params_P.numpy())


def test_a_put_that_fails_leaves_nothing(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    (taken / "inside").mkdir(parents=True)  # a folder where the file should go
    with pytest.raises(OSError, match="file"):
        put(pafs.LocalFileSystem(), str(taken), b"data")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def rename_as_before_checksums(path: Path) -> Path:
    return path.rename(path.with_name(path.name[: len("manifest-00001")] + ".json"))


def test_a_manifest_named_without_a_checksum_is_still_read(tmp_path: Path) -> None:
    new_set(tmp_path).append(0, snapshots(0, 1))
    old = rename_as_before_checksums(manifest_file(tmp_path))
    assert old.name == "manifest-00001.json"
    store = open_set(tmp_path)
    assert store.complete(1) == [0]
    np.testing.assert_array_equal(store.params(0, 1), snapshots(1, 1)[0].params_P.numpy())
    assert store.resume_point(0) is not None
    store.append(0, snapshots(2, 3))
    assert open_set(tmp_path).complete(3) == [0]
    open_set(tmp_path).verify(0)


# --- two writers of one expert --------------------------------------------------------------


def other(first: int, last: int) -> list[Snapshot]:
    """Snapshots of expert 0 as another machine trains it."""
    return [replace(s, params_P=s.params_P + 1) for s in snapshots(first, last)]


def two_writers(path: Path) -> tuple[ExpertSet, ExpertSet]:
    """Both find nothing and train from scratch."""
    writers = new_set(path), new_set(path)
    for writer in writers:
        assert writer.resume_point(0) is None
    return writers


def holds(path: Path, expected: Sequence[Snapshot]) -> None:
    reader = open_set(path)
    for s in expected:
        np.testing.assert_array_equal(reader.params(0, s.epoch), s.params_P.numpy())
    reader.verify(0)


def test_of_two_manifests_of_as_many_epochs_the_one_published_first_counts(tmp_path: Path) -> None:
    for folder, written in (("ours", snapshots(0, 2)), ("theirs", other(0, 2))):
        new_set(tmp_path / folder).append(0, written)
    for first in ("ours", "theirs"):
        both = tmp_path / f"{first} first"
        new_set(both)
        for folder in ("ours", "theirs"):
            for name, data in contents(tmp_path / folder).items():
                (both / name).parent.mkdir(exist_ok=True)
                (both / name).write_bytes(data)
                when = 1_000 if folder == first else 1_001
                os.utime(both / name, ns=(when, when))
        assert len(list(both.glob("expert-0000/manifest-00002-*"))) == 2
        holds(both, snapshots(0, 2) if first == "ours" else other(0, 2))


def test_of_two_manifests_of_the_same_moment_the_name_decides(tmp_path: Path) -> None:
    names = {}
    for folder, written in (("ours", snapshots(0, 2)), ("theirs", other(0, 2))):
        new_set(tmp_path / folder).append(0, written)
        names[manifest_file(tmp_path / folder).name] = written
    for name, data in contents(tmp_path / "theirs").items():
        (tmp_path / "ours" / name).write_bytes(data)
    for file in (tmp_path / "ours/expert-0000").iterdir():
        os.utime(file, ns=(1_000, 1_000))
    holds(tmp_path / "ours", names[min(names)])


def test_a_longer_trajectory_counts_more_than_an_earlier_one(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    store.append(0, snapshots(0, 2))
    late = manifest_file(tmp_path)
    store.append(0, snapshots(3, 4))
    os.utime(late, ns=(2**62, 2**62))
    assert open_set(tmp_path).complete(4) == [0]


def test_a_writer_that_publishes_at_the_same_moment_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked and found nothing when the first of them publishes."""
    a, b = two_writers(tmp_path)
    a.append(0, snapshots(0, 2))
    os.utime(manifest_file(tmp_path), (1_000, 1_000))  # clocks of files are coarse
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ExpertSet, "manifest", lambda *_: None)
        b.append(0, other(0, 2))
    after = contents(tmp_path)
    assert before.items() < after.items() and len(after) == len(before) + 2
    holds(tmp_path, snapshots(0, 2))
    with pytest.raises(Overtaken):
        b.append(0, other(3, 4))
    a.append(0, snapshots(3, 4))
    holds(tmp_path, snapshots(0, 4))


def test_the_writer_that_lost_learns_it_at_its_next_append(tmp_path: Path) -> None:
    a, b = two_writers(tmp_path)
    a.append(0, snapshots(0, 2))
    assert b.append(0, other(0, 2)).epochs == 2  # what stands is as good as what it has
    with pytest.raises(Overtaken, match=r"expert 0 .* another writer"):
        b.append(0, other(3, 4))
    holds(tmp_path, snapshots(0, 2))


def test_a_writer_of_more_epochs_at_once_learns_that_it_lost_at_once(tmp_path: Path) -> None:
    a, b = two_writers(tmp_path)
    a.append(0, snapshots(0, 2))
    before = contents(tmp_path)
    with pytest.raises(Overtaken):
        b.append(0, other(0, 4))
    assert contents(tmp_path) == before


def test_a_writer_learns_that_another_with_other_bits_is_further_ahead(tmp_path: Path) -> None:
    a, b = two_writers(tmp_path)
    a.append(0, snapshots(0, 8))
    assert b.append(0, other(0, 2)).epochs == 8
    assert b.append(0, other(3, 5)).epochs == 8
    with pytest.raises(Overtaken):
        b.append(0, other(6, 9))
    holds(tmp_path, snapshots(0, 8))


def test_a_writer_whose_end_is_the_others_end_learns_it_one_append_later(tmp_path: Path) -> None:
    a, b = two_writers(tmp_path)
    a.append(0, snapshots(0, 5))
    b.append(0, other(0, 2))
    b.append(0, other(3, 5))
    with pytest.raises(Overtaken):
        b.append(0, other(6, 8))
    holds(tmp_path, snapshots(0, 5))


def test_a_writer_whose_expert_was_quarantined_meanwhile_is_told(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    store.append(0, snapshots(0, 2))
    open_set(tmp_path).quarantine(0)
    with pytest.raises(Overtaken, match="taken away"):
        store.append(0, snapshots(3, 4))
    resumed = open_set(tmp_path)
    assert resumed.resume_point(0) is None
    assert not list(tmp_path.glob("expert-0000/*"))


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_writer_whose_expert_was_quarantined_and_trained_anew_is_told(
    tmp_path: Path, epochs: int
) -> None:
    """Anew up to an epoch before its own end, to it, and beyond."""
    new_set(tmp_path).append(0, snapshots(0, 2))
    store = open_set(tmp_path)
    store.params(0, 1)
    assert store.resume_point(0) is not None
    open_set(tmp_path).quarantine(0)
    open_set(tmp_path).append(0, other(0, epochs))
    with pytest.raises(Overtaken):
        store.append(0, snapshots(3, 4))
    holds(tmp_path, other(0, epochs))


def test_a_writer_that_was_told_goes_on_from_what_is_published(tmp_path: Path) -> None:
    a, b = two_writers(tmp_path)
    a.append(0, snapshots(0, 2))
    b.append(0, other(0, 2))
    with pytest.raises(Overtaken):
        b.append(0, other(3, 4))
    point = b.resume_point(0)
    assert point is not None and torch.equal(point.params_P, snapshots(2, 2)[0].params_P)
    b.append(0, snapshots(3, 4))
    holds(tmp_path, snapshots(0, 4))


@pytest.mark.parametrize("ours", [[2, 5, 8], [3, 4, 8], [8], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
@pytest.mark.parametrize("theirs", [[2, 5, 8], [5, 6], [1, 7], [8]])
@pytest.mark.parametrize("lead", [0, 1, 9])
def test_writers_of_the_same_bits_never_learn_of_each_other(
    tmp_path: Path, ours: list[int], theirs: list[int], lead: int
) -> None:
    """Whatever parts they cut, and whoever is ahead."""
    a, b = two_writers(tmp_path)
    order = ["b"] * lead + [w for _ in range(9) for w in "ab"]
    cuts = {"a": list(ours), "b": list(theirs)}
    at = {"a": 0, "b": 0}
    for who in order:
        if cuts[who]:
            last = cuts[who].pop(0)
            (a if who == "a" else b).append(0, snapshots(at[who], last))
            at[who] = last + 1
    holds(tmp_path, snapshots(0, 8))


def test_writers_of_the_same_bits_in_other_parts_at_one_moment_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two_writers(tmp_path)
    a.append(0, snapshots(0, 2))
    with monkeypatch.context() as patch:
        patch.setattr(ExpertSet, "manifest", lambda *_: None)
        b.append(0, snapshots(0, 1))
    b.append(0, snapshots(2, 2))
    b.append(0, snapshots(3, 4))
    a.append(0, snapshots(3, 6))
    holds(tmp_path, snapshots(0, 6))


def test_a_segment_never_mixes_two_trajectories(tmp_path: Path) -> None:
    new_set(tmp_path).append(0, snapshots(0, 2))
    reader = open_set(tmp_path)
    np.testing.assert_array_equal(reader.params(0, 0), snapshots(0, 0)[0].params_P.numpy())
    open_set(tmp_path).quarantine(0)
    open_set(tmp_path).append(0, other(0, 4))
    start, end = reader.segment(0, 1, 4)  # the end is beyond what it knew
    np.testing.assert_array_equal(start, other(1, 1)[0].params_P.numpy())
    np.testing.assert_array_equal(end, other(4, 4)[0].params_P.numpy())


def test_a_segment_of_an_expert_that_was_quarantined_comes_from_the_new_one(
    tmp_path: Path,
) -> None:
    store = new_set(tmp_path)
    store.append(0, snapshots(0, 2))
    store.append(0, snapshots(3, 5))
    reader = open_set(tmp_path)
    reader.params(0, 5)  # one of its files is open, the other is not
    open_set(tmp_path).quarantine(0)
    open_set(tmp_path).append(0, other(0, 5))
    start, end = reader.segment(0, 1, 5)
    np.testing.assert_array_equal(start, other(1, 1)[0].params_P.numpy())
    np.testing.assert_array_equal(end, other(5, 5)[0].params_P.numpy())


def test_a_manifest_that_goes_while_it_is_looked_for_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_set(tmp_path).append(0, snapshots(0, 2))
    reader = open_set(tmp_path)
    monkeypatch.setattr(
        "ftd.trajectory.manifest_names", lambda _: ["manifest-00002-0123456789ab.json"]
    )
    assert reader.manifest(0) is None


# --- quarantine -----------------------------------------------------------------------------


def test_quarantine_takes_an_expert_out_of_the_set(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    for i in range(3):
        store.append(i, snapshots(0, 2, expert=i))
    np.testing.assert_array_equal(store.params(1, 0), snapshots(0, 0, expert=1)[0].params_P)
    before = contents(tmp_path / "expert-0001")
    where = Path(store.quarantine(1))
    assert where.parent == tmp_path / "quarantine" and where.name.startswith("expert-0001-")
    assert contents(where) == before
    assert store.complete(0) == store.experts() == [0, 2]
    for reader in (store, open_set(tmp_path)):
        with pytest.raises(UserError, match=r"expert 1 .* has none of the 0 epochs"):
            reader.params(1, 0)


def test_an_expert_quarantined_twice_lies_there_twice(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    for _ in range(2):
        store.append(0, snapshots(0, 2))
        store.quarantine(0)
    assert len(list((tmp_path / "quarantine").iterdir())) == 2


def test_where_folders_cannot_be_moved_the_files_are(tmp_path: Path) -> None:
    below = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    store = ExpertSet(below, "one", IDENTITY)
    store.create()
    store.append(0, snapshots(0, 1))
    before = contents(tmp_path / "one/expert-0000")
    assert contents(tmp_path / store.quarantine(0)) == before
    assert not (tmp_path / "one/expert-0000").exists()


# --- strangers and damage -------------------------------------------------------------------


def test_a_set_of_another_configuration_at_the_same_place_is_refused(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    other = {"schema": 1, "experts": {"rho": 0.02}}
    with pytest.raises(UserError, match=f"another configuration .*{store.key}"):
        ExpertSet(pafs.LocalFileSystem(), str(tmp_path), other)


def test_a_folder_that_is_not_a_set_is_refused_by_readers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not an expert set: it has no set\.json"):
        open_set(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": 1}', '{"identity": 1}'])
def test_a_damaged_set_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(DamagedError, match=r"set\.json is damaged"):
        open_set(tmp_path)


def test_an_expert_of_another_set_is_refused(tmp_path: Path) -> None:
    new_set(tmp_path / "a").append(0, snapshots(0, 1))
    b = new_set(tmp_path / "b", {"schema": 1, "experts": {"rho": 0.02}})
    (tmp_path / "a/expert-0000").rename(tmp_path / "b/expert-0000")
    with pytest.raises(DamagedError, match="belongs to expert 0 of set"):
        b.params(0, 1)


def test_a_part_of_another_expert_is_refused(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    store.append(0, snapshots(0, 1, expert=0))
    store.append(1, snapshots(0, 1, expert=1))
    part_files(tmp_path, 0)[0].write_bytes(part_files(tmp_path, 1)[0].read_bytes())
    with pytest.raises(DamagedError, match="holds expert 1 of set"):
        open_set(tmp_path).params(0, 1)


def test_a_newer_schema_version_is_refused_by_name(tmp_path: Path) -> None:
    new_set(tmp_path).append(0, snapshots(0, 1))
    path = manifest_file(tmp_path)
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(UserError, match="schema version 2; this program reads version 1") as error:
        open_set(tmp_path).params(0, 1)
    assert path.name in str(error.value) and not isinstance(error.value, DamagedError)


def test_a_set_of_a_newer_schema_version_is_refused_by_name(tmp_path: Path) -> None:
    new_set(tmp_path)
    path = tmp_path / "set.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    for identity_ in (None, IDENTITY):
        with pytest.raises(UserError, match=r"set\.json has schema version 2") as error:
            ExpertSet(pafs.LocalFileSystem(), str(tmp_path), identity_)
        assert not isinstance(error.value, DamagedError)
    path.write_text(json.dumps([1]))
    with pytest.raises(DamagedError):
        open_set(tmp_path)


def test_a_set_file_without_a_schema_version_is_of_the_first(tmp_path: Path) -> None:
    new_set(tmp_path).append(0, snapshots(0, 1))
    (tmp_path / "set.json").write_text(json.dumps({"identity": IDENTITY}))
    assert open_set(tmp_path).complete(1) == [0]


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"schema": 1}', b"\xff\xfe\x00"])
def test_a_damaged_manifest_is_named(tmp_path: Path, data: bytes) -> None:
    new_set(tmp_path).append(0, snapshots(0, 1))
    path = manifest_file(tmp_path)
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=path.name):
        open_set(tmp_path).params(0, 1)


def test_no_flipped_byte_of_a_manifest_goes_unseen(tmp_path: Path) -> None:
    new_set(tmp_path).append(0, snapshots(0, 1))
    path = manifest_file(tmp_path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytes([whole[position] ^ 0x01])
        path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        with pytest.raises(UserError, match=path.name):  # of the version: that is a newer one
            open_set(tmp_path).manifest(0)


def test_a_flipped_byte_among_the_weights_is_found_on_reading(tmp_path: Path) -> None:
    new_set(tmp_path).append(0, snapshots(0, 3))
    file = part_files(tmp_path)[0]
    data = bytearray(file.read_bytes())
    data[data.index(snapshots(2, 2)[0].params_P.numpy().tobytes()) + 7] ^= 1
    file.write_bytes(data)
    reader = open_set(tmp_path)
    with pytest.raises(DamagedError, match=file.name):
        reader.params(0, 2)
    with pytest.raises(DamagedError, match=file.name):
        reader.verify(0)
    np.testing.assert_array_equal(reader.params(0, 1), snapshots(1, 1)[0].params_P.numpy())


def test_no_flipped_byte_gives_other_weights(tmp_path: Path) -> None:
    """Headers, pages and footer: reading gives what was written, or names the file."""
    new_set(tmp_path).append(0, snapshots(0, 1))
    file = part_files(tmp_path)[0]
    whole = file.read_bytes()
    expected = snapshots(1, 1)[0].params_P.numpy()
    messages = []
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            np.testing.assert_array_equal(open_set(tmp_path).params(0, 1), expected)
        except DamagedError as error:
            messages.append(str(error))
        if position % 50 == 0:
            with pytest.raises(DamagedError, match=file.name):
                open_set(tmp_path).verify(0)
    assert len(messages) > expected.nbytes
    assert all(file.name in message for message in messages)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_part_is_named(tmp_path: Path, keep: float) -> None:
    new_set(tmp_path).append(0, snapshots(0, 3))
    file = part_files(tmp_path)[0]
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    for reads in (lambda s: s.params(0, 3), lambda s: s.verify(0), lambda s: s.resume_point(0)):
        with pytest.raises(DamagedError, match=file.name):
            reads(open_set(tmp_path))


class OutOfReach(pafs.FileSystemHandler):
    """A folder where one file cannot be reached for now."""

    def __init__(self, folder: Path, name: str):
        self._fs = pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem())
        self._name = name

    def get_type_name(self) -> str:
        return "flaky"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return self._fs.get_file_info(paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self._fs.get_file_info(selector)

    def open_input_file(self, path: str) -> Any:
        if path.endswith(self._name):
            raise OSError("the server is out of reach")
        return self._fs.open_input_file(path)

    open_input_stream = open_input_file

    def _never(self, *_: Any) -> None:
        raise NotImplementedError

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _never
    delete_file = move = copy_file = open_output_stream = open_append_stream = _never


def test_files_out_of_reach_are_not_damaged_files(tmp_path: Path) -> None:
    """Whoever quarantines damage must not do it because a network is down."""
    new_set(tmp_path).append(0, snapshots(0, 3))
    file = part_files(tmp_path)[0]
    for reads in (
        lambda s: s.params(0, 3),
        lambda s: s.segment(0, 1, 3),
        lambda s: s.verify(0),
        lambda s: s.history(0),
        lambda s: s.resume_point(0),
    ):
        store = ExpertSet(pafs.PyFileSystem(OutOfReach(tmp_path, file.name)), "")
        with pytest.raises(OSError, match="out of reach"):
            reads(store)
    open_set(tmp_path).verify(0)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    new_set(tmp_path).append(0, snapshots(0, 3))
    file = part_files(tmp_path)[0]
    file.unlink()
    for reads in (lambda s: s.params(0, 3), lambda s: s.verify(0), lambda s: s.history(0)):
        with pytest.raises(DamagedError, match=file.name):
            reads(open_set(tmp_path))


def test_verify_is_content_with_a_whole_expert(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    store.append(0, snapshots(0, 3))
    store.append(0, snapshots(4, 5))
    open_set(tmp_path).verify(0)


# --- snapshots in fewer bits ----------------------------------------------------------------


def in_bits(precision: str) -> dict[str, Any]:
    return IDENTITY | {"snapshots": precision}


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_snapshots_in_fewer_bits_are_rounded_as_torch_rounds(
    tmp_path: Path, precision: str
) -> None:
    dtype = getattr(torch, precision)
    odd = torch.tensor([0.0, -0.0, 1 / 3, 65504, -(2.0**-24), 1e-8, 1.0009765625, 0.1, 3, -7, 8, 9])
    written = [*snapshots(0, 2), replace(snapshots(3, 3)[0], params_P=odd)]
    store = new_set(tmp_path, in_bits(precision))
    store.append(0, written[:3])
    store.append(0, written[3:])
    reader = open_set(tmp_path)
    assert reader.precision == precision
    for s in written:
        read = reader.params(0, s.epoch)
        assert read.dtype == np.float32
        assert read.tobytes() == s.params_P.to(dtype).float().numpy().tobytes()
    start, end = reader.segment(0, 1, 3)
    assert start.dtype == end.dtype == np.float32
    reader.verify(0)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_training_resumes_from_the_whole_parameters(tmp_path: Path, precision: str) -> None:
    store = new_set(tmp_path, in_bits(precision))
    written = snapshots(0, 4, momentum=True)
    for first, last in ((0, 2), (3, 4)):
        store.append(0, written[first : last + 1])
        point = open_set(tmp_path).resume_point(0)
        assert point is not None and point.momentum_P is not None
        assert point.params_P.dtype == point.momentum_P.dtype == torch.float32
        assert torch.equal(point.params_P, written[last].params_P)
        assert torch.equal(point.momentum_P, written[last].momentum_P)
        point.params_P.add_(1)  # must be the caller's own memory


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_fewer_bits_take_half_the_disk(tmp_path: Path, precision: str) -> None:
    long = [replace(s, params_P=torch.randn(100_000)) for s in snapshots(0, 5)]
    sizes = {}
    for bits in ("float32", precision):
        store = new_set(tmp_path / bits, in_bits(bits))
        store.append(0, long)
        sizes[bits] = store.size()
    # six halves and a whole one of the end, to resume from
    assert sizes[precision] == pytest.approx(sizes["float32"] * (6 / 2 + 1) / 6, rel=0.01)


@pytest.mark.parametrize("size", [65520.0, -1e9])
def test_a_parameter_too_large_for_float16_publishes_nothing(tmp_path: Path, size: float) -> None:
    store = new_set(tmp_path, in_bits("float16"))
    store.append(0, snapshots(0, 2))
    before = contents(tmp_path)
    large = snapshots(3, 4)
    large[0].params_P[5] = size
    with pytest.raises(UserError, match=r"float16 cannot hold .* Take bfloat16 or float32"):
        store.append(0, large)
    with pytest.raises(UserError, match=re.escape(f"{abs(size):g}")):
        store.append(1, [replace(large[0], epoch=0)])
    assert contents(tmp_path) == before


def test_sets_in_other_bits_are_other_sets(tmp_path: Path) -> None:
    keys = {new_set(tmp_path / b, in_bits(b)).key for b in ("float16", "bfloat16")}
    assert len(keys | {new_set(tmp_path / "whole").key}) == 3
    with pytest.raises(UserError, match="another configuration"):
        ExpertSet(pafs.LocalFileSystem(), str(tmp_path / "whole"), in_bits("float16"))


def test_a_precision_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keeps snapshots in int8; this program knows float32"):
        new_set(tmp_path, in_bits("int8"))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_writers_whose_bits_differ_only_below_the_precision_are_told_apart(
    tmp_path: Path, precision: str
) -> None:
    a, b = (new_set(tmp_path, in_bits(precision)) for _ in range(2))
    close = [
        replace(s, params_P=s.params_P * (1 + torch.finfo(torch.float32).eps))
        for s in snapshots(0, 4)
    ]
    a.append(0, snapshots(0, 2))
    b.append(0, close[:3])
    with pytest.raises(Overtaken):
        b.append(0, close[3:])


# --- with real experts ----------------------------------------------------------------------

CONFIG = ExpertConfig(network="ConvNetD1W8", epochs=3, lr=0.1, momentum=0.5, rho=0.05)


def build(
    data: Dataset, path: Path, until: Sequence[int], expert: int = 1, precision: str = "float32"
) -> ExpertSet:
    """An expert trained and published up to each of ``until`` in turn."""
    who = identity(CONFIG, data.description, data.strategy, Numerics(), precision)
    for epochs in until:
        store = new_set(path, who)  # a new process knows nothing of the last
        resume = store.resume_point(expert)
        store.append(expert, list(train_expert(CONFIG, data, expert, epochs=epochs, resume=resume)))
    return store


def test_the_same_seed_twice_gives_the_same_files_byte_for_byte(
    digits: Dataset, tmp_path: Path
) -> None:
    build(digits, tmp_path / "a", [2])
    torch.manual_seed(99)  # nothing global may matter
    build(digits, tmp_path / "b", [2])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_topped_up_epochs_equal_those_asked_for_at_once(digits: Dataset, tmp_path: Path) -> None:
    at_once = build(digits, tmp_path / "a", [3])
    topped_up = build(digits, tmp_path / "b", [1, 2, 3])
    for epoch in range(4):
        np.testing.assert_array_equal(at_once.params(1, epoch), topped_up.params(1, epoch))
    assert at_once.history(1)[1:] == topped_up.history(1)[1:]
    a, b = at_once.resume_point(1), topped_up.resume_point(1)
    assert a is not None and b is not None and a.momentum_P is not None and b.momentum_P is not None
    assert torch.equal(a.momentum_P, b.momentum_P)


def test_an_expert_trained_anew_after_its_quarantine_gives_the_same_files(
    digits: Dataset, tmp_path: Path
) -> None:
    store = build(digits, tmp_path, [2])
    before = contents(tmp_path)
    where = Path(store.quarantine(1))
    build(digits, tmp_path, [2])
    quarantined = str(where.relative_to(tmp_path))
    after = {k: v for k, v in contents(tmp_path).items() if not k.startswith(quarantined)}
    assert after == before


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_topped_up_epochs_in_fewer_bits_equal_those_asked_for_at_once(
    digits: Dataset, tmp_path: Path, precision: str
) -> None:
    """Training goes on from the whole parameters, not from the rounded ones."""
    whole = build(digits, tmp_path / "whole", [3])
    at_once = build(digits, tmp_path / "a", [3], precision=precision)
    topped_up = build(digits, tmp_path / "b", [1, 2, 3], precision=precision)
    dtype = getattr(torch, precision)
    for epoch in range(4):
        np.testing.assert_array_equal(at_once.params(1, epoch), topped_up.params(1, epoch))
        kept = torch.from_numpy(whole.params(1, epoch).copy()).to(dtype)
        np.testing.assert_array_equal(at_once.params(1, epoch), kept.float().numpy())
    points = [s.resume_point(1) for s in (whole, at_once, topped_up)]
    for point in points[1:]:
        assert point is not None and points[0] is not None
        assert torch.equal(point.params_P, points[0].params_P)
        assert torch.equal(point.momentum_P, points[0].momentum_P)
