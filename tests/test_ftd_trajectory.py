"""Expert sets on disk: round trips, and every way that a file can be wrong."""

import json
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
from ftd.trajectory import OPEN_FILES, DamagedError, ExpertSet, put

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
    with pytest.raises(AssertionError):
        store.append(0, snapshots(4, 5))
    assert contents(tmp_path) == before


def test_a_writer_killed_between_part_and_manifest_has_published_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_set(tmp_path)
    store.append(0, snapshots(0, 2))
    real_put = ExpertSet._put

    def killed(self: ExpertSet, path: str, data: bytes, *, once: bool = False) -> None:
        if "manifest" in path:
            raise KeyboardInterrupt
        real_put(self, path, data, once=once)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertSet, "_put", killed)
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


# --- strangers and damage -------------------------------------------------------------------


def test_a_set_of_another_configuration_at_the_same_place_is_refused(tmp_path: Path) -> None:
    store = new_set(tmp_path)
    other = {"schema": 1, "experts": {"rho": 0.02}}
    with pytest.raises(UserError, match=f"another configuration .*{store.key}"):
        ExpertSet(pafs.LocalFileSystem(), str(tmp_path), other)


def test_a_folder_that_is_not_a_set_is_refused_by_readers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not an expert set: it has no set\.json"):
        open_set(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": 1}'])
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
    path = tmp_path / "expert-0000/manifest-00001.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(UserError, match="schema version 2; this program reads version 1"):
        open_set(tmp_path).params(0, 1)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"schema": 1}', b"\xff\xfe\x00"])
def test_a_damaged_manifest_is_named(tmp_path: Path, data: bytes) -> None:
    new_set(tmp_path).append(0, snapshots(0, 1))
    path = tmp_path / "expert-0000/manifest-00001.json"
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"manifest-00001\.json"):
        open_set(tmp_path).params(0, 1)


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


# --- with real experts ----------------------------------------------------------------------

CONFIG = ExpertConfig(network="ConvNetD1W8", epochs=3, lr=0.1, momentum=0.5, rho=0.05)


def build(data: Dataset, path: Path, until: Sequence[int], expert: int = 1) -> ExpertSet:
    """An expert trained and published up to each of ``until`` in turn."""
    who = identity(CONFIG, data.description, data.strategy, Numerics())
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
