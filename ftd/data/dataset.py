"""A data set ready for training: train, validation and test as views of one mapped pixel array.

Searches select on the validation part, which is the data set's own or held out of *train*, class
by class; the test part is for the end.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ftd.data.cache import cached_arrays
from ftd.data.config import DatasetConfig
from ftd.data.normalise import Normalisation, check_zca, fit_standard, fit_zca
from ftd.data.registry import DATASETS
from ftd.data.sources import Source
from ftd.data.splits import Indices, fractions, split
from ftd.data.survey import Facts, Progress, decode_into, pixel_key, survey
from ftd.data.unreadable import Unreadable, check_readable, unreadable_of
from ftd.errors import UserError

Counts = tuple[int, ...]


@dataclass(frozen=True)
class Description:
    """What is known of a data set without its pixels."""

    name: str
    class_names: tuple[str, ...]
    channels: int
    resolution: int
    counts: tuple[Counts, Counts, Counts]
    """Images of each class in train, validation and test."""
    fingerprint: str
    """Names pixels, labels, split and normalisation: equal fingerprints, equal tensors."""
    held_out: tuple[float | None, float | None] = (None, None)
    """Shares of train that became validation and test; None for a part that was given."""
    unreadable: tuple[Unreadable, ...] = ()
    """Image files that were left out."""
    unused: tuple[str, ...] = ()
    """What lies beside the images and is of no part, in words."""

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def per_class(self) -> Counts:
        """Training images of each class."""
        return self.counts[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Images in train, validation and test."""
        train, val, test = map(sum, self.counts)
        return train, val, test


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


def describe(config: DatasetConfig, progress: Progress | None = None) -> Description:
    """Classes, splits and fingerprint. Raises UserError if the data are missing or do not do.

    Of image files the first call decodes every one, tells ``progress``, and leaves the pixels in
    the cache; a later one reads its index.
    """
    facts, source = _facts(config, progress)
    description = _description(config, facts)
    if DATASETS[config.name].encoded:
        _pixels(config, facts, lambda out: _decode(config, facts, source, out, progress))
    return description


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
    images = _pixels(config, facts, lambda out: _decode(config, facts, source, out))
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
        sender.fill("pixels", out) if sender else _decode(config, facts, source, out)

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


def _facts(config: DatasetConfig, progress: Progress | None = None) -> tuple[Facts, Source | None]:
    """What the survey found, when it will do for this configuration."""

    def check(source: Source) -> None:
        _resolution(config, source.native_resolution)
        split(config, source.labels, source.parts, source.class_names)

    facts, source = survey(config, progress, check)
    check_readable(config, facts)
    return facts, source


def _resolution(config: DatasetConfig, native: int | None) -> int:
    resolution = config.resolution or native
    if resolution is None:
        raise UserError(
            f"dataset.resolution is missing, and the images of {config.name} have no common size. "
            "Set it, for instance to 32, 64 or 128."
        )
    return resolution


def _description(config: DatasetConfig, facts: Facts) -> Description:
    resolution = _resolution(config, facts["native_resolution"])
    if config.zca:
        check_zca(facts["channels"] * resolution**2)
    labels, parts = _split(config, facts)
    names = tuple(facts["class_names"])
    train, val, test = (
        tuple(np.bincount(labels[index], minlength=len(names)).tolist()) for index in parts
    )
    held_out = fractions(config, np.asarray(facts["parts"]))
    val_fraction, test_fraction = held_out
    identity = [
        "data-1", facts["digest"], facts["rule"], resolution, val_fraction, config.split_seed,
        test_fraction, "zca" if config.zca else facts["stats"] or "fit",
    ]  # fmt: skip
    return Description(
        name=config.name,
        class_names=names,
        channels=facts["channels"],
        resolution=resolution,
        counts=(train, val, test),
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32],
        held_out=held_out,
        unreadable=unreadable_of(facts),
        unused=tuple(facts["unused"]),
    )


def _split(config: DatasetConfig, facts: Facts) -> tuple[np.ndarray, Indices]:
    """Labels, and the positions of train, validation and test, each in ascending order."""
    labels = np.asarray(facts["labels"], np.int64)
    parts = np.asarray(facts["parts"], np.int64)
    try:
        return labels, split(config, labels, parts, tuple(facts["class_names"]))
    except UserError as error:
        if left_out := len(facts["unreadable"]):
            raise UserError(f"{error} (Unreadable images, left out: {left_out}.)") from error
        raise


def _decode(
    config: DatasetConfig,
    facts: Facts,
    source: Source | None,
    out: np.ndarray,
    progress: Progress | None = None,
) -> None:
    decode_into(source or DATASETS[config.name].open(config), facts, out, progress)


def _pixels(config: DatasetConfig, facts: Facts, fill: Callable[[np.ndarray], None]) -> np.ndarray:
    """All images of a data set (N, C, H, W), uint8, from the cache."""
    c, r = facts["channels"], _resolution(config, facts["native_resolution"])
    return cached_arrays(pixel_key(facts, r), len(facts["labels"]), (c, r, r), fill)


def _zca_bytes(
    fingerprint: str, images: np.ndarray, fill: Callable[[np.ndarray], None]
) -> np.ndarray:
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
