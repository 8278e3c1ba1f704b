"""Decoded pixels, kept once a node and mapped into every process that reads them.

``$FTD_CACHE`` (default ``~/.cache/ftd``) holds one folder for each source, resolution and number
of channels: ``images.npy`` (uint8), ``labels.npy``, ``meta.json``. Files are memory-mapped
copy-on-write, so that ten workers share one copy in the page cache. A folder appears by one
rename when it is whole, so a killed process leaves nothing half-written behind.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
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
    _make_dir(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as f:
        json.dump(value, f)
    os.replace(temporary, path)
    return value


def cached_arrays(
    key: str, n: int, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]
) -> np.ndarray:
    """A mapped uint8 array (n, *shape), filled by ``fill`` the first time."""
    folder = cache_root() / "pixels" / key
    path = folder / "images.npy"
    if not path.exists():
        _make_dir(folder.parent)
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
                if not path.exists():  # not merely another process that was faster
                    raise
        except OSError as error:
            raise UserError(
                f"cannot write the decoded images to {folder}: {error.strerror or error}. "
                "Set FTD_CACHE to a folder with room."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    array = np.load(path, mmap_mode="c")
    if array.shape != (n, *shape):
        raise UserError(
            f"{path} has shape {array.shape} where {(n, *shape)} was expected. "
            f"Delete {folder} and start again."
        )
    return array


def _make_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {path}: {error.strerror or error}. "
            "Set FTD_CACHE to a folder that can be written."
        ) from error
