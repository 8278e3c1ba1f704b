"""Folders of image files: ``train/CLASS/...`` with other parts beside it, or plain ``CLASS/...``.

Images in folders below a class folder are of that class; links are followed. Whatever is no image
by its name, hidden files, and folders without an image are passed over.
"""

import hashlib
import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ftd.data.parts import by_part, part_of
from ftd.data.sources import TEST, TRAIN, VAL, ImageFile, Source, Stats, missing
from ftd.errors import UserError

if TYPE_CHECKING:
    from ftd.data.config import DatasetConfig

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".jp2", ".avif", ".heic", ".heif", ".jxl",
}  # fmt: skip
"""Names of image files. What this machine has no decoder for is listed as unreadable, not passed
over."""

STRAYS = {"__MACOSX", "@eaDir"}
"""Folders that machines leave beside images."""


def open_imagefolder(config: "DatasetConfig") -> Source:
    """Any folder of class folders, or of parts with class folders."""
    root = Path(config.root or ".")
    if not root.is_dir():
        raise missing(config, "train/CLASS/image files, or CLASS/image files")
    return source_of_folder(root)


def source_of_folder(
    root: Path, stats: Stats | None = None, *, val_is_test: bool = False
) -> Source:
    """The images below ``root``.

    ``val_is_test``: where there is no test part, the validation part is the test part.
    """
    folders = _parts(root)
    if val_is_test and VAL in folders and TEST not in folders:
        folders[TEST] = folders.pop(VAL)
    classes = {part: _classes(folder) for part, folder in folders.items()}
    for part, found in classes.items():
        if not found:
            raise UserError(
                f"dataset.root={root}: {_shown(folders[part], root)} holds no class folder with "
                "images. Lay the images out as CLASS/picture.jpg."
            )
        if strange := sorted(set(found) - set(classes[TRAIN])):
            raise UserError(
                f"dataset.root={root}: {folders[part].name}/ has the class {strange[0]!r}, which "
                f"{folders[TRAIN].name}/ has not. Give both parts the same class folders."
            )
    names = sorted(classes[TRAIN])
    files: list[Path] = []
    labels: list[int] = []
    parts: list[int] = []
    for part in sorted(classes):
        for name in sorted(classes[part]):
            files += classes[part][name]
            labels += [names.index(name)] * len(classes[part][name])
            parts += [part] * len(classes[part][name])
    paths = [f.relative_to(root).as_posix() for f in files]

    def digest(hashes: Sequence[bytes | None]) -> str:
        contents = hashlib.sha256()
        for path, content in zip(paths, hashes, strict=True):
            if content is not None:
                contents.update(os.fsencode(path) + b"\0" + content)
        return contents.hexdigest()

    return Source(
        labels=np.asarray(labels, np.int64),
        parts=np.asarray(parts),
        class_names=tuple(map(_text, names)),
        channels=3,
        native_resolution=None,
        digest=digest,
        files=lambda: (
            ImageFile(_text(p), f.read_bytes) for p, f in zip(paths, files, strict=True)
        ),
        stats=stats,
        unused=(*_loose(root, folders.values()), *_others(root, folders.values())),
    )


def image_files(folder: Path) -> Iterator[Path]:
    """All image files below a folder, sorted, each folder's own before those of its folders."""
    ways = (Path(os.path.realpath(folder)), Path(os.path.realpath(folder.parent)) / folder.name)
    return _image_files(folder, tuple(str(above) for way in ways for above in way.parents))


def _image_files(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in, with images of other classes
        return
    for entry in _entries(folder, files=True):
        if _is_image(entry.name):
            yield Path(entry.path)
    for entry in _entries(folder, files=False):
        yield from _image_files(Path(entry.path), (*above, real))


def _entries(folder: Path, *, files: bool) -> list[os.DirEntry[str]]:
    """Files or folders in a folder by name, without what is hidden or left by machines.

    Links that lead nowhere count as files: whoever reads them is told.
    """
    with os.scandir(folder) as entries:
        return sorted(
            (
                e
                for e in entries
                if not e.name.startswith(".")
                and e.name not in STRAYS
                and (os.path.isdir(e.path) != files)
                and (os.path.isdir(e.path) or os.path.isfile(e.path) or e.is_symlink())
            ),
            key=lambda e: e.name,
        )


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class -> its image files; a folder without any is no class.

    Names that read alike are one, however accents are written: Macs compose them otherwise.
    """
    found: dict[str, list[Path]] = {}
    for entry in _entries(folder, files=False):
        name = unicodedata.normalize("NFC", entry.name)
        found.setdefault(name, []).extend(image_files(Path(entry.path)))
    return {name: files for name, files in found.items() if files}


def _parts(root: Path) -> dict[int, Path]:
    """Part -> its folder; a root without a train part is all train.

    A class may be called train: it is one if it holds images and no folders of them, among folders
    that are no parts.
    """
    names = [e.name for e in _entries(root, files=False)]
    found = {part: root / name for part, name in by_part(names, root).items()}
    others = [n for n in names if part_of(n) is None and any(image_files(root / n))]
    if TRAIN in found and (not others or _classes(found[TRAIN])):
        return found
    if found and not others:
        raise UserError(
            f"dataset.root={root}: {_shown(next(iter(found.values())), root)} is there and train/ "
            "is not. Lay the images out as train/CLASS/picture.jpg."
        )
    return {TRAIN: root}


def _loose(root: Path, folders: Iterable[Path]) -> Iterator[str]:
    """Images that lie beside class folders."""
    for folder in folders:
        if count := sum(_is_image(e.name) for e in _entries(folder, files=True)):
            where = "dataset.root" if folder == root else f"{folder.name}/"
            yield f"{count} image{'s' if count > 1 else ''} directly in {where}"


def _others(root: Path, folders: Collection[Path]) -> Iterator[str]:
    """Folders of images beside the parts."""
    if root not in folders:
        for entry in _entries(root, files=False):
            if Path(entry.path) not in folders and any(image_files(Path(entry.path))):
                yield f"{entry.name}/"


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _text(name: str) -> str:
    """A name of the disk as text that can be written; bytes that are none show as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _shown(folder: Path, root: Path) -> str:
    return "it" if folder == root else f"{folder.name}/"
