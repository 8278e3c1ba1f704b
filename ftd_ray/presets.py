"""Points to begin with (``search.start_from``): published configurations by name, and given ones.

FTD, Table 7 (CVPR 2023); for the ImageNet subsets what its author gave for them. The paper's alpha
is ``experts.sharpness_weight``; its synthetic batch is None where it is all images.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftd.errors import UserError
from ftd_ray.space import is_same

if TYPE_CHECKING:
    from ftd_ray.config import SweepConfig

_KEYS = (
    "distill.syn_steps",
    "distill.expert_epochs",
    "distill.max_start_epoch",
    "distill.batch_syn",
    "distill.lr_img",
    "distill.lr_lr",
    "distill.lr_init",
    "experts.sharpness_weight",
    "distill.ema_decay",
)

_TABLE_7: dict[tuple[str, int], tuple[Any, ...]] = {
    ("cifar10", 1): (50, 2, 2, None, 100.0, 1e-7, 0.01, 0.3, 0.9999),
    ("cifar10", 10): (30, 2, 20, None, 100.0, 1e-5, 0.001, 0.3, 0.9995),
    ("cifar10", 50): (30, 2, 40, None, 1000.0, 1e-5, 0.01, 1.0, 0.999),
    ("cifar100", 1): (40, 3, 20, None, 1000.0, 1e-5, 0.01, 1.0, 0.9995),
    ("cifar100", 10): (20, 2, 40, None, 1000.0, 1e-5, 0.01, 1.0, 0.9995),
    ("cifar100", 50): (80, 2, 40, 1000, 1000.0, 1e-5, 0.01, 1.0, 0.999),
    ("tiny_imagenet", 1): (30, 2, 10, None, 1e4, 1e-4, 0.01, 1.0, 0.999),
    ("tiny_imagenet", 10): (20, 2, 40, 500, 1e4, 1e-4, 0.01, 1.0, 0.999),
    ("imagenet", 1): (20, 2, 10, None, 1e4, 1e-4, 0.01, 1.0, 0.999),
    ("imagenet", 10): (20, 2, 10, 64, 1e4, 1e-4, 0.001, 1.0, 0.999),
}

PRESETS: dict[str, dict[str, Any]] = {
    f"ftd-{data}-ipc{ipc}": {
        "experts.sharpness": "sam",
        "experts.rho": 0.01,
        "distill.optimiser": "sgd",
        "distill.ipc": ipc,
        **dict(zip(_KEYS, row, strict=True)),
    }
    for (data, ipc), row in _TABLE_7.items()
}
"""Name -> {key of the configuration: value}."""


@dataclass(frozen=True)
class StartPoint:
    """A point to try first."""

    label: str
    params: dict[str, Any]
    """Of the dimensions that it names; the others are sampled."""
    others: dict[str, tuple[Any, Any]]
    """Keys that the sweep fixes otherwise than the preset: (here, in the preset)."""


def start_points(config: "SweepConfig") -> list[StartPoint]:
    """The points to try first. Raises UserError for what is no point of the space."""
    found: list[StartPoint] = []
    for i, entry in enumerate(config.search.start_from):
        where = f"search.start_from[{i}]"
        if isinstance(entry, str):
            point = _published(config, where, entry)
        else:
            point = _given(config, where, entry)
        same = next((p for p in found if p.params == point.params), None)
        if same is not None:
            raise UserError(
                f"{where}={point.label} is the same point as {same.label}. Name it once."
            )
        found.append(point)
    return found


def _published(config: "SweepConfig", where: str, name: str) -> StartPoint:
    wanted = preset(name)
    params = _in_space(config, f"{where}={name}", wanted)
    here = config.at(config.completed(params, ()))
    others = {}
    for key, value in wanted.items():
        section, _, field = key.partition(".")
        fixed = getattr(getattr(here, section), field)
        if key not in params and not is_same(value, fixed):
            others[key] = (fixed, value)
    return StartPoint(name, params, others)


def _given(config: "SweepConfig", where: str, entry: dict[str, Any]) -> StartPoint:
    label = "{" + ", ".join(f"{k}: {v}" for k, v in entry.items()) + "}"
    known = [d.key for d in config.space]
    for key in entry:
        if key not in known:
            hint = _hint(str(key), known, f"It has {', '.join(known) or 'none'}.")
            raise UserError(f"{where}: {key} is no dimension of the search. {hint}")
    params = _in_space(config, f"{where}={label}", entry)
    for d in config.space:
        if d.key in entry and d.key not in params:
            raise UserError(
                f"{where}: {d.key} does not exist at that point ({d.key} is {d}). Leave it out, or "
                "name what it depends on."
            )
    return StartPoint(label, params, {})


def _in_space(config: "SweepConfig", where: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """The values of the dimensions that exist at the wanted point."""
    params: dict[str, Any] = {}
    for d in config.space:
        if d.key in wanted and d.active(params):
            params[d.key] = d.member(wanted[d.key])
            if params[d.key] is None:
                raise UserError(
                    f"{where}: {d.key}={wanted[d.key]!r} is not in the search ({d}). Add it to the "
                    "dimension, or leave the point out."
                )
    return params


def preset(name: str) -> dict[str, Any]:
    """The values of a preset. Raises UserError with the names that there are."""
    if name not in PRESETS:
        hint = _hint(name, PRESETS, f"There are {', '.join(PRESETS)}.")
        raise UserError(f"search.start_from: there is no preset {name!r}. {hint}")
    return PRESETS[name]


def _hint(word: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else otherwise
