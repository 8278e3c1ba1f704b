"""Signals: noted, raised where it is safe, and acted on at once."""

import hashlib
import os
import signal
import threading

import pytest

from ftd_ray.signals import Interrupted, signals


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_raised_where_it_is_asked_for(signum):
    with signals() as handled:
        handled.check()
        send(signum)
        with pytest.raises(Interrupted) as raised:
            handled.check()
    assert raised.value.signum == signum


def test_action_is_taken_while_the_main_thread_is_deep_in_other_code():
    """In there Python does not run handlers, so they would come too late."""
    acted, still_working = threading.Event(), True
    seen: list[bool] = []

    def action() -> None:
        seen.append(still_working)
        acted.set()

    with signals() as handled:
        handled.at_once(action)
        timer = threading.Timer(0.1, send, [signal.SIGTERM])
        timer.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # some seconds of C
        still_working = False
        assert acted.wait(20)
        timer.join()
        with pytest.raises(Interrupted):
            handled.check()
    assert seen == [True]


def test_nothing_is_left_of_the_handling():
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    threads = threading.active_count()
    for _ in range(3):
        with signals() as handled:
            handled.at_once(lambda: None)
    assert {s: signal.getsignal(s) for s in before} == before
    wakeup = signal.set_wakeup_fd(-1)
    assert wakeup == -1
    for thread in threading.enumerate():
        if thread.name == "signals":
            thread.join(20)
    assert threading.active_count() <= threads
