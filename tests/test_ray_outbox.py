"""The outbox: in order, without loss, without waiting, and with what is said of it."""

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftd_ray.tracking import outbox
from ftd_ray.tracking.outbox import Outbox


class Server:
    """Takes what it is sent while it is up, and not what it refuses."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.batches: list[list[Any]] = []
        self.up = True
        self.refuses: set[Any] = set()
        self.faults: set[Any] = set()
        self.tries = 0

    def take(self, what: Any) -> None:
        self.take_all([what])

    def take_all(self, parts: Any) -> None:
        self.tries += 1
        if not self.up:
            raise ConnectionError("nobody there")
        if self.refuses & set(parts):
            raise ValueError(f"no {self.refuses}")
        if self.faults & set(parts):
            raise TimeoutError("it hurts")
        self.got += parts
        self.batches.append(list(parts))


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def box(server: Server, monkeypatch) -> Iterator[Outbox]:
    monkeypatch.setattr(outbox, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(outbox, "LONGEST_WAIT", 0.02)
    made = Outbox(
        "The server",
        lambda error: isinstance(error, (ConnectionError, TimeoutError)),
        lambda error: isinstance(error, TimeoutError) and server.up,
    )
    yield made
    made.close()


def put(box: Outbox, server: Server, *what: Any) -> None:
    for one in what:
        box.put(lambda one=one: server.take(one))


def until(look: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not look():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


class Gate:
    """An entry that is being sent until it is opened."""

    def __init__(self, box: Outbox) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        box.put(self)
        assert self.reached.wait(20)

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(20)


def test_entries_are_sent_in_order_by_one_other_thread(box, server):
    threads = []
    for i in range(200):
        put(box, server, i)
        box.put(lambda: threads.append(threading.current_thread()))
    assert box.drain(20) == 0
    assert server.got == list(range(200))
    assert set(threads) != {threading.current_thread()} and len(set(threads)) == 1


def test_putting_does_not_wait_for_what_is_being_sent(box, server):
    gate = Gate(box)
    put(box, server, *range(1000))
    assert server.got == []
    assert len(box) == 1001
    gate.opened.set()
    assert box.drain(20) == 0
    assert server.got == list(range(1000))


def test_outage_loses_nothing_keeps_the_order_and_is_said_once(box, server):
    server.up = False
    put(box, server, *range(5))
    until(lambda: server.tries > 3)
    put(box, server, 5, 6)
    (said,) = box.new_notes()
    assert said.startswith("The server does not answer (nobody there)")
    server.up = True
    assert box.drain(20) == 0
    assert server.got == list(range(7))
    assert box.new_notes() == ["The server answers again; 7 entries were sent."]
    assert box.new_notes() == []
    assert box.refused == 0


def test_outage_is_said_by_its_first_cause(box, server):
    def fail() -> None:
        server.tries += 1
        try:
            raise ConnectionRefusedError("refused")
        except OSError as error:
            raise ConnectionError("a long story") from error

    box.put(fail)
    until(lambda: server.tries > 1)
    (said,) = box.new_notes()
    assert said.startswith("The server does not answer (refused)")


def test_server_that_comes_and_goes_is_one_outage_until_all_of_it_is_sent(box, server):
    server.up = False
    put(box, server, 0)
    box.put(lambda: setattr(server, "up", False))
    put(box, server, 1)
    until(lambda: server.tries > 1)
    server.up = True
    until(lambda: server.got == [0])
    tries = server.tries
    until(lambda: server.tries > tries)
    server.up = True
    assert box.drain(20) == 0
    first, second = box.new_notes()
    assert "does not answer" in first and "answers again" in second


def test_refused_entry_is_dropped_alone_and_its_kind_is_said_once(box, server):
    server.refuses = {3, 5}
    put(box, server, *range(7))
    assert box.drain(20) == 0
    assert server.got == [0, 1, 2, 4, 6]
    (said,) = box.new_notes()
    assert "refuses an entry (no {3, 5})" in said and "ValueError" in said
    assert box.refused == 2


def test_entry_on_which_alone_the_server_fails_is_dropped_after_some_tries(box, server):
    server.faults = {1}
    put(box, server, 0, 1, 2)
    assert box.drain(20) == 0
    assert server.got == [0, 2]
    assert box.refused == 1
    assert server.tries >= outbox.TRIES


def test_entry_is_never_dropped_while_the_server_takes_no_other(box, server):
    server.up = False
    put(box, server, 0)
    until(lambda: server.tries > 2 * outbox.TRIES)
    server.up = True
    assert box.drain(20) == 0
    assert server.got == [0] and box.refused == 0


def test_waits_between_tries_grow_to_a_limit(server, monkeypatch):
    waits = []
    box = Outbox("The server", lambda error: True)

    def wait(seconds: float) -> None:
        waits.append(seconds)
        server.up = len(waits) == 8

    monkeypatch.setattr(box, "_wait", wait)
    server.up = False
    put(box, server, 0)
    assert box.drain(20) == 0
    box.close()
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


def test_parts_of_one_key_in_a_row_are_sent_together(box, server):
    gate = Gate(box)
    for key, part in (("a", 1), ("a", 2), ("b", 3), ("a", 4), ("a", 5)):
        box.put_part(server.take_all, part, key)
    put(box, server, 6)
    box.put_part(server.take_all, 7, "a")
    gate.opened.set()
    assert box.drain(20) == 0
    assert server.batches == [[1, 2], [3], [4, 5], [6], [7]]


def test_refused_part_is_dropped_without_those_that_were_sent_with_it(box, server):
    gate = Gate(box)
    server.refuses = {2}
    for part in range(5):
        box.put_part(server.take_all, part, "a")
    gate.opened.set()
    assert box.drain(20) == 0
    assert server.got == [0, 1, 3, 4]
    assert box.refused == 1


def test_drain_counts_what_is_left_and_gives_up_early_in_an_outage(box, server):
    server.up = False
    put(box, server, *range(3))
    assert box.drain(1000, patience=0.05) == 3
    assert box.drain(0.05) == 3
    server.up = True
    assert box.drain(1000, patience=20) == 0


def test_drain_tries_at_once_what_waits_for_its_next_try(box, server, monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_WAIT", 1000)
    monkeypatch.setattr(outbox, "LONGEST_WAIT", 1000)
    server.up = False
    put(box, server, 0)
    until(lambda: server.tries)
    assert box.drain(0.05) == 1
    monkeypatch.setattr(outbox, "FIRST_WAIT", 0.01)
    server.up = True
    assert box.drain(20) == 0


def test_kept_files_lie_on_disk_alone_until_they_are_sent(box, server):
    gate = Gate(box)
    data = bytes(100_000)
    references = sys.getrefcount(data)
    paths = [box.keep("picture.png", data) for _ in range(3)]
    for path in paths:
        box.put(lambda path=path: server.take(path.read_bytes()), [path])
    gc.collect()
    assert sys.getrefcount(data) == references
    assert len(set(paths)) == 3 and all(p.read_bytes() == data for p in paths)
    gate.opened.set()
    assert box.drain(20) == 0
    assert server.got == [data] * 3
    assert not any(p.exists() for p in paths)


def test_files_of_refused_and_of_unsent_entries_are_removed_too(box, server):
    refused, unsent = box.keep("one", b"1"), box.keep("two", b"2")
    server.refuses = {"refused"}
    box.put(lambda: server.take("refused"), [refused])
    until(lambda: not refused.exists())
    server.up = False
    box.put(lambda: server.take("unsent"), [unsent])
    until(lambda: server.tries > 2)
    assert unsent.exists()
    box.close()
    assert not unsent.exists() and not Path(unsent).parents[1].exists()


def test_closed_outbox_sends_nothing_more_and_begins_anew(box, server):
    server.up = False
    put(box, server, 0)
    until(lambda: server.tries > 1)
    box.close()
    server.up = True
    put(box, server, 1)
    assert box.drain(20) == 0
    assert server.got == [1]


def test_what_is_put_first_is_sent_before_all_that_waits(box, server):
    gate = Gate(box)
    put(box, server, 0, 1)
    box.put_first(lambda: server.take("first"))
    box.put_first(lambda: server.take("second"))
    put(box, server, 2)
    assert len(box) == 6
    gate.opened.set()
    assert box.drain(20) == 0
    assert server.got == ["first", "second", 0, 1, 2]


def test_what_is_put_first_goes_before_what_the_server_fails_on_and_does_not_wait_for_it(
    box, server, monkeypatch
):
    monkeypatch.setattr(outbox, "FIRST_WAIT", 1000)
    monkeypatch.setattr(outbox, "LONGEST_WAIT", 1000)
    server.faults = {0}
    put(box, server, 0, 1)
    until(lambda: server.tries)
    monkeypatch.setattr(outbox, "FIRST_WAIT", 0.01)
    box.put_first(lambda: server.take("first"))
    until(lambda: server.got == ["first"])
    server.faults = set()
    assert box.drain(20) == 0
    assert server.got == ["first", 0, 1]


def test_refused_entry_that_was_put_first_takes_none_of_the_others_with_it(box, server):
    server.refuses = {"first"}
    gate = Gate(box)
    for i in range(4):
        box.put_part(server.take_all, i, key="a")
    box.put_first(lambda: server.take("first"))
    gate.opened.set()
    assert box.drain(20) == 0
    assert (server.got, box.refused) == ([0, 1, 2, 3], 1)
