"""Data sets by name: how each is found and opened, and its customary augmentation."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftd.augment import FULL, ORIENTED
from ftd.data.arrays import open_digits, torchvision_opener
from ftd.data.folders import image_files, open_imagefolder, source_of_folder
from ftd.data.sources import CIFAR_STATS, IMAGENET_STATS, Source, missing
from ftd.data.tables import open_parquet, parquet_files, source_of_tables

if TYPE_CHECKING:
    from ftd.data.config import DatasetConfig


def _all_files(root: Path) -> Iterable[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file())


def _fastai_files(root: Path) -> Iterable[Path]:
    return parquet_files(root) or image_files(root)


@dataclass(frozen=True)
class Entry:
    """How a data set is opened."""

    open: Callable[["DatasetConfig"], Source]
    files: Callable[[Path], Iterable[Path]] = _all_files
    """The files below ``dataset.root`` that it is read from."""
    augment: str = FULL
    needs_root: bool = True
    downloads: bool = True
    encoded: bool = False
    """Whether it holds image files, which may be unreadable."""
    columns: bool = False
    """Whether its columns can be named."""


def _fastai_opener(download_size: str, folder: str) -> Callable[["DatasetConfig"], Source]:
    """Imagenette and its like: fast.ai's folders (train/, val/), or Parquet of the same images.

    Their validation part serves as test, as in the field.
    """

    def open_it(config: "DatasetConfig") -> Source:
        root = Path(config.root or ".")
        if config.download and not any(root.glob(f"{folder}*")) and not parquet_files(root):
            from torchvision.datasets import Imagenette

            try:
                Imagenette(root, split="train", size=download_size, download=True)
            except (RuntimeError, OSError) as error:
                raise missing(config, f"{folder} (the download failed)", error) from error
        if parquet_files(root):
            return source_of_tables(config, IMAGENET_STATS, val_is_test=True)
        nested = sorted(root.glob(f"{folder}*"))
        base = next((p for p in (root, *nested) if (p / "train").is_dir()), None)
        if base is None:
            raise missing(config, f"{folder}*/train and val, or Parquet files train-* and test-*")
        return source_of_folder(base, IMAGENET_STATS, val_is_test=True)

    return open_it


DATASETS: dict[str, Entry] = {
    "digits": Entry(open_digits, augment=ORIENTED, needs_root=False, downloads=False),
    "mnist": Entry(torchvision_opener("MNIST", ((0.1307,), (0.3081,))), augment=ORIENTED),
    "fashion_mnist": Entry(torchvision_opener("FashionMNIST", ((0.2861,), (0.3530,)))),
    "cifar10": Entry(torchvision_opener("CIFAR10", CIFAR_STATS)),
    "cifar100": Entry(torchvision_opener("CIFAR100", CIFAR_STATS)),
    "imagenette": Entry(_fastai_opener("160px", "imagenette2"), _fastai_files, encoded=True),
    "imagefolder": Entry(open_imagefolder, image_files, downloads=False, encoded=True),
    "parquet": Entry(open_parquet, parquet_files, downloads=False, encoded=True, columns=True),
}
