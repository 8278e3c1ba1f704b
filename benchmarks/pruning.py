"""What pruning by ASHA saves against running every trial to its end, and what it costs."""

import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import spread
from benchmarks.sweep import sweep
from ftd_ray.search import read_study

SEEDS = (0,)


def run() -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="ftd-bench-"))
    try:
        return {"rows": asha(folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def asha(folder: Path) -> list[dict[str, Any]]:
    """The same search with and without pruning: outer steps done, and what came out."""
    rows = []
    for seed in SEEDS:
        row: dict[str, Any] = {"seed": seed}
        for pruner in ("asha", "none"):
            summary = sweep(
                folder / f"{seed}-{pruner}",
                "digits",
                f"seed={seed}",
                f"search.pruner={pruner}",
                "search.concurrency=1",
                "search.trials=10",
                "search.sampler=random",
                f"store.uri={folder / 'store'}",
            )
            trials, _ = read_study(str(folder / f"{seed}-{pruner}" / "run")) or ([], None)
            row[pruner] = {
                "steps": sum(max(t.reports, default=0) for t in trials),
                "trial_seconds": summary["worked"]["trials"],
                "pruned": summary["trials"]["pruned"],
                "val": summary["best"]["val_accuracy_full"]["mean"],
                "test": summary["best"]["test_accuracy"]["mean"],
            }
        print(row, flush=True)
        rows.append(row)
    return rows


def render(results: dict[str, Any]) -> list[str]:
    rows: Sequence[dict[str, Any]] = results["rows"]
    saved = [r["none"]["steps"] / r["asha"]["steps"] for r in rows]
    gain = [100 * (r["asha"]["val"] - r["none"]["val"]) for r in rows]
    lines = [
        "ASHA against no pruning: the same 10 random trials of the digits sweep, one at a time, "
        "from the same",
        f"experts. Outer steps without ÷ with: {spread(saved, 'x {:.2f}')}; difference of the "
        "winner's validation",
        f"accuracy by the full protocol {statistics.mean(gain):+.1f} points in the mean.",
        "",
        "| seed | asha | none |",
        "|---|---|---|",
    ]
    for r in rows:
        cells = (
            f"{r[p]['steps']} steps ({r[p]['trial_seconds']:.0f} s), {r[p]['pruned']} pruned, "
            f"validation "
            f"{100 * r[p]['val']:.1f} %, test {100 * r[p]['test']:.1f} %"
            for p in ("asha", "none")
        )
        lines.append(f"| {r['seed']} | {' | '.join(cells)} |")
    return lines
