"""The sizes of a sweep, by how much effort it is to make.

Effort 0 is the least from which anything can be learned, 1 what a search of these images still
gains from; beyond it only trials are added. Sizes that only pay together grow together, each by
its own factor, so that no part of a sweep is starved by another.
"""

from dataclasses import dataclass
from math import sqrt

from ftd_ray.new.images import Images

MOST_EFFORT = 2.0

GROWTH = {
    "trials": (6, 100, 300),
    "iterations": (60, 3000, 3000),
    "student_steps": (15, 40, 40),
    "experts": (3, 20, 20),
    "start_steps": (120, 400, 400),
    "networks": (4, 16, 10),
    "network_epochs": (300, 2500, 1000),
}
"""What grows with effort: its size at 0, its size at 1, and what it never exceeds.

``start_steps`` are the SGD steps of an expert after which segments start at the latest, for one
image per class: so few images cannot follow an expert any later, and more can."""

STEPS_OF_AN_EPOCH = 16
"""SGD steps that an epoch of an expert should have: segments of an epoch or so are what a few
synthetic images can follow."""

BATCHES = (4, 128)
"""Batch sizes of experts: at least and at most."""

SEGMENT_STEPS = 150
"""SGD steps of the longest segments: what student steps can still cover."""

SEGMENT_EPOCHS = (2, 6)
"""Epochs of the longest segments: at least and at most."""

MOST_STARTS = 50
"""Epochs at which segments may start."""

WIDER = 0.5
"""Effort from which there are trials enough for more values of rho (each is an expert set), for a
search of the window, and for more learning rates."""

LR_IMG = (0.03, 0.1, 0.3)
WIDER_LR_IMG = (0.03, 0.06, 0.15, 0.3)
"""Change of a class in an outer step, in standard deviations of the pixels."""

FINALISTS = {0.0: 1, 0.3: 3, 0.7: 5}
"""Best trials that are compared by the full protocol, from an effort on."""

FINE_RUNGS = 360
"""Outer steps from which on trials report nine times instead of three: a trial that is no good is
pruned after a ninth of them, and reports still cost less than steps."""


@dataclass(frozen=True, order=True, kw_only=True)
class Scale:
    """What one step of the work is: a network on images of one size, a multiple of 4 pixels."""

    resolution: int
    width: int
    ipc: int = 1

    @property
    def depth(self) -> int:
        """Halvings: two, and as many more as leave a map of 4 pixels."""
        return max(
            depth
            for depth in (2, 3, 4, 5)
            if self.resolution % 2**depth == 0 and (depth == 2 or self.resolution >> depth >= 4)
        )

    @property
    def network(self) -> str:
        return f"ConvNetD{self.depth}W{self.width}"

    @property
    def products(self) -> int:
        """Multiplications of the network's convolutions for one image, its first one left out."""
        sides = [self.resolution >> level for level in range(1, self.depth)]
        return sum(9 * side**2 * self.width**2 for side in sides)


@dataclass(frozen=True, kw_only=True)
class Programme:
    """What a sweep does."""

    scale: Scale
    rho: tuple[float, ...]
    experts: int
    """Of each set."""
    epochs: int
    batch_size: int
    lr: float
    syn_steps: tuple[int, ...]
    expert_epochs: tuple[int, ...]
    windows: tuple[int, ...]
    """Values of max_start_epoch."""
    lr_img: tuple[float, ...]
    iterations: int
    every: int
    trials: int
    startup_trials: int
    concurrency: int
    finalists: int
    search_networks: int
    search_epochs: int
    networks: int
    network_epochs: int


def programme(scale: Scale, images: Images, workers: int, effort: float) -> Programme:
    """The sweep of an effort for so many workers."""

    def grown(what: str, at_least: float = 0) -> float:
        low, high, most = GROWTH[what]
        return min(max(low * (high / low) ** effort, at_least), most)

    train = sum(images.train)
    batch_size = batch_size_for(train)
    steps_of_an_epoch = -(-train // batch_size)
    starts = 1 + round(grown("start_steps") * sqrt(scale.ipc) / steps_of_an_epoch)
    starts = min(max(2, starts), MOST_STARTS)
    segments = _segments(steps_of_an_epoch)
    wider = effort >= WIDER
    iterations = 9 * round(grown("iterations") / 9)
    middle = 5 * round(grown("student_steps") / 5)
    spread = 5 if middle < 20 else 10
    trials = round(grown("trials", at_least=2 * workers))
    return Programme(
        scale=scale,
        rho=(0.0, 0.01, 0.03) if wider else (0.0, 0.02),
        experts=round(grown("experts")),
        epochs=starts - 1 + segments[-1],
        batch_size=batch_size,
        lr=0.01 if batch_size <= 64 else 0.02,
        syn_steps=(middle - spread, middle, middle + spread),
        expert_epochs=segments,
        windows=tuple(sorted({-(-starts // 4), -(-starts // 2), starts})) if wider else (starts,),
        lr_img=WIDER_LR_IMG if wider else LR_IMG,
        iterations=iterations,
        every=iterations // (9 if iterations >= FINE_RUNGS else 3),
        trials=trials,
        startup_trials=min(10, trials // 2),
        concurrency=min(workers, trials // 2),
        finalists=max(n for start, n in FINALISTS.items() if effort >= start),
        search_networks=2,
        search_epochs=200,
        networks=round(grown("networks")),
        network_epochs=100 * round(grown("network_epochs") / 100),
    )


def _segments(steps_of_an_epoch: int) -> tuple[int, ...]:
    """Epochs of segments: up to the longest in thirds."""
    least, most = SEGMENT_EPOCHS
    longest = min(max(round(SEGMENT_STEPS / steps_of_an_epoch), least), most)
    return tuple(sorted({-(-longest // 3), -(-2 * longest // 3), longest}))


def batch_size_for(train: int) -> int:
    """The largest power of two that leaves an epoch its steps."""
    least, most = BATCHES
    size = least
    while size < most and 2 * size * STEPS_OF_AN_EPOCH <= train:
        size *= 2
    return size
