"""What ``ls``, ``show`` and ``gc`` print."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean, pstdev
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftd_ray.store.cleaning import CleaningPlan
from ftd_ray.store.inventory import Inventory, SetEntry
from ftd_ray.store.text import (
    age_text,
    data_text,
    field,
    plural,
    precision_text,
    sharpness_text,
    size_text,
    sparkline,
)
from ftd_ray.store.usage import User

FIXED: dict[str, Any] = {"no_wrap": True}
NUMBER: dict[str, Any] = {"no_wrap": True, "justify": "right"}

WIDE = 110
"""Columns of a terminal from which on keys and users have room in the table."""

CURVE_ROWS = 12
"""Epochs that a curve's table shows at most."""

History = Sequence[tuple[int, float, float]]
"""(epoch, training loss, validation accuracy) of one expert."""


def say(console: Console, text: str, style: str = "") -> None:
    """A line as it is, however narrow the terminal."""
    console.print(Text(text, style=style), soft_wrap=True)


def print_inventory(console: Console, store: Inventory, now: float) -> None:
    """Every set on a row, then all that is not as it should be, then the sum."""
    sets = [s for s in store.sets if s.files]
    digits = _prefix([s.key for s in sets]) if console.width < WIDE else 20
    columns: list[tuple[str, Callable[[SetEntry], str], dict[str, Any]]] = [
        ("key", lambda s: s.key[:digits], FIXED),
        ("data", lambda s: data_text(s.identity) if _known(s) else s.state, {}),
        ("network", lambda s: str(field(s.identity, "experts", "network")), FIXED),
        ("sharpness", lambda s: sharpness_text(s.identity), FIXED),
        ("bits", lambda s: precision_text(s.identity), FIXED),
        ("experts", _experts_text, NUMBER),
        ("bytes", lambda s: size_text(s.bytes), NUMBER),
        ("age", lambda s: "" if s.newest is None else age_text(now - s.newest), NUMBER),
        ("used by", lambda s: _users_text(s.users, now), {}),
    ]
    if all(precision_text(s.identity) == "float32" for s in sets):
        columns = [c for c in columns if c[0] != "bits"]
    narrow = console.width < WIDE
    if narrow or not any(s.users for s in sets):
        columns = [c for c in columns if c[0] != "used by"]
    table = _table(gap=1 if narrow else 2)
    for name, _, options in columns:
        table.add_column(name, **options)
    of_all = ("key", "data", "bytes", "age", "used by")
    for s in sets:
        known = _known(s)
        cells = [cell(s) if known or name in of_all else "" for name, cell, _ in columns]
        table.add_row(*cells, style="" if known else "dim")
    if sets:
        console.print(table)
    if narrow:
        _say_users(console, sets, digits, now)
    for s in sets:
        for problem in s.problems:
            say(console, f"{s.key}: {problem}", "red")
        if s.leftovers:
            size = size_text(sum(f.bytes for f in s.leftovers))
            what = plural(len(s.leftovers), "leftover")
            say(console, f"{s.key}: {what} of dead writers, {size}. `gc` takes them away.")
        if s.quarantined:
            size = size_text(sum(q.bytes for q in s.quarantined))
            what = plural(len(s.quarantined), "expert")
            say(console, f"{s.key}: {what} in quarantine, {size}.")
        if s.foreign:
            say(console, f"{s.key}: foreign: {_some([f.name for f in s.foreign])}")
    if store.quarantined:
        size = size_text(sum(q.bytes for q in store.quarantined))
        say(console, f"{plural(len(store.quarantined), 'set')} in quarantine, {size}.")
    if store.leftovers:
        names = _some([f.name for f in store.leftovers])
        say(console, f"leftovers of dead writers: {names}. `gc` takes them away.")
    if store.foreign:
        say(console, f"foreign: {_some(store.foreign)}")
    experts = sum(len(s.published) for s in sets)
    total = f"{plural(len(sets), 'set')}, {plural(experts, 'expert')}, {size_text(store.bytes)}"
    say(console, f"{total} in {store.uri}", "bold")


def _say_users(console: Console, sets: Sequence[SetEntry], digits: int, now: float) -> None:
    """A line for each sweep, where the table has no room for them."""
    keys: dict[str, list[str]] = {}
    for s in sets:
        for name in dict.fromkeys(_user_text(u, now) for u in s.users):
            keys.setdefault(name, []).append(s.key[:digits])
    for name, used in sorted(keys.items()):
        say(console, f"used by {name}: {' '.join(used)}")


def inventory_json(store: Inventory, now: float) -> dict[str, Any]:
    """The same for scripts. Times are UTC seconds, sizes bytes."""
    return {
        "uri": store.uri,
        "bytes": store.bytes,
        "foreign": store.foreign,
        "quarantined": [q.name for q in store.quarantined],
        "leftovers": [f.name for f in store.leftovers],
        "sets": [_set_json(s, now) for s in store.sets if s.files],
    }


def _set_json(s: SetEntry, now: float) -> dict[str, Any]:
    rho = field(s.identity, "experts", "rho")
    names = {
        "data": field(s.identity, "data", "name"),
        "fingerprint": field(s.identity, "data", "fingerprint"),
        "network": field(s.identity, "experts", "network"),
        "sharpness": field(s.identity, "experts", "sharpness"),
        "rho": rho,
        "precision": precision_text(s.identity) if s.identity is not None else "?",
    }
    return {
        "key": s.key,
        "state": s.state,
        "problems": s.problems,
        **{k: None if v == "?" else v for k, v in names.items()},
        "experts": {str(e.index): e.epochs for e in s.published},
        "bytes": s.bytes,
        "newest": s.newest,
        "last_used": s.last_used,
        "users": [asdict(u) | {"running": u.is_running(now)} for u in s.users],
        "leftovers": [f.name for f in s.leftovers],
        "foreign": [f.name for f in s.foreign],
        "quarantined": [q.name for q in s.quarantined],
    }


def print_set(
    console: Console,
    entry: SetEntry,
    histories: dict[int, History],
    unread: dict[int, str],
    now: float,
) -> None:
    """Configuration, experts, curves and users of one set."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("set", entry.key)
    for name, text in _identity_lines(entry.identity):
        grid.add_row(name, Text(text))
    grid.add_row("experts", f"{_experts_text(entry)} epochs, {size_text(entry.bytes)}")
    longest = max((e.epochs or 0 for e in entry.published), default=0)
    for expert in entry.published:
        if expert.epochs != longest:
            grid.add_row("", f"expert {expert.index} has {expert.epochs} of {longest} epochs")
    for user in entry.users:
        when = "is running" if user.is_running(now) else "ended" if user.ended else "last seen"
        age = "" if user.is_running(now) else f" {age_text(now - user.renewed)} ago"
        grid.add_row("used by", Text(f"{user.name} in {user.place}, {when}{age}"))
    console.print(grid)
    for problem in [*entry.problems, *unread.values()]:
        say(console, f"damaged    {problem}", "red")
    if histories:
        console.print()
        _print_curves(console, histories)


def _print_curves(console: Console, histories: dict[int, History]) -> None:
    accuracies: dict[int, list[float]] = {}
    losses: dict[int, list[float]] = {}
    for history in histories.values():
        for epoch, loss, accuracy in history:
            accuracies.setdefault(epoch, []).append(100 * accuracy)
            losses.setdefault(epoch, []).append(loss)
    epochs = sorted(accuracies)
    table = _table()
    for name in ("epoch", "validation", "min", "max", "training loss", "experts"):
        table.add_column(name, **NUMBER)
    for epoch in _spread(epochs, CURVE_ROWS):
        values, loss = accuracies[epoch], fmean(losses[epoch])
        table.add_row(
            str(epoch),
            f"{fmean(values):.1f} ± {pstdev(values):.1f} %",
            f"{min(values):.1f}",
            f"{max(values):.1f}",
            "–" if math.isnan(loss) else f"{loss:.4f}",
            str(len(values)),
        )
    console.print(table)
    shown = _spread(epochs, max(8, min(60, console.width - 30)))
    curve = sparkline([fmean(accuracies[e]) for e in shown])
    say(console, f"validation {curve} epoch {epochs[0]} to {epochs[-1]}")


def print_cleaning(console: Console, plan: CleaningPlan, now: float) -> None:
    """What goes and why, then what stays although it is old."""
    if plan.removals:
        table = _table()
        for name, options in (("what", FIXED), ("where", {"overflow": "fold"}), ("bytes", NUMBER)):
            table.add_column(name, **options)
        table.add_column("last used", **NUMBER)
        table.add_column("why")
        for r in plan.removals:
            age = f"{age_text(now - r.last_used)} ago" if r.bytes else ""
            table.add_row(r.kind, r.name or "the store itself", size_text(r.bytes), age, r.why)
        console.print(table)
    for line in plan.kept:
        say(console, line)


def _table(gap: int = 2) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")


def _known(entry: SetEntry) -> bool:
    """Whether the set is what its identity says."""
    return entry.identity is not None and entry.state == "whole"


def _prefix(keys: Sequence[str]) -> int:
    """Digits that tell the keys apart, at least 8."""
    return next(n for n in range(8, 21) if n == 20 or len({k[:n] for k in keys}) == len(set(keys)))


def _experts_text(entry: SetEntry) -> str:
    epochs = [e.epochs for e in entry.published if e.epochs is not None]
    if not epochs:
        return "none"
    low, high = min(epochs), max(epochs)
    return f"{len(epochs)} × {low}" if low == high else f"{len(epochs)} × {low}…{high}"


def _users_text(users: Sequence[User], now: float) -> str:
    ordered = sorted(users, key=lambda u: (not u.is_running(now), -u.renewed))
    return _some(list(dict.fromkeys(_user_text(u, now) for u in ordered)))


def _user_text(user: User, now: float) -> str:
    return f"{user.name} (running)" if user.is_running(now) else user.name


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _spread(epochs: Sequence[int], most: int) -> list[int]:
    """The first, the last, and evenly some between."""
    if len(epochs) <= most:
        return list(epochs)
    return [epochs[round(i * (len(epochs) - 1) / (most - 1))] for i in range(most)]


def _identity_lines(identity: object) -> list[tuple[str, str]]:
    """An identity as lines; what this program does not know of is shown as it is."""
    if not isinstance(identity, dict):
        return []
    rest = {k: v for k, v in identity.items() if k not in ("data", "experts", "numerics", "schema")}
    rest.pop("snapshots", None)
    shape = field(identity, "data", "shape")
    data = data_text(identity)
    if isinstance(shape, list):
        size = " x ".join(str(n) for n in shape)
        data += f", {size}, {field(identity, 'data', 'classes')} classes"
    lines = [
        ("data", data),
        ("network", str(field(identity, "experts", "network"))),
        ("sharpness", sharpness_text(identity)),
        ("snapshots", precision_text(identity)),
    ]
    for section, name in (("experts", "training"), ("numerics", "numerics")):
        values = field(identity, section)
        if isinstance(values, dict):
            told = ("network", "sharpness", "rho")
            text = ", ".join(f"{k} {v}" for k, v in values.items() if k not in told)
            lines.append((name, text or "–"))
    return lines + [(str(k), str(v)) for k, v in rest.items()]
