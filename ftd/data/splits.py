"""Train, validation and test: the parts as they were given, the others held out class by class."""

import numpy as np

from ftd.data.config import FRACTIONS, DatasetConfig
from ftd.data.sources import PARTS, TEST, TRAIN, VAL
from ftd.errors import UserError

Indices = tuple[np.ndarray, np.ndarray, np.ndarray]


def fractions(config: DatasetConfig, parts: np.ndarray) -> tuple[float | None, float | None]:
    """The shares of train that become validation and test; None for a part that was given.

    Raises UserError where a share is set for a part that was given.
    """
    found: list[float | None] = []
    for part, key in ((VAL, "val_fraction"), (TEST, "test_fraction")):
        asked = getattr(config, key)
        given = bool((parts == part).any())
        if given and asked is not None:
            raise UserError(
                f"dataset.{key}={asked} has no effect: the data have a "
                f"{'validation' if part == VAL else 'test'} part of their own. Leave it out."
            )
        found.append(None if given else asked or FRACTIONS[key])
    if found[0] is None and config.split_seed:
        raise UserError(
            f"dataset.split_seed={config.split_seed} has no effect: the data have a validation "
            "part of their own. Leave it out."
        )
    return found[0], found[1]


def split(
    config: DatasetConfig, labels: np.ndarray, parts: np.ndarray, names: tuple[str, ...]
) -> Indices:
    """The positions of train, validation and test, each in ascending order.

    ``labels`` and ``parts`` have shape (N,). Raises UserError where a class would be missing in one
    of the three, or where there is nothing to tell apart.
    """
    val_fraction, test_fraction = fractions(config, parts)
    where = f"dataset.root={config.root}" if config.root else "dataset"
    if len(names) < 2:
        raise UserError(
            f"{where}: there is one class, {names[0]!r}, and a network tells two or more apart. "
            "Point dataset.root at the folder of the class folders."
        )
    counts = [np.bincount(labels[parts == p], minlength=len(names)) for p in range(len(PARTS))]
    given = {VAL: val_fraction is None, TEST: test_fraction is None}
    needed = {TRAIN: 3 - sum(given.values()), VAL: int(given[VAL]), TEST: int(given[TEST])}
    for part, least in needed.items():
        few = np.flatnonzero(counts[part] < least)
        if len(few):
            raise UserError(f"{where}: {_too_few(part, few, counts[part], names, least)}")
    train, val, test = (np.flatnonzero(parts == p) for p in range(len(PARTS)))
    if test_fraction is not None:
        test, train = _hold_out(labels, train, test_fraction, 0, "test")
    if val_fraction is not None:
        val, train = _hold_out(labels, train, val_fraction, config.split_seed, "val")
    empty = np.flatnonzero(np.bincount(labels[train], minlength=len(names)) == 0)
    if len(empty):
        shares = [
            (k, f) for k, f in zip(FRACTIONS, (val_fraction, test_fraction), strict=True) if f
        ]
        raise UserError(
            f"{where}: the class {names[empty[0]]!r} has no training image after the split. Add "
            "images to it, or lower " + " or ".join(f"dataset.{k}={f}" for k, f in shares) + "."
        )
    return train, val, test


def _too_few(
    part: int, few: np.ndarray, counts: np.ndarray, names: tuple[str, ...], least: int
) -> str:
    """That some classes have fewer images in a part than they need."""
    named = ", ".join(repr(names[k]) for k in few[:5])
    named += f" and {len(few) - 5} more" if len(few) > 5 else ""
    what = f"class {named}" if len(few) == 1 else f"classes {named}"
    lies = {TRAIN: "to train on", VAL: "in the validation part", TEST: "in the test part"}[part]
    verb = "has" if len(few) == 1 else "have"
    if not counts[few].any():
        return f"the {what} {verb} no image {lies}. Add some, or remove the class from every part."
    most = counts[few].max()
    return (
        f"the {what} {verb} {most} image{'s' if most > 1 else ''}, and a class needs {least} or "
        "more, for each part that is held out takes one. Add images, or remove the class."
    )


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
