"""A small disk of the test's own, to be filled up."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ray_helpers import wait_until

PAGE = 4096


@contextlib.contextmanager
def mounted(options: str, folder: Path) -> Iterator[Path | None]:
    """A disk in a mount namespace of its own, seen by way of its process, which it goes with."""
    script = 'mount -t tmpfs -o size=1m tmpfs "$0" && touch "$0/ready" && exec sleep 600'
    try:
        process = subprocess.Popen(
            ["unshare", options, "sh", "-c", script, str(folder)], stderr=subprocess.DEVNULL
        )
    except FileNotFoundError:
        yield None
        return
    disk = Path(f"/proc/{process.pid}/root{folder}")
    try:
        wait_until("a disk", lambda: process.poll() or (disk / "ready").exists(), seconds=20)
        if process.poll() is None:
            (disk / "ready").unlink()
            yield disk
        else:
            yield None
    finally:
        process.kill()
        process.wait(timeout=20)


def choke(disk: Path) -> Path:
    """Leaves no room on a disk that others write to; the file that it returns takes it."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * PAGE)
    return ballast


def fill(disk: Path, room: int) -> Path:
    """Leaves ``room`` pages on the disk; the file that it returns takes the others."""
    ballast = disk / "ballast"
    usage = os.statvfs(disk)
    ballast.write_bytes(b"x" * (usage.f_bavail * usage.f_frsize - room * PAGE))
    assert os.statvfs(disk).f_bavail * usage.f_frsize == room * PAGE
    return ballast
