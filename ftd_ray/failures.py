"""Why trials failed: what those that failed for one reason have in common, and what helps.

A reason is what a trial says without its numbers: "step 4: eta became -0.2" and "step 9: eta became
-3" are one. What is common is looked for in one dimension at a time: the value, or the end of its
range, that all of them have and the fewest trials that lived.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftd_ray.pictures import short_names
from ftd_ray.pictures.places import value_text
from ftd_ray.search import Ended
from ftd_ray.space import Dimension

LEAST = 3
"""Trials that failed for one reason, before more is said of them than their reason."""

FIRST = 5
"""Trials that have ended, before anything is said of most of them."""

MOST = 0.6
"""The share of them that are most."""

NUMBER = re.compile(r"((?<![\w.])[-+]?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|inf|nan)\b)")

GAP = "…"
"""In the place of a number that differs from trial to trial."""


@dataclass(frozen=True)
class Failure:
    """Trials that failed for one reason."""

    reason: str
    trials: Sequence[int]
    in_common: str | None
    """A clause; None of fewer than ``LEAST`` trials, which say nothing about the space."""
    remedy: str
    """Sentences; empty where the reason gives none."""

    def __str__(self) -> str:
        clauses = [self.reason, self.in_common or ""]
        told = [f"{c[:1].upper()}{c[1:]}." for c in clauses if c]
        return " ".join(filter(None, (*told, self.remedy)))


def diagnose(ended: Sequence[Ended], space: Sequence[Dimension]) -> list[Failure]:
    """The reasons for which trials failed, that of most trials first."""
    kinds: dict[str, list[Ended]] = defaultdict(list)
    for t in ended:
        if t.state == "failed":
            kinds[NUMBER.sub(GAP, _reason(t))].append(t)
    lived = [t for t in ended if t.state != "failed"]
    failures = []
    for trials in sorted(kinds.values(), key=lambda ts: (-len(ts), ts[0].number)):
        reason, remedy = _sentences([_reason(t) for t in trials])
        common = in_common(trials, lived, space, reason + remedy) if len(trials) >= LEAST else None
        failures.append(Failure(reason, [t.number for t in trials], common, remedy))
    return failures


def patterns(told: Sequence[Mapping[str, Any]]) -> list[Failure]:
    """Of the ``failures`` of a summary those of enough trials to say something about the space."""
    return [f for f in (Failure(**entry) for entry in told) if f.in_common is not None]


def most_failed(ended: Sequence[Ended], space: Sequence[Dimension], trials: int) -> str | None:
    """A warning, when most of the trials so far failed for one reason, of ``trials`` in all."""
    failures = diagnose(ended, space)
    if not failures or len(ended) < min(FIRST, trials):
        return None
    failed = len(failures[0].trials)
    if failed < max(LEAST, MOST * len(ended)):
        return None
    return f"{failed} of the first {len(ended)} trials failed for one reason. {failures[0]}"


def _reason(trial: Ended) -> str:
    return trial.reason or "it did not say why"


def _sentences(reasons: Sequence[str]) -> tuple[str, str]:
    """What equal reasons say, without the numbers that differ; and the remedy that follows it."""
    parts = zip(*(NUMBER.split(r) for r in reasons), strict=True)
    text = "".join(same[0] if len(set(same)) == 1 else GAP for same in parts)
    reason, *remedy = re.split(r"\.\s+(?=[A-Z])", text.removeprefix(f"step {GAP}: "), maxsplit=1)
    return reason.removesuffix("."), "".join(remedy).replace(f"={GAP}", "")


def in_common(
    failed: Sequence[Ended],
    lived: Sequence[Ended],
    space: Sequence[Dimension],
    said: str = "",
) -> str:
    """A clause on the dimension whose values tell ``failed`` trials from those that ``lived``.

    Of equally good ones it is a dimension that is named in what they ``said``, and else the first.
    """
    if not lived:
        return "no trial has lived that they could be compared with"
    found = []
    names = short_names(space)
    for d in space:
        if all(d.key in t.params for t in failed):
            for text, holds in _conditions(d, [t.params[d.key] for t in failed]):
                others = sum(d.key in t.params and holds(t.params[d.key]) for t in lived)
                named = re.search(rf"\b{re.escape(d.name)}\b", said) is not None
                found.append((others, not named, f"{names[d.key]} of {text}"))
    others, _, text = min(found, key=lambda f: f[:2], default=(len(lived), False, ""))
    if 2 * others >= len(lived):
        return "no dimension tells them from the trials that lived"
    beside = f"of those that lived, {others or 'none'} of {len(lived)}"
    return f"all {len(failed)} have {text}; {beside}"


def _conditions(d: Dimension, values: Sequence[Any]) -> list[tuple[str, Callable[[Any], bool]]]:
    """What holds of all ``values`` of a dimension, in words and as a test of other values."""
    if all(v == values[0] for v in values):
        return [(value_text(values[0]), lambda v: bool(v == values[0]))]
    if not d.ordered:
        return []
    low, high = min(values), max(values)
    return [
        (f"{value_text(low)} or more", lambda v: bool(v >= low)),
        (f"{value_text(high)} or less", lambda v: bool(v <= high)),
    ]
