"""An earlier sweep that a search learns from: which of its trials are points of this one's space.

Only trials that this sweep could have run itself count, so that accuracies can be compared: the
same images and augmentation, the same evaluation, and every key of ``experts`` and ``distill`` at a
value that this sweep fixes or searches.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ftd.data.dataset import Description
from ftd.errors import UserError
from ftd_ray.config import SEARCHED, Point, SweepConfig, parse_config
from ftd_ray.folder import saved_sweep
from ftd_ray.search import Ended, read_study

NO_MATTER = ("networks", "epochs", "every")
"""Keys of ``evaluate`` that the last report of a trial does not depend on."""


@dataclass(frozen=True)
class Earlier:
    """Trials of an earlier sweep, as points of this one."""

    uri: str
    trials: tuple[Ended, ...]
    complete: int
    """Complete trials that the earlier sweep has."""


def read_earlier(config: SweepConfig, data: Description) -> Earlier:
    """The trials of ``search.warm_start``. Raises UserError when there is nothing to learn."""
    uri = config.search.warm_start
    assert uri is not None
    where = f"search.warm_start={uri}"
    saved = saved_sweep(uri)
    found = read_study(uri)
    if saved is None or found is None:
        raise UserError(f"{where} holds no sweep. Give the output.dir of one.")
    earlier = parse_config(saved)
    trials, fingerprint = found
    if fingerprint != data.fingerprint:
        raise UserError(
            f"{where} is of other images (fingerprint {str(fingerprint)[:8]}; here "
            f"{data.fingerprint[:8]}), so its accuracies say nothing here. Leave it out."
        )
    _check_comparable(where, config, earlier)
    complete = [t for t in trials if t.state == "complete"]
    fitting, reason = [], "it has no complete trial"
    for trial in complete:
        try:
            fitting.append(replace(trial, params=point_of(config, earlier.at(trial.params))))
        except ValueError as unfit:
            reason = f"trial {trial.number} has {unfit}"
    if not fitting:
        raise UserError(f"{where} has no trial of this space: {reason}. Leave it out.")
    return Earlier(uri, tuple(fitting), len(complete))


def _check_comparable(where: str, config: SweepConfig, earlier: SweepConfig) -> None:
    if missing := set(config.search.objectives) - set(earlier.search.objectives):
        raise UserError(f"{where} did not measure {min(missing)}. Leave it out.")
    here, there = (
        {"dataset.augment": c.dataset.strategy}
        | {f"evaluate.{k}": v for k, v in asdict(c.evaluate).items() if k not in NO_MATTER}
        for c in (config, earlier)
    )
    for key in here:
        if here[key] != there[key]:
            raise UserError(
                f"{where} had {key}={there[key]}, and here it is {here[key]}, so that accuracies "
                "cannot be compared. Take the same, or leave it out."
            )


def point_of(config: SweepConfig, point: Point) -> dict[str, Any]:
    """The parameters at which ``config`` has this point. Raises ValueError with what is not so."""
    params: dict[str, Any] = {}
    for d in config.space:
        if d.active(params):
            section, _, name = d.key.partition(".")
            params[d.key] = d.member(getattr(getattr(point, section), name))
            if params[d.key] is None:
                raise ValueError(f"{d.key}={getattr(getattr(point, section), name)}")
    here = config.at(params)
    for section in SEARCHED:
        mine, theirs = getattr(here, section), getattr(point, section)
        for f in fields(mine):
            if getattr(mine, f.name) != getattr(theirs, f.name):
                raise ValueError(f"{section}.{f.name}={getattr(theirs, f.name)}")
    return params
