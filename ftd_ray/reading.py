"""How far the pass over the images is: a bar on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from ftd.data import Progress
from ftd_ray.progress import duration

LINE_SECONDS = 5.0
"""Between two plain lines. A pass that takes less says nothing."""


@contextlib.contextmanager
def reading(console: Console, every: float = LINE_SECONDS) -> Iterator[Progress]:
    """What ``ftd.data.describe`` tells of images done and images in all, for the eye."""
    if not console.is_terminal:
        yield _Lines(console, every)
        return
    columns = (TextColumn("images    "), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=console, transient=True)
    task = bar.add_task("images", visible=False)

    def show(done: int, total: int) -> None:
        bar.start()  # only now: nothing is shown where the cache knows all
        bar.update(task, completed=done, total=total, visible=True)

    try:
        yield show
    finally:
        bar.stop()


class _Lines:
    def __init__(self, console: Console, every: float):
        self._console, self._every = console, every
        self._began: tuple[float, int] | None = None
        self._told = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._began is None:  # what came before it, such as imports, tells nothing of the pace
            self._began, self._told = (now, done), now
            return
        if now - self._told < self._every or done == total:
            return
        self._told = now
        began, before = self._began
        left = (now - began) / (done - before) * (total - done)
        text = f"images     {done}/{total} read, about {duration(left)} to go"
        self._console.print(Text(text), soft_wrap=True)
