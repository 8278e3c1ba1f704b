"""A URI or a path as a ``pyarrow.fs`` filesystem and a path on it.

What a place needs beyond its address comes from the environment (credentials, region, endpoint)
or from the query of its URI, as ``pyarrow.fs`` takes it: ``s3://bucket/x?region=eu-west-1``.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePath
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs as pafs

from ftd.errors import UserError
from ftd.s3 import S3
from ftd.trajectory import put

__all__ = [
    "PlaceError",
    "files_below",
    "is_local",
    "join",
    "move_file",
    "open_uri",
    "place_error",
    "probe",
    "put",
    "read_bytes",
    "remove_file",
    "remove_tree",
    "write_bytes",
]

S3_RETRIES = 11
"""Waits of 0.05 s, 0.1 s, ... 25.6 s, 51 s together: an endpoint that was away for 40 s is met
again, and one that is gone for good is reported within a minute. The SDK's other strategy draws
its waits at random and stops retrying at all once a client has failed often."""

S3_SILENCE = 10.0
"""Seconds without a byte after which a request is tried again: 12 times this and the waits make
the three minutes that an endpoint which never answers costs."""

S3_CONNECT = 5.0
"""Seconds for a connection to stand."""

GCS_SECONDS = 60
"""For how long the GCS client tries again."""

PROBE_S3_RETRIES = 3
"""0.2 s of waits: at the start of a command a wrong address is likelier than an outage."""

PROBE_GCS_SECONDS = 5

CLIENTS = 16
"""Clients of object stores that a process keeps."""

CLIENTS_READ = ("AWS_", "GOOGLE_", "CLOUDSDK_")
"""Begin the variables of the environment that clients look at."""


class PlaceError(UserError):
    """What all work of a sweep needs is out of reach.

    Above all a store or a folder: full, forbidden, or its server is down.
    """


def open_uri(uri: str, *, patient: bool = True) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path that ``uri`` names: a path, file://, s3:// or gs://.

    A ``patient`` filesystem tries again for about a minute where the server fails. Filesystems of
    object stores are the same one again and again: a process keeps its clients.
    """
    if is_local(uri):
        return pafs.LocalFileSystem(), os.path.abspath(uri.removeprefix("file://"))
    try:
        opener = _OPENERS.get(uri.partition("://")[0], _open_other)
        filesystem, path = opener(uri, patient)
    except (ValueError, OSError, NotImplementedError, pa.ArrowException) as error:
        raise UserError(
            f"{_without_secrets(uri)} is not a place that can be opened ({_reason(error)}). "
            "Give a path, or a URI that begins with file://, s3:// or gs://."
        ) from error
    return filesystem, path.rstrip("/")


def _open_s3(uri: str, patient: bool) -> tuple[pafs.FileSystem, str]:
    """``FileSystem.from_uri`` knows no retries and no timeouts, so its options are read here."""
    parsed = urlsplit(uri, allow_fragments=False)
    user, _, bucket = parsed.netloc.rpartition("@")
    options = dict(parse_qsl(parsed.query, keep_blank_values=True))
    unknown = set(options) - {"region", "scheme", "endpoint_override"}
    if unknown or not bucket:
        raise ValueError(f"unknown option {min(unknown)}" if unknown else "it names no bucket")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:
        scheme, _, host = endpoint.rstrip("/").rpartition("://")
        options |= {"endpoint_override": host, "scheme": scheme or "https"}
    attempts = S3_RETRIES if patient else PROBE_S3_RETRIES
    given = tuple(sorted(options.items()))
    filesystem = _client(_s3_client, bucket, user, given, attempts, S3_SILENCE)
    return filesystem, f"{bucket}{unquote(parsed.path)}"


def _s3_client(
    bucket: str, user: str, given: tuple[tuple[str, str], ...], attempts: int, silence: float
) -> pafs.FileSystem:
    access_key, _, secret_key = user.partition(":")
    options = dict(given)
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not named and not {"region", "endpoint_override"} & set(options):
        options["region"] = pafs.resolve_s3_region(bucket)
    return S3(
        access_key=unquote(access_key) or None,
        secret_key=unquote(secret_key) or None,
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=attempts),
        connect_timeout=S3_CONNECT,
        request_timeout=silence,
        **options,
    )


def _open_gcs(uri: str, patient: bool) -> tuple[pafs.FileSystem, str]:
    """The emulator's address is where Google's own libraries look for it."""
    parsed = urlsplit(uri, allow_fragments=False)
    bucket = parsed.netloc
    options = dict(parse_qsl(parsed.query, keep_blank_values=True))
    options.setdefault("retry_limit_seconds", str(GCS_SECONDS if patient else PROBE_GCS_SECONDS))
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator and "endpoint_override" not in options:
        scheme, _, host = emulator.rstrip("/").rpartition("://")
        options |= {"endpoint_override": host, "scheme": scheme or "http"}
        bucket = f"anonymous@{bucket.rpartition('@')[2]}"
    root = urlunsplit((parsed.scheme, bucket, "", urlencode(options), ""))
    return _client(_gcs_client, root), f"{bucket.rpartition('@')[2]}{unquote(parsed.path)}"


def _gcs_client(root: str) -> pafs.FileSystem:
    return pafs.FileSystem.from_uri(root)[0]


def _client(make: Callable[..., pafs.FileSystem], *what: Any) -> pafs.FileSystem:
    """The client of this process that ``make`` makes of ``what``; its threads share it.

    A new one would open connections anew for every file. Not over a fork, which takes a client's
    threads away, and not where the environment says something else now.
    """
    environment = {k: v for k, v in os.environ.items() if k.startswith(CLIENTS_READ)}
    return _kept_client(make, what, os.getpid(), tuple(sorted(environment.items())))


@lru_cache(maxsize=CLIENTS)
def _kept_client(
    make: Callable[..., pafs.FileSystem],
    what: tuple[Any, ...],
    process: int,
    environment: tuple[tuple[str, str], ...],
) -> pafs.FileSystem:
    return make(*what)


def _open_other(uri: str, patient: bool) -> tuple[pafs.FileSystem, str]:
    return pafs.FileSystem.from_uri(uri)


_OPENERS: dict[str, Callable[[str, bool], tuple[pafs.FileSystem, str]]] = {
    "s3": _open_s3,
    "gs": _open_gcs,
    "gcs": _open_gcs,
}


def is_local(uri: str) -> bool:
    """Whether ``uri`` names a folder of this machine's own filesystem."""
    return "://" not in uri or uri.startswith("file://")


def join(uri: str, *parts: str) -> str:
    """``uri`` with further path elements, before its query if it has one."""
    place, mark, query = (uri, "", "") if is_local(uri) else uri.partition("?")
    return "/".join([place.rstrip("/"), *parts]) + mark + query


def probe(uri: str, what: str) -> None:
    """Writes and removes a small file. Raises UserError when that is not possible.

    Folders that this makes on the way are removed again.
    """
    filesystem, path = open_uri(uri, patient=False)
    name = f"{path}/.probe-{os.getpid()}"
    made = []
    if is_local(uri):
        parents = [path, *(str(p) for p in PurePath(path).parents)]
        made = [p for p in parents if not os.path.exists(p)]
    try:
        if is_local(uri):
            filesystem.create_dir(path, recursive=True)
        put(filesystem, name, b"probe")
        filesystem.delete_file(name)
    except (OSError, pa.ArrowException) as error:
        raise place_error(uri, what, error, verb="written") from error
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # never made, or somebody else uses it by now
                os.rmdir(folder)


def place_error(
    uri: str, what: str, error: OSError | pa.ArrowException, *, verb: str = "used"
) -> PlaceError:
    """One line for what a filesystem raised about the place ``what=uri``."""
    reason = _reason(error)
    words = f"{reason} {error}"
    remedy = next((text for pattern, text in _REMEDIES if re.search(pattern, words)), _REMEDY)
    return PlaceError(f"{what}={_without_secrets(uri)} cannot be {verb} ({reason}). {remedy}")


_REMEDY = "Choose another place, or mend its permissions."

_REMEDIES = [
    (
        f"{os.strerror(errno.ENOSPC)}|{os.strerror(errno.EDQUOT)}",
        "Make room there, then try again.",
    ),
    (
        "NO_SUCH_BUCKET|Bucket '.*' not found|missing project id",
        "Make the bucket, or choose another place.",
    ),
    (
        "ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|TOKEN|PERMISSION_DENIED|UNAUTHENTICATED|OAuth2",
        "See that the credentials of that place are at hand and allow it.",
    ),
    ("HTTP status 5|SLOW_DOWN|INTERNAL_FAILURE", "Try again when the server is well."),
    (
        "NETWORK_CONNECTION|UNAVAILABLE|DEADLINE_EXCEEDED",
        "See that the endpoint's address is right and that it is up, then try again.",
    ),
]
"""By words of the error; the first that fits."""


def _reason(error: BaseException) -> str:
    """What happened: one sentence, without what the SDKs add."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    text = " ".join(str(error).split())
    for pattern in (
        r"curlCode: \d+, (.*)",
        r"AWS Error UNKNOWN \((HTTP status \d+)\)",
        r"AWS Error (.*)",
        r"google::cloud::Status\(.*with a last message of (?:PerformWork\(\) - )?(.*)",
        r"google::cloud::Status\((.*)",
    ):
        if found := re.search(pattern, text):
            text = found[1]
            break
    text = re.sub(r" during \w+ operation", "", text)
    noise = r"\. |; Details:| error_info=|: No response body| \(Request ID"
    text = re.split(noise, text)[0].rstrip(".")
    return _without_secrets(text if len(text) <= 200 else f"{text[:200]}...")


def _without_secrets(uri: str) -> str:
    return re.sub("(?<=://)[^/@]*@", "", uri)


def read_bytes(uri: str) -> bytes | None:
    """The content of a file, or None when there is no such file."""
    filesystem, path = open_uri(uri)
    try:
        with filesystem.open_input_stream(path) as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        if filesystem.get_file_info(path).type == pafs.FileType.File:
            raise
        return None  # a folder


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a whole file at once, with the folders that it needs."""
    filesystem, path = open_uri(uri)
    if not isinstance(filesystem, pafs.S3FileSystem):  # S3 shows the folder of every file
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    put(filesystem, path, data)


def files_below(uri: str) -> list[str]:
    """Paths of all files below a folder, relative to it; none where there is no folder."""
    filesystem, path = open_uri(uri)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    found = (i.path for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.File)
    return sorted(p.removeprefix(path).lstrip("/") for p in found)


def remove_file(uri: str) -> None:
    """Removes a file, if it is there."""
    filesystem, path = open_uri(uri)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(path)


def move_file(uri: str, to: str) -> None:
    """Gives a file another name in the same place, where it replaces what is there."""
    filesystem, path = open_uri(uri)
    filesystem.move(path, open_uri(to)[1])


def remove_tree(uri: str) -> None:
    """Removes a folder, if it is there."""
    filesystem, path = open_uri(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)
