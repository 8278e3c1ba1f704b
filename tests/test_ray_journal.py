"""The study's journal on an object store: what is new travels, and no crash loses a line."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from s3_helpers import FaultProxy, s3_of_the_environment

from ftd.errors import UserError
from ftd_ray import journal as journal_module
from ftd_ray.journal import MERGED, SEGMENTS, STUDY_FILE, Journal, read_journal, set_journal_aside
from ftd_ray.search import SweepStudy, has_begun, read_study
from ftd_ray.sections import SearchConfig
from ftd_ray.space import parse_dimension
from ftd_ray.storage import files_below, join, read_bytes, remove_file, write_bytes


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultProxy]:
    with s3_of_the_environment() as proxy:
        yield proxy


@pytest.fixture
def folder(s3, request) -> str:
    return f"s3://buffers/{request.node.name.partition('[')[0]}-{id(request)}"


def append(journal: Journal, *texts: str) -> None:
    with open(journal.path, "ab") as f:
        f.write("".join(f"{t}\n" for t in texts).encode())


def lines(folder: str) -> list[str]:
    return (read_journal(folder) or b"").decode().splitlines()


def segments(folder: str) -> list[str]:
    return files_below(join(folder, SEGMENTS))


def written(folder: str, *texts: str) -> Journal:
    """A journal that has put each of these lines by itself."""
    journal = Journal(folder)
    for text in texts:
        append(journal, text)
        journal.sync(force=True)
    return journal


# --- what travels ---------------------------------------------------------------------------


def test_what_travels_for_a_line_does_not_grow_with_the_lines_before(s3, folder):
    journal = written(folder, *(f"line {i:04d}" for i in range(2)))
    sizes = []
    for i in range(3 * MERGED):
        s3.reset_counts()
        append(journal, f"line {i + 2:04d}")
        journal.sync(force=True)
        sizes.append(s3.received["PUT"])
    usual = sizes[0]  # of a line of 10 bytes, and what S3 puts around it
    assert usual < 100
    assert sorted(sizes)[: 3 * MERGED - 3] == [usual] * (3 * MERGED - 3)
    assert max(sizes) <= 2 * usual + MERGED * 10  # merges of so many lines
    assert len(segments(folder)) < 2 * MERGED
    assert lines(folder) == [f"line {i:04d}" for i in range(3 * MERGED + 2)]


def test_nothing_new_costs_no_request(s3, folder):
    journal = written(folder, "one", "two")
    s3.reset_counts()
    journal.sync(force=True)
    assert not s3.requests


def test_half_a_line_waits_for_its_other_half(s3, folder):
    journal = written(folder, "one")
    with open(journal.path, "ab") as f:
        f.write(b"two\nthr")
    journal.sync(force=True)
    assert read_bytes(join(folder, SEGMENTS, *segments(folder))) == b"two\n"
    with open(journal.path, "ab") as f:
        f.write(b"ee\n")
    journal.sync(force=True)
    assert lines(folder) == ["one", "two", "three"]


def test_threads_that_sync_at_the_same_time_put_every_line_once(s3, folder):
    journal = Journal(folder)
    for i in range(8):
        append(journal, f"{i}")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: journal.sync(force=True), range(4)))
    assert lines(folder) == [str(i) for i in range(8)]
    assert len(segments(folder)) == 7


def test_segments_of_segments_are_merged_in_their_turn(s3, folder, monkeypatch):
    monkeypatch.setattr(journal_module, "MERGED", 3)
    journal = Journal(folder)
    for i in range(40):
        append(journal, f"{i}")
        journal.sync(force=True)
        assert len(segments(folder)) <= 2 * 4  # two of each level at most
        assert lines(folder) == [str(j) for j in range(i + 1)]


def test_journal_that_is_closed_is_one_file(s3, folder):
    written(folder, "one", "two", "three").close()
    assert read_bytes(join(folder, STUDY_FILE)) == b"one\ntwo\nthree\n"
    assert segments(folder) == []


def test_journal_of_one_file_goes_on(s3, folder):
    write_bytes(join(folder, STUDY_FILE), b"old\n")  # as all were once
    written(folder, "new", "newer")
    assert lines(folder) == ["old", "new", "newer"]
    written(folder, "newest").close()
    assert read_bytes(join(folder, STUDY_FILE)) == b"old\nnew\nnewer\nnewest\n"


def test_no_journal_is_none(s3, folder):
    assert read_journal(folder) is None
    journal = Journal(folder)
    journal.sync(force=True)
    journal.close()
    assert read_journal(folder) is None


# --- who is killed --------------------------------------------------------------------------


class Killed(BaseException):
    """The driver is gone."""


@pytest.fixture
def dies_after(monkeypatch) -> Callable[[int], None]:
    """The driver dies before the so-and-so-many-th next thing that it does to the store."""
    left = [10**9]

    def arrange(count: int) -> None:
        left[0] = count

    def mortal(act: Callable[..., Any]) -> Callable[..., Any]:
        def do(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return act(*args)

        return do

    for name in ("write_bytes", "remove_file", "move_file", "remove_tree"):
        monkeypatch.setattr(journal_module, name, mortal(getattr(journal_module, name)))
    return arrange


@pytest.mark.parametrize("life", range(12))
def test_driver_killed_at_any_put_or_deletion_loses_no_line_that_was_synced(
    s3, folder, monkeypatch, dies_after, life
):
    monkeypatch.setattr(journal_module, "MERGED", 3)
    said: list[str] = []
    for session in range(4):
        dies_after(10**9)
        journal = Journal(folder)
        if session < 3:
            dies_after(life)
        try:
            for i in range(4):
                append(journal, f"{session}-{i}")
                journal.sync(force=True)
                said.append(f"{session}-{i}")
            journal.close()
        except Killed:
            there = lines(folder)  # the last put may have arrived, with a line nobody was told of
            assert there[: len(said)] == said
            assert there[len(said) :] in ([], [f"{session}-{i}"])
            said = there
    assert lines(folder) == said
    assert segments(folder) == [] and f"{3}-{3}" == said[-1]


def test_line_whose_put_was_answered_too_late_is_there_once(s3, folder, monkeypatch):
    journal = written(folder, "one", "two")
    put = write_bytes

    def lost(*args: Any) -> None:
        put(*args)
        raise OSError("no answer")

    append(journal, "three")
    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "write_bytes", lost)
        with pytest.raises(OSError, match="no answer"):
            journal.sync(force=True)
    append(journal, "four")
    journal.sync(force=True)
    assert lines(folder) == ["one", "two", "three", "four"]


@pytest.mark.parametrize("kept", [0, 3, 8, 11])
def test_truncated_last_segment_costs_its_torn_line_and_the_journal_goes_on(s3, folder, kept):
    journal = written(folder, "beginning", "before")
    append(journal, "three 1", "three 2")
    journal.sync(force=True)
    last = join(folder, SEGMENTS, max(segments(folder)))
    data = read_bytes(last)
    assert data is not None
    write_bytes(last, data[:kept])
    whole = ["beginning", "before", *(["three 1"] if kept >= 8 else [])]
    assert lines(folder) == whole
    again = written(folder, "four", "five")
    assert lines(folder) == [*whole, "four", "five"]
    again.close()
    assert (
        read_bytes(join(folder, STUDY_FILE))
        == "".join(f"{t}\n" for t in [*whole, "four", "five"]).encode()
    )


@pytest.mark.parametrize(
    ("what", "words"),
    [("middle", "what follows on byte 4 is gone"), ("beginning", "its beginning is gone")],
)
def test_segment_that_is_missing_is_said_and_nothing_of_it_is_skipped(s3, folder, what, words):
    written(folder, "one", "two", "three")
    gone = join(folder, STUDY_FILE)
    if what == "middle":
        gone = join(folder, SEGMENTS, min(segments(folder)))
    remove_file(gone)
    for look in (read_journal, Journal):
        with pytest.raises(UserError, match=words) as caught:
            look(folder)
        assert "\n" not in str(caught.value)


def test_segments_of_another_history_are_not_put_together(s3, folder):
    written(folder, "one", "two")
    write_bytes(join(folder, STUDY_FILE), b"eno\n")  # a writer that knew no segments
    with pytest.raises(UserError, match="is damaged"):
        read_journal(folder)


def test_reader_finds_all_lines_while_the_writer_merges(s3, folder, monkeypatch):
    monkeypatch.setattr(journal_module, "MERGED", 3)
    journal = written(folder, "0", "1", "2")
    real, turns = journal_module.read_bytes, [True]

    def slow(uri: str) -> bytes | None:
        if SEGMENTS in uri and turns:
            turns.clear()
            append(journal, "3", "4")
            journal.sync(force=True)  # merges all three and deletes two
        return real(uri)

    monkeypatch.setattr(journal_module, "read_bytes", slow)
    assert lines(folder) == ["0", "1", "2", "3", "4"]


# --- aside ----------------------------------------------------------------------------------


def test_journal_set_aside_is_whole_and_leaves_no_segment(s3, folder):
    written(folder, "one", "two")
    set_journal_aside(folder, f"{STUDY_FILE}.12345678")
    assert read_bytes(join(folder, f"{STUDY_FILE}.12345678")) == b"one\ntwo\n"
    assert read_journal(folder) is None and segments(folder) == []


@pytest.mark.parametrize("life", range(3))
def test_killed_while_it_sets_a_journal_aside_does_it_again(s3, folder, dies_after, life):
    written(folder, "one", "two")
    dies_after(life)
    with pytest.raises(Killed):
        set_journal_aside(folder, f"{STUDY_FILE}.12345678")
    assert lines(folder) == ["one", "two"]
    dies_after(10**9)
    set_journal_aside(folder, f"{STUDY_FILE}.12345678")
    assert read_bytes(join(folder, f"{STUDY_FILE}.12345678")) == b"one\ntwo\n"


# --- the study ------------------------------------------------------------------------------


def study_in(folder: str, trials: int) -> SweepStudy:
    return SweepStudy(
        folder,
        name="study",
        space=[parse_dimension("experts.rho", {"float": [0.0, 1.0]})],
        search=SearchConfig(trials=trials, sampler="random", pruner="none"),
        seed=0,
        every=1,
        steps=1,
    )


def finish_one(study: SweepStudy) -> None:
    suggestion = study.next()
    assert suggestion is not None
    study.report(suggestion.number, 1, 0.5)
    study.complete(suggestion.number)


def test_what_a_trial_sends_does_not_grow_with_the_trials_that_are_done(s3, folder):
    study = study_in(folder, 3 * MERGED)
    sizes = []
    for _ in range(3 * MERGED):
        s3.reset_counts()
        finish_one(study)
        sizes.append(s3.received["PUT"])
    usual = sorted(sizes[1:])[MERGED]
    assert sum(size > 1.2 * usual for size in sizes[1:]) <= 4  # merges, which every byte meets once
    assert max(sizes[2 * MERGED :]) <= (MERGED + 2) * usual
    again = study_in(folder, 3 * MERGED)  # without close()
    assert [e.number for e in again.ended()] == list(range(3 * MERGED))
    assert has_begun(folder)
    ended, _ = read_study(folder) or ([], None)
    assert len(ended) == 3 * MERGED
    for line in lines(folder):
        json.loads(line)
