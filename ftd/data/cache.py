"""Decoded pixels, kept once a node and mapped into every process that reads them.

``$FTD_CACHE`` (default ``~/.cache/ftd``) holds one folder for each source, resolution and number
of channels, with ``images.npy`` (uint8), and an index of what was found where. Files are mapped
copy-on-write, so that ten workers share one copy in the page cache. A folder appears by one
rename when it is whole, so a killed process leaves nothing half-written behind.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ftd.errors import UserError


def cache_root() -> Path:
    """Where decoded data sets lie on this node."""
    base = os.environ.get("FTD_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ftd"
    )
    return Path(base)


def read_json(key: str) -> dict[str, Any] | None:
    """The JSON value kept in the index under ``key``; None where it is not there or damaged."""
    try:
        return json.loads((cache_root() / "index" / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None


def write_json(key: str, value: dict[str, Any]) -> None:
    """Keeps a JSON value in the index."""
    write_text(f"index/{key}.json", json.dumps(value))


def write_text(name: str, text: str) -> Path:
    """Writes a whole file of the cache at once; returns its path."""
    path = cache_root() / name
    _make_dir(path.parent)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    return path


class GrowingArray:
    """A uint8 array (n, *shape) on its way into the cache, whose n is known at its end."""

    def __init__(self, file: BinaryIO, shape: tuple[int, ...]):
        self._file, self._shape, self._rows = file, shape, 0
        self._write_header()
        self._start = file.tell()

    def append(self, row: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(row).data)
        self._rows += 1

    def finish(self) -> None:
        """Writes down how many rows there are."""
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._start  # numpy leaves room for the first dimension

    def _write_header(self) -> None:
        shape = (self._rows, *self._shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


@contextlib.contextmanager
def growing_array(shape: tuple[int, ...], key: Callable[[], str]) -> Iterator[GrowingArray]:
    """An array that lies under ``key()`` at the end, where ``cached_arrays`` finds it."""
    with _making() as folder:
        with open(folder / "images.npy", "wb") as file:
            array = GrowingArray(file, shape)
            yield array
            array.finish()
        _publish(folder, cache_root() / "pixels" / key())


def cached_arrays(
    key: str, n: int, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]
) -> np.ndarray:
    """A mapped uint8 array (n, *shape), filled by ``fill`` the first time."""
    folder = cache_root() / "pixels" / key
    path = folder / "images.npy"
    if path.exists():
        return _mapped(path, (n, *shape))
    with _lock(key):  # ten workers start at once, and one decodes
        if path.exists():
            return _mapped(path, (n, *shape))
        with _making() as temporary:
            array = np.lib.format.open_memmap(
                temporary / "images.npy", mode="w+", dtype=np.uint8, shape=(n, *shape)
            )
            fill(array)
            array.flush()
            del array
            _publish(temporary, folder)
    return _mapped(path, (n, *shape))


@contextlib.contextmanager
def _making() -> Iterator[Path]:
    """A folder for decoded images on their way into the cache, removed unless it was published."""
    pixels = cache_root() / "pixels"
    _make_dir(pixels)
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=pixels, prefix="making-"))
        yield temporary
    except OSError as error:
        raise UserError(
            f"cannot write the decoded images to {pixels}: {error.strerror or error}. "
            "Set FTD_CACHE to a folder with room."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _publish(made: Path, folder: Path) -> None:
    """By one rename; where another process or node was faster, its images stay."""
    try:
        os.rename(made, folder)
    except OSError:
        if not (folder / "images.npy").exists():
            raise


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="c")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read. Delete {path.parent} and start again.") from error
    if array.shape != shape:
        raise UserError(
            f"{path} has shape {array.shape} where {shape} was expected. "
            f"Delete {path.parent} and start again."
        )
    return array


@contextlib.contextmanager
def _lock(key: str) -> Iterator[None]:
    path = cache_root() / "locks" / key
    _make_dir(path.parent)
    try:
        with open(path, "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield
    except PermissionError as error:
        raise _unwritable(path.parent, error) from error


def _make_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache folder {folder} cannot be written: {error.strerror or error}. "
        "Set FTD_CACHE to a folder that can."
    )
