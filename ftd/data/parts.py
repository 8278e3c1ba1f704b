"""The names that people give to the parts of a data set."""

from collections.abc import Iterable

from ftd.data.sources import TEST, TRAIN, VAL
from ftd.errors import UserError

NAMES = {
    "train": TRAIN, "training": TRAIN,
    "val": VAL, "valid": VAL, "validation": VAL, "dev": VAL,
    "test": TEST, "testing": TEST,
}  # fmt: skip


def part_of(name: str) -> int | None:
    """The part that a folder or a file is by its name, in whatever case; None for none."""
    return NAMES.get(name.lower())


def by_part(names: Iterable[str], root: object) -> dict[int, str]:
    """Part -> its name among ``names``. Raises UserError where two are the same part."""
    found: dict[int, str] = {}
    for name in sorted(names):
        part = part_of(name)
        if part is None:
            continue
        if part in found:
            raise UserError(
                f"dataset.root={root}: {found[part]}/ and {name}/ are the same part. Keep one of "
                "them, or put their images together."
            )
        found[part] = name
    return found
