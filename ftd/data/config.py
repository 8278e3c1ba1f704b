"""The ``dataset`` section of a configuration."""

from dataclasses import dataclass, field

from ftd.augment import parse_strategy
from ftd.data.registry import DATASETS
from ftd.data.tables import COLUMNS
from ftd.errors import UserError

FRACTIONS = {"val_fraction": 0.1, "test_fraction": 0.2}
"""What None stands for, where the part is held out."""

UNREADABLE = ("fail", "skip")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which images, and how they are split and normalised."""

    name: str
    """digits, mnist, fashion_mnist, cifar10, cifar100, imagenette, imagefolder or parquet."""
    root: str | None = None
    """Folder of the data; not used by ``digits``, which is bundled."""
    download: bool = False
    """Fetch missing data through torchvision, where it can."""
    columns: dict[str, str] | None = field(default=None, hash=False)
    """Columns of ``parquet``, as in {image: img, label: fine_label}; None for image or img, and
    label."""
    on_unreadable: str = "fail"
    """Image files that cannot be read: fail lists them and stops before any work, skip leaves them
    out."""
    val_fraction: float | None = None
    """Share of the training images of each class that is held out to select on, where the data have
    no validation part; None for 0.1."""
    split_seed: int = 0
    """Which images are held out to select on."""
    test_fraction: float | None = None
    """Share of each class that becomes test where the data have no test part; None for 0.2."""
    resolution: int | None = None
    """Side in pixels after resizing; None for the data set's own."""
    zca: bool = False
    """ZCA whitening in place of per-channel mean and standard deviation."""
    augment: str | None = None
    """DSA families joined by '_', or none; None for the data set's customary ones."""

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise UserError(
                f"dataset.name={self.name!r} is not known. Take one of {', '.join(DATASETS)}."
            )
        for key in FRACTIONS:
            value = getattr(self, key)
            if value is not None and not 0 < value < 1:
                raise UserError(f"dataset.{key}={value} must lie between 0 and 1, both excluded.")
        if self.split_seed < 0:
            raise UserError(f"dataset.split_seed={self.split_seed} must be 0 or more.")
        entry = DATASETS[self.name]
        if self.root is not None and not entry.needs_root:
            raise UserError(
                f"dataset.root={self.root!r} has no effect: {self.name} is bundled. Leave it out."
            )
        if self.download and not entry.downloads:
            raise UserError(
                f"dataset.download=true has no effect: {self.name} is not downloaded. Leave it out."
            )
        self._check_columns()
        if self.on_unreadable not in UNREADABLE:
            raise UserError(
                f"dataset.on_unreadable={self.on_unreadable!r} must be {' or '.join(UNREADABLE)}."
            )
        if self.on_unreadable != "fail" and not entry.encoded:
            raise UserError(
                f"dataset.on_unreadable={self.on_unreadable} has no effect: {self.name} holds no "
                "image files. Leave it out."
            )
        if self.resolution is not None and self.resolution < 1:
            raise UserError(f"dataset.resolution={self.resolution} must be at least 1 pixel.")
        if self.augment is not None:
            parse_strategy(self.augment)
        if self.root is None and entry.needs_root:
            raise UserError(
                f"dataset.root is missing, and {self.name} is not bundled. "
                "Set dataset.root to the folder of the data."
            )

    def _check_columns(self) -> None:
        if self.columns is None:
            return
        if not DATASETS[self.name].columns:
            owners = " or ".join(name for name, entry in DATASETS.items() if entry.columns)
            raise UserError(
                f"dataset.columns={self.columns} has no effect: {self.name} has none to name. "
                f"Leave it out, or take {owners}."
            )
        if strange := set(self.columns) - set(COLUMNS):
            raise UserError(
                f"dataset.columns names {min(strange)!r}. It maps {' and '.join(COLUMNS)} to the "
                "names of columns."
            )

    @property
    def strategy(self) -> str:
        """The DSA strategy in force."""
        return DATASETS[self.name].augment if self.augment is None else self.augment
