"""An expert set on disk: trajectories as Parquet, published by manifests.

A set is a folder on any ``pyarrow.fs`` filesystem:

    set.json                              what the experts are (``ftd.expert.identity``)
    expert-0007/part-0000-0005-<sum>.parquet
    expert-0007/manifest-00005.json       parts, sizes and checksums up to epoch 5

One row and one row group an epoch, so that reading a segment touches two row groups. A part is
visible once a manifest names it: a manifest is written last, in one put, and is never
overwritten; an expert that trains on gets further parts and a further manifest. Part names carry
their checksum, so two writers of the same bits write the same file and others cannot collide.

Importing this module imports no torch, so that those who only look after files stay small.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from ftd.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ftd.expert import Snapshot

SCHEMA_VERSION = 1
"""Of the files. A reader refuses others by name."""

PART_EPOCHS = 5
"""Epochs of a part at most: what a killed expert loses."""

OPEN_FILES = 64
"""Parts that a reader keeps open."""

_SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("train_loss", pa.float64()),
        ("val_accuracy", pa.float64()),
        ("params", pa.large_binary()),  # P little-endian float32
        ("momentum", pa.large_binary()),  # of a part's last row only: what training resumes from
    ]
)


def set_key(identity: dict[str, Any]) -> str:
    """The key of an expert set: a hash of its identity, 20 hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class DamagedError(UserError):
    """A file of the set is not what its manifest says. The message names the file."""


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
            if value["schema"] != SCHEMA_VERSION:
                raise UserError(
                    f"{where} has schema version {value['schema']}; this program reads version "
                    f"{SCHEMA_VERSION}. Use the version that wrote it, or another store."
                )
            value["parts"] = tuple(Part(**p) for p in value["parts"])
            ends = [-1, *(p.last for p in value["parts"])]
            if [p.first - 1 for p in value["parts"]] != ends[:-1] or ends[-1] != value["epochs"]:
                raise KeyError(f"its parts do not add up to {value['epochs']} epochs")
            return cls(**value)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise DamagedError(f"{where} is not a manifest of an expert ({error!r}).") from error

    def part_of(self, epoch: int) -> Part:
        return next(p for p in self.parts if p.first <= epoch <= p.last)


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
            try:
                self.identity = json.loads(found)["identity"]
            except (ValueError, KeyError, TypeError) as error:
                raise DamagedError(f"{self.path}/set.json is damaged ({error!r}).") from error
            if identity is not None and self.identity != json.loads(json.dumps(identity)):
                raise UserError(
                    f"{path} holds experts of another configuration (key "
                    f"{set_key(self.identity)}, wanted {set_key(identity)}). Use another folder."
                )
        self.key = set_key(self.identity)
        self._files: dict[str, pq.ParquetFile] = {}
        self._manifests: dict[int, Manifest] = {}

    # --- reading ----------------------------------------------------------------------------

    def manifest(self, expert: int) -> Manifest | None:
        """The furthest published manifest of an expert, or None."""
        folder = f"{self.path}/expert-{expert:04d}"
        files = self.fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
        names = [f.base_name for f in files]
        newest = max((n for n in names if re.fullmatch(r"manifest-\d{5}\.json", n)), default=None)
        if newest is None:
            return None
        where = f"{folder}/{newest}"
        text = self._read_text(where)
        manifest = Manifest.from_json(text or "", where)
        if manifest.set != self.key or manifest.expert != expert:
            raise DamagedError(
                f"{where} belongs to expert {manifest.expert} of set {manifest.set}, "
                f"not to expert {expert} of set {self.key}."
            )
        return manifest

    def complete(self, epochs: int) -> list[int]:
        """Experts that are published up to ``epochs`` at least, in order."""
        folders = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        numbers = sorted(
            int(m[1]) for f in folders if (m := re.fullmatch(r"expert-(\d{4,})", f.base_name))
        )
        manifests = {i: self.manifest(i) for i in numbers}
        return [i for i, m in manifests.items() if m is not None and m.epochs >= epochs]

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Parameters (P,), float32, of an expert at two epochs."""
        return self.params(expert, start), self.params(expert, end)

    def params(self, expert: int, epoch: int) -> np.ndarray:
        """Parameters (P,), float32, of an expert after ``epoch`` epochs."""
        if expert not in self._manifests or self._manifests[expert].epochs < epoch:
            manifest = self.manifest(expert)
            if manifest is None or manifest.epochs < epoch:
                have = "none" if manifest is None else str(manifest.epochs)
                raise UserError(
                    f"expert {expert} of {self.path} has {have} of the {epoch} epochs needed. "
                    "Train it further."
                )
            self._manifests[expert] = manifest
        part = self._manifests[expert].part_of(epoch)
        table = self._row_group(expert, part, epoch - part.first, ["epoch", "params"])
        if table.column("epoch")[0].as_py() != epoch:
            raise DamagedError(f"{self._part_path(expert, part)} has its epochs out of order.")
        return np.frombuffer(table.column("params")[0].as_buffer(), np.float32)

    def history(self, expert: int) -> list[tuple[int, float, float]]:
        """(epoch, training loss, validation accuracy) of every published epoch."""
        manifest = self.manifest(expert)
        rows = []
        for part in manifest.parts if manifest else ():
            columns = ["epoch", "train_loss", "val_accuracy"]
            for group in range(part.last - part.first + 1):
                row = self._row_group(expert, part, group, columns).to_pylist()[0]
                rows.append(tuple(row[c] for c in columns))
        return rows

    def resume_point(self, expert: int) -> "Snapshot | None":
        """The last published snapshot with its optimiser state, to go on from."""
        from ftd.expert import Snapshot

        manifest = self.manifest(expert)
        if manifest is None:
            return None
        part = manifest.parts[-1]
        row = self._row_group(expert, part, part.last - part.first, None).to_pylist()[0]
        momentum = row["momentum"]
        return Snapshot(
            epoch=row["epoch"],
            params_P=_tensor(row["params"]),
            momentum_P=None if momentum is None else _tensor(momentum),
            train_loss=row["train_loss"],
            val_accuracy=row["val_accuracy"],
        )

    def size(self) -> int:
        """Bytes that published parts take."""
        return sum(
            part.bytes for i in self.complete(0) for part in (self.manifest(i) or _EMPTY).parts
        )

    def verify(self, expert: int) -> None:
        """Reads every byte that the expert's manifest names. Raises DamagedError."""
        manifest = self.manifest(expert)
        for part in manifest.parts if manifest else ():
            path = self._part_path(expert, part)
            try:
                with self.fs.open_input_stream(path) as stream:
                    data = stream.read()
            except OSError as error:
                raise DamagedError(f"{path} cannot be read ({error}).") from error
            if len(data) != part.bytes or hashlib.sha256(data).hexdigest() != part.sha256:
                raise DamagedError(
                    f"{path} is damaged: {len(data)} bytes of another checksum where the manifest "
                    f"says {part.bytes} bytes."
                )

    # --- writing ----------------------------------------------------------------------------

    def create(self) -> None:
        """Writes ``set.json`` if it is not there."""
        if self._read_text(f"{self.path}/set.json") is None:
            self.fs.create_dir(self.path, recursive=True)
            text = json.dumps({"identity": self.identity}, indent=1, sort_keys=True) + "\n"
            self._put(f"{self.path}/set.json", text.encode())

    def append(self, expert: int, snapshots: "Sequence[Snapshot]") -> Manifest:
        """Publishes further epochs of an expert; they must follow on those published."""
        before = self.manifest(expert)
        if before is not None:  # what somebody published already stands: first published wins
            there = [s for s in snapshots if s.epoch <= before.epochs]
            snapshots = [s for s in snapshots if s.epoch > before.epochs]
            if not snapshots:
                return before
            if there and self.params(expert, there[-1].epoch).tobytes() != _bytes(
                there[-1].params_P
            ):
                raise UserError(
                    f"expert {expert} of {self.path} was published by another writer with other "
                    "bits, so its trajectory cannot be continued by this one. Train it again."
                )
        first, last = snapshots[0].epoch, snapshots[-1].epoch
        expected = 0 if before is None else before.epochs + 1
        assert first == expected, f"epoch {first} follows on {expected - 1}"
        data = _encode(self.identity, expert, snapshots)
        digest = hashlib.sha256(data).hexdigest()
        part = Part(
            f"part-{first:04d}-{last:04d}-{digest[:12]}.parquet", first, last, len(data), digest
        )
        manifest = Manifest(
            schema=SCHEMA_VERSION,
            set=self.key,
            expert=expert,
            epochs=last,
            parameters=snapshots[0].params_P.numel(),
            parts=(*(before.parts if before else ()), part),
        )
        folder = f"{self.path}/expert-{expert:04d}"
        self.fs.create_dir(folder, recursive=True)
        self._put(f"{folder}/{part.file}", data)
        name = f"{folder}/manifest-{last:05d}.json"
        self._put(name, manifest.to_json().encode(), once=True)
        return manifest

    # --- files ------------------------------------------------------------------------------

    def _row_group(
        self, expert: int, part: Part, group: int, columns: list[str] | None
    ) -> pa.Table:
        path = self._part_path(expert, part)
        try:
            if path not in self._files:
                file = pq.ParquetFile(
                    self.fs.open_input_file(path), page_checksum_verification=True, pre_buffer=False
                )
                metadata = json.loads((file.schema_arrow.metadata or {})[b"ftd"])
                if metadata["set"] != self.key or metadata["expert"] != expert:
                    raise DamagedError(
                        f"{path} holds expert {metadata['expert']} of set {metadata['set']}, "
                        f"not expert {expert} of set {self.key}."
                    )
                while len(self._files) >= OPEN_FILES:
                    self._files.pop(next(iter(self._files))).close()
                self._files[path] = file
            table = self._files[path].read_row_group(group, columns=columns)
            if table.schema.names != (columns or _SCHEMA.names):
                raise ValueError(f"its columns are {', '.join(table.schema.names)}")
            return table
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise DamagedError(f"{path} cannot be read ({error}).") from error

    def _part_path(self, expert: int, part: Part) -> str:
        return f"{self.path}/expert-{expert:04d}/{part.file}"

    def _read_text(self, path: str) -> str | None:
        if self.fs.get_file_info(path).type != pafs.FileType.File:
            return None
        with self.fs.open_input_stream(path) as stream:
            return stream.read().decode(errors="replace")  # damage shows when it is parsed

    def _put(self, path: str, data: bytes, *, once: bool = False) -> None:
        put(self.fs, path, data, once=once)


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
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
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


def _encode(identity: dict[str, Any], expert: int, snapshots: "Sequence[Snapshot]") -> bytes:
    metadata = {
        "schema": SCHEMA_VERSION,
        "set": set_key(identity),
        "expert": expert,
        "dtype": "float32",
        "identity": identity,
    }
    schema = _SCHEMA.with_metadata({"ftd": json.dumps(metadata, sort_keys=True)})
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
            momentum = s.momentum_P if s is snapshots[-1] else None
            columns = [
                [s.epoch],
                [s.train_loss],
                [s.val_accuracy],
                [_bytes(s.params_P)],
                [None if momentum is None else _bytes(momentum)],
            ]
            arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return sink.getvalue()


def _bytes(tensor: "Tensor") -> bytes:
    return tensor.numpy().astype("<f4", copy=False).tobytes()


def _tensor(data: bytes) -> "Tensor":
    import torch

    return torch.from_numpy(np.frombuffer(data, "<f4").copy())


_EMPTY = Manifest(SCHEMA_VERSION, "", 0, 0, 0, ())
