"""What the command says: what it saw, measured and chose, and why, in few lines."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from ftd_ray.new.choice import Choice
from ftd_ray.new.crew import Crew
from ftd_ray.new.images import Images
from ftd_ray.new.pace import STEPS, Pace
from ftd_ray.new.programme import SEGMENT_EPOCHS, Scale
from ftd_ray.progress import duration
from ftd_ray.store.text import plural, size_text

WIDTH = 100
"""Columns of a line."""

NAMED = 4
"""Classes, unreadable files or twins that a line names."""


def saw(images: Images) -> list[str]:
    """Lines about the images."""
    found, d = images.found, images.dataset
    n = sum(map(sum, found.counts.values()))
    sizes = sorted(set(found.sizes), key=lambda size: size[0] * size[1])
    (w, h), (w2, h2) = sizes[0], sizes[-1]
    span = f"{w} x {h}" if len(sizes) == 1 else f"{w} x {h} to {w2} x {h2}"
    colour = "all grey" if found.grey == n else f"{found.grey} grey" if found.grey else "in colour"
    val = "as given" if "val" in found.counts else f"{d.val_fraction:g} of train"
    test = "as given" if "test" in found.counts else f"{d.test_fraction or 0.2:g} of train"
    return [
        f"images     {n:,} in {images.classes} classes, {_balance(images)}: "
        + _some(found.class_names),
        f"sizes      {span} pixels, half of them {images.side} or more on the shorter side; "
        f"{colour}",
        f"parts      {sum(images.train):,} train, {sum(images.val):,} validation ({val}), "
        f"{sum(images.test):,} test ({test})",
        *_oddities(images),
    ]


def _balance(images: Images) -> str:
    each = [sum(n) for n in zip(*images.found.counts.values(), strict=True)]
    low, high = min(each), max(each)
    return (
        f"{low:,} of each"
        if low == high
        else f"{low:,} to {high:,} of each, in the middle {median(each):,g}"
    )


def _oddities(images: Images) -> Iterator[str]:
    found = images.found
    if found.unreadable:
        named = _some([f"{u.where} ({u.reason})" for u in found.unreadable])
        yield f"left out   {plural(len(found.unreadable), 'file')} that cannot be read: {named}"
    if found.duplicates:
        named = _some([one for one, _ in found.duplicates])
        yield (
            f"twins      {plural(len(found.duplicates), 'image')} of test or validation in train "
            f"too, so that accuracies flatter: {named}"
        )
    if not (found.unreadable or found.duplicates):
        yield "checked    every file can be read, and none of test or validation is in train too"


def machine(crew: Crew) -> str:
    """The line before those of ``measured``."""
    gpu = f" and {crew.gpus:.2g} GPU" if crew.gpus else ""
    where = f" on {crew.nodes} nodes" if crew.nodes > 1 else ""
    return (
        f"measured   {plural(crew.workers, 'worker')} of {crew.cpus} CPU{gpu}{where}, all at work "
        "at once:"
    )


def measured(scale: Scale, pace: Pace, images: Images) -> str:
    """A line about the pace of all workers at one scale."""
    epoch = sum(images.train) * pace.flat
    return (
        f"  {_scale(scale):24}  {_seconds(epoch)} a flat expert epoch, "
        f"{_seconds(STEPS * pace.step)} a matching step of {STEPS} student steps"
    )


def chose(choice: Choice, scales: Sequence[Scale], images: Images, hours: float) -> list[str]:
    """Lines about the choice among ``scales``, and the forecast."""
    p, f, crew = choice.programme, choice.forecast, choice.crew
    larger = scales[scales.index(choice.scale) + 1 :]
    why = (
        f"{_scale(larger[0])} would leave too little time to search"
        if larger
        else "the largest that comes into question"
    )
    steps = p.epochs * -(-sum(images.train) // p.batch_size)
    first, last = SEGMENT_EPOCHS
    share = f" and {crew.gpus:.2g} GPU" if crew.gpus else ""
    return [
        f"network    {p.scale.network} at {p.scale.resolution} pixels, {why}",
        f"experts    {len(p.rho)} sets of {p.experts} (rho {_values(p.rho)}), {p.epochs} epochs of "
        f"batches of {p.batch_size}: {steps} SGD steps",
        f"distill    {plural(p.scale.ipc, 'image')} per class, N {_values(p.syn_steps)}, M {first} "
        f"to {last}, window {_values(p.windows)}, {p.iterations} outer steps by rmsprop",
        f"search     {p.trials} trials, {p.concurrency} at a time, the first {p.startup_trials} at "
        f"random, the worse two thirds pruned after {p.every} steps",
        f"final      {plural(p.finalists, 'finalist')}, {p.networks} fresh networks of "
        f"{p.network_epochs} epochs each",
        f"resources  a worker {crew.cpus} CPU{share} and {size_text(choice.memory)}, of it a "
        "quarter to spare",
        f"forecast   {duration(f.total)} of {duration(3600 * hours)}: start {duration(f.start)}, "
        f"experts {duration(f.experts)}, trials {duration(f.trials)}, final {duration(f.final)}",
    ]


def written(out: Path, address: str | None, crew: Crew) -> list[str]:
    """The last lines: the file, and what to do with it."""
    words = [".venv/bin/python" if ".venv" in sys.executable else "python", "-m", "ftd_ray.sweep"]
    words += [str(out), *(["--address", address] if address else [])]
    shared = (
        ["shared     with several nodes, set store.uri and output.dir to a place of all, as s3://"]
        if crew.nodes > 1
        else []
    )
    return [f"wrote      {out}", *shared, f"next       {shlex.join(words)}"]


def _scale(scale: Scale) -> str:
    many = f", IPC {scale.ipc}" if scale.ipc > 1 else ""
    return f"{scale.network} at {scale.resolution} px{many}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def _values(values: Sequence[float]) -> str:
    return " | ".join(f"{v:g}" for v in values)


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
