"""A data set ready for training: train, validation and test as views of one mapped pixel array.

The validation split is held out of *train*, class by class, and is what searches select on;
the test part is the data set's own and is for the end.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ftd.augment import parse_strategy
from ftd.data.cache import cached_arrays, cached_json
from ftd.data.normalise import Normalisation, check_zca, fit_standard, fit_zca
from ftd.data.sources import DATASETS, DECODE_RULE, Source, decode_into
from ftd.errors import UserError

TEST_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which images, and how they are split and normalised."""

    name: str
    """digits, mnist, fashion_mnist, cifar10, cifar100, imagenette, imagefolder or parquet."""
    root: str | None = None
    """Folder of the data; not used by ``digits``, which is bundled."""
    download: bool = False
    """Fetch missing data through torchvision, where it can."""
    val_fraction: float = 0.1
    """Share of the training images of each class that is held out to select on."""
    split_seed: int = 0
    """Which images are held out."""
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
        for key in ("val_fraction", "test_fraction"):
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
        if self.resolution is not None and self.resolution < 1:
            raise UserError(f"dataset.resolution={self.resolution} must be at least 1 pixel.")
        if self.augment is not None:
            parse_strategy(self.augment)
        if self.root is None and entry.needs_root:
            raise UserError(
                f"dataset.root is missing, and {self.name} is not bundled. "
                "Set dataset.root to the folder of the data."
            )

    @property
    def strategy(self) -> str:
        """The DSA strategy in force."""
        return DATASETS[self.name].augment if self.augment is None else self.augment


@dataclass(frozen=True)
class Description:
    """What is known of a data set without decoding it."""

    name: str
    class_names: tuple[str, ...]
    channels: int
    resolution: int
    per_class: tuple[int, ...]
    """Training images of each class, after the validation split."""
    sizes: tuple[int, int, int]
    """Images in train, validation and test."""
    fingerprint: str
    """Names pixels, labels, split and normalisation: equal fingerprints, equal tensors."""

    @property
    def classes(self) -> int:
        return len(self.class_names)


class Split:
    """Some images of a pixel array: ``len(split)``, ``split.labels`` (N,), ``split.batch(i)``."""

    def __init__(self, images: Tensor, labels: Tensor, index: Tensor, normalisation: Normalisation):
        self._images, self._index, self._normalisation = images, index, normalisation
        self._all_labels = labels
        self.labels = labels[index.to(labels.device)]

    def __len__(self) -> int:
        return len(self._index)

    def pixels(self, i: Tensor) -> Tensor:
        """Images ``i`` of the split as float32 in [0, 1], (len(i), C, H, W)."""
        return self._images[self._index[i]].float() / 255

    def batch(self, i: Tensor) -> Tensor:
        """Images ``i`` of the split in network space, (len(i), C, H, W)."""
        return self._normalisation.apply(self.pixels(i))

    def first(self, count: int) -> "Split":
        """The first ``count`` images of the split."""
        return Split(self._images, self._all_labels, self._index[:count], self._normalisation)

    def normalised_by(self, normalisation: Normalisation) -> "Split":
        """The same images under another normalisation."""
        return Split(self._images, self._all_labels, self._index, normalisation)

    @cached_property
    def by_class(self) -> list[Tensor]:
        """For every class, the positions in the split that have it."""
        labels = self.labels.cpu()
        return [torch.nonzero(labels == k).flatten() for k in range(int(labels.max()) + 1)]


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test with the normalisation that was fit on train."""

    description: Description
    strategy: str
    normalisation: Normalisation
    train: Split
    val: Split
    test: Split

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        d = self.description
        return d.channels, d.resolution, d.resolution

    def normalised_by(self, normalisation: Normalisation) -> "Dataset":
        """The same images in the network space of another normalisation."""
        parts = {k: getattr(self, k).normalised_by(normalisation) for k in ("train", "val", "test")}
        return replace(self, normalisation=normalisation, **parts)


def describe(config: DatasetConfig) -> Description:
    """Labels, splits and fingerprint, without decoding an image. Raises UserError if missing."""
    facts, _ = _facts(config)
    return _description(config, facts)


class Sender(Protocol):
    """A process that has opened a data set, and sends it to machines that have not got it."""

    @property
    def facts(self) -> dict[str, Any]:
        """What ``open_arrays`` returned there."""
        ...

    def fill(self, what: str, out: np.ndarray) -> None:
        """Fills ``out`` with the array ``what`` of ``open_arrays``."""
        ...

    def __hash__(self) -> int: ...


def open_arrays(config: DatasetConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A data set as it is sent to other machines: facts, and the mapped arrays of its cache."""
    facts, source = _facts(config)
    images = _pixels(config, facts, lambda out: _decode(config, source, out))
    arrays = {"pixels": images}
    if config.zca:
        train = _split(config, facts)[1][0]
        fingerprint = _description(config, facts).fingerprint
        arrays["zca"] = _zca_bytes(fingerprint, images, lambda out: _fit_zca(images, train, out))
    return facts, arrays


def load(
    config: DatasetConfig, device: torch.device | str = "cpu", sender: Sender | None = None
) -> Dataset:
    """The data set as tensors on ``device``; on CPU the pixels stay mapped, not copied.

    The first call on a node decodes every image into the cache (see ``ftd.data.cache``), or takes
    the pixels from a ``sender``; then this machine needs no files of the data set.
    """
    facts, source = (sender.facts, None) if sender else _facts(config)
    description = _description(config, facts)
    labels, (train, val, test) = _split(config, facts)

    def fill(out: np.ndarray) -> None:
        sender.fill("pixels", out) if sender else _decode(config, source, out)

    def fill_zca(out: np.ndarray) -> None:
        sender.fill("zca", out) if sender else _fit_zca(images, train, out)

    images = _pixels(config, facts, fill)
    if config.zca:
        raw = _zca_bytes(description.fingerprint, images, fill_zca)
        normalisation = _zca_from(raw, int(np.prod(images.shape[1:])))
    elif facts["stats"] is not None:
        mean, std = (torch.tensor(s) for s in facts["stats"])
        normalisation = Normalisation("standard", mean, std)
    else:
        normalisation = fit_standard(images, train)
    device = torch.device(device)
    normalisation = normalisation.to(device)
    pixels, targets = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)

    def part(index: np.ndarray) -> Split:
        return Split(pixels, targets, torch.from_numpy(index).to(device), normalisation)

    return Dataset(description, config.strategy, normalisation, part(train), part(val), part(test))


def _facts(config: DatasetConfig) -> tuple[dict[str, Any], Source | None]:
    """Digest, labels and class names; from the index when the files are those seen before."""
    opened: list[Source] = []

    def look() -> dict[str, Any]:
        opened.append(DATASETS[config.name].open(config))
        return _source_facts(opened[0])

    root = Path(config.root or ".")
    if not DATASETS[config.name].needs_root:
        facts = cached_json(lambda: f"{config.name}-{version('scikit-learn')}", look)
    elif root.is_dir():
        facts = cached_json(lambda: _stamp(config, root), look)
    else:
        facts = look()  # says what is missing, or downloads it
    return facts, opened[0] if opened else None


def _source_facts(source: Source) -> dict[str, Any]:
    return {
        "digest": source.digest,
        "labels": source.labels.tolist(),
        "test": None if source.test is None else source.test.tolist(),
        "class_names": list(source.class_names),
        "channels": source.channels,
        "native_resolution": source.native_resolution,
        "stats": source.stats,
    }


def _stamp(config: DatasetConfig, root: Path) -> str:
    """Names, sizes and times of all files under root: the same stamp, the same content."""
    h = hashlib.sha256(json.dumps(["stamp-1", config.name, str(root.resolve())]).encode())
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        for name in sorted(files):
            try:
                stat = os.stat(os.path.join(folder, name))
            except FileNotFoundError:  # a link to nowhere
                continue
            h.update(f"{folder}/{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return h.hexdigest()[:32]


def _description(config: DatasetConfig, facts: dict[str, Any]) -> Description:
    resolution = config.resolution or facts["native_resolution"]
    if resolution is None:
        raise UserError(
            f"dataset.resolution is missing, and the images of {config.name} have no common size. "
            "Set it, for instance to 32, 64 or 128."
        )
    if config.zca:
        check_zca(facts["channels"] * resolution**2)
    labels, parts = _split(config, facts)
    counts = np.bincount(labels[parts[0]], minlength=len(facts["class_names"]))
    test_fraction = None if facts["test"] is not None else config.test_fraction or TEST_FRACTION
    identity = [
        "data-1", facts["digest"], DECODE_RULE, resolution, config.val_fraction,
        config.split_seed, test_fraction, "zca" if config.zca else facts["stats"] or "fit",
    ]  # fmt: skip
    return Description(
        name=config.name,
        class_names=tuple(facts["class_names"]),
        channels=facts["channels"],
        resolution=resolution,
        per_class=tuple(int(c) for c in counts),
        sizes=(len(parts[0]), len(parts[1]), len(parts[2])),
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32],
    )


Fill = Callable[[np.ndarray], None]
Indices = tuple[np.ndarray, np.ndarray, np.ndarray]


def _split(config: DatasetConfig, facts: dict[str, Any]) -> tuple[np.ndarray, Indices]:
    """Labels, and the positions of train, validation and test, each in ascending order."""
    labels = np.asarray(facts["labels"], np.int64)
    classes = len(facts["class_names"])
    if facts["test"] is None:
        fraction = config.test_fraction or TEST_FRACTION
        test, rest = _hold_out(labels, np.arange(len(labels)), fraction, 0, "test")
    elif config.test_fraction is not None:
        raise UserError(
            f"dataset.test_fraction={config.test_fraction} has no effect: the data have a test "
            "part of their own. Leave it out."
        )
    else:
        mask = np.asarray(facts["test"], bool)
        test, rest = np.flatnonzero(mask), np.flatnonzero(~mask)
    val, train = _hold_out(labels, rest, config.val_fraction, config.split_seed, "val")
    empty = np.flatnonzero(np.bincount(labels[train], minlength=classes) == 0)
    if len(empty):
        raise UserError(
            f"dataset: the class {facts['class_names'][empty[0]]!r} has no training image after "
            f"the split. Add images to it, or lower dataset.val_fraction={config.val_fraction}."
        )
    return labels, (train, val, test)


def _hold_out(
    labels: np.ndarray, among: np.ndarray, fraction: float, seed: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Takes ``fraction`` of each class, at least one image, out of ``among``."""
    taken = []
    for k in np.unique(labels[among]):
        members = among[labels[among] == k]
        rng = np.random.default_rng([seed, int(k), *what.encode()])
        count = max(1, round(fraction * len(members)))
        taken.append(rng.permutation(members)[:count])
    held = np.sort(np.concatenate(taken))
    return held, np.setdiff1d(among, held)


def _decode(config: DatasetConfig, source: Source | None, out: np.ndarray) -> None:
    decode_into(source or DATASETS[config.name].open(config), out)


def _pixels(config: DatasetConfig, facts: dict[str, Any], fill: Fill) -> np.ndarray:
    """All images of a data set (N, C, H, W), uint8, from the cache."""
    c, r = facts["channels"], _description(config, facts).resolution
    key = f"{facts['digest'][:32]}-{c}x{r}x{r}-{DECODE_RULE}"
    return cached_arrays(key, len(facts["labels"]), (c, r, r), fill)


def _zca_bytes(fingerprint: str, images: np.ndarray, fill: Fill) -> np.ndarray:
    """ZCA takes a while to fit: kept beside the pixels, as the bytes of two float32 arrays."""
    values = int(np.prod(images.shape[1:]))
    return cached_arrays(f"zca-{fingerprint}", 4 * (values + values * values), (), fill)


def _fit_zca(images: np.ndarray, train: np.ndarray, out: np.ndarray) -> None:
    fitted = fit_zca(images, train)
    floats = np.concatenate([fitted.mean.numpy().ravel(), fitted.scale.numpy().ravel()])
    out[:] = floats.view(np.uint8)


def _zca_from(raw: np.ndarray, values: int) -> Normalisation:
    floats = torch.from_numpy(np.asarray(raw).view(np.float32))
    return Normalisation("zca", floats[:values].clone(), floats[values:].view(values, values))
