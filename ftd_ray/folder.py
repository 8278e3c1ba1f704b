"""The sweep's folder: what an earlier run left there, and whether this one may go on with it."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from typing import Any

import yaml

from ftd.data import FRACTIONS
from ftd.errors import UserError
from ftd.expert import Numerics
from ftd_ray.config import SweepConfig, parse_config
from ftd_ray.results import result_text
from ftd_ray.storage import is_local, join, read_bytes

CHANGEABLE = (
    "search.trials", "search.concurrency", "search.max_hours", "search.max_gpu_hours",
    "search.finalists", "resources", "tracking", "output",
    "store.uri", "store.cache_mb", "dataset.root", "dataset.download",
    "dataset.columns", "dataset.on_unreadable",
)  # fmt: skip
"""What a resumed sweep may have otherwise than the saved one."""


def saved_sweep(folder: str) -> dict[str, Any] | None:
    """The configuration of the sweep that a folder holds, if it holds one."""
    place = join(folder, "sweep.yaml")
    text = read_bytes(place)
    if text is None:
        return None
    try:
        saved = yaml.safe_load(text)
    except yaml.YAMLError:
        saved = None
    if not isinstance(saved, dict):
        raise UserError(f"{place} is damaged. Restore it from a copy, or give another output.dir.")
    return saved


def finished_summary(config: SweepConfig) -> dict[str, Any] | None:
    """The summary of a sweep that is over: all trials are done, or its budget is spent.

    A summary that cannot be read is none: the study knows all that it said.
    """
    text = read_bytes(join(config.output_dir, "summary.json"))
    try:
        summary = json.loads(text or b"{}")
        trials, state = summary["trials"], summary["state"]
        nothing_usable = state == "failed" and not trials["complete"]
        over = (state == "done" or nothing_usable) and (
            sum(trials.values()) >= config.search.trials or _is_spent(summary, config)
        )
        finalists = summary.get("protocol", {}).get("finalists", 1)
        if state == "done" and finalists != config.search.finalists:
            return None  # they are to be evaluated anew
        result_text(summary, config.space)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return summary if over else None


def _is_spent(summary: dict[str, Any], config: SweepConfig) -> bool:
    """Whether what was used is all that there is, also by the limits that now hold."""
    used, search = summary.get("budget", {}), config.search
    limits = {"hours": search.max_hours, "gpu_hours": search.max_gpu_hours}
    return any(limit is not None and used.get(k, 0) >= limit for k, limit in limits.items())


def check_same(saved: dict[str, Any], config: SweepConfig) -> list[str]:
    """A resumed sweep must search the same space of the same data by the same rules.

    Returns what is otherwise and may be, as ``key: before -> now``.
    Raises UserError with everything that may not.
    """

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(tree, dict) and prefix.count(".") < 2:
            inner = [flat(v, f"{prefix}{k}.") for k, v in tree.items()]
            return {k: v for one in inner for k, v in one.items()}
        return {prefix.rstrip("."): tree}

    before_backends = {f"{kind}_backend": "eager" for kind in ("expert", "trial")}
    saved = saved | {"resources": before_backends | (saved.get("resources") or {})}
    with contextlib.suppress(UserError):  # keys that are newer than the sweep get their defaults
        saved = parse_config(saved).resolved()
    resolved = yaml.safe_load(yaml.safe_dump(config.resolved()))
    before, after = flat(yaml.safe_load(yaml.safe_dump(saved))), flat(resolved)
    r = config.resources
    for kind, numerics in (("expert", r.expert_numerics), ("trial", r.trial_numerics)):
        cpus, gpus = (before.get(f"resources.{unit}_per_{kind}", 0) for unit in ("cpus", "gpus"))
        backend = before.get(f"resources.{kind}_backend", "eager")
        was = Numerics.on("cuda" if gpus else "cpu", max(1, int(cpus)), backend)
        if was != numerics:  # other bits: other experts, and checkpoints that do not fit
            raise UserError(
                f"{config.output_dir} was started with a {kind} on {was.device} with {was.threads} "
                f"threads ({was.backend}), and now it is {numerics.device} with "
                f"{numerics.threads} ({numerics.backend}). Resume with the same "
                f"resources.*_per_{kind} and {kind}_backend, or give another output.dir."
            )
    for key, value in FRACTIONS.items():  # None is another way to write the default
        for side in (before, after):
            if side.get(f"dataset.{key}") is None:
                side[f"dataset.{key}"] = value
    changed = {k for k in {*before, *after} if before.get(k) != after.get(k)}
    allowed = {k for k in changed if any(k == c or k.startswith(f"{c}.") for c in CHANGEABLE)}
    if refused := sorted(changed - allowed):
        then = ", ".join(f"{k}={before.get(k)!r}" for k in refused)
        now = ", ".join(f"{k}={after.get(k)!r}" for k in refused)
        raise UserError(
            f"{config.output_dir} was started with {then}, and now it is {now}. Resume with the "
            "same, or give another output.dir."
        )
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in sorted(allowed)]


@contextlib.contextmanager
def only_one(folder: str) -> Iterator[None]:
    """Two drivers of one local folder would take each other's trials for interrupted ones."""
    if not is_local(folder):
        yield
        return
    os.makedirs(folder, exist_ok=True)
    with open(join(folder, ".lock"), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder} is being worked on by another process. Wait for it, or give another "
                "output.dir."
            ) from None
        yield
