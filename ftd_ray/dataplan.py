"""The images in the plan: how many of each class are in which part, and what to think of that."""

import math
from statistics import median

from ftd.data.dataset import Description
from ftd.data.unreadable import listed

CLASSES_NAMED = 12
"""Classes whose counts stand in the plan one by one; of more only the extremes do."""

FEW = 100
"""Validation images below which the plan warns of chance."""

UNEQUAL = 3
"""How many times the training images of the smallest class the largest may have unsaid."""


def data_lines(d: Description) -> list[str]:
    """What the data set is, its split, its classes, and warnings."""
    lines = [
        f"data       {d.name}, {d.channels} x {d.resolution} x {d.resolution}, "
        f"{d.classes} classes; {d.sizes[0]} train, {d.sizes[1]} validation, {d.sizes[2]} test",
        f"split      {_split_text(d)}",
        f"classes    {_classes_text(d)}",
    ]
    if d.unreadable:
        n = len(d.unreadable)
        lines.append(
            f"left out   {n} image{'s' if n > 1 else ''} that cannot be read: "
            f"{listed(d.unreadable)}"
        )
    if d.unused:
        lines.append(f"not used   {', '.join(d.unused)}")
    return lines + [f"warning    {text}" for text in (_small(d), _unequal(d)) if text]


def _split_text(d: Description) -> str:
    named = zip(("validation", "test"), d.held_out, strict=True)
    return ", ".join(
        f"{part} as given" if share is None else f"{part} {share:g} of train, held out by class"
        for part, share in named
    )


def _classes_text(d: Description) -> str:
    train, val, test = d.counts
    if d.classes <= CLASSES_NAMED:
        each = zip(d.class_names, train, val, test, strict=True)
        named = ", ".join(f"{name}: {a}/{b}/{c}" for name, a, b, c in each)
        return f"train/validation/test of {named}"
    parts = []
    for what, counts in (("train", train), ("validation", val), ("test", test)):
        low, high = min(counts), max(counts)
        if low == high:
            parts.append(f"{what} {low} each")
            continue
        smallest, largest = (d.class_names[counts.index(n)] for n in (low, high))
        middle = median(counts)
        parts.append(f"{what} {low} ({smallest}) to {high} ({largest}), median {middle:g}")
    return "; ".join(parts)


def _small(d: Description) -> str | None:
    """Whether the validation part can rank trials.

    An accuracy near 50 % over n images has a standard error of 50 / sqrt(n) points, and the
    difference of two sqrt(2) times that.
    """
    n = d.sizes[1]
    if n >= FEW:
        return None
    points = 50 * math.sqrt(2 / n)
    remedy = "give more images" if d.held_out[0] is None else "raise dataset.val_fraction"
    return (
        f"{n} validation images: two trials must differ by about {points:.0f} points to be told "
        f"apart. Better {remedy}."
    )


def _unequal(d: Description) -> str | None:
    low, high = min(d.per_class), max(d.per_class)
    if high < UNEQUAL * low:
        return None
    smallest, largest = (d.class_names[d.per_class.index(n)] for n in (low, high))
    return (
        f"{largest!r} has {high} training images and {smallest!r} {low}: accuracies count images, "
        "so that large classes weigh more."
    )
