"""Parquet files of encoded images with labels, as Hugging Face lays them out.

``train-*.parquet`` with ``validation-*`` and ``test-*``. An image is a struct with ``bytes``, or
the bytes themselves; a label is a whole number from 0, or a word.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftd.data.parts import part_of
from ftd.data.sources import TEST, TRAIN, VAL, ImageFile, Source, Stats, missing
from ftd.errors import UserError

if TYPE_CHECKING:
    from ftd.data.config import DatasetConfig

COLUMNS = {"image": ("image", "img"), "label": ("label",)}
"""What columns are called where the configuration does not say."""


def open_parquet(config: "DatasetConfig") -> Source:
    """Any folder of Parquet files that are named by their part."""
    return source_of_tables(config)


def source_of_tables(
    config: "DatasetConfig", stats: Stats | None = None, *, val_is_test: bool = False
) -> Source:
    """The images of the Parquet files in ``dataset.root``.

    ``val_is_test``: where there is no test part, the validation part is the test part.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = Path(config.root or ".")
    files = parquet_files(root)
    parts = [_part(f) for f in files]
    if TRAIN not in parts:
        raise missing(config, "Parquet files named train-* (and validation-* or test-*)")
    if val_is_test and TEST not in parts:
        parts = [TEST if p == VAL else p for p in parts]
    used = sorted(((p, f) for p, f in zip(parts, files, strict=True) if p is not None))
    labels: list[np.ndarray] = []
    columns: list[tuple[str, str]] = []
    names: tuple[str, ...] = ()
    for _, f in used:
        try:
            schema = pq.read_schema(f)
            image, label = (_column(config, f, schema, what) for what in COLUMNS)
            kind = schema.field(image).type
            if not (pa.types.is_binary(_of_bytes(kind)) or pa.types.is_large_binary(kind)):
                raise UserError(
                    f"{f} has {kind} in the column {image!r}, and images are bytes, or a struct "
                    "with 'bytes'. Set dataset.columns={image: ...} to the column that has them."
                )
            column = pq.read_table(f, columns=[label]).column(label)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(f, error) from error
        labels.append(_values(column, f, label))
        columns.append((image, label))
        names = names or _huggingface_names(schema, label)
    joined, names = _numbered(np.concatenate(labels), names, config)

    def digest(hashes: Sequence[bytes | None]) -> str:
        contents = hashlib.sha256()
        for _, f in used:
            with open(f, "rb") as stream:
                contents.update(hashlib.file_digest(stream, "sha256").digest())
        if set(columns) != {("image", "label")}:
            contents.update(json.dumps(columns).encode())
        if VAL in parts:
            contents.update(json.dumps([p for p, _ in used]).encode())
        if skipped := [row for row, content in enumerate(hashes) if content is None]:
            contents.update(json.dumps(skipped).encode())
        return contents.hexdigest()

    def images() -> Iterator[ImageFile]:
        for (_, f), (image, _) in zip(used, columns, strict=True):
            row = 0
            try:
                for batch in pq.ParquetFile(f).iter_batches(batch_size=256, columns=[image]):
                    cells = batch.column(0)
                    for cell in cells.field("bytes") if pa.types.is_struct(cells.type) else cells:
                        yield ImageFile(f"{f.name}, row {row}", partial(_bytes_of, cell))
                        row += 1
            except (pa.ArrowException, OSError) as error:
                raise _damaged(f, error) from error

    return Source(
        labels=joined,
        parts=np.repeat([p for p, _ in used], [len(x) for x in labels]),
        class_names=names,
        channels=3,
        native_resolution=None,
        digest=digest,
        files=images,
        stats=stats,
        unused=tuple(f.name for p, f in zip(parts, files, strict=True) if p is None),
    )


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} cannot be read ({str(error).splitlines()[0]}). Fetch it again.")


def _bytes_of(cell: Any) -> bytes:
    return cell.as_py() or b""


def parquet_files(root: Path) -> list[Path]:
    """The Parquet files of a data set, in its folder or in ``data`` below it, by name."""
    return sorted(root.glob("*.parquet")) or sorted((root / "data").glob("*.parquet"))


def _part(file: Path) -> int | None:
    """By the word that the name begins with."""
    word = re.match("[A-Za-z]*", file.name)
    return part_of(word[0]) if word else None


def _column(config: "DatasetConfig", file: Path, schema: Any, what: str) -> str:
    """The name of the image or label column. Raises UserError with the columns that there are."""
    given = (config.columns or {}).get(what)
    found = [n for n in ((given,) if given else COLUMNS[what]) if n in schema.names]
    if len(found) == 1:
        return found[0]
    wrong = (
        f"no column {given or COLUMNS[what][0]!r}" if not found else "both " + " and ".join(found)
    )
    raise UserError(
        f"{file} has {wrong} for the {what}s; its columns are {', '.join(schema.names)}. Set "
        f"dataset.columns={{{what}: ...}} to one of them."
    )


def _of_bytes(kind: Any) -> Any:
    """The type of a struct's ``bytes``, or the type itself."""
    import pyarrow as pa

    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return kind.field("bytes").type
    return kind


def _values(column: Any, file: Path, name: str) -> np.ndarray:
    """A column of labels as (N,) int64, or as objects where they are words."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    words = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (words or pa.types.is_integer(kind)):
        raise UserError(
            f"{file} has {kind} in the column {name!r}, and labels are whole numbers or words. "
            "Set dataset.columns={label: ...} to the column that has them."
        )
    if column.null_count:
        raise UserError(
            f"{file}: {column.null_count} rows have no label in {name!r}. Remove those rows."
        )
    return np.asarray(column.to_pylist(), object if words else np.int64)


def _numbered(
    labels: np.ndarray, names: tuple[str, ...], config: "DatasetConfig"
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as numbers, and the class that each number stands for."""
    if not len(labels):
        raise UserError(f"dataset.root={config.root}: the Parquet files hold no images.")
    if labels.dtype == object:
        words = sorted({str(label) for label in labels})
        number = {word: i for i, word in enumerate(words)}
        return np.asarray([number[str(label)] for label in labels], np.int64), tuple(words)
    if labels.min() < 0:
        raise UserError(f"dataset.root={config.root}: a label is below 0. Labels count from 0.")
    if not names and labels.max() >= len(labels):
        raise UserError(
            f"dataset.root={config.root}: a label is {labels.max()}, and there are {len(labels)} "
            "images, too few for so many classes. Labels count from 0; set dataset.columns="
            "{label: ...} to the column that has them."
        )
    names = names or tuple(str(i) for i in range(int(labels.max()) + 1))
    if labels.max() >= len(names):
        raise UserError(
            f"dataset.root={config.root}: a label is {labels.max()}, and the schema names "
            f"{len(names)} classes. Labels count from 0."
        )
    return labels, names


def _huggingface_names(schema: Any, label: str) -> tuple[str, ...]:
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
        return tuple(info["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
