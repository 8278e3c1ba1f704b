"""Copies of an SQLite database, in a bucket or a folder.

python clusters/backup.py save|restore|watch DATABASE PLACE [--every SECONDS]

``save`` copies once. ``watch`` copies again whenever the database has changed, until it is ended.
``restore`` fetches the copy where there is no database; one that is there is never touched. SQLite
makes the copy, so one that is made in the middle of a write is whole; the bucket gets it in one go.
"""

import argparse
import contextlib
import hashlib
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

from ftd.errors import UserError
from ftd_ray.storage import join, read_bytes, write_bytes


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


def watch(database: Path, uri: str, every: float) -> None:
    """Copies for as long as it runs: what fails is said, and tried again."""
    saved = ""
    while True:
        try:
            if database.exists():
                saved = save(database, uri, saved)
        except (OSError, sqlite3.Error, UserError) as error:
            print(f"backup: {error}", file=sys.stderr, flush=True)
        time.sleep(every)


def main() -> int:
    parser = argparse.ArgumentParser(prog="backup.py", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["save", "restore", "watch"])
    parser.add_argument("database", type=Path)
    parser.add_argument("place")
    parser.add_argument("--every", type=float, default=300, help="seconds between two looks")
    arguments = parser.parse_args()
    database, uri = arguments.database, join(arguments.place, arguments.database.name)
    try:
        if arguments.what == "watch":
            watch(database, uri, arguments.every)
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
