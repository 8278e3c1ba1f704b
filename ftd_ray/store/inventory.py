"""What a store holds: every set with its experts, its users, and what does not belong to it.

Taken from one listing of each set and the manifests that count, so that it costs a few requests.
Nothing here raises for what lies in the store, only for a store that cannot be reached.
"""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pyarrow as pa
from pyarrow import fs as pafs

from ftd.errors import UserError
from ftd.trajectory import DamagedError, ExpertSet, manifest_names
from ftd_ray.storage import open_uri, place_error
from ftd_ray.store.usage import User, read_user

READERS = 16
"""Small files that are read at the same time."""

QUARANTINE = "quarantine"

_KEY = re.compile(r"[0-9a-f]{20}")
_EXPERT = re.compile(r"expert-(\d{4,})")
_MANIFEST = re.compile(r"manifest-\d{5}(-[0-9a-f]{12})?\.json")
_PART = re.compile(r"part-\d{4,}-\d{4,}-[0-9a-f]{12}\.parquet")
_USER = re.compile(r"[0-9a-f]{16}\.json")
_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.part|\.probe-\d+")
_QUARANTINED = re.compile(r".+-(\d{8}T\d{6})-[0-9a-f]{4}")


@dataclass(frozen=True)
class File:
    """A file; ``name`` is its path below the store."""

    name: str
    bytes: int
    modified_ns: int

    @property
    def modified(self) -> float:
        return self.modified_ns / 1e9


@dataclass(frozen=True)
class Quarantined:
    """One folder of a quarantine."""

    name: str
    since: float
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files)


@dataclass
class Expert:
    """One expert of a set."""

    index: int
    files: list[File] = field(default_factory=list)
    epochs: int | None = None
    """As published; None where nothing is, or where it cannot be read."""
    problem: str | None = None
    """Why its manifest cannot be read."""
    newer: bool = False
    """It is of another schema version."""

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files)


@dataclass
class SetEntry:
    """One folder of the store that is named like a key."""

    key: str
    files: list[File]
    """All of them."""
    state: str = "whole"
    """whole, awaited (a sweep that uses it began, and it is not there yet), damaged, misplaced (the
    set of another key) or newer (of another schema version)."""
    problem: str | None = None
    experts_set: ExpertSet | None = None
    experts: dict[int, Expert] = field(default_factory=dict)
    users: list[User] = field(default_factory=list)
    leftovers: list[File] = field(default_factory=list)
    """What writers left that died: parts that no manifest names, and temporaries."""
    foreign: list[File] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)

    @property
    def identity(self) -> object:
        return self.experts_set.identity if self.experts_set is not None else None

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files)

    @property
    def published(self) -> list[Expert]:
        """Experts with epochs, in order."""
        return [e for _, e in sorted(self.experts.items()) if e.epochs is not None]

    @property
    def problems(self) -> list[str]:
        """What is damaged or newer, in words."""
        own = [self.problem] if self.problem else []
        return own + [e.problem for _, e in sorted(self.experts.items()) if e.problem]

    @property
    def newest(self) -> float | None:
        """When its newest manifest was published."""
        return max((f.modified for f in self.files if is_manifest(f)), default=None)

    @property
    def last_used(self) -> float:
        """When somebody last renewed his use of it or published to it."""
        times = [u.renewed for u in self.users]
        times += [self.newest] if self.newest is not None else []
        return max(times or [f.modified for f in self.files], default=0.0)

    def running(self, now: float) -> list[User]:
        return [u for u in self.users if u.is_running(now)]


@dataclass
class Inventory:
    """A store at one moment."""

    uri: str
    fs: pafs.FileSystem
    path: str
    sets: list[SetEntry] = field(default_factory=list)
    leftovers: list[File] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Names of files and folders that are no part of a store; folders end with a slash."""
    quarantined: list[Quarantined] = field(default_factory=list)
    """Whole sets that were moved away."""

    @property
    def bytes(self) -> int:
        """Of all that is the store's own."""
        aside = sum(q.bytes for q in self.quarantined) + sum(f.bytes for f in self.leftovers)
        return aside + sum(s.bytes for s in self.sets)


@contextmanager
def reached(uri: str, verb: str = "read") -> Iterator[None]:
    """A server that does not answer, or a file that may not be read, is a UserError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise place_error(uri, "the store", error, verb=verb) from error


def open_store(uri: str) -> Inventory:
    """The store at ``uri`` without its sets. Raises UserError when there is none."""
    filesystem, path = open_uri(uri)
    with reached(uri):
        root = filesystem.get_file_info(path)
        if root.type == pafs.FileType.Directory:
            entries = filesystem.get_file_info(pafs.FileSelector(path))
    if root.type != pafs.FileType.Directory:
        raise UserError(f"{uri} is not a trajectory store: there is no such folder.")
    store = Inventory(uri, filesystem, path)
    names = {f.base_name for f in entries}
    if "set.json" in names:
        raise UserError(f"{uri} is one expert set. Give the folder that it lies in.")
    for entry in sorted(entries, key=lambda f: f.base_name):
        folder = entry.type == pafs.FileType.Directory
        if folder and _KEY.fullmatch(entry.base_name):
            store.sets.append(SetEntry(entry.base_name, []))
        elif not folder and _TEMPORARY.fullmatch(entry.base_name):
            store.leftovers.append(_file(entry, path))
        elif not (folder and entry.base_name == QUARANTINE):
            store.foreign.append(f"{entry.base_name}/" if folder else entry.base_name)
    if store.foreign and not store.sets and QUARANTINE not in names:
        raise UserError(
            f"{uri} is not a trajectory store: it holds no expert set, but {store.foreign[0]}."
        )
    return store


def take_inventory(uri: str, key: str | None = None) -> Inventory:
    """All that the store at ``uri`` holds; of its sets only those whose key begins with ``key``.

    Raises UserError when there is no store, or no such set in it.
    """
    store = open_store(uri)
    with reached(uri):
        wanted = [s.key for s in store.sets if s.key.startswith(key or "")]
        if key is not None and not wanted:
            raise UserError(f"{uri} holds no set {key}. `ls` shows those that it holds.")
        store.sets = look_at(store, wanted)
        files = _list(store, QUARANTINE)
    store.quarantined, stray = _quarantined(files, QUARANTINE)
    store.foreign += [f.name for f in stray]
    return store


def look_at(store: Inventory, keys: Iterable[str]) -> list[SetEntry]:
    """The sets with those keys as they are now. Raises OSError when they cannot be read."""
    with ThreadPoolExecutor(READERS) as pool:
        entries = list(pool.map(lambda key: _look(store, key), keys))
        whole = [e for e in entries if e.experts_set is not None and e.state == "whole"]
        pairs = [(entry, expert) for entry in whole for expert in entry.experts.values()]
        for (entry, _), parts in zip(
            pairs, pool.map(lambda p: _read_expert(store, *p), pairs), strict=True
        ):
            entry.leftovers += parts
    return entries


def is_manifest(file: File) -> bool:
    """Whether it publishes an expert of a set; those in quarantines lie in other folders."""
    *_, folder, name = file.name.rsplit("/", 2)
    return bool(_EXPERT.fullmatch(folder) and _MANIFEST.fullmatch(name))


def _look(store: Inventory, key: str) -> SetEntry:
    """A set by its listing, its set.json and its users; manifests come later."""
    entry = SetEntry(key, _list(store, key))
    users = []
    in_quarantine = []
    has_identity = False
    for file in entry.files:
        folder, _, rest = file.name.removeprefix(f"{key}/").rpartition("/")
        expert = _EXPERT.fullmatch(folder)
        if folder.split("/")[0] == QUARANTINE:
            in_quarantine.append(file)
        elif not folder and rest == "set.json":
            has_identity = True
        elif folder == "users" and _USER.fullmatch(rest):
            users.append(file)
        elif _TEMPORARY.fullmatch(rest) and (not folder or folder == "users" or expert):
            entry.leftovers.append(file)
        elif expert and (_MANIFEST.fullmatch(rest) or _PART.fullmatch(rest)):
            index = int(expert[1])
            entry.experts.setdefault(index, Expert(index)).files.append(file)
        else:
            entry.foreign.append(file)
    entry.quarantined, stray = _quarantined(in_quarantine, f"{key}/{QUARANTINE}")
    entry.foreign += stray
    read = (read_user(store.fs, f"{store.path}/{f.name}", f.modified) for f in users)
    entry.users = sorted((u for u in read if u is not None), key=lambda u: -u.renewed)
    _identify(store, entry, has_identity)
    return entry


def _identify(store: Inventory, entry: SetEntry, has_identity: bool) -> None:
    where = f"{store.path}/{entry.key}"
    if not has_identity:
        entry.state = "damaged" if entry.experts else "awaited"
        entry.problem = f"{where}/set.json is missing." if entry.experts else None
        return
    try:
        entry.experts_set = ExpertSet(store.fs, where)
    except DamagedError as error:
        entry.state, entry.problem = "damaged", str(error)
    except UserError as error:
        entry.state, entry.problem = "newer", str(error)
    else:
        if entry.experts_set.key != entry.key:
            entry.state = "misplaced"
            entry.problem = f"{where} holds the set {entry.experts_set.key}, not its own."


def _read_expert(store: Inventory, entry: SetEntry, expert: Expert) -> list[File]:
    """Reads the manifest that counts; returns the parts that no manifest names."""
    assert entry.experts_set is not None
    folder = f"{entry.key}/expert-{expert.index:04d}"
    infos = [pafs.FileInfo(f"{store.path}/{f.name}", mtime_ns=f.modified_ns) for f in expert.files]
    names = manifest_names(infos)
    parts = {f.name: f for f in expert.files if _PART.fullmatch(f.name.rpartition("/")[2])}
    try:
        for name in names:
            manifest = entry.experts_set.read_manifest(expert.index, name)
            if manifest is None:  # it was quarantined while we looked
                continue
            if expert.epochs is None:
                expert.epochs = manifest.epochs
            for part in manifest.parts:
                parts.pop(f"{folder}/{part.file}", None)
            if not parts:  # the usual case: one manifest is enough
                return []
    except UserError as error:
        if expert.epochs is None:
            expert.problem, expert.newer = str(error), not isinstance(error, DamagedError)
        return []  # what it names is not known
    return list(parts.values())


def _quarantined(files: list[File], below: str) -> tuple[list[Quarantined], list[File]]:
    """Folders of a quarantine, and files there that nobody quarantined."""
    folders: dict[str, list[File]] = {}
    stray = []
    for file in files:
        name, slash, _ = file.name.removeprefix(f"{below}/").partition("/")
        if slash and _QUARANTINED.fullmatch(name):
            folders.setdefault(name, []).append(file)
        else:
            stray.append(file)
    found = []
    for name, inside in sorted(folders.items()):
        match = _QUARANTINED.fullmatch(name)
        assert match is not None
        since = datetime.strptime(match[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC).timestamp()
        found.append(Quarantined(f"{below}/{name}", since, tuple(inside)))
    return found, stray


def _list(store: Inventory, folder: str) -> list[File]:
    selector = pafs.FileSelector(f"{store.path}/{folder}", recursive=True, allow_not_found=True)
    try:
        found = store.fs.get_file_info(selector)
    except FileNotFoundError:  # a folder went while it was walked through
        found = store.fs.get_file_info(selector)
    files = [_file(f, store.path) for f in found if f.type == pafs.FileType.File]
    return sorted(files, key=lambda f: f.name)


def _file(info: pafs.FileInfo, path: str) -> File:
    name = info.path.removeprefix(f"{path}/")
    return File(name, info.size or 0, info.mtime_ns or 0)
