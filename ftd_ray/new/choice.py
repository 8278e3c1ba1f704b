"""The largest sweep that fits a time: a function of images, workers and their paces."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ftd.errors import UserError
from ftd_ray.new.crew import Crew
from ftd_ray.new.forecast import Forecast, forecast
from ftd_ray.new.images import Images
from ftd_ray.new.pace import Pace
from ftd_ray.new.programme import MOST_EFFORT, Programme, Scale, programme

FILLED = 0.9
"""The share of the hours that is planned for."""

ENOUGH = 0.5
"""The effort that a scale must leave room for, before it is worth more than the one below it."""

PROMISING = 0.4
"""The same, where a scale's pace is only guessed from the one below it."""

STEPS = 100
"""Efforts that are tried between 0 and 1."""

RESOLUTIONS = (8, 16, 32, 64, 128)

PHOTOGRAPH = 32
"""Resolution from which on a choice begins, where images are large enough."""

ENLARGED = 1.25
"""Images are not blown up by more than this."""

MANY = 10
"""Images a class, where there is time for more than one."""

MEMORY_MARGIN = 1.25
"""On the memory that a worker took while it was measured."""

MEMORY_FILLED = 0.95
"""Share of a node's memory that its workers together may book: trials that wait book a little."""

GPU_FILLED = 0.92
"""Share of a GPU's memory that its workers together may fill."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A programme, and what it was chosen by."""

    programme: Programme
    effort: float
    forecast: Forecast
    pace: Pace
    crew: Crew
    """As far as memory goes."""

    @property
    def scale(self) -> Scale:
        return self.programme.scale

    @property
    def memory(self) -> int:
        """Bytes for a worker, in whole tenths of a GB."""
        return _memory(self.pace)


def choose(
    images: Images,
    scales: Sequence[Scale],
    crew: Crew,
    measure: Callable[[Scale], Pace | None],
    hours: float,
) -> Choice:
    """Climbs the scales as long as one leaves room for enough effort; ``measure`` gives its pace.

    ``measure`` is asked only for scales that are promising. Raises UserError when the hours do not
    suffice for anything.
    """
    seconds = FILLED * 3600 * hours
    best = _best_at(scales[0], images, crew, measure(scales[0]), seconds)
    if isinstance(best, Unfit):
        raise UserError(_refusal(best, scales[0], hours))
    for scale in scales[1:]:
        guess = _best_at(scale, images, crew, _guessed(best.pace, best.scale, scale), seconds)
        if isinstance(guess, Unfit) or guess.effort < PROMISING:
            break
        found = _best_at(scale, images, crew, measure(scale), seconds)
        if isinstance(found, Unfit) or found.effort < ENOUGH:
            break
        best = found
    return best


@dataclass(frozen=True)
class Unfit:
    """Why nothing was chosen at a scale: the least takes ``seconds``, or memory if that is None."""

    seconds: float | None


def _best_at(
    scale: Scale, images: Images, crew: Crew, pace: Pace | None, seconds: float
) -> Choice | Unfit:
    """The largest effort at a scale that fits the seconds; no ``pace`` where memory did not do."""
    fitting = None if pace is None else _fitting(crew, pace)
    if pace is None or fitting is None:
        return Unfit(None)
    for step in range(round(STEPS * MOST_EFFORT), -1, -1):
        p = programme(scale, images, fitting.workers, step / STEPS)
        f = forecast(p, images, pace, fitting)
        if f.total <= seconds:
            return Choice(programme=p, effort=step / STEPS, forecast=f, pace=pace, crew=fitting)
    return Unfit(f.total)


def _refusal(unfit: Unfit, scale: Scale, hours: float) -> str:
    if unfit.seconds is None:
        return (
            f"a worker on {scale.network} at {scale.resolution} pixels takes more memory than "
            "there is. Close other programs, or give the --address of a cluster."
        )
    needed = math.ceil(100 * unfit.seconds / 3600 / FILLED) / 100
    return (
        f"--hours {hours:g} is too short: the least that tells anything about these images takes "
        f"about {needed:g} here. Give that, or fewer images."
    )


def scales_of(images: Images, ipc: int | None) -> tuple[Scale, ...]:
    """Sizes of the work that come into question, from the smallest up.

    The resolution grows before networks become as wide as the field's; where it is given or the
    images are small, only the width grows. Many images a class come last, unless ``ipc`` is given.
    Raises UserError when images are too small or too few.
    """
    given, smallest = images.dataset.resolution, min(images.train)
    if given is not None and (given % 4 or given < RESOLUTIONS[0]):
        raise UserError(
            f"dataset.resolution={given} does not do: a ConvNet halves images twice or more. Take "
            f"a multiple of 4 from {RESOLUTIONS[0]} on, such as {PHOTOGRAPH}."
        )
    if ipc is not None and not 1 <= ipc <= smallest:
        raise UserError(
            f"distill.ipc={ipc} must lie from 1 to {smallest}, the training images of the smallest "
            "class. Lower it, or give more images."
        )
    fitting = [r for r in RESOLUTIONS if r <= ENLARGED * images.side]
    if given is None and not fitting:
        raise UserError(
            f"the images are {images.side} pixels on their shorter side, and {RESOLUTIONS[0]} are "
            "the least that a ConvNet can halve. Point at larger images."
        )
    first, *larger = [given] if given else [r for r in fitting if r >= PHOTOGRAPH] or fitting[-1:]
    sizes = [(first, 32), (first, 64)]
    sizes += [(side, width) for side in larger for width in (64, 128)] or [(first, 128)]
    scales = [Scale(resolution=r, width=w, ipc=ipc or 1) for r, w in sizes]
    if ipc is None and smallest >= MANY:
        scales.append(replace(scales[-1], ipc=MANY))
    return tuple(scales)


def _guessed(pace: Pace, before: Scale, scale: Scale) -> Pace:
    """A pace at a scale by that of another: as much slower as there is more to compute."""
    of_image = scale.products / before.products
    of_set = of_image * scale.ipc / before.ipc
    return replace(
        pace,
        plain=pace.plain * of_image,
        flat=pace.flat * of_image,
        step=pace.step * of_set,
        fresh=pace.fresh * of_set,
        classify=pace.classify * of_image,
    )


def _fitting(crew: Crew, pace: Pace) -> Crew | None:
    """As many of the crew as memory has room for; None if not even one."""
    on_a_node = min(crew.on_a_node, int(MEMORY_FILLED * crew.node_memory) // _memory(pace))
    gpus = crew.gpus
    if gpus:
        on_a_gpu = min(round(1 / gpus), math.floor(GPU_FILLED / pace.gpu_share))
        if not on_a_gpu:
            return None
        on_a_node = min(on_a_node, math.floor(on_a_gpu * crew.on_a_node * gpus + 1e-9))
        gpus = 1 / on_a_gpu
    workers = min(crew.workers, crew.nodes * on_a_node)
    return replace(crew, workers=workers, gpus=gpus) if workers else None


def _memory(pace: Pace) -> int:
    return math.ceil(MEMORY_MARGIN * pace.memory / 1e8) * 10**8
