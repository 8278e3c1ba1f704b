"""Copies of an SQLite database, in a bucket or a folder.

python clusters/backup.py save|restore|watch DATABASE PLACE [--every SECONDS] [--beside PORT]

``save`` copies once. ``watch`` copies again whenever the database has changed, until it is ended;
with ``--beside`` a port of this machine, until nobody has listened there for a minute, and then
once more. ``restore`` fetches the copy where there is no database; one that is there is never
touched. SQLite makes the copy, so one that is made in the middle of a write is whole; the bucket
gets it in one go.
"""

import argparse
import contextlib
import hashlib
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ftd.errors import UserError
from ftd_ray.storage import join, read_bytes, write_bytes

PATIENCE_SECONDS = 60.0
"""For so long a port may be without a listener: a second `ray up` starts Ray again."""

LISTEN = "0A"
"""A socket's state in the kernel's list."""


def copy_of(database: Path) -> bytes:
    """The database as it is at one moment."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy.db")
        source = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)
        with contextlib.closing(source), contextlib.closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        return copy.read_bytes()


def save(database: Path, uri: str, saved: str = "") -> str:
    """Writes a copy unless ``saved`` is its checksum; its checksum."""
    data = copy_of(database)
    checksum = hashlib.sha256(data).hexdigest()
    if checksum != saved:
        write_bytes(uri, data)
    return checksum


def restore(database: Path, uri: str) -> str:
    """Fetches the copy, and says in words what was done."""
    if database.exists():
        return f"{database} is there already, and stays"
    data = read_bytes(uri)
    if data is None:
        return f"nothing to restore: there is no {uri}"
    database.parent.mkdir(parents=True, exist_ok=True)
    part = database.with_name(database.name + ".part")
    part.write_bytes(data)
    part.rename(database)
    return f"{database} restored from {uri}"


def watch(database: Path, uri: str, every: float, over: Callable[[], bool]) -> None:
    """Copies until it is over: what fails is said, and tried again."""
    saved, last = "", False
    while not last:
        last = over()
        try:
            if database.exists():
                saved = save(database, uri, saved)
        except (OSError, sqlite3.Error, UserError) as error:
            print(f"backup: {error}", file=sys.stderr, flush=True)
        end = time.monotonic() + every
        while not last and not over() and time.monotonic() < end:
            time.sleep(min(every, 1.0))


def until_silent(port: int, patience: float) -> Callable[[], bool]:
    """Says whether nobody of this machine has listened on a port for some seconds."""
    heard = time.monotonic()

    def silent() -> bool:
        nonlocal heard
        if port in listening():
            heard = time.monotonic()
        return time.monotonic() - heard > patience

    return silent


def listening() -> set[int]:
    """Ports of this machine on which somebody listens for TCP, by the kernel's own list."""
    ports = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state == LISTEN:
                    ports.add(int(local.rpartition(":")[2], 16))
    return ports


def main() -> int:
    parser = argparse.ArgumentParser(prog="backup.py", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["save", "restore", "watch"])
    parser.add_argument("database", type=Path)
    parser.add_argument("place")
    parser.add_argument("--every", type=float, default=300, help="seconds between two looks")
    parser.add_argument("--beside", type=int, metavar="PORT", help="whose end is the end")
    parser.add_argument("--patience", type=float, default=PATIENCE_SECONDS, metavar="SECONDS")
    arguments = parser.parse_args()
    database, uri = arguments.database, join(arguments.place, arguments.database.name)
    try:
        if arguments.what == "watch":
            port, patience = arguments.beside, arguments.patience
            over = (lambda: False) if port is None else until_silent(port, patience)
            watch(database, uri, arguments.every, over)
        elif arguments.what == "restore":
            print(restore(database, uri))
        elif database.exists():
            save(database, uri)
        else:
            raise UserError(f"there is no database {database}. Give the path of one.")
    except (OSError, sqlite3.Error, UserError) as error:
        print(f"backup: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
