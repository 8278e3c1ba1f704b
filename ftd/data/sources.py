"""Where images come from: a source knows its labels and a digest cheaply, and decodes on demand.

Each data set is one entry of ``DATASETS``. A new one is a function that returns a ``Source``.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ftd.augment import FULL, ORIENTED
from ftd.errors import UserError

if TYPE_CHECKING:
    from ftd.data.dataset import DatasetConfig

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR_STATS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))

DECODE_RULE = "pil-bilinear-antialias-centre-1"
"""Named in the fingerprint: change it when decoding or resizing changes."""

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}

Picture = Image.Image | np.ndarray


@dataclass(frozen=True)
class Source:
    """Images before decoding. Train and test images stand in one sequence, told apart by ``test``.

    ``labels`` (N,) int64; ``test`` (N,) bool, or None when the source has no test part of its own;
    ``pictures`` yields N PIL images or uint8 arrays (C, H, W) in that order; ``digest`` names the
    content; ``stats`` are the customary mean and std of the field, if there are any.
    """

    labels: np.ndarray
    test: np.ndarray | None
    class_names: tuple[str, ...]
    channels: int
    native_resolution: int | None
    digest: str
    pictures: Callable[[], Iterator[Picture]]
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Entry:
    """A data set by name: how to open it, and its customary augmentation."""

    open: Callable[["DatasetConfig"], Source]
    augment: str = FULL
    needs_root: bool = True
    downloads: bool = True


def decode_into(source: Source, out: np.ndarray) -> None:
    """Decodes every picture into ``out`` (N, C, R, R): shorter side to R, centre crop."""
    _, channels, resolution, _ = out.shape

    def one(picture: Picture) -> np.ndarray:
        try:
            return to_array(picture, channels, resolution)
        except (OSError, SyntaxError, ValueError) as error:  # PIL reads pixels on demand
            where = getattr(picture, "info", {}).get("where", "an image of the data set")
            raise UserError(
                f"{where} is not an image that can be read ({error}). Remove or mend it."
            ) from error

    pictures = source.pictures()
    position = 0
    with ThreadPoolExecutor(4) as pool:  # PIL lets go of the interpreter lock while it decodes
        while block := list(islice(pictures, 512)):
            for array in pool.map(one, block):
                out[position] = array
                position += 1
    if position != len(out):
        raise UserError(
            f"dataset: {len(out)} images were listed and {position} could be read. "
            "Has the data changed while it was being read?"
        )


def to_array(picture: Picture, channels: int, resolution: int) -> np.ndarray:
    """One picture as uint8 (C, R, R)."""
    if isinstance(picture, np.ndarray):
        if picture.shape[1:] == (resolution, resolution) and len(picture) == channels:
            return picture
        hwc = picture.transpose(1, 2, 0)
        picture = Image.fromarray(hwc[:, :, 0] if hwc.shape[2] == 1 else hwc)
    mode = "L" if channels == 1 else "RGB"
    picture.draft(mode, (resolution, resolution))  # JPEG: decode at the nearest larger size
    picture = picture.convert(mode)
    w, h = picture.size
    if (w, h) != (resolution, resolution):
        short = min(w, h)
        left, top = (w - short) / 2, (h - short) / 2
        picture = picture.resize(
            (resolution, resolution),
            Image.Resampling.BILINEAR,
            box=(left, top, left + short, top + short),
        )
    array = np.asarray(picture)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


# --- data sets ------------------------------------------------------------------------------


def open_digits(config: "DatasetConfig") -> Source:
    """The 1,797 handwritten digits (8 x 8, grey) bundled with scikit-learn; a quarter is test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = raw.target.astype(np.int64)
    _, test_index = train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0
    )
    test = np.zeros(len(labels), bool)
    test[test_index] = True
    return Source(
        labels=labels,
        test=test,
        class_names=tuple(str(i) for i in range(10)),
        channels=1,
        native_resolution=8,
        digest=_digest(images, labels, test),
        pictures=lambda: iter(images),
    )


def _open_torchvision(
    cls_name: str,
    shape: tuple[int, int],
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None,
) -> Callable[["DatasetConfig"], Source]:
    channels, resolution = shape

    def open_it(config: "DatasetConfig") -> Source:
        import torchvision.datasets

        cls = getattr(torchvision.datasets, cls_name)
        try:
            parts = [cls(config.root, train=t, download=config.download) for t in (True, False)]
        except (RuntimeError, OSError) as error:
            raise _missing(config, f"the files of torchvision's {cls_name}", error) from error
        images = [np.asarray(p.data) for p in parts]
        labels = np.concatenate([np.asarray(p.targets, np.int64) for p in parts])
        stacked = np.concatenate(images)
        stacked = stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
        test = np.arange(len(labels)) >= len(images[0])
        return Source(
            labels=labels,
            test=test,
            class_names=tuple(str(c) for c in parts[0].classes),
            channels=channels,
            native_resolution=resolution,
            digest=_digest(np.ascontiguousarray(stacked), labels, test),
            pictures=lambda: iter(stacked),
            stats=stats,
        )

    return open_it


def _open_fastai(download_size: str, folder: str) -> Callable[["DatasetConfig"], Source]:
    """Imagenette and its like: fast.ai's folders (train/, val/), or Parquet of the same images."""

    def open_it(config: "DatasetConfig") -> Source:
        root = Path(config.root or ".")
        if config.download and not any(root.glob(f"{folder}*")) and not _parquet_files(root):
            from torchvision.datasets import Imagenette

            try:
                Imagenette(root, split="train", size=download_size, download=True)
            except (RuntimeError, OSError) as error:
                raise _missing(config, f"{folder} (the download failed)", error) from error
        if _parquet_files(root):
            return open_parquet(config, stats=IMAGENET_STATS)
        nested = sorted(root.glob(f"{folder}*"))
        base = next((p for p in (root, *nested) if (p / "train").is_dir()), None)
        if base is None:
            raise _missing(config, f"{folder}*/train and val, or Parquet files train-* and test-*")
        return _from_folder(config, base, IMAGENET_STATS)

    return open_it


def open_imagefolder(config: "DatasetConfig") -> Source:
    """Any ``root/train/CLASS/*`` with ``root/test`` (or val), or plain ``root/CLASS/*``."""
    root = Path(config.root or ".")
    if not root.is_dir():
        raise _missing(config, "train/CLASS/image files, or CLASS/image files")
    return _from_folder(config, root, None)


def _from_folder(
    config: "DatasetConfig",
    root: Path,
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None,
) -> Source:
    train = root / "train"
    split = train.is_dir()
    train_files, names = _class_files(train if split else root)
    files, labels, test = train_files, [names.index(f.parent.name) for f in train_files], None
    part = next((root / n for n in ("test", "val", "validation") if (root / n).is_dir()), None)
    if split and part is not None:
        test_files, test_names = _class_files(part)
        if strange := set(test_names) - set(names):
            raise UserError(
                f"dataset.root={config.root}: {part.name}/ has the class {min(strange)!r}, which "
                "train/ has not. Give both parts the same class folders."
            )
        files = train_files + test_files
        labels += [names.index(f.parent.name) for f in test_files]
        test = np.arange(len(files)) >= len(train_files)
    contents = hashlib.sha256()
    for f in files:
        contents.update(f.relative_to(root).as_posix().encode() + b"\0")
        contents.update(hashlib.sha256(f.read_bytes()).digest())

    def pictures() -> Iterator[Picture]:
        for f in files:
            yield _open_image(f, str(f))

    return Source(
        labels=np.asarray(labels, np.int64),
        test=test,
        class_names=tuple(names),
        channels=3,
        native_resolution=None,
        digest=contents.hexdigest(),
        pictures=pictures,
        stats=stats,
    )


def _class_files(root: Path) -> tuple[list[Path], list[str]]:
    """Image files in class folders, through torchvision, which sorts both."""
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(
            str(root), is_valid_file=lambda p: Path(p).suffix.lower() in IMAGE_SUFFIXES
        )
    except (FileNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"dataset.root: {root} is not a folder of class folders with images ({reason}) "
            "Lay the images out as CLASS/picture.jpg."
        ) from error
    return [Path(path) for path, _ in folder.samples], folder.classes


def open_parquet(
    config: "DatasetConfig",
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Source:
    """Hugging Face's image layout: ``train-*.parquet`` and ``test-*`` or ``validation-*``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = Path(config.root or ".")
    files = _parquet_files(root)
    if not files:
        raise _missing(config, "Parquet files named train-* (and test-* or validation-*)")
    prefix = next((p for p in ("test", "validation", "val") if _named(files, p)), None)
    train_files, test_files = _named(files, "train"), _named(files, prefix) if prefix else []
    if not train_files:
        raise _missing(config, "a Parquet file named train-*")
    names: tuple[str, ...] = ()
    labels: list[np.ndarray] = []
    contents = hashlib.sha256()
    for f in train_files + test_files:
        try:
            schema = pq.read_schema(f)
            image = schema.field("image").type
            if not (pa.types.is_struct(image) and image.get_field_index("bytes") >= 0):
                raise KeyError("image.bytes")
            if not pa.types.is_integer(schema.field("label").type):
                raise KeyError(f"label is {schema.field('label').type}")
            column = pq.read_table(f, columns=["label"]).column("label")
        except (pa.ArrowException, KeyError, OSError) as error:
            raise UserError(
                f"{f} is not in Hugging Face's image layout ({error}). It needs a struct column "
                "'image' with 'bytes', and an integer column 'label'."
            ) from error
        labels.append(column.to_numpy().astype(np.int64))
        names = names or _huggingface_names(schema)
        with open(f, "rb") as stream:
            contents.update(hashlib.file_digest(stream, "sha256").digest())
    joined = np.concatenate(labels)
    if not len(joined):
        raise UserError(f"dataset.root={config.root}: the Parquet files hold no images.")
    if joined.min(initial=0) < 0:
        raise UserError(f"dataset.root={config.root}: a label is below 0. Labels count from 0.")
    names = names or tuple(str(i) for i in range(int(joined.max()) + 1))
    if joined.max(initial=0) >= len(names):
        raise UserError(
            f"dataset.root={config.root}: a label is {joined.max()}, and the schema names "
            f"{len(names)} classes. Labels count from 0."
        )
    n_train = sum(len(x) for x in labels[: len(train_files)])

    def pictures() -> Iterator[Picture]:
        for f in train_files + test_files:
            parquet = pq.ParquetFile(f)
            row = 0
            for batch in parquet.iter_batches(batch_size=256, columns=["image"]):
                for data in batch.column(0).field("bytes"):
                    yield _open_image(io.BytesIO(data.as_py() or b""), f"{f}, row {row}")
                    row += 1

    return Source(
        labels=joined,
        test=np.arange(len(joined)) >= n_train if test_files else None,
        class_names=names,
        channels=3,
        native_resolution=None,
        digest=contents.hexdigest(),
        pictures=pictures,
        stats=stats,
    )


def _parquet_files(root: Path) -> list[Path]:
    return sorted(root.glob("*.parquet")) or sorted((root / "data").glob("*.parquet"))


def _named(files: list[Path], prefix: str) -> list[Path]:
    return [f for f in files if f.name.startswith(prefix)]


def _huggingface_names(schema: Any) -> tuple[str, ...]:
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
        return tuple(info["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _open_image(file: Path | io.BytesIO, where: str) -> Image.Image:
    try:
        image = Image.open(file)
        image.info["where"] = where
        return image
    except OSError as error:
        raise UserError(f"{where} is not an image that can be read. Remove or mend it.") from error


def _missing(config: "DatasetConfig", wanted: str, error: Exception | None = None) -> UserError:
    reason = f" ({str(error).splitlines()[0]})" if error else ""
    return UserError(
        f"dataset.root={config.root!r} has no data for {config.name}: looked for {wanted} in "
        f"{Path(config.root or '.').resolve()}{reason}. Point dataset.root at the data"
        + ("" if config.download else ", or set dataset.download=true where there is a network")
        + "."
    )


def _digest(*arrays: np.ndarray) -> str:
    h = hashlib.sha256()
    for a in arrays:
        h.update(f"{a.shape}{a.dtype}".encode())
        h.update(np.ascontiguousarray(a).data)
    return h.hexdigest()


DATASETS: dict[str, Entry] = {
    "digits": Entry(open_digits, augment=ORIENTED, needs_root=False, downloads=False),
    "mnist": Entry(_open_torchvision("MNIST", (1, 28), ((0.1307,), (0.3081,))), augment=ORIENTED),
    "fashion_mnist": Entry(_open_torchvision("FashionMNIST", (1, 28), ((0.2861,), (0.3530,)))),
    "cifar10": Entry(_open_torchvision("CIFAR10", (3, 32), CIFAR_STATS)),
    "cifar100": Entry(_open_torchvision("CIFAR100", (3, 32), CIFAR_STATS)),
    "imagenette": Entry(_open_fastai("160px", "imagenette2")),
    "imagefolder": Entry(open_imagefolder, downloads=False),
    "parquet": Entry(open_parquet, downloads=False),
}
