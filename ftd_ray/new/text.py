"""What the command says: what it saw, measured and chose, and why.

A line has at most ``WIDTH`` columns, and all together are at most ``LINES``.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ftd.expert import Numerics
from ftd_ray.new.choice import Choice
from ftd_ray.new.crew import Crew
from ftd_ray.new.images import Images
from ftd_ray.new.pace import STEPS, Pace
from ftd_ray.new.programme import Scale
from ftd_ray.progress import duration
from ftd_ray.store.text import plural, size_text

WIDTH = 100
LINES = 25

NAME = 40
"""Characters of a name that are shown; of a longer one its end."""


def saw(images: Images) -> list[str]:
    """Lines about the images."""
    found, d = images.found, images.dataset
    n = sum(map(sum, found.counts.values()))
    sizes = sorted(set(found.sizes), key=lambda size: size[0] * size[1])
    span = " to ".join(f"{w} x {h}" for w, h in dict.fromkeys((sizes[0], sizes[-1]))) + " pixels"
    if len(sizes) > 1:
        span += f", half of them {images.side} or more on the shorter side"
    colour = "all grey" if found.grey == n else f"{found.grey} grey" if found.grey else "in colour"
    val = "as given" if "val" in found.counts else f"{d.val_fraction:g} of train"
    test = "as given" if "test" in found.counts else f"{d.test_fraction or 0.2:g} of train"
    return [
        _naming(
            f"images     {n:,} in {images.classes} classes, {_balance(images)}:",
            found.class_names,
        ),
        f"sizes      {span}; {colour}",
        f"parts      {sum(images.train):,} train, {sum(images.val):,} validation ({val}), "
        f"{sum(images.test):,} test ({test})",
        *_oddities(images),
    ]


def _balance(images: Images) -> str:
    each = [sum(n) for n in zip(*images.found.counts.values(), strict=True)]
    low, high = min(each), max(each)
    return f"{low:,} of each" if low == high else f"{low:,} to {high:,} of each"


def _oddities(images: Images) -> Iterator[str]:
    found = images.found
    if found.unreadable:
        head = f"left out   {plural(len(found.unreadable), 'file')} that cannot be read:"
        yield _naming(head, [f"{_end(u.where)} ({u.reason})" for u in found.unreadable])
    if found.duplicates:
        many = plural(len(found.duplicates), "image")
        head = f"twins      {many} held out and in train too, which flatters accuracies:"
        yield _naming(head, [_end(one) for one, _ in found.duplicates])
    if found.unused:
        yield _naming("not used  ", found.unused)
    if not (found.unreadable or found.duplicates):
        yield "checked    every file can be read, and none that is held out is in train too"


def machine(crew: Crew, numerics: Numerics) -> str:
    """The line before those of ``measured``."""
    gpu = f" and {crew.gpus:.2g} GPU" if crew.gpus else ""
    where = f" on {crew.nodes} nodes" if crew.nodes > 1 else ""
    return (
        f"measured   {plural(crew.workers, 'worker')} of {crew.cpus} CPU{gpu}{where}, gradients "
        f"{numerics.backend}, all at work at once:"
    )


def measured(scale: Scale, pace: Pace, images: Images) -> str:
    """A line about the pace of all workers at one scale."""
    epoch = sum(images.train) * pace.flat
    return (
        f"  {_scale(scale):24}  expert epoch {_seconds(epoch)}, matching step of {STEPS} "
        f"student steps {_seconds(STEPS * pace.step)}"
    )


def chose(choice: Choice, scales: Sequence[Scale], images: Images) -> list[str]:
    """Lines about the choice among ``scales``, and the forecast."""
    p, f, crew = choice.programme, choice.forecast, choice.crew
    larger = scales[scales.index(choice.scale) + 1 :]
    why = (
        f"{_scale(larger[0])} would leave too little time"
        if larger
        else "the largest that comes into question"
    )
    steps = -(-sum(images.train) // p.batch_size)
    first, *_, last = p.expert_epochs
    gpu = f" and {crew.gpus:.2g} GPU" if crew.gpus else ""
    return [
        f"network    {_scale(choice.scale)}; {why}",
        f"experts    {len(p.rho)} sets (rho {_values(p.rho)}) of {p.experts}, {p.epochs} epochs of "
        f"{plural(steps, 'step')} in batches of {p.batch_size}:",
        f"           M = {first} to {last} epochs are {first * steps} to {last * steps} steps for "
        "the student to follow in N",
        f"distill    {plural(p.scale.ipc, 'image')} per class, N {_values(p.syn_steps)}, window "
        f"{_values(p.windows)}, {p.iterations} outer steps by rmsprop:",
        f"           it suits any images, a step moves a class by {_values(p.lr_img)} standard "
        "deviations",
        f"search     {p.trials} trials, {p.concurrency} at a time, {p.startup_trials} at random "
        f"first; asha prunes two thirds after {p.every} steps",
        f"final      {plural(p.finalists, 'finalist')}, {p.networks} fresh networks of "
        f"{p.network_epochs} epochs for each set",
        f"resources  {crew.cpus} CPU{gpu} and {size_text(choice.memory)} for a worker: "
        f"{size_text(choice.pace.memory)} were measured, a quarter is to spare",
        f"forecast   {duration(f.total)}: start {duration(f.start)}, "
        f"experts {duration(f.experts)}, trials {duration(f.trials)}, final {duration(f.final)}",
    ]


def written(out: Path, address: str | None, crew: Crew) -> list[str]:
    """The last lines: the file, and what to do with it."""
    words = [".venv/bin/python" if ".venv" in sys.executable else "python", "-m", "ftd_ray.sweep"]
    words += [str(out), *(["--address", address] if address else [])]
    shared = (
        ["shared     set store.uri and output.dir to a place that all nodes share, such as s3://"]
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


def _naming(head: str, names: Sequence[str]) -> str:
    """A line that ends in as many names as fit, and how many more there are."""
    for shown in range(min(len(names), WIDTH), 0, -1):
        more = f" and {len(names) - shown} more" if shown < len(names) else ""
        line = f"{head} {', '.join(names[:shown])}{more}"
        if len(line) <= WIDTH:
            return line
    return f"{head} {names[0]}"[: WIDTH - 1] + "…"


def _end(name: str) -> str:
    return name if len(name) <= NAME else f"…{name[1 - NAME :]}"
