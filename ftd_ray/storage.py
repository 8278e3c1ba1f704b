"""A URI or a path as a ``pyarrow.fs`` filesystem and a path on it."""

import contextlib
import os
from pathlib import PurePath
from urllib.parse import urlparse

from pyarrow import fs as pafs

from ftd.errors import UserError
from ftd.trajectory import put

__all__ = [
    "is_local",
    "join",
    "open_uri",
    "probe",
    "put",
    "read_bytes",
    "remove_tree",
    "write_bytes",
]


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path that ``uri`` names: a path, file://, s3:// or gs://."""
    if is_local(uri):
        return pafs.LocalFileSystem(), os.path.abspath(uri.removeprefix("file://"))
    try:
        parsed = urlparse(uri)
        if parsed.scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
            scheme, _, host = endpoint.rpartition("://")
            filesystem = pafs.S3FileSystem(endpoint_override=host, scheme=scheme or "https")
            return filesystem, f"{parsed.netloc}{parsed.path}".rstrip("/")
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (ValueError, OSError, NotImplementedError) as error:
        raise UserError(
            f"{uri} is not a place that can be opened ({error}). "
            "Give a path, or a URI that begins with file://, s3:// or gs://."
        ) from error
    return filesystem, path.rstrip("/")


def is_local(uri: str) -> bool:
    """Whether ``uri`` names a folder of this machine's own filesystem."""
    return "://" not in uri or uri.startswith("file://")


def join(uri: str, *parts: str) -> str:
    """``uri`` with further path elements."""
    return "/".join([uri.rstrip("/"), *parts])


def probe(uri: str, what: str) -> None:
    """Writes and removes a small file. Raises UserError when that is not possible.

    Folders that this makes on the way are removed again.
    """
    filesystem, path = open_uri(uri)
    name = f"{path}/.probe-{os.getpid()}"
    made = []
    if is_local(uri):
        parents = [path, *(str(p) for p in PurePath(path).parents)]
        made = [p for p in parents if not os.path.exists(p)]
    try:
        filesystem.create_dir(path, recursive=True)
        put(filesystem, name, b"")
        filesystem.delete_file(name)
        with contextlib.suppress(OSError):  # somebody else uses it by now
            for folder in made:
                os.rmdir(folder)
    except OSError as error:
        raise UserError(
            f"{what}={uri} cannot be written ({error.strerror or error}). "
            "Choose another place, or mend its permissions."
        ) from error


def read_bytes(uri: str) -> bytes | None:
    """The content of a file, or None when there is no such file."""
    filesystem, path = open_uri(uri)
    if filesystem.get_file_info(path).type != pafs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a whole file at once, with the folders that it needs."""
    filesystem, path = open_uri(uri)
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    put(filesystem, path, data)


def remove_tree(uri: str) -> None:
    """Removes a folder, if it is there."""
    filesystem, path = open_uri(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)
