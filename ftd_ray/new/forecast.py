"""How long a sweep is going to take: its work, piece by piece, at the pace that was measured."""

from dataclasses import dataclass
from statistics import fmean

from ftd_ray.new.crew import Crew
from ftd_ray.new.images import Images
from ftd_ray.new.pace import Pace
from ftd_ray.new.programme import Programme

REDUCTION = 3
"""asha lets one trial in so many go on, at each rung."""

DRIVER_SHARE = 1.15
"""Work takes longer by this, for the driver, Ray and MLflow take their share of the machine."""

START_SECONDS = 15.0
"""Before Ray and after it stands: imports, the plan, the first workers."""

END_SECONDS = 8.0
"""Report, MLflow's last words."""

REPORT_SECONDS = 0.1
"""A report of a trial: pictures, its checkpoint."""

EVALUATED = 3
"""Sets that are tested at the end: the best one, and real images at two learning rates."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds of each part of a sweep."""

    start: float
    experts: float
    trials: float
    final: float

    @property
    def total(self) -> float:
        return self.start + self.experts + self.trials + self.final


def forecast(p: Programme, images: Images, pace: Pace, crew: Crew) -> Forecast:
    """The time that a programme takes a crew."""
    train, val, test = sum(images.train), sum(images.val), sum(images.test)
    epoch = sum(train * (pace.flat if rho else pace.plain) + val * pace.classify for rho in p.rho)
    experts = p.experts * p.epochs * epoch

    fresh = p.search_epochs * pace.fresh + val * pace.classify
    reports = p.iterations // p.every
    distilled = p.iterations * fmean(p.syn_steps) * pace.step
    trial = distilled + reports * (p.search_networks * fresh + REPORT_SECONDS)
    straggling = trial / 2 * (1 - 1 / p.concurrency)

    fresh = p.network_epochs * pace.fresh + val * pace.classify
    final = EVALUATED * (fresh + test * pace.classify)
    if p.finalists > 1:
        final += p.finalists * fresh
    networks = -(-p.networks // p.concurrency)  # of the worker that has most
    return Forecast(
        start=crew.start + START_SECONDS,
        experts=DRIVER_SHARE * experts / crew.workers,
        trials=DRIVER_SHARE * (whole_trials(p) * trial / p.concurrency + straggling),
        final=networks * final + END_SECONDS,
    )


def whole_trials(p: Programme) -> float:
    """How many trials that are never pruned do as much work as those of a programme."""
    left, work, done = float(p.trials), 0.0, 0.0
    rung = p.every
    while rung < p.iterations:
        work += left * (rung / p.iterations - done)
        left, done = _passing(round(left)), rung / p.iterations
        rung *= REDUCTION
    return work + left * (1 - done)


def _passing(trials: int) -> float:
    """Trials that asha lets go on, of so many in whatever order of merit.

    The k-th to reach a rung passes when it is among the best k // 3 so far; before there are
    three, when it is the best.
    """
    return sum(max(1, k // REDUCTION) / k for k in range(1, trials + 1))
