"""MLflow's SQLite file, which is there whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path

from mlflow import MlflowClient

from ftd.errors import UserError
from ftd_ray.tracking.outbox import one_line

MAKING = ".mlflow-making-"
"""Begins the name of the folder in which a database is made."""


def create_database(path: str) -> None:
    """Makes MLflow's SQLite file, if there is none, by one link when its tables are all there.

    MLflow makes them in place, one after another, and cannot go on with a file that a killed
    process left half made.
    """
    if os.path.exists(path):
        return
    folder = os.path.dirname(path) or "."
    with contextlib.ExitStack() as stack:
        lock = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, lock)
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in Path(folder).glob(f"{MAKING}*"):  # by a killed process
            shutil.rmtree(left, ignore_errors=True)
        made = stack.enter_context(tempfile.TemporaryDirectory(prefix=MAKING, dir=folder))
        file = os.path.join(made, "mlflow.db")
        try:
            client = MlflowClient(tracking_uri=f"sqlite:///{file}")
            client.search_experiments(max_results=1)
            client._tracking_client.store.engine.dispose()
            with contextlib.closing(sqlite3.connect(file)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            try:
                os.link(file, path)
            except FileExistsError:  # where nothing could be locked, somebody was faster
                pass
            except OSError:  # no hard links here
                os.rename(file, path)
        except Exception as error:  # of sqlalchemy, sqlite3 and the disk
            raise UserError(
                f"tracking.uri=sqlite:///{path} cannot be made ({one_line(error)}). Make room, or "
                "give another place."
            ) from error
