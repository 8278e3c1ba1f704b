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
from typing import Any

import numpy as np

from ftd.errors import UserError


def cache_root() -> Path:
    """Where decoded data sets lie on this node."""
    base = os.environ.get("FTD_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ftd"
    )
    return Path(base)


def cached_json(key: Callable[[], str], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON value kept under ``key()``, computed and kept when it is not there.

    The key is asked for again after computing, which may have changed it: a download did.
    """
    folder = cache_root() / "index"
    try:
        return json.loads((folder / f"{key()}.json").read_text())
    except (OSError, ValueError):
        value = compute()
    path = folder / f"{key()}.json"
    _make_dir(folder)
    try:
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w") as f:
            json.dump(value, f)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return value


def cached_arrays(
    key: str, n: int, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]
) -> np.ndarray:
    """A mapped uint8 array (n, *shape), filled by ``fill`` the first time."""
    folder = cache_root() / "pixels" / key
    path = folder / "images.npy"
    if path.exists():
        return _mapped(path, (n, *shape))
    _make_dir(folder.parent)
    with _lock(key):  # ten workers start at once, and one decodes
        if path.exists():
            return _mapped(path, (n, *shape))
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="making-"))
        try:
            array = np.lib.format.open_memmap(
                temporary / "images.npy", mode="w+", dtype=np.uint8, shape=(n, *shape)
            )
            fill(array)
            array.flush()
            del array
            try:
                os.rename(temporary, folder)
            except OSError:
                if not path.exists():  # not merely another node on a shared disk, which was faster
                    raise
        except OSError as error:
            raise UserError(
                f"cannot write the decoded images to {folder}: {error.strerror or error}. "
                "Set FTD_CACHE to a folder with room."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return _mapped(path, (n, *shape))


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
