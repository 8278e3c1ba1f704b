"""The one pass over all images of a data set, before any work: what is there, what can be read.

What it finds is kept in the cache under a stamp of the files (names, sizes, times): *facts* that
splits and fingerprints are made of, and a *report* of single images. Where the resolution is
known, the same pass leaves the pixels in the cache.
"""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL

from ftd.data.cache import GrowingArray, growing_array, read_json, write_json
from ftd.data.config import DatasetConfig
from ftd.data.decode import DECODE_RULES, Decoded, UnreadableError, decode, to_array
from ftd.data.registry import DATASETS
from ftd.data.sources import TRAIN, ImageFile, Source
from ftd.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

Facts = dict[str, Any]
"""digest, labels and parts (of the readable images, in order), class_names, channels,
native_resolution, stats, rule (of decoding), unreadable (pairs of where and reason), unused."""

Report = dict[str, Any]
"""sizes (width, height), grey (how many), duplicates (pairs of where)."""

Progress = Callable[[int, int], None]
"""Called with images done and images in all."""

WITHHELD = b"withheld"
"""In place of the SHA-256 of a file that is there and could not be read."""

AHEAD = 16
"""Images for each core that are read or waiting to be taken."""


def survey(
    config: DatasetConfig,
    progress: Progress | None = None,
    check: Callable[[Source], None] | None = None,
) -> tuple[Facts, Source | None]:
    """The facts, from the index when the files are those seen before, else the source too.

    ``check`` is asked before the pass, so that what a listing tells costs no pass.
    """
    key = _stamp(config)
    if key is not None and (facts := read_json(key)) is not None:
        return facts, None
    source = DATASETS[config.name].open(config)  # says what is missing, or downloads it
    if check is not None:
        check(source)
    facts, _ = _pass(config, source, progress)
    return facts, source


def report(config: DatasetConfig, progress: Progress | None = None) -> tuple[Facts, Report]:
    """The facts with what is known of single images."""
    key = _stamp(config)
    facts, found = (read_json(key), read_json(f"{key}-images")) if key else (None, None)
    if facts is not None and found is not None:
        return facts, found
    return _pass(config, DATASETS[config.name].open(config), progress)


def pixel_key(facts: Facts, resolution: int) -> str:
    """Names the decoded pixels of a data set in the cache."""
    return f"{facts['digest'][:32]}-{facts['channels']}x{resolution}x{resolution}-{facts['rule']}"


def decode_into(
    source: Source, facts: Facts, out: np.ndarray, progress: Progress | None = None
) -> None:
    """Decodes every readable image into ``out`` (N, C, R, R): shorter side to R, centre crop."""
    resolution = out.shape[-1]
    if source.arrays is not None:
        for position, array in enumerate(source.arrays):
            out[position] = to_array(array, source.channels, resolution)
        return
    left_out = {where for where, _ in facts["unreadable"]}
    position = 0
    for where, _, found in _decoded(source, resolution):
        if where in left_out:
            continue
        if isinstance(found, str):
            raise UserError(f"{where} cannot be read any more ({found}). Start again.")
        if position < len(out):
            out[position] = found.pixels
        position += 1
        if progress is not None:
            progress(position, len(out))
    if position != len(out):
        raise UserError(
            f"dataset: {len(out)} images were listed and {position} could be read. "
            "Has the data changed while it was being read?"
        )


def _pass(config: DatasetConfig, source: Source, progress: Progress | None) -> tuple[Facts, Report]:
    """Looks at every image, and keeps what it found."""
    key = _stamp(config)  # only now: to open a source may download it
    if source.files is None or config.resolution is None:
        facts, found, settled = _look(source, config.resolution, None, progress)
    else:
        resolution = config.resolution
        shape = (source.channels, resolution, resolution)
        with growing_array(shape, lambda: pixel_key(facts, resolution)) as array:
            facts, found, settled = _look(source, resolution, array, progress)
    if key is not None and settled:
        write_json(f"{key}-images", found)
        write_json(key, facts)
    return facts, found


def _look(
    source: Source,
    resolution: int | None,
    array: GrowingArray | None,
    progress: Progress | None,
) -> tuple[Facts, Report, bool]:
    """Facts, report, and whether they hold as long as the files are as they are.

    A file that its disk would not give may be read the next time, with the same name, size and
    time.
    """
    n, settled = len(source.labels), True
    readable, hashes = np.ones(n, bool), list[bytes | None]()
    unreadable, sizes, grey, special = [], [], 0, False
    of_train: dict[bytes, str] = {}
    others: list[tuple[str, bytes, bytes]] = []
    for i, (where, content, found) in enumerate(_decoded(source, resolution)):
        if progress is not None:
            progress(i + 1, n)
        if isinstance(found, str):
            unreadable.append((where, found))
            readable[i] = False
            settled &= content != WITHHELD
            hashes.append(None)
            continue
        hashes.append(content)
        sizes.append(found.size)
        grey += found.grey
        special |= found.special
        if source.parts[i] == TRAIN:
            of_train |= {content: where, found.digest: where}
        else:
            others.append((where, content, found.digest))
        if array is not None and found.pixels is not None:
            array.append(found.pixels)
    twins = [(w, of_train.get(c) or of_train.get(d)) for w, c, d in others]
    facts = {
        "digest": source.digest(hashes),
        "labels": source.labels[readable].tolist(),
        "parts": source.parts[readable].tolist(),
        "class_names": source.class_names,
        "channels": source.channels,
        "native_resolution": source.native_resolution,
        "stats": source.stats,
        "rule": DECODE_RULES[special],
        "unreadable": unreadable,
        "unused": source.unused,
    }
    duplicates = [(where, twin) for where, twin in twins if twin is not None]
    return facts, {"sizes": sizes, "grey": grey, "duplicates": duplicates}, settled


def _decoded(source: Source, resolution: int | None) -> Iterator[tuple[str, bytes, Decoded | str]]:
    """For every image where it is, the SHA-256 of its content, and its pixels or why it has none.

    By all cores: Pillow lets go of the interpreter's lock while it decodes.
    """
    if source.arrays is not None:
        for i, a in enumerate(source.arrays):
            content = hashlib.sha256(np.ascontiguousarray(a).data).digest()
            yield str(i), content, Decoded(None, a.shape[:0:-1], len(a) == 1, False, content)
        return

    def one(file: ImageFile) -> tuple[str, bytes, Decoded | str]:
        try:
            data = file.read()
        except FileNotFoundError:
            return file.where, b"", "a link to nowhere"
        except OSError as error:
            return file.where, WITHHELD, error.strerror or str(error)
        content = hashlib.sha256(data).digest()
        try:
            return file.where, content, decode(data, resolution)
        except UnreadableError as error:
            return file.where, content, str(error)

    assert source.files is not None
    yield from _in_order(one, source.files(), len(os.sched_getaffinity(0)))


def _in_order(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """``function`` of every item, some ahead, in the items' order."""
    pool = ThreadPoolExecutor(threads)
    running: deque[Future[R]] = deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) >= AHEAD * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _stamp(config: DatasetConfig) -> str | None:
    """Names, sizes and times of the files of a data set: the same stamp, the same content.

    None where there is no folder.
    """
    entry = DATASETS[config.name]
    if not entry.needs_root:
        return f"{config.name}-{version('scikit-learn')}-2"
    root = Path(config.root or ".")
    if not root.is_dir():
        return None
    what = ["stamp-3", config.name, str(root.resolve()), config.columns, PIL.__version__]
    h = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    for file in entry.files(root):
        with contextlib.suppress(OSError):  # a link to nowhere
            stat = os.stat(file)
            h.update(os.fsencode(file) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return h.hexdigest()[:32]
