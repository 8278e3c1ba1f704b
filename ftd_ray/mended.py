"""A sweep whose images are not those that it began on: mended, added to, or others altogether.

Accuracies on different images cannot be compared. So a search in which a trial was measured on the
old ones cannot go on; one in which every trial failed or was interrupted begins anew.
"""

from dataclasses import dataclass
from typing import Any

from ftd.errors import UserError
from ftd_ray.journal import STUDY_FILE, set_journal_aside
from ftd_ray.search import read_begun
from ftd_ray.storage import join, remove_file, remove_tree

CARRIED = ("mlflow_run", "mark")
"""What the new study remembers of the old one: they share MLflow's parent run."""


@dataclass(frozen=True)
class OtherImages:
    """A study in ``folder`` that began on images of another fingerprint."""

    folder: str
    before: str
    now: str
    """Fingerprints."""
    measured: int
    """Trials that are complete or pruned."""
    lost: int
    """Trials that failed or were interrupted."""
    remembered: dict[str, Any]

    def check(self) -> None:
        """Raises UserError when the search cannot begin anew."""
        if self.measured:
            raise UserError(
                f"{self.folder} has {_trials(self.measured)} measured on other images (fingerprint "
                f"{self.before[:8]}; now {self.now[:8]}), and accuracies on these cannot be "
                "compared with theirs. Restore the images, or give another output.dir; experts in "
                "the store that fit are used again."
            )

    def __str__(self) -> str:
        what = f"; {_trials(self.lost)}, failed or interrupted, will be done again"
        return f"the images, since this sweep began: the search begins anew{what * bool(self.lost)}"

    def set_aside(self) -> None:
        """Clears the folder for a new study; the journal of the old one stays beside it.

        The journal goes last, so that a process killed in between leaves this to be done again.
        """
        remove_file(join(self.folder, "summary.json"))
        remove_tree(join(self.folder, "trials"))
        set_journal_aside(self.folder, f"{STUDY_FILE}.{self.before[:8]}")


def other_images(folder: str, fingerprint: str) -> OtherImages | None:
    """The study of a folder if it began on other images than those of ``fingerprint``."""
    begun = read_begun(folder)
    before = None if begun is None else begun.remembered.get("data")
    if begun is None or before in (None, fingerprint):
        return None
    measured = sum(t.state != "failed" for t in begun.ended)
    return OtherImages(
        folder=folder,
        before=str(before),
        now=fingerprint,
        measured=measured,
        lost=len(begun.ended) - measured + begun.interrupted,
        remembered={k: v for k in CARRIED if (v := begun.remembered.get(k)) is not None},
    )


def _trials(count: int) -> str:
    return f"{count} trial{'s' if count > 1 else ''}"
