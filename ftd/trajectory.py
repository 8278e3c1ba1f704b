"""An expert set on disk: trajectories as Parquet, published by manifests.

A set is a folder on any ``pyarrow.fs`` filesystem:

    set.json                              what the experts are (``ftd.expert.identity``)
    expert-0007/part-0000-0005-<sum>.parquet
    expert-0007/manifest-00005-<sum>.json parts, sizes and checksums up to epoch 5
    quarantine/expert-0003-<time>/        damaged experts, out of the way

One row and one row group an epoch, so that reading a segment touches two row groups. A part is
visible once a manifest names it, and a manifest is written last, in one put; an expert that trains
on gets further parts and a further manifest. Names carry their file's checksum, so nothing is ever
overwritten, not even on an object store that two clusters write to: writers of the same bits write
the same files, and of two manifests of as many epochs the one published first counts. A writer
that finds itself overtaken is told (``Overtaken``) and goes on from what was published.

Snapshots may be kept in fewer bits than training has (``PRECISIONS``); what training resumes from
is always whole, in float32.

Importing this module imports no torch, so that those who only look after files stay small.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from ftd.errors import UserError
from ftd.s3 import S3

if TYPE_CHECKING:
    from torch import Tensor

    from ftd.expert import Snapshot

SCHEMA_VERSION = 1
"""Of the files. A reader refuses others by name."""

PART_EPOCHS = 5
"""Epochs of a part at most: what a killed expert loses."""

OPEN_FILES = 64
"""Parts that a reader keeps open."""

MANIFEST_READERS = 16
"""Manifests that are read at the same time, where all of a set are looked at."""

PRECISIONS = ("float32", "float16", "bfloat16")
"""Of the snapshots on disk; readers get float32 whatever it is."""

_SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("train_loss", pa.float64()),
        ("val_accuracy", pa.float64()),
        ("params", pa.large_binary()),  # P little-endian numbers of the set's precision
        ("momentum", pa.large_binary()),  # of a part's last row only: what training resumes from
    ]
)
_WHOLE = pa.field("params_float32", pa.large_binary())  # likewise, where params has fewer bits

_MANIFEST = re.compile(r"manifest-(\d{5})(-[0-9a-f]{12})?\.json")
_PART = re.compile(r"part-\d{4,}-\d{4,}-[0-9a-f]{12}\.parquet")
_EXPERT = re.compile(r"expert-(\d{4,})")


def set_key(identity: dict[str, Any]) -> str:
    """The key of an expert set: a hash of its identity, 20 hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class DamagedError(UserError):
    """A file of the set is not what its manifest says. The message names the file."""


class NotPublished(DamagedError):
    """Epochs of an expert are not there, or not any more: they can be trained anew."""


class Overtaken(UserError):
    """What an expert's writer trained on is no longer what is published of it: go on from that."""


@dataclass(frozen=True)
class Part:
    """One Parquet file: epochs ``first`` to ``last`` of an expert."""

    file: str
    first: int
    last: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What is published of one expert."""

    schema: int
    set: str
    expert: int
    epochs: int
    parameters: int
    parts: tuple[Part, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        try:
            value = json.loads(text)
            _check_schema(value["schema"], where)
            value["parts"] = tuple(Part(**p) for p in value["parts"])
            ends = [-1, *(p.last for p in value["parts"])]
            if [p.first - 1 for p in value["parts"]] != ends[:-1] or ends[-1] != value["epochs"]:
                raise KeyError(f"its parts do not add up to {value['epochs']} epochs")
            return cls(**value)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise DamagedError(f"{where} is not a manifest of an expert ({error!r}).") from error

    def part_of(self, epoch: int) -> Part:
        return next(p for p in self.parts if p.first <= epoch <= p.last)


class _End(NamedTuple):
    """The last epoch that a writer has of an expert: what its next one is trained on from."""

    epoch: int
    bits: str
    """Digest of the float32 parameters."""
    part: str = ""
    """The published file that is known to hold it."""

    @classmethod
    def of(cls, snapshot: "Snapshot", part: str = "") -> "_End":
        digest = hashlib.sha256(_bytes(snapshot.params_P)).hexdigest()
        return cls(snapshot.epoch, digest, part)


class _File(NamedTuple):
    """An open part."""

    source: Any
    metadata: pq.FileMetaData | None = None

    def reader(self) -> pq.ParquetFile:
        """For one read: a reader keeps the bytes of what it read last."""
        return pq.ParquetFile(
            self.source, metadata=self.metadata, page_checksum_verification=True, pre_buffer=True
        )


class ExpertSet:
    """One expert set. Reading trusts manifests only; writing publishes by them.

    ``identity`` creates the set where it is missing and must agree where it is not; without it
    the set must exist.
    """

    def __init__(
        self, filesystem: pafs.FileSystem, path: str, identity: dict[str, Any] | None = None
    ):
        self.fs, self.path = filesystem, path.rstrip("/")
        found = self._read_text(f"{self.path}/set.json")
        if found is None:
            if identity is None:
                raise UserError(f"{path} is not an expert set: it has no set.json.")
            self.identity = identity
        else:
            where = f"{self.path}/set.json"
            try:
                value = json.loads(found)
                _check_schema(value.get("schema", SCHEMA_VERSION), where)
                self.identity = value["identity"]
                if not isinstance(self.identity, dict):
                    raise TypeError("its identity is no mapping")
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise DamagedError(f"{where} is damaged ({error!r}).") from error
            if identity is not None and self.identity != json.loads(json.dumps(identity)):
                raise UserError(
                    f"{path} holds experts of another configuration (key "
                    f"{set_key(self.identity)}, wanted {set_key(identity)}). Use another folder."
                )
        self.key = set_key(self.identity)
        self.precision: str = self.identity.get("snapshots", "float32")
        if self.precision not in PRECISIONS:
            raise UserError(
                f"{path} keeps snapshots in {self.precision}; this program knows "
                f"{', '.join(PRECISIONS)}. Use the version that wrote it, or another store."
            )
        self._files: dict[str, _File] = {}
        self._manifests: dict[int, Manifest] = {}
        self._names: dict[int, list[str]] = {}
        """Expert -> its manifests as the last listing of the whole set had them, the best first."""
        self._base: dict[int, _End] = {}
        """Expert -> what its writer, this object, trains on from."""
        self._wrote: tuple[str, Manifest] | None = None
        """The manifest that this object wrote last, and its name, which tells its content."""

    # --- reading ----------------------------------------------------------------------------

    def manifest(self, expert: int) -> Manifest | None:
        """The furthest published manifest of an expert, the first of its length; or None."""
        folder = self.folder(expert)
        files = self.fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
        names = manifest_names(files)
        return self.read_manifest(expert, names[0]) if names else None

    def published(self) -> dict[int, int]:
        """Expert -> its last published epoch, as the names of manifests tell it.

        One listing, however many experts there are. What is in the manifests is not looked at:
        ``damaged_manifests`` does, and so does whoever reads an expert.
        """
        self._names = self._list()
        return {i: _epoch_of(names[0]) for i, names in self._names.items()}

    def damaged_manifests(self) -> dict[int, DamagedError]:
        """Experts whose manifest, of those that ``published`` has found, cannot be used."""

        def fault(expert: int) -> DamagedError | None:
            try:
                self.read_manifest(expert, self._names[expert][0])
            except DamagedError as error:
                return error
            return None

        with ThreadPoolExecutor(MANIFEST_READERS) as pool:
            faults = zip(self._names, pool.map(fault, self._names), strict=True)
            return {expert: error for expert, error in faults if error is not None}

    def sizes(self) -> dict[int, int]:
        """Expert -> bytes of its part files. One listing."""
        sizes: dict[int, int] = {}
        for expert, file in self._walk():
            if _PART.fullmatch(file.base_name):
                sizes[expert] = sizes.get(expert, 0) + (file.size or 0)
        return sizes

    def _list(self) -> dict[int, list[str]]:
        found: dict[int, list[pafs.FileInfo]] = {}
        for expert, file in self._walk():
            found.setdefault(expert, []).append(file)
        names = {i: manifest_names(files) for i, files in sorted(found.items())}
        return {i: n for i, n in names.items() if n}

    def _walk(self) -> Iterator[tuple[int, pafs.FileInfo]]:
        """(expert, file) of all files in experts' folders."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=True)
        try:
            files = self.fs.get_file_info(selector)
        except FileNotFoundError:  # a folder went while it was walked through
            files = self.fs.get_file_info(selector)
        for file in files:
            folder, _, _ = file.path.removeprefix(f"{self.path}/").rpartition("/")
            expert = _EXPERT.fullmatch(folder)
            if expert and file.type == pafs.FileType.File:
                yield int(expert[1]), file

    def read_manifest(self, expert: int, name: str) -> Manifest | None:
        """One manifest of an expert, checked; None if it is gone, because it was quarantined."""
        if self._wrote is not None and self._wrote[0] == name and self._wrote[1].expert == expert:
            return self._wrote[1]
        where = f"{self.folder(expert)}/{name}"
        text = self._read_text(where)
        if text is None:
            return None
        manifest = Manifest.from_json(text, where)
        if manifest.set != self.key or manifest.expert != expert:
            raise DamagedError(
                f"{where} belongs to expert {manifest.expert} of set {manifest.set}, "
                f"not to expert {expert} of set {self.key}."
            )
        match = _MANIFEST.fullmatch(name)
        if match and match[2] and match[2] != f"-{_short_sum(text.encode())}":
            raise DamagedError(f"{where} is damaged: it has another checksum than its name says.")
        return manifest

    def experts(self) -> list[int]:
        """Experts that have a folder, published or not, in order."""
        folders = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(int(m[1]) for f in folders if (m := _EXPERT.fullmatch(f.base_name)))

    def complete(self, epochs: int) -> list[int]:
        """Experts that are published up to ``epochs`` at least, in order."""
        return [i for i, published in self.published().items() if published >= epochs]

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Parameters (P,), float32, of an expert at two epochs of one and the same trajectory.

        They are read by one manifest. Where its files are gone, because the expert was
        quarantined and trained anew, both come from the new one.
        """
        try:
            return self._segment(expert, start, end)
        except DamagedError:
            if self.manifest(expert) == self._forget(expert):
                raise
            return self._segment(expert, start, end)

    def _segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        last = self.params(expert, end)
        return (last if start == end else self.params(expert, start)), last

    def params(self, expert: int, epoch: int) -> np.ndarray:
        """Parameters (P,), float32, of an expert after ``epoch`` epochs."""
        part = self.part(expert, epoch)
        table = self._row_group(expert, part, epoch - part.first, ["epoch", "params"])
        if table.column("epoch")[0].as_py() != epoch:
            raise DamagedError(f"{self._part_path(expert, part)} has its epochs out of order.")
        return _decode_params(table.column("params")[0].as_buffer(), self.precision)

    def part(self, expert: int, epoch: int) -> Part:
        """The published file that holds an epoch of an expert."""
        if expert not in self._manifests or self._manifests[expert].epochs < epoch:
            manifest = self._listed(expert, epoch) or self.manifest(expert)
            if manifest is None or manifest.epochs < epoch:
                have = "none" if manifest is None else str(manifest.epochs)
                raise NotPublished(
                    f"expert {expert} of {self.path} has {have} of the {epoch} epochs needed. "
                    "Train it further."
                )
            self._manifests[expert] = manifest
        return self._manifests[expert].part_of(epoch)

    def _listed(self, expert: int, epoch: int) -> Manifest | None:
        """The manifest that the last listing has of an expert, if it goes far enough."""
        names = self._names.get(expert)
        if not names or _epoch_of(names[0]) < epoch:
            return None
        return self.read_manifest(expert, names[0])

    def history(self, expert: int) -> list[tuple[int, float, float]]:
        """(epoch, training loss, validation accuracy) of every published epoch."""
        manifest = self.manifest(expert)
        rows: list[tuple[int, float, float]] = []
        for part in manifest.parts if manifest else ():
            path = self._part_path(expert, part)
            try:
                reader = self._open(expert, part).reader()  # one pass, not by rows
                table = reader.read(columns=["epoch", "train_loss", "val_accuracy"])
                rows += zip(*(c.to_pylist() for c in table.columns), strict=True)
            except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
                raise self._damage(path, part, error) from error
        return rows

    def resume_point(self, expert: int) -> "Snapshot | None":
        """The last published snapshot with its optimiser state, to go on from."""
        from ftd.expert import Snapshot

        manifest = self.manifest(expert)
        self._base.pop(expert, None)
        if manifest is None:
            return None
        part = manifest.parts[-1]
        row = self._row_group(expert, part, part.last - part.first, None).to_pylist()[0]
        momentum = row["momentum"]
        snapshot = Snapshot(
            epoch=row["epoch"],
            params_P=_tensor(row[self._resume_column]),
            momentum_P=None if momentum is None else _tensor(momentum),
            train_loss=row["train_loss"],
            val_accuracy=row["val_accuracy"],
        )
        self._base[expert] = _End.of(snapshot, part.file)
        return snapshot

    def size(self) -> int:
        """Bytes that published parts take."""
        manifests = (self.manifest(i) for i in self.experts())
        return sum(part.bytes for m in manifests if m is not None for part in m.parts)

    def verify(self, expert: int) -> None:
        """Reads every byte and every page that the manifest names.

        Raises DamagedError, or OSError when the files cannot be reached.
        """
        manifest = self.manifest(expert)
        for part in manifest.parts if manifest else ():
            path = self._part_path(expert, part)
            data = self._whole(path, part)
            try:
                table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
                epochs = table.column("epoch").to_pylist()
            except (pa.ArrowException, KeyError, OSError) as error:
                raise DamagedError(f"{path} cannot be read ({error}).") from error
            if epochs != list(range(part.first, part.last + 1)):
                raise DamagedError(f"{path} holds other epochs than {part.first} to {part.last}.")

    def quarantine(self, expert: int) -> str:
        """Takes an expert out of the set, to be trained anew; returns where it lies now."""
        self._forget(expert)
        target = f"{self.path}/quarantine/expert-{expert:04d}-{quarantine_stamp()}"
        move_tree(self.fs, self.folder(expert), target)
        return target

    # --- writing ----------------------------------------------------------------------------

    def create(self) -> None:
        """Writes ``set.json`` if it is not there."""
        if self._read_text(f"{self.path}/set.json") is None:
            self.fs.create_dir(self.path, recursive=True)
            value = {"schema": SCHEMA_VERSION, "identity": self.identity}
            text = json.dumps(value, indent=1, sort_keys=True) + "\n"
            put(self.fs, f"{self.path}/set.json", text.encode(), once=True)

    def record(
        self, expert: int, snapshots: "Iterable[Snapshot]", *, last: int
    ) -> "Iterator[Snapshot]":
        """Passes snapshots on, publishing a part every few epochs and at epoch ``last``."""
        part: list[Snapshot] = []
        for snapshot in snapshots:
            part.append(snapshot)
            if snapshot.epoch == last or (snapshot.epoch and snapshot.epoch % PART_EPOCHS == 0):
                self.append(expert, part)
                part = []
            yield snapshot

    def append(self, expert: int, snapshots: "Sequence[Snapshot]") -> Manifest:
        """Publishes further epochs of an expert; they must follow on those published.

        Raises Overtaken when they do not, because somebody else published or removed some.
        """
        before = self.manifest(expert)
        epochs = -1 if before is None else before.epochs
        there = [s for s in snapshots if s.epoch <= epochs]
        base = _End.of(there[-1]) if there else self._base.get(expert)
        if base is not None and len(there) == len(snapshots):
            assert before is not None
            self._base[expert] = base  # first published wins; the next append compares
            return before
        snapshots = snapshots[len(there) :]
        follows = snapshots[0].epoch == epochs + 1
        if follows and before is not None and base is not None:
            follows = base.epoch == epochs and (
                base.part == before.parts[-1].file or base.bits == self._last_bits(before)
            )
        if not follows:
            raise Overtaken(
                f"expert {expert} of {self.path} was published by another writer with other bits, "
                "or taken away, while it was trained. Train it on from what is there."
            )
        data = _encode(self.identity, expert, snapshots)
        digest = hashlib.sha256(data).hexdigest()
        first, last = snapshots[0].epoch, snapshots[-1].epoch
        name = f"part-{first:04d}-{last:04d}-{digest[:12]}.parquet"
        part = Part(name, first, last, len(data), digest)
        manifest = Manifest(
            schema=SCHEMA_VERSION,
            set=self.key,
            expert=expert,
            epochs=last,
            parameters=snapshots[0].params_P.numel(),
            parts=(*(before.parts if before else ()), part),
        )
        folder = self.folder(expert)
        if not isinstance(self.fs, pafs.S3FileSystem):  # S3 shows the folder of every file
            self.fs.create_dir(folder, recursive=True)
        put(self.fs, f"{folder}/{part.file}", data)
        text = manifest.to_json().encode()
        published = f"manifest-{last:05d}-{_short_sum(text)}.json"
        put(self.fs, f"{folder}/{published}", text, once=True)
        self._base[expert] = _End.of(snapshots[-1], part.file)
        self._wrote = published, manifest
        return manifest

    def _last_bits(self, manifest: Manifest) -> str:
        part = manifest.parts[-1]
        group = part.last - part.first
        row = self._row_group(manifest.expert, part, group, [self._resume_column])
        return hashlib.sha256(row.column(0)[0].as_buffer()).hexdigest()

    # --- files ------------------------------------------------------------------------------

    def _row_group(
        self, expert: int, part: Part, group: int, columns: list[str] | None
    ) -> pa.Table:
        path = self._part_path(expert, part)
        try:
            if path not in self._files:
                file = self._open(expert, part)
                while len(self._files) >= OPEN_FILES:
                    self._files.pop(next(iter(self._files))).source.close()
                self._files[path] = file
            table = self._files[path].reader().read_row_group(group, columns=columns)
            if table.schema.names != (columns or _schema(self.precision).names):
                raise ValueError(f"its columns are {', '.join(table.schema.names)}")
            return table
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise self._damage(path, part, error) from error

    def _open(self, expert: int, part: Part) -> "_File":
        path = self._part_path(expert, part)
        file = _File(self.fs.open_input_file(path))
        reader = file.reader()
        file = file._replace(metadata=reader.metadata)
        metadata = json.loads((reader.schema_arrow.metadata or {})[b"ftd"])
        if metadata["set"] != self.key or metadata["expert"] != expert:
            raise DamagedError(
                f"{path} holds expert {metadata['expert']} of set {metadata['set']}, "
                f"not expert {expert} of set {self.key}."
            )
        return file

    def _damage(self, path: str, part: Part, error: Exception) -> Exception:
        """What an error in reading a part comes from: the file, or the way to it.

        Parquet and networks raise the same errors, so the file's own bytes decide.
        """
        if isinstance(error, UserError):
            return error
        try:
            self._whole(path, part)
        except (OSError, DamagedError) as found:
            return found
        if isinstance(error, OSError):
            return error
        return DamagedError(f"{path} cannot be read ({error}).")

    def _whole(self, path: str, part: Part) -> bytes:
        """A part's bytes, if they are those that the manifest promises."""
        try:
            with self.fs.open_input_file(path) as file:  # knows its size: one request
                data = file.read()
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno == errno.EIO:
                raise DamagedError(f"{path} cannot be read ({error}).") from error
            raise
        if len(data) != part.bytes:
            raise DamagedError(
                f"{path} is damaged: it has {len(data)} bytes where its manifest says {part.bytes}."
            )
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise DamagedError(
                f"{path} is damaged: it has another checksum than its manifest says."
            )
        return data

    def _forget(self, expert: int) -> Manifest | None:
        """Drops what is known of an expert's files; returns the manifest they were read by."""
        self._wrote = None
        for path in [p for p in self._files if p.startswith(f"{self.folder(expert)}/")]:
            self._files.pop(path).source.close()
        self._names.pop(expert, None)
        return self._manifests.pop(expert, None)

    def folder(self, expert: int) -> str:
        """Where an expert's files lie."""
        return f"{self.path}/expert-{expert:04d}"

    @property
    def _resume_column(self) -> str:
        return "params" if self.precision == "float32" else _WHOLE.name

    def _part_path(self, expert: int, part: Part) -> str:
        return f"{self.folder(expert)}/{part.file}"

    def _read_text(self, path: str) -> str | None:
        try:
            with self.fs.open_input_stream(path) as stream:
                return stream.read().decode(errors="replace")  # damage shows when it is parsed
        except (FileNotFoundError, NotADirectoryError):
            return None


def manifest_names(files: Iterable[pafs.FileInfo]) -> list[str]:
    """Names of an expert's manifests; the first is the one that counts.

    That is the furthest, of several as far the one published first. Clocks of object stores tick
    in seconds, so names settle the rest.
    """
    found = [
        (-int(m[1]), f.mtime_ns or 0, f.base_name)
        for f in files
        if (m := _MANIFEST.fullmatch(f.base_name))
    ]
    return [name for _, _, name in sorted(found)]


def _epoch_of(name: str) -> int:
    """The last epoch that a manifest publishes."""
    match = _MANIFEST.fullmatch(name)
    assert match is not None
    return int(match[1])


def quarantine_stamp() -> str:
    """What makes a name in a quarantine its own: the time and something random."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:4]}"


def _upload(filesystem: pafs.FileSystem, path: str, data: bytes) -> None:
    writer = filesystem.writer(len(data)) if isinstance(filesystem, S3) else filesystem
    with writer.open_output_stream(path) as stream:
        stream.write(data)


def put(filesystem: pafs.FileSystem, path: str, data: bytes, *, once: bool = False) -> None:
    """Writes a whole file at once: nobody sees half of it, and a failure leaves nothing.

    With ``once`` a file that is there already stays as it is.
    """
    if once and filesystem.get_file_info(path).type == pafs.FileType.File:
        return
    local = isinstance(filesystem, pafs.LocalFileSystem) or (
        isinstance(filesystem, pafs.SubTreeFileSystem)
        and isinstance(filesystem.base_fs, pafs.LocalFileSystem)
    )
    if not local:  # object stores show an object when its upload is complete
        with ThreadPoolExecutor(1) as pool:  # which an interrupt in the middle would make it
            pool.submit(_upload, filesystem, path, data).result()
        return
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.part"
    try:
        with filesystem.open_output_stream(temporary) as stream:
            stream.write(data)
        if once and isinstance(filesystem, pafs.LocalFileSystem):
            with contextlib.suppress(FileExistsError):  # somebody was faster
                os.link(temporary, path)
            os.unlink(temporary)
        else:
            filesystem.move(temporary, path)
    except BaseException:
        if filesystem.get_file_info(temporary).type == pafs.FileType.File:
            filesystem.delete_file(temporary)
        raise


def move_tree(filesystem: pafs.FileSystem, folder: str, target: str) -> None:
    """Moves a folder; where that takes a move for each file, manifests go first."""
    filesystem.create_dir(target.rpartition("/")[0], recursive=True)
    if isinstance(filesystem, pafs.LocalFileSystem):
        filesystem.move(folder, target)
        return
    filesystem.create_dir(target)
    files = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True))
    names = [f.path for f in files if f.type == pafs.FileType.File]
    for path in sorted(names, key=lambda p: not _MANIFEST.fullmatch(p.rpartition("/")[2])):
        filesystem.move(path, f"{target}{path.removeprefix(folder)}")
    left = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    if not any(f.type == pafs.FileType.File for f in left):  # else somebody writes there again
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(folder)


def _check_schema(version: object, where: str) -> None:
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {version}; this program reads version {SCHEMA_VERSION}. "
            "Use the version that wrote it, or another store."
        )


def _schema(precision: str) -> pa.Schema:
    return _SCHEMA if precision == "float32" else _SCHEMA.append(_WHOLE)


def _encode(identity: dict[str, Any], expert: int, snapshots: "Sequence[Snapshot]") -> bytes:
    precision = identity.get("snapshots", "float32")
    metadata = {
        "schema": SCHEMA_VERSION,
        "set": set_key(identity),
        "expert": expert,
        "dtype": precision,
        "identity": identity,
    }
    schema = _schema(precision).with_metadata({"ftd": json.dumps(metadata, sort_keys=True)})
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        schema,
        compression="none",  # weights are noise to a compressor
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        for s in snapshots:
            last = s is snapshots[-1]
            row = {
                "epoch": s.epoch,
                "train_loss": s.train_loss,
                "val_accuracy": s.val_accuracy,
                "params": _encode_params(s.params_P, precision),
                "momentum": _bytes(s.momentum_P) if last and s.momentum_P is not None else None,
                _WHOLE.name: _bytes(s.params_P) if last else None,
            }
            arrays = [pa.array([row[f.name]], f.type) for f in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return sink.getvalue()


def _encode_params(params_P: "Tensor", precision: str) -> bytes:
    if precision == "float32":
        return _bytes(params_P)
    import torch

    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[precision]
    kept = params_P.to(dtype)
    if not bool(kept.isfinite().all()):
        raise UserError(
            f"store.precision={precision} cannot hold a parameter of size "
            f"{float(params_P.abs().max()):g}. Take bfloat16 or float32."
        )
    return kept.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def _decode_params(buffer: Any, precision: str) -> np.ndarray:
    if precision == "float16":
        return np.frombuffer(buffer, "<f2").astype(np.float32)
    if precision == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(buffer, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(buffer, "<f4")


def _short_sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _bytes(tensor: "Tensor") -> bytes:
    return tensor.numpy().astype("<f4", copy=False).tobytes()


def _tensor(data: bytes) -> "Tensor":
    import torch

    return torch.from_numpy(np.frombuffer(data, "<f4").copy())
