"""Sizes, ages, curves and expert sets in few characters, for tables."""

import re
from collections.abc import Sequence
from typing import Any

from ftd.errors import UserError

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
BARS = "▁▂▃▄▅▆▇█"


def size_text(count: float) -> str:
    """Bytes in decimal units: 17.5 MB."""
    value = float(count)
    for unit in UNITS:
        if value < 999.95 or unit == UNITS[-1]:
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def parse_size(text: str) -> int:
    """Bytes of 500000000, 500MB or 20GB. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGTP]?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"{text!r} is not a size. Write 500000000, 500MB or 20GB.")
    units = [u.upper() for u in UNITS]
    return round(float(match[1]) * 1000 ** units.index((match[2] or "B").upper()))


def age_text(seconds: float) -> str:
    """How long ago, in its largest unit: 45 s, 3 min, 5 h, 12 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def sparkline(values: Sequence[float]) -> str:
    """A curve from its lowest to its highest value."""
    low, high = min(values), max(values)
    if high == low:
        return BARS[0] * len(values)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1))] for v in values)


def field(identity: object, *path: str) -> Any:
    """A value of an identity, or "?" where it has none: identities grow with time."""
    value: Any = identity
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return "?" if value is None else value


def data_text(identity: object) -> str:
    """The data set and the first digits of its fingerprint."""
    return f"{field(identity, 'data', 'name')} {str(field(identity, 'data', 'fingerprint'))[:8]}"


def sharpness_text(identity: object) -> str:
    """The sharpness and its radius: sam 0.01, none."""
    kind = field(identity, "experts", "sharpness")
    return "none" if kind == "none" else f"{kind} {field(identity, 'experts', 'rho')}"


def precision_text(identity: object) -> str:
    """What snapshots are kept in; sets of before there was a choice do not say."""
    found = field(identity, "snapshots")
    return "float32" if found == "?" else str(found)
